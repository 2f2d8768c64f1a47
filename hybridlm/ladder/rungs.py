"""Rungs: sizes from a minute of one CPU core to days of one H200, for any architecture.

A rung has a width and a depth; heads and feed-forward of a model follow (`ModelConfig.resize`). r0 to r3 are meant for
bytes and 16 dims per head, r4 to r7 for a tokenizer of 32k tokens and 64 dims per head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.model.config import ModelConfig
from hybridlm.model.parametrization import Kind


@dataclass(kw_only=True)
class RungConfig:
    """One size of a ladder, and the batch that it is trained with.

    Args:
        name: name in tables and folders.
        hidden_size: width of the residual stream.
        num_layers: depth.
        sequence_length: tokens per sequence.
        batch_size: sequences per step.
        tokens_per_parameter: tokens of training per parameter that a token meets, without embedding and head; null:
            that of the ladder.
        tokens: tokens of training in place of that; null: none.
    """

    name: str
    hidden_size: int
    num_layers: int
    sequence_length: int = 512
    batch_size: int = 8
    tokens_per_parameter: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        require(re.fullmatch(r"[\w.-]+", self.name) is not None, "name", "cannot name a folder", got=self.name,
                expected="letters, digits, '_', '-' and '.'")
        for key in ("hidden_size", "num_layers", "sequence_length", "batch_size", "tokens_per_parameter", "tokens"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.sequence_length * self.batch_size

    @property
    def shape(self) -> tuple[int, int]:
        """Hidden size and number of layers."""
        return self.hidden_size, self.num_layers


RUNGS: dict[str, RungConfig] = {rung.name: rung for rung in (
    RungConfig(name="r0", hidden_size=32, num_layers=8, sequence_length=512, batch_size=8),
    RungConfig(name="r1", hidden_size=48, num_layers=8, sequence_length=512, batch_size=12),
    RungConfig(name="r2", hidden_size=64, num_layers=8, sequence_length=512, batch_size=16),
    RungConfig(name="r3", hidden_size=128, num_layers=8, sequence_length=512, batch_size=32),
    RungConfig(name="r4", hidden_size=256, num_layers=8, sequence_length=2048, batch_size=16),
    RungConfig(name="r5", hidden_size=512, num_layers=8, sequence_length=2048, batch_size=32),
    RungConfig(name="r6", hidden_size=768, num_layers=16, sequence_length=4096, batch_size=64),
    RungConfig(name="r7", hidden_size=1024, num_layers=24, sequence_length=4096, batch_size=128))}


def carry(model: ModelConfig, kind: Kind, size: tuple[int, int], base: tuple[int, int]) -> ModelConfig:
    """The model at a size, with hyperparameters that a parametrization carries from a base of another size.

    Under `standard` the initial standard deviation falls with the root of the width, as is usual, and nothing else
    changes.

    Args:
        model: of any size; its `init_std` is that of the base.
        kind: the parametrization.
        size: hidden size and number of layers.
        base: those for which hyperparameters were tuned.

    Raises:
        ConfigError: a width at which a mixer would have no whole number of heads.
    """
    rule = replace(model.parametrization, kind=kind, base_hidden_size=base[0], base_num_layers=base[1])
    std = model.init_std * (base[0] / size[0]) ** 0.5 if kind == "standard" else model.init_std
    return replace(model.resize(*size), parametrization=rule, init_std=std)


def find_rung(name: str, key: str = "ladder.rungs") -> RungConfig:
    """A rung by its name, or a width and depth such as 96x8.

    Args:
        name: one of RUNGS, or HIDDENxLAYERS.
        key: the setting that errors name.

    Raises:
        ConfigError: neither.

    >>> find_rung("r2").hidden_size, find_rung("96x4").num_layers
    (64, 4)
    """
    if name in RUNGS:
        return RUNGS[name]
    if size := re.fullmatch(r"(\d+)x(\d+)", name):
        return RungConfig(name=name, hidden_size=int(size[1]), num_layers=int(size[2]))
    raise ConfigError(key, "no such rung", got=name,
                      expected=f"one of {', '.join(RUNGS)}, or HIDDENxLAYERS such as 96x8",
                      hint=did_you_mean(name, RUNGS))
