"""Linear maps of a layer that runs several times, with weights that each run has for itself.

    y = W x + B_k A_k x        low rank (LoRA): W is shared, run k has A_k [R, I] and B_k [O, R], which is 0 at first
    y = W_k x                  separate

Sources: Glorioso et al. 2024 (Zamba2, section 2: low-rank adapters of shared blocks); Bae et al. 2024 (relaxed
recursive transformers: of repeated layers); Hu et al. 2022 (LoRA).
I inputs, O outputs, R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.schedule import RunAdaptersConfig


class PerRunLinear(nn.Linear):
    """A linear map that takes over the weight of another one and differs between the runs of its layer.

    Attributes:
        run: number of the current run of the layer, which `Block.forward` sets.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.run = 0

    def _new_linears(self, count: int, inputs: int, outputs: int, bias: bool = False) -> nn.ModuleList:
        where = {"device": self.weight.device, "dtype": self.weight.dtype}
        return nn.ModuleList(nn.Linear(inputs, outputs, bias=bias, **where) for _ in range(count))

    @abstractmethod
    def init_runs(self, std: float, drawn: Sequence[dict[str, Tensor]]) -> None:
        """Initialise what single runs have for themselves.

        Args:
            std: standard deviation of plain projections.
            drawn: for each of `later_runs`, what the layer has drawn for this map by its own rules.
        """

    @property
    def later_runs(self) -> int:
        """Number of runs, behind the first one, for which the layer draws first weights."""
        return 0

    def drawn_weights(self) -> dict[str, Tensor]:
        """A copy of the weight, and of the bias if there is one, of the first run."""
        return {name: value.clone() for name, value in self.named_parameters(recurse=False)}

    def run_roles(self, role: ParameterRole) -> dict[str, ParameterRole]:
        """Roles of weights of single runs that have the role of the first run's weight, by name."""
        return {}

    @abstractmethod
    def run_flops(self) -> float:
        """FLOPs per token of all runs beyond those of the map that is taken over."""

    def run_params(self) -> int:
        """Number of parameters that single runs have for themselves."""
        own = [] if self.bias is None else [self.bias]
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in [self.weight, *own])


class LowRankPerRun(PerRunLinear):
    """Adds a product of two matrices of its own in each run. Parameters: `down.K.weight` and `up.K.weight` of run K.

    Args:
        linear: the map whose weight all runs share.
        runs: number of runs.
        rank: rows of the first matrix.

    Example:
        >>> shared = LowRankPerRun(nn.Linear(3, 2, bias=False), runs=2, rank=1)
        >>> shared.init_runs(0.02, [])
        >>> sorted(name for name, _ in shared.named_parameters())
        ['down.0.weight', 'down.1.weight', 'up.0.weight', 'up.1.weight', 'weight']
    """

    def __init__(self, linear: nn.Linear, runs: int, rank: int):
        super().__init__(linear)
        self.down = self._new_linears(runs, linear.in_features, rank)
        self.up = self._new_linears(runs, rank, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up[self.run](self.down[self.run](x))

    def init_runs(self, std: float, drawn: Sequence[dict[str, Tensor]]) -> None:
        for down, up in zip(self.down, self.up, strict=True):
            nn.init.normal_(down.weight, std=std)  # type: ignore[arg-type]
            nn.init.zeros_(up.weight)  # type: ignore[arg-type]

    def run_flops(self) -> float:
        return 2.0 * self.run_params()


class SeparatePerRun(PerRunLinear):
    """Has a matrix for each run. Parameters: `weight` of the first one, `later.K.weight` of run K + 1.

    Args:
        linear: the map of the first run.
        runs: number of runs.
    """

    def __init__(self, linear: nn.Linear, runs: int):
        super().__init__(linear)
        self.later = self._new_linears(runs - 1, linear.in_features, linear.out_features, linear.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        return self.later[self.run - 1](x) if self.run else F.linear(x, self.weight, self.bias)

    @property
    def later_runs(self) -> int:
        return len(self.later)

    def init_runs(self, std: float, drawn: Sequence[dict[str, Tensor]]) -> None:
        for linear, values in zip(self.later, drawn, strict=False):
            for name, value in linear.named_parameters():
                value.copy_(values[name])

    def run_roles(self, role: ParameterRole) -> dict[str, ParameterRole]:
        return {f"later.{index}.weight": role for index in range(len(self.later))}

    def run_flops(self) -> float:
        return 0.0


def add_run_adapters(layer: nn.Module, config: RunAdaptersConfig, runs: int) -> list[str]:
    """Give the linear maps of a layer that the config names weights for each run.

    Args:
        layer: the layer, changed in place.
        config: names of linear maps, and the rank.
        runs: how often the layer runs, at least twice.

    Returns:
        The patterns of the config that named a linear map of the layer.

    Raises:
        ConfigError: a map that both lists name, or a layer of another kind, such as one with a quantised weight.
    """
    used: list[str] = []
    for name, linear in list(_linear_maps(layer)):
        low_rank, separate = ([pattern for pattern in patterns if fnmatchcase(name, pattern)]
                              for patterns in (config.low_rank, config.separate))
        used += low_rank + separate
        if low_rank and separate:
            raise ConfigError("schedule.run_adapters.separate", "names a linear map that low_rank names too", got=name,
                              expected="each map in one of the lists")
        if low_rank:
            layer.set_submodule(name, LowRankPerRun(linear, runs, config.rank))
        elif separate:
            layer.set_submodule(name, SeparatePerRun(linear, runs))
    return used


def check_run_adapters(layers: list[nn.Module], config: RunAdaptersConfig, used: set[str]) -> None:
    """Raise ConfigError for a pattern that names no linear map of a layer that runs several times.

    Args:
        layers: the layers that run several times.
        config: with the patterns.
        used: patterns that named a map.
    """
    for key in ("low_rank", "separate"):
        for pattern in getattr(config, key):
            if pattern not in used:
                known = dict.fromkeys(name for layer in layers for name, _ in _linear_maps(layer))
                raise ConfigError(f"schedule.run_adapters.{key}",
                                  "names no linear map of a layer that runs several times", got=pattern,
                                  expected=f"one of {sorted(known)}")


def _linear_maps(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps of a layer by name, without those that adapters consist of."""
    for name, module in layer.named_modules():
        if type(module) is nn.Linear or isinstance(module, PerRunLinear):
            parent = layer.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
            if not isinstance(parent, PerRunLinear):
                yield name, module
