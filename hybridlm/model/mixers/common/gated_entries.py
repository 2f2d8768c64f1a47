"""Entries pooled from windows of tokens by a softmax over their slots, per channel, with learned logits.

    C, Z = W_c x, W_z x                                         values and logits of each token, per channel
    e_i  = norm(sum_j softmax_j(Z_j + b_j) * C_j)               j over the `ratio` tokens of window i

With overlap a token has two series of values and logits, and an entry has 2 `ratio` slots: the first series of the
window before, and the second one of its own; the first entry of a document has its own window alone. Only complete
windows have an entry. It is rotated to the position of the first token of its window.

Source: DeepSeek-V4, 2026, sections 2.3.1 (with overlap) and 2.3.2.
B rows, T tokens, E windows, D hidden size, K dims of an entry, m tokens of a window, L slots, X = K or 2 K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import EntryCache
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.entries import EntryWindows, count_entries
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.rope import RopeConfig, rotate_last
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


class GatedEntries(nn.Module):
    """Makes entries. Parameters: kv_proj and gate_proj [X, D], position_bias [L, K] and norm.

    Args:
        context: the layer.
        dim: dims of an entry K.
        ratio: tokens of a window m.
        overlap: an entry also pools the window before.
        rope: rotary embedding of entries.
        rotary_dim: how many of their last dims it rotates.
    """

    def __init__(self, context: LayerContext, dim: int, ratio: int, overlap: bool, rope: RopeConfig, rotary_dim: int):
        super().__init__()
        series = 1 + overlap
        self.dim, self.ratio, self.before = dim, ratio, ratio * overlap
        self.rope, self.rotary_dim = rope, rotary_dim
        self.kv_proj = nn.Linear(context.hidden_size, series * dim, bias=False)
        self.gate_proj = nn.Linear(context.hidden_size, series * dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(series * ratio, dim))
        self.norm = RMSNorm.of(context.norm, dim)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, cache: EntryCache | None = None) -> tuple[Tensor, EntryWindows]:
        """Entries [B, E, K] of these tokens, with those of the cache before them, and their windows."""
        raw_BT2X = torch.stack([self.kv_proj(x_BTD), self.gate_proj(x_BTD)], 2)
        if cache is not None:
            entries_BEK = cache.append(raw_BT2X, self.combine)
            windows = EntryWindows.of(seq, x_BTD, cache.length, self.ratio, self.ratio)
            return windows.pad(entries_BEK), windows
        raw_BS2X = seq.history(raw_BT2X)
        windows = EntryWindows.of(seq, x_BTD, raw_BS2X.shape[1], self.ratio, self.ratio)
        return self.combine(windows.gather(raw_BS2X, self.before), windows.place_BE), windows

    def combine(self, raw_BEL2X: Tensor, place_BE: Tensor) -> Tensor:
        """Entries [B, E, K] of windows [B, E, L, 2, X] whose first tokens have the positions `place_BE`."""
        if self.before:
            first, second = raw_BEL2X.split(self.ratio, 2)
            raw_BEL2X = torch.cat([first[..., : self.dim], second[..., self.dim :]], 2)
        c_BELK, z_BELK = wide(raw_BEL2X).unbind(3)
        z_BELK = z_BELK + self.position_bias.to(z_BELK.dtype)
        if self.before:
            slot_L = torch.arange(2 * self.ratio, device=z_BELK.device)
            outside_BEL = (place_BE == 0)[..., None] & (slot_L < self.ratio)
            z_BELK = z_BELK.masked_fill(outside_BEL[..., None], -torch.inf)
            c_BELK = c_BELK.masked_fill(outside_BEL[..., None], 0.0)
        entries_BEK = self.norm((z_BELK.softmax(2) * c_BELK).sum(2).to(raw_BEL2X.dtype))
        return rotate_last(entries_BEK[:, :, None], self.rope, self.rotary_dim, SequenceInfo(place_BE))[:, :, 0]

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"position_bias": VECTOR})

    def new_cache(self, max_length: int) -> EntryCache:
        """The decode state of the entries, empty."""
        return EntryCache(max_length, self.ratio, self.ratio, self.before)


def entry_projection_weights(hidden_size: int, dim: int, overlap: bool) -> int:
    """Number of weights of the projections of `GatedEntries`."""
    return 2 * hidden_size * (1 + overlap) * dim


def entry_params(hidden_size: int, dim: int, ratio: int, overlap: bool) -> int:
    """Number of parameters of `GatedEntries`."""
    return entry_projection_weights(hidden_size, dim, overlap) + (1 + overlap) * ratio * dim + dim


def entry_state_numbers(context_length: int, dim: int, ratio: int, overlap: bool) -> int:
    """Numbers in the decode state of `GatedEntries` after `context_length` tokens.

    >>> entry_state_numbers(9, dim=1, ratio=4, overlap=False), entry_state_numbers(9, dim=1, ratio=4, overlap=True)
    (4, 22)
    """
    entries, open_tokens = count_entries(context_length, ratio, ratio)
    return dim * (entries + 2 * (1 + overlap) * (open_tokens + ratio * overlap))
