"""What a model family is: a config mapping and a key mapping, each in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.interop.mapping import Rule, Spec, rule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers.contract import MixerConfig

Derived = tuple[str, tuple[int, ...], Callable[[], Tensor]]  # name, shape, value in fp32
LayerRules = Callable[[ModelConfig, MixerConfig, bool, str, str], Iterator[Rule]]


class HFConfig:
    """A transformers config with the raw config.json it came from. Attributes are the transformers ones.

    `keys` are the tensor names of the checkpoint, official spelling; empty when only the config is asked for.
    """

    def __init__(self, config: Any, raw: Mapping[str, Any], keys: frozenset[str] = frozenset()):
        self.object, self.raw, self.keys = config, raw, keys

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.object, name)
        except AttributeError:
            raise ConfigError(f"config.json: {name}", "is missing") from None

    def only(self, name: str, *values: Any, why: str = "") -> None:
        """Raise ConfigError unless the field has one of `values`, or is absent."""
        got = getattr(self.object, name, values[0])
        if got not in values:
            raise ConfigError(f"config.json: {name}", "asks for what hybridlm does not have", got=got,
                              expected=" or ".join(repr(value) for value in values), hint=why)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of released models.

    `to_model` reads a transformers config, as transformers computes with it, into the plain data of a `ModelConfig`.
    `to_hf` writes the config.json; it may drop what the format cannot say, for the caller compares what comes back.
    `layer` yields the rules of one layer: (config, its mixer, is it MoE, our prefix, their prefix).
    `renames` turn other spellings of keys (transformers' runtime names, older releases) into the official ones,
    `ignored` match keys that carry nothing to keep. `mtp` is how MTP weights are named: "layers" behind the last
    layer (DeepSeek), "mtp" under a prefix of their own (Qwen), None nowhere.
    `derived` are tensors that follow from the config, which transformers expects to find in the files.
    `limits` says where transformers is known to compute other numbers from the exported checkpoint than we do.
    """

    name: str
    architecture: str
    to_model: Callable[[HFConfig], dict[str, Any]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    layer: LayerRules
    aliases: tuple[str, ...] = ()
    text_of: tuple[str, ...] = ()  # model types whose `text_config` this is
    embed: str = "model.embed_tokens.weight"
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    mtp: str | None = None
    limits: Callable[[ModelConfig], list[str]] = field(default=lambda config: [])
    derived: Callable[[ModelConfig], Iterator[Derived]] = field(default=lambda config: iter(()))

    def rules(self, config: ModelConfig) -> list[Rule]:
        """Every tensor of the model, once."""
        depth = config.mtp.depth if self.mtp == "layers" else 0
        base = [f"model.layers.{config.num_layers + d}" for d in range(depth)]
        rules = [_shared("embed.weight", self.embed, [f"{b}.embed_tokens.weight" for b in base]),
                 rule("norm.weight", "model.norm.weight")]
        if not config.tie_embeddings:
            rules.append(_shared("lm_head.weight", "lm_head.weight", [f"{b}.shared_head.head.weight" for b in base]))
        for index, name in enumerate(config.layers()):
            rules += self.layer(config, config.mixers[name], config.feed_forward.is_moe(index),
                                f"layers.{index}.", f"model.layers.{index}.")
        for d in range(config.mtp.depth):
            rules += self._mtp_rules(config, d)
        return rules

    def _mtp_rules(self, config: ModelConfig, d: int) -> Iterator[Rule]:
        last = config.num_layers - 1
        mixer = config.mixers[config.mtp.mixer or config.layers()[-1]]
        if self.mtp == "layers":
            base = f"model.layers.{config.num_layers + d}."
            names, block = (f"{base}enorm", f"{base}hnorm", f"{base}eh_proj", f"{base}shared_head.norm"), base
        else:
            names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
            block = "mtp.layers.0."
        for ours, theirs in zip(("enorm", "hnorm", "eh_proj", "norm"), names, strict=True):
            yield rule(f"mtp.{d}.{ours}.weight", f"{theirs}.weight")
        yield from self.layer(config, mixer, config.feed_forward.is_moe(last), f"mtp.{d}.block.", block)

    def is_ignored(self, config: ModelConfig) -> Callable[[str], bool]:
        """Which keys may be in a checkpoint without being read."""
        patterns = [*self.ignored, r"\.rotary_emb\.inv_freq$"]
        if config.tie_embeddings:
            patterns.append(r"^lm_head\.weight$")
        if self.mtp == "layers":
            patterns.append(r"^model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")
        pattern = re.compile("|".join(patterns))
        return lambda name: pattern.search(name) is not None

    def spell(self, names: Mapping[str, Spec]) -> tuple[dict[str, Spec], dict[str, str]]:
        """Specs by official name, and the source's own spelling of each."""
        specs, spelling = {}, {}
        for name, spec in names.items():
            official = name
            for pattern, replacement in self.renames:
                official = re.sub(pattern, replacement, official)
            specs[official], spelling[official] = spec, name
        return specs, spelling


def _shared(ours: str, theirs: str, copies: list[str]) -> Rule:
    """One tensor of ours that MTP layers repeat in released checkpoints; the copies may be absent."""
    from hybridlm.interop.mapping import Copies, Layout

    alone = Layout((theirs,))
    if not copies:
        return Rule((ours,), (alone,))
    return Rule((ours,), (Layout((theirs, *copies), Copies(1 + len(copies))), alone))
