"""The engine of ZeRO, which shards optimizer state, gradients and weights over ranks: DeepSpeed through Accelerate.

DeepSpeed sees fp32 parameters and no precision of its own: its bf16 mode would cast every parameter. bf16 is autocast
here as in the other engines. Accumulation, learning rate and what a step does with a NaN are decided here too.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.distributed.engine import Engine, Update, assign_owners, check_fp32
from hybridlm.distributed.expert_parallel import ExpertParallel, expert_parameters
from hybridlm.distributed.launch import free_port
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.distributed.shell_variables import settings_hidden
from hybridlm.distributed.zero import experts as zero_experts
from hybridlm.distributed.zero.config import ZeroConfig
from hybridlm.distributed.zero.optimizer import FlatOptimizer
from hybridlm.distributed.zero.partition import Fragment, gather_weight, local_elements, locate_fragment
from hybridlm.errors import ConfigError
from hybridlm.model.output import ModelOutput
from hybridlm.optimizers.optimizer_set import RULE, OptimizerSet, check_state_shape
from hybridlm.tensor_storage import StoredTensor

TORCH_LINEAR = F.linear
DEEPSPEED_MODULE_ATTRIBUTES = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_external_params",
                               "_original_parameters")  # left on modules when its engine has ended


class LossFirst(nn.Module):
    """Calls DeepSpeed's engine, which must be given the loss first to hook on it, and returns the whole output."""

    def __init__(self, deepspeed_engine: nn.Module):
        super().__init__()
        self.deepspeed_engine = deepspeed_engine

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        loss, opaque = self.deepspeed_engine(*args, **kwargs)
        opaque.output.loss = loss
        return opaque.output


class OpaqueOutput:
    """Hides the model's output from DeepSpeed, which would walk through its tensors."""

    def __init__(self, output: ModelOutput):
        self.output = output


