"""Parallel mixers: several mixers read one normed input, and their outputs are added (Falcon-H1, Hymba).

    y = sum_i out_i norm_i(mixer_i(in_i x))

Sources: Zuo et al. 2025 (Falcon-H1), section 2.1 (attention beside Mamba-2, with fixed multipliers); Dong et al. 2024
(Hymba), section 2.2 (mean of the normalised outputs).

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, Self, cast

from torch import Tensor, nn

from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.kind_registry import registry_of
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.contract import AttentionMode, Aux, MixerConfig, SequenceMixer, build_mixer, register_mixer
from hybridlm.model.mixers.sizing import HeadSizes, ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead


@dataclass(kw_only=True)
class ParallelConfig(MixerConfig):
    """Configuration of several mixers on one norm.

    Args:
        branches: the mixers, by a name of the branch. How they join the residual is the option `residual` of this
            config; that of a branch has no effect.
        input_scale: factor on the input, by branch; 1 where none is given (Falcon-H1's multipliers).
        output_scale: factor on the output, by branch; null is 1 for a sum, or one over the branches for `mean`.
        norm: none, or branch: RMSNorm of each branch's output before they are added (Hymba).
        combine: sum of the outputs, or their mean.

    Raises:
        ConfigError: fewer than two branches, or a factor for a branch that is not there.
    """

    kind: str = "parallel"
    branches: dict[str, MixerConfig]
    input_scale: dict[str, float] = field(default_factory=dict)
    output_scale: dict[str, float] = field(default_factory=dict)
    norm: Literal["none", "branch"] = "none"
    combine: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        require(len(self.branches) > 1, "branches", "must be two mixers or more", got=sorted(self.branches))
        for key in ("input_scale", "output_scale"):
            for name in getattr(self, key):
                require(name in self.branches, f"{key}.{name}", "is no branch", got=name,
                        expected=f"one of {sorted(self.branches)}", hint=did_you_mean(name, self.branches))
        self.is_linear = all(branch.is_linear for branch in self.branches.values())  # type: ignore[misc]

    def _sum(self, ask: Callable[[MixerConfig], float]) -> float:
        return sum(ask(branch) for branch in self.branches.values())

    # Costs

    def num_params(self, context: LayerContext) -> int:
        norms = len(self.branches) * context.hidden_size if self.norm == "branch" else 0
        return norms + sum(branch.num_params(context) for branch in self.branches.values())

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """FLOPs of the branches; parts of equal names are added."""
        parts: Counter[str] = Counter()
        for branch in self.branches.values():
            parts.update(branch.flops_per_token(context, context_length))  # type: ignore[arg-type]
        return dict(parts)

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return sum(branch.state_bytes(context, context_length, element_bytes) for branch in self.branches.values())

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        return self._sum(lambda branch: branch.forward_only_flops_per_token(context, context_length))

    def lookup_params(self, context: LayerContext) -> int:
        return sum(branch.lookup_params(context) for branch in self.branches.values())

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        return self._sum(lambda branch: branch.loss_flops_per_token(context, context_length))

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes of the branches, and of their scaled inputs and normalised outputs."""
        scaled = len(self.input_scale) + len(self.output_scale) + (self.norm == "branch") * 2 * len(self.branches)
        own = element_bytes * context.hidden_size * scaled
        return own + self._sum(lambda branch: branch.activation_bytes(context, element_bytes))

    def own_losses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for branch in self.branches.values() for name in branch.own_losses()))

    # Values that layers share

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return [kind for branch in self.branches.values() for kind in branch.leaves(context)]

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        return [read for branch in self.branches.values() for read in branch.reads(context)]

    def check_sources(self, context: LayerContext) -> None:
        for name, branch in self.branches.items():
            try:
                branch.check_sources(context)
            except ConfigError as error:
                raise error.within(f"branches.{name}") from None

    @classmethod
    def idle_options(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        registry, branches = registry_of(MixerConfig), options.get("branches")
        idle: dict[str, str] = {}
        for name, branch in branches.items() if isinstance(branches, Mapping) else ():
            if registry is not None and isinstance(branch, Mapping) and branch.get("kind") in registry:
                of_branch = registry.config_class(branch["kind"]).idle_options(branch)  # type: ignore[attr-defined]
                idle |= {f"branches.{name}.{path}": cause for path, cause in of_branch.items()}
        return idle

    def shared_width(self, kind: SharedKind, context: LayerContext) -> int:
        return self._last_source(kind, context).shared_width(kind, context)

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        return self._last_source(kind, context).shared_layout(kind, context)

    def _last_source(self, kind: SharedKind, context: LayerContext) -> MixerConfig:
        """The last branch that leaves the kind of value, whose value replaces those of the others."""
        return next(branch for branch in reversed(self.branches.values()) if kind in branch.leaves(context))

    # Rows that are divided between processes

    def check_context_parallel(self, shards: int, length: int) -> None:
        for name, branch in self.branches.items():
            try:
                branch.check_context_parallel(shards, length)
            except ConfigError as error:
                raise error.within(f"branches.{name}") from None

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [traffic for branch in self.branches.values()
                for traffic in branch.shard_traffic(context, rows, length, shards, element_bytes)]

    # Comparison and sizes

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data["branches"] = {name: {key: value for key, value in branch.canonical(norm).items() if key != "residual"}
                            for name, branch in self.branches.items()}
        for key in ("input_scale", "output_scale"):
            data[key] = {name: scale for name, scale in getattr(self, key).items() if scale != 1.0}
        return data

    def head_sizes(self) -> HeadSizes | None:
        """Heads of the first branch that has some."""
        return next((sizes for branch in self.branches.values() if (sizes := branch.head_sizes()) is not None), None)

    @classmethod
    def missing_sizes(cls, options: Mapping[str, Any]) -> list[str]:
        """The branches that leave sizes open."""
        return [f"branches.{name}" for name, branch in _known_branches(options).items()
                if _class_of(branch).missing_sizes(branch)]

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        filled = {name: _class_of(branch).fill_sizes(branch, model)
                  for name, branch in _known_branches(options).items()}
        return {**options, "branches": {**options.get("branches", {}), **filled}} if filled else dict(options)

    # Changes to a trained model

    def at_width(self, factor: Fraction) -> Self:
        return replace(self, branches={name: branch.at_width(factor) for name, branch in self.branches.items()})

    def transfer_gaps(self) -> list[str]:
        return list(dict.fromkeys(gap for branch in self.branches.values() for gap in branch.transfer_gaps()))

    def rotates(self) -> bool:
        return any(branch.rotates() for branch in self.branches.values())

    def has_indexer(self) -> bool:
        return any(branch.has_indexer() for branch in self.branches.values())

    def has_selector(self) -> bool:
        return any(branch.has_selector() for branch in self.branches.values())

    def with_topk(self, topk: int) -> Self:
        return replace(self, branches={name: branch.with_topk(topk) for name, branch in self.branches.items()})

    def with_attention_mode(self, mode: AttentionMode) -> Self:
        return replace(self, branches={name: branch.with_attention_mode(mode)
                                       for name, branch in self.branches.items()})

    def topk_multiple(self) -> int:
        return math.lcm(*(branch.topk_multiple() for branch in self.branches.values()))

    def selector_parameters(self) -> tuple[str, ...]:
        return tuple(f"branches.{name}.{pattern}" for name, branch in self.branches.items()
                     for pattern in branch.selector_parameters())


def _known_branches(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the branches whose kind is registered; what is wrong with the others is said when they are read."""
    branches = options.get("branches")
    registry: Mapping[str, Any] = registry_of(MixerConfig) or {}
    if not isinstance(branches, Mapping):
        return {}
    return {name: branch for name, branch in branches.items()
            if isinstance(branch, Mapping) and branch.get("kind") in registry}


def _class_of(options: Mapping[str, Any]) -> Any:
    registry = registry_of(MixerConfig)
    assert registry is not None
    return registry.config_class(options["kind"])


class ParallelState:
    """The decode states of all branches, by name."""

    def __init__(self, states: dict[str, Any]):
        self.states = states

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return sum(state.num_bytes for state in self.states.values())


@register_mixer("parallel", ParallelConfig)
class Parallel(SequenceMixer):
    """The module: `branches` holds the mixers, `norms` the norms of their outputs, by name."""

    config: ParallelConfig

    def __init__(self, config: ParallelConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.branches = nn.ModuleDict({name: build_mixer(branch, context) for name, branch in config.branches.items()})
        self.norms = None
        if config.norm == "branch":
            self.norms = nn.ModuleDict({name: RMSNorm.of(context.norm, context.hidden_size) for name in self.branches})
        listed = [name for branch in self.mixers().values() for name in branch.fp32_parameters]
        norms = [f"norms.{name}.weight" for name in self.norms or ()]
        # Of this module alone: branches differ from layer to layer.
        self.fp32_parameters = tuple(dict.fromkeys([*listed, *norms]))  # type: ignore[misc]

    def mixers(self) -> dict[str, SequenceMixer]:
        """The mixers by the name of their branch."""
        return cast(dict[str, SequenceMixer], dict(self.branches.items()))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the losses of all branches."""
        return {name: weight for branch in self.mixers().values()
                for name, weight in getattr(branch, "loss_weights", {}).items()}

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: ParallelState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        share = 1.0 / len(self.branches) if config.combine == "mean" else 1.0
        total: Tensor | None = None
        merged: Aux = {}
        for name, mixer in self.mixers().items():
            scale = config.input_scale.get(name, 1.0)
            y_BTD, aux = mixer(x_BTD if scale == 1.0 else x_BTD * scale, seq,
                               None if state is None else state.states[name])
            if self.norms is not None:
                y_BTD = self.norms[name](y_BTD)
            scale = config.output_scale.get(name, 1.0) * share
            y_BTD = y_BTD if scale == 1.0 else y_BTD * scale
            total = y_BTD if total is None else total + y_BTD
            for key, value in aux.items():
                merged[key] = merged[key] + value if key in merged else value
        assert total is not None
        return total, merged

    @property
    def decodes_padded_rows(self) -> bool:
        return all(branch.decodes_padded_rows for branch in self.mixers().values())

    def new_state(self, batch: int, max_length: int) -> ParallelState:
        return ParallelState({name: branch.new_state(batch, max_length) for name, branch in self.mixers().items()})

    def parameter_roles(self) -> dict[str, ParameterRole]:
        roles = {f"norms.{name}.weight": VECTOR for name in self.norms or ()}
        for name, branch in self.mixers().items():
            roles |= {f"branches.{name}.{key}": role for key, role in branch.parameter_roles().items()}
        return roles

    def init_weights(self, std: float) -> None:
        for branch in self.mixers().values():
            branch.init_weights(std)
        for norm in [] if self.norms is None else self.norms.values():
            cast(RMSNorm, norm).reset_parameters()
