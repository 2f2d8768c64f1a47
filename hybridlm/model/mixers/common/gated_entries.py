"""Entries pooled from windows of tokens by a softmax over their slots, per channel, with learned logits.

    C, Z = W_c x, W_z x                                         values and logits of each token, per channel
    e_i  = norm(sum_j softmax_j(Z_j + b_j) * C_j)               j over the `ratio` tokens of window i

With overlap a token has two series of values and logits, and an entry has 2 `ratio` slots: the first series of the
window before, and the second one of its own; the first entry of a document has its own window alone. Only complete
windows have an entry. It is rotated to the position of the first token of its window. An entry of a single slot is
norm(C), without logits.

Sources: DeepSeek-V4, 2026, sections 2.3.1 (with overlap) and 2.3.2; DeepSeek-V4.1, 2026, for entries without b and of
one slot.
B rows, T tokens, E windows, D hidden size, K dims of an entry, m tokens of a window, L slots, X = K or 2 K, Y = 2
(values and logits) or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class EntryForm:
    """The sizes of entries, and what follows from them.

    Args:
        dim: dims of an entry K.
        ratio: tokens of a window m.
        overlap: an entry also pools the window before.
        position_bias: logits have a learned term per slot and channel.

    >>> form = EntryForm(dim=1, ratio=4, overlap=False)
    >>> form.state_numbers(9), EntryForm(dim=1, ratio=4, overlap=True).state_numbers(9)
    (4, 22)
    """

    dim: int
    ratio: int
    overlap: bool
    position_bias: bool = True

    @property
    def series(self) -> int:
        """Series of values per token."""
        return 1 + self.overlap

    @property
    def slots(self) -> int:
        """Slots of an entry L."""
        return self.series * self.ratio

    @property
    def projections(self) -> int:
        """Projections of a token per series: values, and logits where there is more than one slot."""
        return 1 + (self.slots > 1)

    @property
    def biased(self) -> bool:
        """Whether there are learned terms of logits."""
        return self.position_bias and self.slots > 1

    def of_dim(self, dim: int) -> EntryForm:
        """The same form with other dims."""
        return replace(self, dim=dim)

    def projection_weights(self, hidden_size: int) -> int:
        """Number of weights of the projections."""
        return hidden_size * self.projections * self.series * self.dim

    def num_params(self, hidden_size: int) -> int:
        """Number of parameters."""
        return self.projection_weights(hidden_size) + (self.biased * self.slots + 1) * self.dim

    def state_numbers(self, context_length: int) -> int:
        """Numbers in the decode state after `context_length` tokens."""
        entries, open_tokens = count_entries(context_length, self.ratio, self.ratio)
        kept = open_tokens + self.ratio * self.overlap
        return self.dim * (entries + self.projections * self.series * kept)


class GatedEntries(nn.Module):
    """Makes entries. Parameters: kv_proj [X, D] and norm; gate_proj [X, D] and position_bias [L, K] where the form has.

    Args:
        context: the layer.
        form: sizes of the entries.
        rope: rotary embedding of entries.
        rotary_dim: how many of their last dims it rotates.
    """

    def __init__(self, context: LayerContext, form: EntryForm, rope: RopeConfig, rotary_dim: int):
        super().__init__()
        self.form, self.dim, self.ratio, self.before = form, form.dim, form.ratio, form.ratio * form.overlap
        self.rope, self.rotary_dim = rope, rotary_dim
        self.kv_proj = nn.Linear(context.hidden_size, form.series * form.dim, bias=False)
        self.gate_proj = self.position_bias = None
        if form.slots > 1:
            self.gate_proj = nn.Linear(context.hidden_size, form.series * form.dim, bias=False)
        if form.biased:
            self.position_bias = nn.Parameter(torch.zeros(form.slots, form.dim))
        self.norm = RMSNorm.of(context.norm, form.dim)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, cache: EntryCache | None = None,
                derive: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Tensor, EntryWindows, Tensor | None]:
        """Entries of these tokens, with those of the cache before them, and their windows.

        Args:
            x_BTD: the tokens.
            seq: positions and borders of the documents.
            cache: entries of earlier tokens, updated in place; None in training.
            derive: makes more numbers [B, E, I] of entries before their rotation and the positions [B, E] of their
                first tokens; the cache keeps them behind the entries.

        Returns:
            Entries [B, E, K], their windows, and what `derive` made of them, None without it.
        """
        projections = [proj for proj in (self.kv_proj, self.gate_proj) if proj is not None]
        raw_BTYX = torch.stack([proj(x_BTD) for proj in projections], 2)

        def combine(raw_BELYX: Tensor, place_BE: Tensor) -> tuple[Tensor, Tensor | None]:
            plain_BEK, place = self.pool(raw_BELYX, place_BE), SequenceInfo(place_BE)
            entries_BEK = rotate_last(plain_BEK[:, :, None], self.rope, self.rotary_dim, place)[:, :, 0]
            return entries_BEK, None if derive is None else derive(plain_BEK, place_BE)

        if cache is not None:
            joined_BEX = cache.append(raw_BTYX, lambda raw, place: torch.cat(
                [part for part in combine(raw, place) if part is not None], -1))
            windows = EntryWindows.of(seq, x_BTD, cache.length, self.ratio, self.ratio)
            joined_BEX = windows.pad(joined_BEX)
            return joined_BEX[..., : self.dim], windows, None if derive is None else joined_BEX[..., self.dim :]
        raw_BSYX = seq.history(raw_BTYX)
        windows = EntryWindows.of(seq, x_BTD, raw_BSYX.shape[1], self.ratio, self.ratio)
        entries_BEK, derived_BEI = combine(windows.gather(raw_BSYX, self.before), windows.place_BE)
        return entries_BEK, windows, derived_BEI

    def pool(self, raw_BELYX: Tensor, place_BE: Tensor) -> Tensor:
        """Entries [B, E, K] before rotation, of windows [B, E, L, Y, X] whose first tokens have these positions."""
        if self.gate_proj is None:
            return self.norm(raw_BELYX[:, :, 0, 0])
        if self.before:
            first, second = raw_BELYX.split(self.ratio, 2)
            raw_BELYX = torch.cat([first[..., : self.dim], second[..., self.dim :]], 2)
        c_BELK, z_BELK = wide(raw_BELYX).unbind(3)
        if self.position_bias is not None:
            z_BELK = z_BELK + self.position_bias.to(z_BELK.dtype)
        if self.before:
            slot_L = torch.arange(2 * self.ratio, device=z_BELK.device)
            outside_BEL = (place_BE == 0)[..., None] & (slot_L < self.ratio)
            z_BELK = z_BELK.masked_fill(outside_BEL[..., None], -torch.inf)
            c_BELK = c_BELK.masked_fill(outside_BEL[..., None], 0.0)
        return self.norm((z_BELK.softmax(2) * c_BELK).sum(2).to(raw_BELYX.dtype))

    def init_weights(self) -> None:
        """Set what is no plain projection."""
        if self.position_bias is not None:
            nn.init.zeros_(self.position_bias)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {} if self.position_bias is None else {"position_bias": VECTOR})

    def new_cache(self, max_length: int) -> EntryCache:
        """The decode state of the entries, empty."""
        return EntryCache(max_length, self.ratio, self.ratio, self.before)
