"""Typed configuration of a model: plain dataclasses, checked when they are made, no torch needed.

The config of one mixer lives beside that mixer in `hybridlm/model/mixers/`, with its cost methods;
this file holds what every model has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hybridlm.errors import ConfigError, nearest


def require(condition: bool, key: str, what: str, *, got: object = None, expected: str = "", hint: str = "") -> None:
    """Raise ConfigError(key, ...) unless `condition` holds."""
    if not condition:
        raise ConfigError(key, what, got=got, expected=expected, hint=hint)


@dataclass(kw_only=True)
class ResidualConfig:
    """How a branch f (mixer or feed-forward) joins the residual stream h.

    pre:    h + f(norm(h))                              (most models)
    post:   h + norm(f(h))                              (OLMo 2/3, full layers of OLMo-Hybrid)
    normed: x = norm(h); alpha * x + beta * f(x)        (MiniMax-01: the residual is the normed input)
    `alpha` and `beta` scale the residual and the branch in every form.
    """

    form: Literal["pre", "post", "normed"] = "pre"
    alpha: float = 1.0
    beta: float = 1.0


@dataclass(kw_only=True)
class NormConfig:
    """RMSNorm. `zero_centered` is the Gemma form: x_hat * (1 + weight), weight initialised at 0."""

    eps: float = 1e-6
    zero_centered: bool = False

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", "must be positive", got=self.eps)


@dataclass(kw_only=True)
class LayerContext:
    """What a branch may know of the model around it. Not user configuration."""

    hidden_size: int
    layer_index: int
    num_layers: int
    norm: NormConfig
    max_position: int


@dataclass(frozen=True)
class ShardTraffic:
    """Bytes of the tensors that one process hands to a kind of exchange between shards of rows (see
    `hybridlm.model.context_parallel`), all shards together for `exchange`; in a backward of its gradients, for `gather` those of
    what is its own."""

    kind: Literal["gather", "exchange", "from_previous"]
    forward: int
    backward: int


@dataclass(kw_only=True)
class MixerConfig:
    """Base of every mixer's config. Subclasses register a `kind` with `@register_mixer`.

    Costs are known from the config alone. FLOPs count a multiply-add as 2, forward only.
    """

    kind: str
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    is_linear: ClassVar[bool] = False  # fixed-size decode state: no term that grows with context

    def num_params(self, context: LayerContext) -> int:
        """Parameters of the mixer, without the branch's own norm."""
        raise TypeError(f"{type(self).__name__} does not count its parameters")

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Forward FLOPs a token by part, averaged over a causal sequence of `context_length` tokens."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs")

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        """FLOPs a token of a loss that the mixer computes for itself in training, its whole backward included."""
        return 0.0

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of decode state for one sequence after `context_length` tokens."""
        raise TypeError(f"{type(self).__name__} does not count its state")

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Raise ConfigError unless the mixer can work on rows that are split into `shards` of `length` tokens (see
        `hybridlm.model.context_parallel`)."""
        raise ConfigError("kind", "cannot work on split rows", got=self.kind, expected="engine.context_parallel=1")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """What a training step exchanges where `rows` rows are split into `shards` of `length` tokens."""
        raise TypeError(f"{type(self).__name__} does not count what shards exchange")


