"""Rotary position embedding: configuration, YaRN scaling and the tables that layers of one forward share.

B rows, T tokens, H heads, D head dim, R rotated pairs (2R <= D dims are rotated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.sequence import SequenceInfo
from hybridlm.plain_data import to_dict
from hybridlm_kernels import rotary
from hybridlm_kernels.decoding import rotary_step, rotary_step_tables


@dataclass(kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023): slow pairs are interpolated by `factor`, fast ones kept.

    A pair is fast when it turns more than `beta_fast` times over `original_max_position` tokens, slow when it turns
    fewer than `beta_slow` times; between them runs a linear ramp, whose ends `truncate` rounds to whole pairs.
    `attention_factor` multiplies cos and sin; null derives it from `factor`, `mscale` and `mscale_all_dim`.
    In MLA, `mscale_all_dim` also enters the softmax scale (DeepSeek-V3).
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", "must be at least 1", got=self.factor)
        require(self.original_max_position > 0, "original_max_position", "must be positive",
                got=self.original_max_position)
        require(self.beta_fast > self.beta_slow > 0, "beta_fast", "must be above beta_slow, which must be positive",
                got=(self.beta_fast, self.beta_slow))

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

    def table_scale(self) -> float:
        """The factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def softmax_scale(self) -> float:
        """The factor that MLA puts on its softmax scale."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def ramp(self, dim: int, theta: float) -> tuple[float, float]:
        """The pairs, as fractions of their index, between which interpolation sets in."""
        def pair(turns: float) -> float:
            return dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if high == low else high


@dataclass(kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) of the first `partial_rotary_factor` share of the head dims.

    `kind`: `half` pairs dim i with i + R (Llama), `interleaved` pairs 2i with 2i + 1 (DeepSeek), `none` rotates
    nothing (NoPE).
    """

    kind: Literal["none", "half", "interleaved"] = "half"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    scaling: YarnConfig | None = None

    def __post_init__(self) -> None:
        require(self.theta > 1, "theta", "must be above 1", got=self.theta)
        require(0 < self.partial_rotary_factor <= 1, "partial_rotary_factor", "must be a share of the head dim",
                got=self.partial_rotary_factor, expected="above 0, at most 1", hint="kind=none turns RoPE off")

    def rotary_dim(self, head_dim: int) -> int:
        """Number of dims of a head that are rotated."""
        return 0 if self.kind == "none" else int(head_dim * self.partial_rotary_factor)

    def canonical(self, *, uses_mscale: bool) -> dict[str, Any]:
        """The options that rotations depend on, as plain data.

        Args:
            uses_mscale: whether the mixer scales its softmax by `scaling.mscale_all_dim`, as MLA does. Elsewhere an
                explicit `attention_factor` makes both mscales void.
        """
        if self.kind == "none":
            return {"kind": "none"}
        data = to_dict(self)
        yarn = data["scaling"]
        if yarn is not None and yarn["attention_factor"] is not None and not uses_mscale:
            yarn["mscale"] = yarn["mscale_all_dim"] = None
        return data

    def check_same(self, read: RopeConfig, what: str) -> None:
        """Raise ConfigError with the options that differ unless another layer's keys are rotated as by this one.

        Args:
            read: rotation of the layer that is read.
            what: what is wrong if they differ.
        """
        own, theirs = (rope.canonical(uses_mscale=False) for rope in (self, read))
        differ = [key for key in dict.fromkeys([*own, *theirs]) if own.get(key) != theirs.get(key)]
        if own["kind"] != theirs["kind"]:
            differ = ["kind"]
        got, expected = (", ".join(f"{key}={side.get(key)}" for key in differ) for side in (own, theirs))
        require(not differ, "rope", what, got=got, expected=expected)

    def check(self, head_dim: int, key: str = "rope") -> None:
        """Raise ConfigError unless the rotated dims of a head of `head_dim` come in pairs."""
        dims = self.rotary_dim(head_dim)
        require(self.kind == "none" or (dims > 0 and dims % 2 == 0), key, "must rotate an even number of dims",
                got=f"{self.partial_rotary_factor} of {head_dim} dims = {dims}", expected="a multiple of 2")


