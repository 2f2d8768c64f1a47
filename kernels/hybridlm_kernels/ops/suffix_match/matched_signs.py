"""Symbols made of signs, signs read at the places of matches, and the autograd function around a match.

All backends share these.

Legend: B rows, T queries, S keys, C channels, G streams, b bits of a symbol, N = B G streams of all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridlm_kernels.precision import wide

MIN_SIZE = 1e-3  # smallest |x| by which the difference of a flipped bit is divided

# (q_NT, k_NS) -> the index behind the match [N, T], 0 where there is none
Match = Callable[[Tensor, Tensor], Tensor]
# (q_NT, k_NT, signs_NTb of what is read from each index, dy_NTb) -> change of sum(dy * read) when each bit of q and of
# k is flipped, [N, T, b] each
Flips = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def to_streams(x_BTC: Tensor, bits: int) -> Tensor:
    """The channels of each stream, [N, T, b]."""
    return x_BTC.unflatten(2, (-1, bits)).transpose(1, 2).flatten(0, 1)


def from_streams(x_NTb: Tensor, rows: int) -> Tensor:
    """The reverse of `to_streams`: [B, T, C]."""
    return x_NTb.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)


def symbols(x_NTb: Tensor) -> Tensor:
    """One whole number per token and stream, whose bit i is the sign of channel i, [N, T]."""
    bits = torch.arange(x_NTb.shape[-1], device=x_NTb.device, dtype=torch.int32)
    return ((x_NTb > 0).to(torch.int32) << bits).sum(-1, dtype=torch.int32)


def readable_signs(v_NTb: Tensor, unmatched: str, dtype: torch.dtype) -> Tensor:
    """The numbers that are read at each index: the signs of v, and at index 0 the number that stands without a match.

    No match ends before index 0.

    >>> readable_signs(torch.tensor([[[3.0], [2.0], [-1.0]]]), "zero", torch.float32).flatten()
    tensor([ 0.,  1., -1.])
    """
    signs_NTb = torch.where(v_NTb > 0, 1.0, -1.0).to(dtype)
    signs_NTb[:, 0] = -1.0 if unmatched == "minus" else 0.0
    return signs_NTb


def read_at(signs_NSb: Tensor, index_NX: Tensor) -> Tensor:
    """The signs [N, X, b] at the indices of each stream."""
    return signs_NSb.gather(1, index_NX[..., None].expand(-1, -1, signs_NSb.shape[-1]).long())


class MatchedSigns(torch.autograd.Function):
    """scale times the signs behind the match, with the gradient of flipped bits for q, k and v."""

    @staticmethod
    def forward(ctx, q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, scale_C: Tensor, bits: int, unmatched: str,
                match: Match, flips: Flips) -> Tensor:
        streams = [to_streams(x, bits) for x in (q_BTC, k_BTC, v_BTC)]
        index_NT = match(symbols(streams[0]), symbols(streams[1]))
        signs_NTb = readable_signs(streams[2], unmatched, torch.float32)
        ctx.save_for_backward(q_BTC, k_BTC, v_BTC, scale_C, index_NT)
        ctx.options = bits, unmatched, flips
        return (scale_C * from_streams(read_at(signs_NTb, index_NT), len(q_BTC))).to(q_BTC.dtype)

    @staticmethod
    def backward(ctx, dy_BTC):  # type: ignore[override]
        q_BTC, k_BTC, v_BTC, scale_C, index_NT = ctx.saved_tensors
        bits, unmatched, flips = ctx.options
        dy_BTC = wide(dy_BTC)
        rows = len(dy_BTC)
        q_NTb, k_NTb, v_NTb = (to_streams(x, bits) for x in (q_BTC, k_BTC, v_BTC))
        signs_NTb = readable_signs(v_NTb, unmatched, dy_BTC.dtype)
        dscale_C = (dy_BTC * from_streams(read_at(signs_NTb, index_NT), rows)).sum((0, 1)).to(scale_C.dtype)
        part_NTb = to_streams(dy_BTC * wide(scale_C), bits)
        # A bit of v changes what is read from it by two, from -1 to 1; nothing else.
        read_NTb = torch.zeros_like(part_NTb).scatter_add_(
            1, index_NT[..., None].expand_as(part_NTb).long(), part_NTb)
        read_NTb[:, 0] = 0.0
        dq_NTb, dk_NTb = flips(symbols(q_NTb), symbols(k_NTb), signs_NTb, part_NTb)
        gradients = [_over_size(q_NTb, _raised(q_NTb, dq_NTb)), _over_size(k_NTb, _raised(k_NTb, dk_NTb)),
                     _over_size(v_NTb, 2.0 * read_NTb)]
        dq_BTC, dk_BTC, dv_BTC = (from_streams(d, rows).to(x.dtype)
                                  for d, x in zip(gradients, (q_BTC, k_BTC, v_BTC), strict=True))
        return dq_BTC, dk_BTC, dv_BTC, dscale_C, None, None, None, None


def _raised(x_NTb: Tensor, flipped_NTb: Tensor) -> Tensor:
    """The change from a bit of 0 to a bit of 1, given the change when the bit is flipped."""
    return torch.where(x_NTb > 0, -flipped_NTb, flipped_NTb)


def _over_size(x_NTb: Tensor, change_NTb: Tensor) -> Tensor:
    """The change over twice |x|, as if the output were linear in x from -|x| to |x|."""
    return change_NTb / (2.0 * x_NTb.to(change_NTb.dtype).abs().clamp_min(MIN_SIZE))