@dataclass(kw_only=True)
class FeedForwardConfig:
    """Base of every feed-forward's config. `residual: null` follows the layer's mixer."""

    kind: str
    residual: ResidualConfig | None = None

    def is_moe(self, layer_index: int) -> bool:
        return False

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        """Parameters of the feed-forward in layer `context.layer_index`; `active`: those one token meets."""
        raise TypeError(f"{type(self).__name__} does not count its parameters")

    def routed_params(self, context: LayerContext) -> int:
        """Those of the parameters that belong to routed experts, which processes may divide among them."""
        return 0

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        """Forward FLOPs a token by part."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Which mixer stands in which layer; `hybridlm.model.schedule.expand` turns it into one name a layer.

    Either `pattern` (tiled over depth) with `override` ({layer: name}, negative layers count from the end), or the
    short form: `ratio` layers of `linear`, then one of `full`, repeated; ratio 0 is all full, inf all linear.
    """

    pattern: list[str] | None = None
    override: dict[int, str] = field(default_factory=dict)
    linear: str | None = None
    full: str | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        short = [k for k in ("linear", "full", "ratio") if getattr(self, k) is not None]
        if self.pattern is not None:
            require(not short, short[0] if short else "", "cannot stand beside 'pattern'", got=self.pattern,
                    expected="either 'pattern' or the short form (linear, full, ratio)",
                    hint="set pattern=null to use the short form")
            require(len(self.pattern) > 0, "pattern", "names no mixer", got=self.pattern,
                    expected="a list of mixer names such as [kda, kda, kda, full]")
        else:
            require(self.ratio is not None, "ratio", "is missing", expected="'pattern', or linear, full and ratio")
            assert self.ratio is not None
            require(self.ratio >= 0 and (math.isinf(self.ratio) or self.ratio == int(self.ratio)), "ratio",
                    "must be a whole number of linear layers for each full one", got=self.ratio,
                    expected="0, 1, 2, ... or inf")
            require(self.ratio == 0 or self.linear is not None, "linear", "is missing", expected="a mixer name")
            require(math.isinf(self.ratio) or self.full is not None, "full", "is missing", expected="a mixer name")


@dataclass(kw_only=True)
class MTPConfig:
    """Multi-token prediction, DeepSeek-V3 form (section 2.2): `depth` extra tokens; 0 turns it off.

    `mixer` names the mixer of the MTP blocks; null takes that of the last layer.
    """

    depth: int = 0
    loss_weight: float = 0.3
    mixer: str | None = None

    def __post_init__(self) -> None:
        require(self.depth >= 0, "depth", "must not be negative", got=self.depth)


@dataclass(kw_only=True)
class PublishedConfig:
    """Parameter counts that the authors of a system publish; `hybridlm inspect` compares its own with them."""

    total: float
    active: float


@dataclass(kw_only=True)
class ModelConfig:
    """One hybrid language model. `mixers` may hold more entries than the schedule uses."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    schedule: ScheduleConfig
    mixers: dict[str, MixerConfig]
    feed_forward: FeedForwardConfig
    norm: NormConfig = field(default_factory=NormConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    max_position: int = 4096  # longest position the model is meant for; sizes nothing, guides generation and YaRN
    tie_embeddings: bool = False
    init_std: float = 0.02
    z_loss: float = 0.0  # coefficient of logsumexp(logits)^2
    logit_soft_cap: float | None = None
    name: str = ""
    published: PublishedConfig | None = None

    def __post_init__(self) -> None:
        for key in ("vocab_size", "hidden_size", "num_layers", "max_position"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        layers = self.layers()
        for index, name in enumerate(layers):
            require(name in self.mixers, "schedule", f"layer {index} names an unknown mixer", got=name,
                    expected=f"one of {sorted(self.mixers)}", hint=_did_you_mean(name, self.mixers))
        require(self.mtp.mixer is None or self.mtp.mixer in self.mixers, "mtp.mixer", "unknown mixer",
                got=self.mtp.mixer, expected=f"one of {sorted(self.mixers)}")

    def layers(self) -> list[str]:
        """The mixer name of each layer, in order: what is printed, saved and compared."""
        from hybridlm.model.schedule import expand

        return expand(self.schedule, self.num_layers)

    def layer_context(self, layer_index: int) -> LayerContext:
        return LayerContext(hidden_size=self.hidden_size, layer_index=layer_index, num_layers=self.num_layers,
                            norm=self.norm, max_position=self.max_position)


def _did_you_mean(name: str, known: object) -> str:
    close = nearest(name, known)  # type: ignore[arg-type]
    return f"did you mean '{close}'?" if close else ""
