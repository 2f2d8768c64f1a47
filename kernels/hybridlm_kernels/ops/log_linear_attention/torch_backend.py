"""Log-linear attention as a few calls of a recurrence, linear attention or the delta rule, in torch operations.

A token reads the block of b tokens just before its own aligned block of b: one call per level on documents of 2 b
tokens, whose second halves write nothing, gives all these reads. Levels whose blocks lie inside one tile of TILE tokens
take one call together: with the place in the tile as value, its output at t is the weight of every token of the tile at
t, and each weight gets the scale of its level. Everything older than the largest block is the recurrence over the whole
document less that over the token's own block.
(Guo et al. 2025, Log-Linear Attention, section 3.2, with tiles as chunks.)

Legend: B rows, T tokens, H key heads, HV value heads, K/V key/value head dim, L levels, C tokens of a tile, M tiles,
N documents, n parts of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.delta_rule import delta_rule
from hybridlm_kernels.ops.linear_attention import linear_attention
from hybridlm_kernels.ops.log_linear_attention.reference import level_of
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.chunk_layout import from_chunks, get_chunk_layout, to_chunks

TILE_LEVELS = 5  # levels 1 .. 5 have blocks of up to half a tile
TILE = 1 << TILE_LEVELS
STEPPED_MAX_TOKENS = 8  # up to so many tokens a decode state is continued token by token


def log_linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, lambda_BTHvL: Tensor, g: Tensor | None,
                         beta_BTHv: Tensor | None, scale: float, state_NXHvKV: Tensor | None,
                         borders: CuSeqlens | None, tokens_seen: int, final_state: bool) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    T = v_BTHvV.shape[1]
    rule = Recurrence(q_BTHK, k_BTHK, g, beta_BTHv, scale)
    stepped = min(T, -tokens_seen % TILE)
    if state_NXHvKV is not None and T <= STEPPED_MAX_TOKENS:
        stepped = T
    outputs = []
    if stepped:
        assert state_NXHvKV is not None
        o, state_NXHvKV = _step(rule.tokens(0, stepped), v_BTHvV[:, :stepped], lambda_BTHvL, state_NXHvKV, tokens_seen)
        outputs.append(o)
    if stepped < T:
        o, state_NXHvKV = _Levels(rule.tokens(stepped, T), v_BTHvV[:, stepped:], lambda_BTHvL[:, stepped:],
                                  state_NXHvKV, tokens_seen + stepped, borders, final_state).run()
        outputs.append(o)
    assert state_NXHvKV is not None
    return torch.cat(outputs, 1) if len(outputs) > 1 else o, state_NXHvKV if final_state else state_NXHvKV[:, :0]


@dataclass(frozen=True)
class Recurrence:
    """Linear attention, or with beta the delta rule: a map from values and states that is linear in both."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    g: Tensor | None
    beta_BTHv: Tensor | None
    scale: float

    def tokens(self, first: int, end: int) -> Recurrence:
        """The recurrence on tokens first .. end - 1 of every row."""
        if (first, end) == (0, self.q_BTHK.shape[1]):
            return self
        g, beta = (None if x is None else x[:, first:end] for x in (self.g, self.beta_BTHv))
        return Recurrence(self.q_BTHK[:, first:end], self.k_BTHK[:, first:end], g, beta, self.scale)

    def __call__(self, v_BTHvV: Tensor, state_nHvKV: Tensor | None, borders: CuSeqlens | None,
                 final_state: bool = True) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"g": self.g, "scale": self.scale, "initial_state": state_nHvKV,
                                   "cu_seqlens": borders, "final_state": final_state}
        if self.beta_BTHv is None:
            return linear_attention(self.q_BTHK, self.k_BTHK, v_BTHvV, **options)
        return delta_rule(self.q_BTHK, self.k_BTHK, v_BTHvV, beta=self.beta_BTHv, **options)