def inverse_frequencies(config: RopeConfig, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [dim / 2]: radians per token for each pair."""
    powers_R = config.theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    yarn = config.scaling
    if yarn is None:
        return 1.0 / powers_R
    low, high = yarn.ramp(dim, config.theta)
    keep_R = 1 - ((torch.arange(dim // 2, device=device, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return keep_R / powers_R + (1 - keep_R) / (yarn.factor * powers_R)


def rope_tables(config: RopeConfig, dim: int, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32, of the tokens of `seq` for `dim` rotated dims.

    [T, R] when all rows have the same positions, else [B, T, R]. Made once a forward: layers that rotate alike share
    them through `seq.tables`. They are never parameters nor buffers.
    """
    if torch.compiler.is_dynamo_compiling():  # fused into each rotation: no graph depends on what others have left
        return _make_tables(config, dim, seq)
    key = f"rope {config.theta} {dim} {config.scaling}"
    if key not in seq.tables:
        seq.tables[key] = _make_tables(config, dim, seq)
    return seq.tables[key]


def rotate_step(x_BTHD: Tensor, config: RopeConfig, dim: int, seq: SequenceInfo) -> Tensor:
    """Rotate as `rotate` does, without gradients, by tables that all layers of a decode step share."""
    if config.kind == "none" or dim == 0:
        return x_BTHD
    interleaved = config.kind == "interleaved"
    dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
    key = f"rope step {config.theta} {dim} {config.scaling} {interleaved} {dtype}"
    if key not in seq.tables:
        cos, sin = rope_tables(config, dim, seq)
        seq.tables[key] = rotary_step_tables(cos.to(dtype), sin.to(dtype), interleaved)
    cos, sin = seq.tables[key]
    if x_BTHD.shape[-1] == dim:
        return rotary_step(x_BTHD, cos, sin, interleaved)
    return torch.cat([rotary_step(x_BTHD[..., :dim], cos, sin, interleaved), x_BTHD[..., dim:]], -1)


def _make_tables(config: RopeConfig, dim: int, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
    cos, sin = _angle_tables(inverse_frequencies(config, dim, seq.positions_BT.device), seq)
    scale = 1.0 if config.scaling is None else config.scaling.table_scale()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def _angle_tables(frequencies_R: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
    positions = seq.positions_BT
    if positions.shape[0] == 1 or positions.stride(0) == 0:
        positions = positions[0]
    angle = positions[..., None].float() * frequencies_R
    return angle.cos(), angle.sin()


def retnet_rotate(x_BTHK: Tensor, seq: SequenceInfo) -> Tensor:
    """Rotate neighbouring pairs of dims as RetNet does: from 1 radian per token to 1e-4, both ends included.

    The frequencies are 10000^(-j / (K / 2 - 1)) for pair j; RoPE has 10000^(-j / (K / 2)).
    Source: Sun et al. 2023, RetNet, and the authors' code (torchscale, retnet.py).

    >>> x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 2, 1, 4)
    >>> retnet_rotate(x, SequenceInfo.make(1, 2, x.device))[0, 1, 0, :2]
    tensor([0.5403, 0.8415])
    """
    pairs, device = x_BTHK.shape[-1] // 2, x_BTHK.device
    key = f"retnet {pairs}"
    tables = None if torch.compiler.is_dynamo_compiling() else seq.tables.get(key)
    if tables is None:
        tables = _angle_tables(10000.0 ** -torch.linspace(0, 1, pairs, device=device), seq)
        if not torch.compiler.is_dynamo_compiling():
            seq.tables[key] = tables
    return rotary(x_BTHK, *tables, interleaved=True)


def rotate_last(x_BTHD: Tensor, config: RopeConfig, dim: int, seq: SequenceInfo, *, back: bool = False) -> Tensor:
    """Rotate the last `dim` dims of each head by the tokens' positions.

    Args:
        x_BTHD: heads of the tokens.
        config: the rotary embedding.
        dim: dims that rotate.
        seq: positions of the tokens.
        back: rotate by the negative positions: of values that were rotated at s, and read by a query at t, a position
            s - t is left (DeepSeek-V4, section 2.3).
    """
    if config.kind == "none" or dim == 0:
        return x_BTHD
    cos, sin = rope_tables(config, dim, seq)
    plain, turned = x_BTHD.split([x_BTHD.shape[-1] - dim, dim], -1)
    return torch.cat([plain, rotary(turned, cos, -sin if back else sin, interleaved=config.kind == "interleaved")], -1)


def rotate(x_BTHD: Tensor, config: RopeConfig, dim: int, seq: SequenceInfo, kind: str | None = None) -> Tensor:
    """Rotate the first `dim` dims of each head by the tokens' positions; `kind` replaces the config's."""
    kind = config.kind if kind is None else kind
    if kind == "none" or dim == 0:
        return x_BTHD
    cos, sin = rope_tables(config, dim, seq)
    return rotary(x_BTHD, cos, sin, interleaved=kind == "interleaved")
