"""The decode step of a whole model: prepared once, checked before every token, used by `HybridLM.forward`.

Preparing chooses, for each branch of each layer, the function of `prepare_step`, or the module itself where its kind
has none. A plan holds as long as the model is made of the modules it was prepared for, without hooks that it would
pass by; parameters may change and be replaced at any time, because steps read them when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from hybridlm.model.block import Block
from hybridlm.model.decode_state import LayerState
from hybridlm.model.decode_step import DecodeStep, has_hooks, norm_step
from hybridlm.model.residual.contract import ResidualBranch, Stream
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import decoding
from hybridlm_kernels.registry import revision

LayerStep = Callable[[Stream, SequenceInfo, LayerState], Stream]
BranchStep = Callable[[Stream, SequenceInfo, Any], Stream]


class DecodePlan:
    """The prepared steps of a model's layers.

    Args:
        model: the model; it is not kept.
        layers: its layers.
        runs: the layer and the number of each run, in their order.
        norm: its final norm.

    Attributes:
        norm: the final norm's step.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, runs: Sequence[tuple[int, int]], norm: nn.Module):
        self._watch(model)
        self._steps = [_prepare_layer(layers[index], number) for index, number in runs]
        self.norm = norm_step(norm)

    def holds(self) -> bool:
        """Whether the model is still what the plan was prepared for."""
        return (self._revision == revision()
                and list(chain.from_iterable(map(dict.values, self._children))) == self._modules
                and list(map(type, self._modules)) == self._types and sum(map(len, self._hooks)) == self._hook_count)

    def run(self, stream: Stream, seq: SequenceInfo, states: Sequence[LayerState]) -> Stream:
        """The stream after the last layer, for one token per row."""
        for step, state in zip(self._steps, states, strict=True):
            stream = step(stream, seq, state)
        return stream

    def _watch(self, model: nn.Module) -> None:
        """Note all modules, their hooks and the backends' settings."""
        self._children = [owner._modules for owner in model.modules() if owner._modules]
        self._modules = list(chain.from_iterable(map(dict.values, self._children)))
        self._types = list(map(type, self._modules))
        present = [module for module in self._modules if module is not None]
        self._hooks: list[dict[Any, Any]] = list(chain.from_iterable(
            (module._forward_hooks, module._forward_pre_hooks) for module in present))
        self._hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        self._hook_count = sum(map(len, self._hooks))
        self._revision = revision()


_plans: WeakKeyDictionary[nn.Module, DecodePlan] = WeakKeyDictionary()


def find_plan(model: nn.Module, layers: nn.ModuleList, runs: Sequence[tuple[int, int]], norm: nn.Module,
              device: torch.device) -> DecodePlan | None:
    """The plan for one token per row of this model, or None where its forward has to run.

    Args:
        model: the model, in any mode.
        layers: its layers.
        runs: the layer and the number of each run, in their order.
        norm: its final norm.
        device: where it is.
    """
    if (model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type)
            or torch.compiler.is_compiling() or module_hooks._global_forward_hooks
            or module_hooks._global_forward_pre_hooks):
        return None
    plan = _plans.get(model)
    if plan is None or not plan.holds():
        if not decoding.is_preferred(device.type):
            return None
        plan = _plans[model] = DecodePlan(model, layers, runs, norm)
    return plan


def _prepare_layer(layer: nn.Module, number: int) -> LayerStep:
    """The step of one run of a layer; hooks of a branch, or of the layer, make it call the module that has them."""
    if (not isinstance(layer, Block) or type(layer) is not Block or has_hooks(layer) or "forward" in vars(layer)
            or not layer.runs_as_branches):
        return lambda stream, seq, state: layer(stream, seq, state, number)[0]
    steps = [(_joined_step(getattr(layer, name), getattr(layer, f"{name}_norm"), getattr(layer, f"{name}_residual")),
              name) for name in layer.branches]

    def step(stream: Stream, seq: SequenceInfo, state: LayerState) -> Stream:
        for branch, name in steps:
            stream = branch(stream, seq, getattr(state, name))
        return stream

    return step


def _joined_step(branch: nn.Module, norm: nn.Module, residual: ResidualBranch) -> BranchStep:
    """The step of one branch of a layer, joined to the stream."""
    read, write, norm_of, run = residual.read, residual.write, norm_step(norm), _prepare_branch(branch)

    def step(stream: Stream, seq: SequenceInfo, state: Any) -> Stream:
        x_B1D, kept = read(stream, norm_of)  # type: ignore[arg-type]
        return write(kept, run(x_B1D, seq, state), norm_of)  # type: ignore[arg-type]

    return step


def _prepare_branch(branch: Any) -> DecodeStep:
    prepared = None
    if not has_hooks(branch) and "forward" not in vars(branch):
        prepared = branch.prepare_step()
    return prepared or _call(branch)


def _call(branch: nn.Module) -> DecodeStep:
    def step(x_B1D: Tensor, seq: SequenceInfo, state: Any) -> Tensor:
        return branch(x_B1D, seq, state)[0]

    return step