def _step(rule: Recurrence, v_BTHvV: Tensor, lambda_BTHvL: Tensor, state_BXHvKV: Tensor,
          tokens_seen: int) -> tuple[Tensor, Tensor]:
    """Token by token: the states of all levels are columns of one state, the token's own write is the last of them."""
    levels, V = lambda_BTHvL.shape[-1], v_BTHvV.shape[-1]
    states = list(state_BXHvKV.unbind(1))
    empty = torch.zeros_like(states[0])
    outputs = []
    for t in range(v_BTHvV.shape[1]):
        value = F.pad(v_BTHvV[:, t : t + 1], ((levels - 1) * V, 0))
        read, after = rule.tokens(t, t + 1)(value, torch.cat([*states, empty], -1), None)
        scales = lambda_BTHvL[:, t : t + 1].roll(-1, -1)
        outputs.append((scales.to(after.dtype)[..., None] * read.unflatten(-1, (levels, V))).sum(-2))
        *states, write = after.split(V, -1)
        level = 1
        while level < levels - 1 and (tokens_seen + t) >> (level - 1) & 1:  # two blocks of a level are one of the next
            write, states[level - 1] = write + states[level - 1], empty
            level += 1
        states[level - 1] = states[level - 1] + write if level == levels - 1 else write
    return torch.cat(outputs, 1).to(v_BTHvV.dtype), torch.stack(states, 1)


