"""The contract of an optimizer: its config, how its torch optimizer is built, and the registry of kinds.

A kind is one file: a config class, which also states the shapes of the optimizer's state, and a function that builds
the torch optimizer. Engines, checkpoints and memory estimates call only these.

    @dataclass(kw_only=True)
    class LionConfig(OptimizerConfig): ...

    @register_optimizer("lion", LionConfig)
    def build_lion(config, groups, lr): return Lion(groups, lr=lr, betas=config.betas)

Most optimizers work element by element and are any `torch.optim.Optimizer`. One that needs whole matrices derives from
`MatrixOptimizer`, or is wrapped by `PerMatrixOptimizer` (per_matrix.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.kind_registry import KindRegistry
from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.parametrization import ParameterScale
from hybridlm.optimizers.lr_schedule import LRScheduleConfig

FP32_BYTES = 4  # bytes per element
Shape = tuple[int, ...]


@dataclass(kw_only=True)
class OptimizerConfig(ABC):
    """Base of every optimizer's config.

    `lr` is the peak learning rate, which `schedule` multiplies step by step; `weight_decay` is decoupled (AdamW's) and
    applies to matrices, not to embeddings, norms, biases and other vectors.
    """

    kind: str
    lr: float = 1e-3
    weight_decay: float = 0.1
    schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    whole_matrices: ClassVar[bool] = False  # an update reads all elements of a matrix: see MatrixOptimizer

    def __post_init__(self) -> None:
        require_positive(self, "lr")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "must be finite and not negative",
                got=self.weight_decay)

    @abstractmethod
    def state_shapes(self, shape: Sequence[int]) -> dict[str, Shape]:
        """Shapes of the optimizer's state of one parameter.

        Args:
            shape: of the parameter: [A, B], or [E, A, B] for a stack of E matrices, or that of a vector.

        Returns:
            Shapes by the key of the torch optimizer's state, which is also its name in checkpoints; () for a count.
        """

    def updates_role(self, role: ParameterRole, kept_fp32: bool) -> bool:
        """Whether this kind updates parameters of this role; `fallback` updates the others.

        Args:
            role: the role of the parameter.
            kept_fp32: whether the model wants the parameter in fp32 under every engine (routers, norms).
        """
        return True

    def lr_factor(self, scale: ParameterScale) -> float:
        """Factor of the learning rate of a matrix that has grown from a base model; that of the decay is its inverse.

        By default that of updates whose elements have a fixed size (AdamW, Lion): outputs then move as much as in the
        base model, because each sums over as many more inputs.

        Args:
            scale: how much the matrix has grown.
        """
        return 1.0 / scale.fan_in

    def scaled_options(self, scale: ParameterScale) -> dict[str, float]:
        """Further options of the parameter group of a matrix that has grown; by default none."""
        return {}

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of the parameters that this kind updates, when the peak of the run is `lr`."""
        return self.lr

    @property
    def fallback(self) -> OptimizerConfig | None:
        """The optimizer of the parameters that this kind does not update; None for a kind that updates all."""
        return None

    def rule_for(self, role: ParameterRole, kept_fp32: bool) -> OptimizerConfig:
        """Find the config of the optimizer that updates a parameter: this one, or its `fallback`.

        Args:
            role: the role of the parameter.
            kept_fp32: whether the model wants the parameter in fp32 under every engine.

        Raises:
            TypeError: neither updates such a parameter.
        """
        if self.updates_role(role, kept_fp32):
            return self
        if self.fallback is None:
            raise TypeError(f"optimizer kind '{self.kind}' updates no parameter of role '{role.kind}' and has no "
                            "fallback")
        return self.fallback.rule_for(role, kept_fp32)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of optimizer state of one parameter of `shape`, in fp32; counts of steps are not counted."""
        return FP32_BYTES * sum(math.prod(one) for one in self.state_shapes(shape).values() if one)

    @property
    def bytes_per_element(self) -> int | None:
        """Bytes of state per element of any parameter; None where they depend on its role or shape."""
        shapes = [one for one in self.state_shapes((2, 3)).values() if one]
        same = self.fallback is None and all(one == (2, 3) for one in shapes)
        return FP32_BYTES * len(shapes) if same else None


def require_positive(config: OptimizerConfig, *keys: str) -> None:
    """Raise ConfigError unless each of the options is positive and finite, or null."""
    for key in keys:
        value = getattr(config, key)
        require(value is None or 0 < value < math.inf, key, "must be positive and finite", got=value)


def require_decay_rates(key: str, *rates: float) -> None:
    """Raise ConfigError unless each rate is at least 0 and below 1."""
    for rate in rates:
        require(0 <= rate < 1, key, "must be a decay rate", got=rate, expected="at least 0 and below 1")


class MatrixOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose update of a matrix (or of each matrix of a stack) depends on all of its elements.

    A step has three phases, so that under ZeRO, which cuts matrices anywhere, each matrix step is computed by one rank:
        combine      element by element: gradient and `flat_state` -> input of the matrix step
        matrix_step  on all elements of a matrix, by one rank
        apply        element by element: weight and result of the matrix step -> weight
    """

    flat_state: ClassVar[tuple[str, ...]] = ()  # keys of state with the weight's shape, sharded as the weight is
    needs_weight: ClassVar[bool] = False  # whether `matrix_step` reads the weight

    def combine(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Compute the input of the matrix step, in memory of its own. `grad` may be any elements of a gradient."""
        return grad.clone()

    @abstractmethod
    def matrix_step(self, matrix: Tensor, weight: Tensor | None, state: dict[str, Tensor],
                    group: dict[str, Any]) -> Tensor:
        """Compute the step of a matrix [A, B], or of each matrix of a stack [E, A, B].

        Args:
            matrix: the result of `combine`.
            weight: the weight before the step, where `needs_weight`; it must not be changed.
            state: all state but `flat_state`; empty before the first step.
            group: the options of the parameter group: lr and so on.

        Returns:
            The argument `result` of `apply`, of the shape of `matrix`.
        """

    def apply(self, weight: Tensor, result: Tensor, group: dict[str, Any]) -> None:
        """Decay the weight and subtract `lr` times `result`, in place. The tensors may be any elements of a weight."""
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(result, alpha=-group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    matrix = self.combine(weight.grad, state, group)
                    result = self.matrix_step(matrix, weight if self.needs_weight else None, state, group)
                    self.apply(weight, result, group)


Groups = list[dict[str, Any]]  # of a torch optimizer: "params" and options
Builder = Callable[[Any, Groups, float], torch.optim.Optimizer]
OPTIMIZERS = KindRegistry("optimizer", OptimizerConfig, default="adamw")


def register_optimizer(kind: str, config: type[OptimizerConfig]) -> Callable[[Builder], Builder]:
    """Decorate the function that builds an optimizer, from (config, parameter groups, peak learning rate).

    Args:
        kind: value of `optimizer.kind` that chooses it.
        config: its config class.

    Raises:
        KindError: the name is taken, or the config class lacks a method of the contract.
    """

    def add(build: Builder) -> Builder:
        OPTIMIZERS.register(kind, config, build)
        return build

    return add
