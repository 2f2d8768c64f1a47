"""A model family: how its config and its tensors map to ours, in both directions, and the registry of families."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.interop.rearrangements import RepeatedTensor
from hybridlm.interop.tensor_rules import KeyLayout, TensorRule, TensorSpec, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import mtp_block
from hybridlm.model.mixers.contract import MixerConfig

HEAD_KEY = "lm_head.weight"  # the output head's name in nearly all families


class HFConfig:
    """A transformers config with the raw config.json it came from; attributes are those of the transformers config.

    Attributes:
        config: the transformers config, with its defaults filled in.
        raw: the config.json.
        keys: the tensor names of the checkpoint in official spelling; empty when only the config is asked for.
    """

    def __init__(self, config: Any, raw: Mapping[str, Any], keys: frozenset[str] = frozenset()):
        self.config = config
        self.raw = raw
        self.keys = keys

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.config, name)
        except AttributeError:
            raise ConfigError(f"config.json: {name}", "is missing") from None

    def require_value(self, name: str, *values: Any) -> None:
        """Check that a field has one of these values, or is absent.

        Raises:
            ConfigError: it has another value, which asks for something that hybridlm does not have.
        """
        got = getattr(self.config, name, values[0])
        if got not in values:
            raise ConfigError(f"config.json: {name}", "asks for what hybridlm does not have", got=got,
                              expected=" or ".join(repr(value) for value in values))


@dataclass(frozen=True)
class LayerToMap:
    """One layer whose tensors a family maps.

    Attributes:
        mixer: its mixer.
        is_moe: whether its feed-forward is a mixture of experts.
        ours: our prefix of its tensors, with the dot: "layers.3.".
        theirs: their prefix: "model.layers.3.".
    """

    mixer: MixerConfig
    is_moe: bool
    ours: str
    theirs: str


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that follows from the config, and that transformers expects to find in the files.

    Attributes:
        name: its name in the files.
        shape: its shape.
        compute: gives its value in fp32.
    """

    name: str
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of released models, known by its own file in `hybridlm.interop.families` alone.

    Attributes:
        name: the model type, as in config.json.
        architecture: the class of transformers that computes it.
        read_config: plain data of a `ModelConfig` from a transformers config, as transformers computes with it.
        write_config: the config.json of a model. It may drop what the format cannot express: the caller reads the
            result back and compares.
        map_layer: the rules of one layer.
        preference: an export writes the family that the model was imported from, else of the families that can hold it
            the one with the highest preference, else the first by the name of its file.
        aliases: further model types with the same format.
        multimodal_types: model types whose `text_config` is of this family.
        embedding_key: their name of the embedding.
        norm_key: their name of the final norm.
        head_key: their name of the output head.
        layers_key: their name of the list of layers; that of MTP weights is `model.layers`.
        renamed_keys: (pattern, replacement) that turn other spellings of keys (transformers' names at run time, older
            releases) into the official ones.
        ignored_keys: patterns of keys that carry nothing to keep.
        mtp_keys: place of MTP weights: "layers" behind the last layer (DeepSeek), "mtp" under a prefix of their own
            (Qwen), None nowhere.
        known_differences: sentences that say where transformers computes other numbers from the exported model.
        derived_tensors: tensors that follow from the config.
        map_model: the rules of tensors that belong to no layer, beside embedding, final norm and head.
    """

    name: str
    architecture: str
    read_config: Callable[[HFConfig], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    map_layer: Callable[[ModelConfig, LayerToMap], Iterator[TensorRule]]
    preference: int = 0
    aliases: tuple[str, ...] = ()
    multimodal_types: tuple[str, ...] = ()
    embedding_key: str = "model.embed_tokens.weight"
    norm_key: str = "model.norm.weight"
    head_key: str = HEAD_KEY
    layers_key: str = "model.layers"
    renamed_keys: tuple[tuple[str, str], ...] = ()
    ignored_keys: tuple[str, ...] = ()
    mtp_keys: str | None = None
    known_differences: Callable[[ModelConfig], list[str]] = field(default=lambda config: [])
    derived_tensors: Callable[[ModelConfig], Iterator[DerivedTensor]] = field(default=lambda config: iter(()))
    map_model: Callable[[ModelConfig], Iterator[TensorRule]] = field(default=lambda config: iter(()))

    def rules(self, config: ModelConfig) -> list[TensorRule]:
        """List the rules for all tensors of a model; each of our tensors is in exactly one."""
        depth = config.mtp.depth if self.mtp_keys == "layers" else 0
        mtp_prefixes = [f"model.layers.{config.num_layers + index}" for index in range(depth)]
        rules = [_map_repeated("embed.weight", self.embedding_key,
                               [f"{prefix}.embed_tokens.weight" for prefix in mtp_prefixes]),
                 map_tensors("norm.weight", self.norm_key)]
        if not config.tie_embeddings:
            rules.append(_map_repeated("lm_head.weight", self.head_key,
                                       [f"{prefix}.shared_head.head.weight" for prefix in mtp_prefixes]))
        for index, name in enumerate(config.layers()):
            layer = LayerToMap(config.mixers[name], config.feed_forward_after(name).is_moe(index), f"layers.{index}.",
                               f"{self.layers_key}.{index}.")
            rules += self.map_layer(config, layer)
        rules += self.map_model(config)
        for index in range(config.mtp.depth):
            rules += self._map_mtp(config, index)
        return rules

    def _map_mtp(self, config: ModelConfig, index: int) -> Iterator[TensorRule]:
        layer, name = mtp_block(config)
        if self.mtp_keys == "layers":
            block = f"model.layers.{config.num_layers + index}."
            names = (f"{block}enorm", f"{block}hnorm", f"{block}eh_proj", f"{block}shared_head.norm")
        else:
            block = "mtp.layers.0."
            names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
        for ours, theirs in zip(("enorm", "hnorm", "eh_proj", "norm"), names, strict=True):
            yield map_tensors(f"mtp.{index}.{ours}.weight", f"{theirs}.weight")
        is_moe = config.feed_forward_after(name).is_moe(layer)
        yield from self.map_layer(config, LayerToMap(config.mixers[name], is_moe, f"mtp.{index}.block.", block))

    def make_ignored_test(self, config: ModelConfig) -> Callable[[str], bool]:
        """Make a function that says whether a key of a checkpoint may be ignored."""
        patterns = [*self.ignored_keys, r"\.rotary_emb\.inv_freq$"]
        if config.tie_embeddings:
            patterns.append(f"^{re.escape(self.head_key)}$")
        if self.mtp_keys == "layers":
            patterns.append(r"^model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")
        pattern = re.compile("|".join(patterns))
        return lambda name: pattern.search(name) is not None

    def to_official_names(self, found: Mapping[str, TensorSpec]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        """Map the names of a source to official names.

        Args:
            found: specs of the tensors of the source, by its names.

        Returns:
            The specs by official name, and the name in the source by official name.
        """
        specs = {}
        spelling = {}
        for name, spec in found.items():
            official = name
            for pattern, replacement in self.renamed_keys:
                official = re.sub(pattern, replacement, official)
            specs[official] = spec
            spelling[official] = name
        return specs, spelling


def _map_repeated(ours: str, theirs: str, copies: list[str]) -> TensorRule:
    """One tensor of ours that MTP layers repeat in released checkpoints; the copies may be absent."""
    single = KeyLayout((theirs,))
    if not copies:
        return TensorRule((ours,), (single,))
    return TensorRule((ours,), (KeyLayout((theirs, *copies), RepeatedTensor(1 + len(copies))), single))


FAMILIES: dict[str, Family] = {}  # by model type


def register_family(family: Family) -> Family:
    """Register a family for import and export, under the model type `family.name`.

    Returns:
        The family.
    """
    FAMILIES[family.name] = family
    return family