class _Levels:
    """All tokens at once, from the border of a tile on."""

    def __init__(self, rule: Recurrence, v_BTHvV: Tensor, lambda_BTHvL: Tensor, state_NXHvKV: Tensor | None,
                 tokens_seen: int, borders: CuSeqlens | None, final_state: bool):
        self.rule, self.v, self.scales, self.state = rule, v_BTHvV, lambda_BTHvL, state_NXHvKV
        self.tokens_seen, self.final_state = tokens_seen, final_state
        B, T, device = *v_BTHvV.shape[:2], v_BTHvV.device
        self.documents = _rows(B, T, device) if borders is None else borders
        self.positions_BT = self.documents.positions().view(B, T) + tokens_seen
        self.longest = tokens_seen + max(self.documents.lengths)
        self.dtype = math_dtype(v_BTHvV)

    def run(self) -> tuple[Tensor, Tensor]:
        """The outputs [B, T, HV, V] and the states of all levels [N, L - 1, HV, K, V]; without a state [N, 0, ...]."""
        largest = self.scales.shape[-1] - 1
        o, states = self._inside_tiles()
        last_block = TILE if largest <= TILE_LEVELS else 1 << (largest - 1)
        for level in range(TILE_LEVELS + 1, largest):
            if self._is_reached(1 << (level - 1)):
                added, final = self._one_level(1 << (level - 1), self._earlier(level))
                o, states = self._add(o, states, level, added, final)
        if self._is_reached(last_block):
            whole = self.longest > 2 * last_block or (self.final_state and self.longest == 2 * last_block)
            added, final = (self._older(last_block) if whole else
                            self._one_level(last_block, self._earlier(largest)))
            o, states = self._add(o, states, largest, added, final)
        return o.to(self.v.dtype), states

    def _is_reached(self, block: int) -> bool:
        return self.longest > block or (self.final_state and self.longest == block)

    def _add(self, o: Tensor, states: Tensor, level: int, added: Tensor, final_NHvKV: Tensor) -> tuple[Tensor, Tensor]:
        o = o + self.scales[..., level, None].to(self.dtype) * added.to(self.dtype)
        if self.final_state:
            states = states.index_add(1, torch.tensor([level - 1], device=o.device), final_NHvKV[:, None])
        return o, states

    def _inside_tiles(self) -> tuple[Tensor, Tensor]:
        """Reads of tokens of the same tile, and states of the blocks in the last tile of every document."""
        levels, (HV, V) = self.scales.shape[-1], self.v.shape[2:]
        place_BT = self.positions_BT % TILE
        tiles = self._cut(TILE)
        place_BTHvC = F.one_hot(place_BT, TILE).to(self.v.dtype)[:, :, None].expand(-1, -1, HV, -1)
        weight_BTHvC, keys_MHvKC = self.rule(place_BTHvC, None, tiles, self.final_state)
        table_CC = _level_table(levels).to(place_BT.device)
        level_BTHvC = table_CC[place_BT][:, :, None].expand(-1, -1, HV, -1)
        weight_BTHvC = weight_BTHvC * self.scales.to(self.dtype).gather(-1, level_BTHvC)
        layout = get_chunk_layout(self.v.shape[0], self.v.shape[1], TILE, tiles, self.v.device)
        v_MHvCV = to_chunks(self.v.to(self.dtype), layout)
        o = from_chunks(to_chunks(weight_BTHvC, layout) @ v_MHvCV, layout)
        if not self.final_state:
            return o, keys_MHvKC.new_zeros(self.documents.num_documents, 0, HV, keys_MHvKC.shape[2], V)
        last = self._last_part(TILE)
        v_NHvCV = layout.unsort_documents(v_MHvCV).index_select(0, last)
        end_N = (self.documents.table.diff() + self.tokens_seen) % TILE  # before the next token
        written_N1C = torch.arange(TILE) < end_N[:, None, None]
        in_level_NLC = (_level_table(levels)[end_N][:, None] == torch.arange(1, levels)[:, None]) & written_N1C
        in_level_NLC = in_level_NLC.to(keys_MHvKC)
        keys_NHvKC = keys_MHvKC.index_select(0, last)
        return o, torch.einsum("nlc,nhkc,nhcv->nlhkv", in_level_NLC, keys_NHvKC, v_NHvCV)

    def _one_level(self, block: int, start_NHvKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reads of the block of `block` tokens before the token's own, and its state at the end of every document."""
        reads_BT = (self.positions_BT // block % 2).bool()[..., None, None]
        parts = self._cut(2 * block)
        o, states_nHvKV = self.rule(torch.where(reads_BT, 0.0, self.v), self._at_first_parts(start_NHvKV, parts), parts,
                                    self.final_state)
        final_NHvKV = states_nHvKV
        if self.final_state:
            open_N = (self.documents.table.diff() + self.tokens_seen) // block % 2 == 1
            final_NHvKV = torch.where(open_N.to(o.device)[:, None, None, None],
                                      states_nHvKV.index_select(0, self._last_part(2 * block)), 0.0)
        return torch.where(reads_BT, o, 0.0), final_NHvKV

    def _older(self, block: int) -> tuple[Tensor, Tensor]:
        """Reads of all blocks of `block` tokens before the token's own, and the state of them at the end."""
        parts = self._cut(block)
        everything = None if self.state is None else self.state.sum(1)
        inside = None if self.state is None else self.state[:, :-1].sum(1)
        o, final_NHvKV = self.rule(self.v, everything, self.documents, self.final_state)
        own_o, own_nHvKV = self.rule(self.v, self._at_first_parts(inside, parts), parts, self.final_state)
        if self.final_state:
            open_N = (self.documents.table.diff() + self.tokens_seen) % block != 0
            own_NHvKV = own_nHvKV.index_select(0, self._last_part(block))
            final_NHvKV = final_NHvKV - torch.where(open_N.to(o.device)[:, None, None, None], own_NHvKV, 0.0)
        return o - own_o, final_NHvKV

    def _earlier(self, level: int) -> Tensor | None:
        """The state before the first token of the open block of 2^level tokens, as the start of a call for `level`."""
        if self.state is None:
            return None
        block = 1 << (level - 1)
        if level == self.state.shape[1]:
            block = max(block, TILE)
        if self.tokens_seen // block % 2:
            return self.state[:, level - 1]
        return self.state[:, : level - 1].sum(1) if self.tokens_seen % (2 * block) else None

    def _cut(self, tokens: int) -> CuSeqlens:
        """The documents cut at multiples of `tokens`, counted from the start of each."""
        key = ("log_linear_attention", tokens, self.tokens_seen)
        if key not in self.documents.cache:
            first = tokens - self.tokens_seen % tokens
            cuts = [0]
            for start, end in pairwise(self.documents.host):
                cuts += [*range(start + first, end, tokens), end]
            self.documents.cache[key] = CuSeqlens(cuts, self.v.device)
        return self.documents.cache[key]

    def _last_part(self, tokens: int) -> Tensor:
        """The number of the last part of every document, int64 [N]."""
        parts, ends = self._cut(tokens), self.documents.table[1:]
        return torch.searchsorted(parts.table[1:], ends).to(self.v.device)

    def _at_first_parts(self, start_NHvKV: Tensor | None, parts: CuSeqlens) -> Tensor | None:
        """Initial states of all parts: those of the documents for their first parts, zero for the others."""
        if start_NHvKV is None:
            return None
        first_N = torch.searchsorted(parts.table[:-1], self.documents.table[:-1]).to(self.v.device)
        empty = start_NHvKV.new_zeros(parts.num_documents, *start_NHvKV.shape[1:])
        return empty.index_copy(0, first_N, start_NHvKV)


@lru_cache(maxsize=16)
def _rows(batch: int, length: int, device: torch.device) -> CuSeqlens:
    return CuSeqlens(range(0, (batch + 1) * length, length), device)


@lru_cache(maxsize=16)
def _level_table(levels: int) -> Tensor:
    """The level at which place t of a tile reads place s <= t, int64 [C, C]; 0 for later places."""
    return torch.tensor([[level_of(t, s, levels) if s <= t else 0 for s in range(TILE)] for t in range(TILE)])