class ZeroEngine(Engine):
    """Runs ZeRO of stage 1, 2 or 3. fp32 parameters stay fp32; with bf16 the forward runs under autocast.

    `deepspeed_engine` is DeepSpeed's engine around `model`, which `wrapped` calls; None until `prepare`.
    """

    config: ZeroConfig
    needs_process_group = True
    shards_weights: ClassVar[bool] = False

    def __init__(self, config: ZeroConfig, precision: str = "auto"):
        _check_device(config)
        if not RankEnvironment.from_launcher().launched:  # DeepSpeed wants a process group for a single process too
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        _import_quietly()
        super().__init__(config, precision)
        from accelerate import DistributedType

        kind = self.accelerator.distributed_type
        if kind != DistributedType.DEEPSPEED:  # Accelerate can turn its plugin off without a word
            raise RuntimeError(f"Accelerate runs without DeepSpeed: {kind.value}")
        self.deepspeed_engine: Any = None
        self.fragments: dict[str, Fragment] = {}  # of the trained parameters, by name
        self.rules: dict[str, str] = {}  # the optimizer kind that updates each of them

    def _accelerator_options(self, config: Any) -> dict[str, Any]:
        from accelerate import DeepSpeedPlugin

        self.settings = config.deepspeed_settings()
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=self.settings)}

    def _make_expert_groups(self, size: int) -> ExpertParallel:
        return zero_experts.make_groups(size)

    def prepare(self, model: nn.Module, optimizers: OptimizerSet | None, fp32_names: Sequence[str] = (),
                state: Mapping[str, StoredTensor] | None = None, *, strict: bool = True) -> None:
        assert optimizers is not None  # sharded weights are of use to DeepSpeed's engine alone
        self._attach(model)
        self.shard_weights(model)
        self.optimizers, state = optimizers, state or {}
        matching = optimizers.matching_state(state, strict=strict)
        # DeepSpeed lays a group out flat, with one count of steps: parameters that began later make another group.
        experts = expert_parameters(model) if self.experts is not None else {}
        steps = {name: float(state[f"step/{name}"].read()) for name, keys in matching.items() if "step" in keys}
        optimizers.subdivide_groups(lambda name: (steps.get(name, 0.0), name in experts))
        if len(optimizers.members) > 1 or optimizers.needs_complete_matrices:
            optimizers.merge(lambda members: FlatOptimizer(members, optimizers.rules))
        optimizer, = optimizers.members
        if self.experts is not None:
            zero_experts.mark(model, optimizer, self.config.expert_parallel, weights_sharded=self.shards_weights)
        groups = [[(optimizers.names[id(p)], p) for p in group["params"]] for group in optimizer.param_groups]
        self.rules = {name: group[RULE] for group, members in zip(optimizer.param_groups, groups, strict=True)
                      for name, _ in members}
        if self.config.communication_dtype == "bf16":
            _mark_bf16_communication(model)
        model.forward = self._loss_first_forward(model.forward)  # type: ignore[method-assign]
        with self._settings_hidden():
            self.deepspeed_engine, _ = self.accelerator.prepare(model, optimizer)
        self.wrapped = LossFirst(self.deepspeed_engine)
        check_fp32(model, [name for name, p in model.named_parameters() if p.is_floating_point()])
        check_fp32(model, fp32_names)
        self.fragments = {name: locate_fragment(self.deepspeed_engine.optimizer, p, index)
                          for index, group in enumerate(groups) for name, p in group}
        if isinstance(optimizer, FlatOptimizer):
            optimizer.fragments = self.fragments
        for name, keys in matching.items():
            self._load_state(name, {key: state[f"{key}/{name}"] for key in keys})

    @property
    def _flat_optimizer(self) -> Any:
        """The torch optimizer that DeepSpeed steps, over flat partitions."""
        return self.deepspeed_engine.optimizer.optimizer

    def _load_state(self, name: str, saved: dict[str, StoredTensor]) -> None:
        fragment, optimizer = self.fragments[name], self._flat_optimizer
        matrix_shapes: dict[str, Any] = {}
        if isinstance(optimizer, FlatOptimizer):
            matrix_shapes = optimizer.matrix_state_shapes(name, self.rules[name])
            if matrix_shapes:
                optimizer.load_matrix_state(name, saved, self.rules[name])
        state = optimizer.state[fragment.flat]
        for key, value in saved.items():  # in this order on all ranks: `owned_optimizer_state` gathers in it
            if key in matrix_shapes:
                continue
            if value.dim() == 0:  # the count of steps
                state[key] = value.read().to(fragment.flat.device, torch.float32)
            else:
                check_state_shape(name, value.shape, fragment.shape)
                flat = state.setdefault(key, torch.zeros_like(fragment.flat))
                fragment.local_elements(flat).copy_(value.elements(fragment.start, fragment.numel))

    def owned_optimizer_state(self, *, copied: bool = False) -> dict[str, Tensor]:
        owned: dict[str, Tensor] = {}
        sizes = {name: fragment.shape.numel() for name, fragment in self.fragments.items()}
        owner = assign_owners(sizes, self.world_size)
        optimizer = self._flat_optimizer
        for name, fragment in self.fragments.items():
            complete = {key: value.clone() if value.dim() == 0 else fragment.gather(value, self.device)
                        for key, value in optimizer.state[fragment.flat].items()}
            if isinstance(optimizer, FlatOptimizer):
                complete |= optimizer.gather_matrix_state(name, self.rules[name], self.device)
            for key, value in complete.items():
                value = super()._gather_tensor(name, value)
                if owner[name] == self.rank:
                    owned[f"{key}/{name}"] = value.cpu()
        return owned

    def _gather_tensor(self, name: str, tensor: Tensor) -> Tensor:
        return super()._gather_tensor(name, gather_weight(tensor) if hasattr(tensor, "ds_id") else tensor)

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().local_weights():
            yield name, local_elements(tensor)

    def _loss_first_forward(self, forward: Callable[..., ModelOutput]
                            ) -> Callable[..., tuple[Tensor | None, OpaqueOutput]]:
        """Return the model's forward under autocast, in the form that `LossFirst` undoes."""
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor | None, OpaqueOutput]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = forward(*args, **kwargs)
            return output.loss, OpaqueOutput(output)

        return run

    def release(self) -> None:
        if self.deepspeed_engine is not None:
            self.deepspeed_engine.destroy()
            self.deepspeed_engine, self.fragments = None, {}
            for module in self.model.modules():
                _restore_module(module)
                if module._parameters:
                    self.shard_weights(module)
            gc.collect()  # parameters of ZeRO-3 hold on to themselves
            F.linear = TORCH_LINEAR  # ZeRO-3 puts one in its place that does not keep gathered weights
            zero_experts.unmark(self.model)
        super().release()

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        self.deepspeed_engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # A loss that is not finite spoils the gradients, whatever they are: one check of their norm covers both.
        self.deepspeed_engine.backward(loss * (1 + 0 * loss.detach()))

    def update(self, values: dict[str, Tensor], *, lr: float, clip: float, balance: bool = True) -> Update:
        assert self.optimizers is not None
        engine = self.deepspeed_engine
        self.optimizers.set_lr(lr)
        engine.optimizer.clip_grad = clip
        engine.step()  # clips; a norm that is not finite only forgets the gradients, on all ranks alike
        applied = engine.was_step_applied()
        norm = float(engine.get_global_grad_norm())
        numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        assert applied == math.isfinite(norm)
        return self._end_step(Update(numbers, norm, applied), balance)


def _check_device(config: ZeroConfig) -> None:
    if config.device == "cpu" and torch.cuda.is_available():
        raise ConfigError("engine.device", "ZeRO takes the GPUs it sees", got="cpu",
                          hint="hide them with CUDA_VISIBLE_DEVICES=")


def _import_quietly() -> None:
    """Import DeepSpeed, which prints what it found, and on a CPU would compile an all-reduce of its own for half a
    minute: it is told the device, and gloo does the work."""
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    with settings_hidden(process_group=True):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r".*torch.distributed\.\w+. is deprecated", FutureWarning)


def _mark_bf16_communication(model: nn.Module) -> None:
    """Mark the weights that autocast rounds to bf16 in any case: they and their gradients travel in bf16. DeepSpeed
    sorts its buckets by the mark."""
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    for parameter in model.autocast_parameters().values():  # type: ignore[operator]
        setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)


def _restore_module(module: nn.Module) -> None:
    """Undo what DeepSpeed has done to the parameters that `module` has itself, and to the module."""
    for name, parameter in module.named_parameters(recurse=False):
        if hasattr(parameter, "ds_id"):
            module._parameters[name] = nn.Parameter(gather_weight(parameter), parameter.requires_grad)
    module._parameters = dict(module._parameters)
    for name in [name for name in module.__dict__ if name.startswith("ds_") or name in DEEPSPEED_MODULE_ATTRIBUTES]:
        del module.__dict__[name]
