"""Typed configuration of a model: plain dataclasses, checked when they are made.

The config of each mixer and feed-forward stands in the file of its kind, with its costs; this file holds what every
model has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.model.feed_forward.contract import FEED_FORWARDS, FeedForwardConfig
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.parametrization import ParametrizationConfig
from hybridlm.model.residual import BRANCH_NAMES, RESIDUALS, BranchConfig, BranchName, ResidualConfig
from hybridlm.model.schedule import RepeatConfig as RepeatConfig
from hybridlm.model.schedule import RunAdaptersConfig as RunAdaptersConfig
from hybridlm.model.schedule import ScheduleConfig as ScheduleConfig
from hybridlm.model.schedule import expand, expand_runs
from hybridlm.model.sharing import LAYER_INPUT


@dataclass(kw_only=True)
class MTPConfig:
    """Multi-token prediction, DeepSeek-V3 form (section 2.2): `depth` extra tokens; depth 0 turns it off.

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
    residual: ResidualConfig = field(default_factory=RESIDUALS.default_config)
    norm: NormConfig = field(default_factory=NormConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    max_position: int = 4096  # longest position the model is meant for; sizes nothing, guides generation and YaRN
    tie_embeddings: bool = False
    init_std: float = 0.02
    z_loss: float = 0.0  # coefficient of logsumexp(logits)^2
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0  # factor of the embedding before the first layer
    logit_scale: float = 1.0  # factor of the logits
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    name: str = ""
    published: PublishedConfig | None = None

    def __post_init__(self) -> None:
        for key in ("vocab_size", "hidden_size", "num_layers", "max_position", "embedding_scale", "logit_scale"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        layers = self.layers()
        for name in self.schedule.alone:
            require(name in self.mixers, "schedule.alone", "names an unknown mixer", got=name,
                    expected=f"some of {sorted(self.mixers)}", hint=did_you_mean(name, self.mixers))
        for index, name in enumerate(layers):
            require(name in self.mixers, "schedule", f"layer {index} names an unknown mixer", got=name,
                    expected=f"one of {sorted(self.mixers)}", hint=did_you_mean(name, self.mixers))
        require(self.mtp.mixer is None or self.mtp.mixer in self.mixers, "mtp.mixer", "unknown mixer",
                got=self.mtp.mixer, expected=f"one of {sorted(self.mixers)}")
        for name in dict.fromkeys([*layers, self.mtp.mixer or layers[-1]]):
            for branch in self.branches(name):
                self.residual.check_branch(branch)
            present = self.present_branches(name)
            require(bool(present), "schedule", "has layers with neither a mixer nor a feed-forward", got=name,
                    expected="at least one of them in each layer")
            self.residual.check_present(present)
        self._check_runs()
        self._check_sharing()

    def layers(self) -> list[str]:
        """The mixer name of each layer, in order: what is printed, saved and compared."""
        return expand(self.schedule, self.num_layers)

    def runs(self) -> list[int]:
        """The layer of each run in the order of the forward; every layer runs once unless the schedule says more."""
        return expand_runs(self.schedule, self.num_layers)

    def used_mixers(self) -> list[str]:
        """Names of the mixers of layers, then that of multi-token prediction where there is any, each once."""
        layers = self.layers()
        return list(dict.fromkeys([*layers, *([self.mtp.mixer or layers[-1]] if self.mtp.depth else [])]))

    def layer_context(self, layer_index: int) -> LayerContext:
        """The facts about the model that the mixer and feed-forward of a layer are told."""
        layers = self.layers()
        mtp_mixer = (self.mtp.mixer or layers[-1]) if self.mtp.depth else None
        wide = self.mixers[layers[layer_index]].residual.embedding
        return LayerContext(hidden_size=self.hidden_size, layer_index=layer_index, num_layers=self.num_layers,
                            norm=self.norm, max_position=self.max_position, layers=layers, mixers=self.mixers,
                            mtp_mixer=mtp_mixer, vocab_size=self.vocab_size,
                            mixer_input=2 * self.hidden_size if wide else None)

    def branches(self, mixer_name: str) -> tuple[BranchConfig, BranchConfig]:
        """The options with which the mixer and the feed-forward of a layer join the residual stream.

        Args:
            mixer_name: the mixer of the layer, which the feed-forward follows where it has no option of its own.
        """
        mixer = self.mixers[mixer_name].residual
        following = self.feed_forward.residual or replace(mixer, embedding=False)
        ratio = self.depth_ratio
        if ratio is None or ratio == 1.0:
            return mixer, following
        return replace(mixer, beta=mixer.beta / ratio), replace(following, beta=following.beta / ratio)

    @property
    def depth_ratio(self) -> float | None:
        """Number of runs of layers relative to the base model; None where the parametrization does not carry depth."""
        return self.parametrization.depth_ratio(self.schedule, self.num_layers)

    def feed_forward_after(self, mixer_name: str) -> FeedForwardConfig:
        """The feed-forward of the layers of a mixer: the model's, or none where the mixer stands alone."""
        if mixer_name not in self.schedule.alone:
            return self.feed_forward
        return FEED_FORWARDS.config_class("none")()  # type: ignore[call-arg]

    def present_branches(self, mixer_name: str) -> tuple[BranchName, ...]:
        """The branches that the layers of a mixer have, in their order."""
        mixer, feed_forward = self.mixers[mixer_name].is_branch, self.feed_forward_after(mixer_name).is_branch
        return tuple(name for name, present in zip(BRANCH_NAMES, (mixer, feed_forward), strict=True) if present)

    @property
    def logit_multiplier(self) -> float:
        """Factor of the logits: `logit_scale`, times base width / width where a parametrization carries
        hyperparameters over width."""
        return self.logit_scale / self.parametrization.width_ratio(self.hidden_size)

    def resize(self, hidden_size: int | None = None, num_layers: int | None = None) -> ModelConfig:
        """The same architecture at another width and depth.

        Heads and the feed-forward's width follow the hidden size in proportion. Dims per head, ranks, taps, indexers
        and the number of experts stay. Mixers that no layer uses are left out.

        Args:
            hidden_size: of the new model; None: as it is.
            num_layers: of the new model; None: as it is.

        Raises:
            ConfigError: a width at which a mixer would have no whole number of heads.
        """
        factor = Fraction(hidden_size or self.hidden_size, self.hidden_size)
        used = dict.fromkeys([*self.layers(), *([self.mtp.mixer] if self.mtp.mixer else [])])
        try:
            mixers = {name: self.mixers[name].at_width(factor) for name in used}
        except ConfigError as error:
            raise ConfigError("model.hidden_size", f"does not fit: {error.what}", got=hidden_size,
                              expected=error.expected) from None
        return replace(self, hidden_size=hidden_size or self.hidden_size, num_layers=num_layers or self.num_layers,
                       mixers=mixers, feed_forward=self.feed_forward.at_width(factor))

    def mtp_context(self) -> LayerContext:
        """The facts that the residual of a block of multi-token prediction is told: a stream of one layer."""
        return replace(self.layer_context(0), num_layers=1)

    def _check_runs(self) -> None:
        """Refuse what a layer that runs several times, or a branch beside the stream, cannot be joined with."""
        runs, layers = self.runs(), self.layers()
        if len(runs) > len(layers):
            self.residual.check_runs()
        feed_forward = self.feed_forward.residual
        require(feed_forward is None or not feed_forward.embedding, "feed_forward.residual.embedding",
                "is for a mixer alone", got=True, expected="false")
        for index, name in enumerate(layers):
            if self.mixers[name].residual.embedding:
                self._check_wide_input(index, name)
        ends = [("the last layer", layers[runs[-1]])]
        if self.mtp.depth:
            ends.append(("multi-token prediction", self.mtp.mixer or layers[-1]))
        for place, name in ends:
            last = self.branches(name)[BRANCH_NAMES.index(self.present_branches(name)[-1])]
            require(last.form != "aside", f"mixers.{name}.residual.form", f"leaves the output of {place} unread",
                    got=last.form, expected="another form, or a layer behind it")

    def _check_wide_input(self, index: int, name: str) -> None:
        """Refuse a layer that reads the embedding beside the stream, unless its mixer and all its readers can."""
        mixer, context = self.mixers[name], self.layer_context(index)
        key = f"mixers.{name}.residual.embedding"
        require(mixer.takes_wide_input, key, "is not read by this kind", got=mixer.kind,
                expected="a kind whose input may be wider than its output, such as attention")
        shares = context.is_read(LAYER_INPUT) or any(read.kind == LAYER_INPUT for read in mixer.reads(context))
        require(not shares, key, "makes an input that layers of another width cannot share", got=name,
                expected="layers with key_input that read others")
        of_mtp = self.mtp.depth > 0 and (index == self.num_layers - 1 or name == self.mtp.mixer)
        require(not of_mtp, key, "has no place in the last layer or in mtp.mixer under multi-token prediction",
                got=name, expected="another mixer there, or mtp.depth=0")

    def _check_sharing(self) -> None:
        """Refuse a layer that reads from another one which leaves nothing of the kind, or what does not fit."""
        blocks = [*enumerate(self.layers())]
        if self.mtp.depth:
            blocks.append((self.num_layers - 1, self.mtp.mixer or blocks[-1][1]))
        for index, name in blocks:
            context = self.layer_context(index)
            try:
                for read in self.mixers[name].reads(context):
                    context.source_of(read)
                self.mixers[name].check_sources(context)
            except ConfigError as error:
                raise error.within(f"mixers.{name}") from None
