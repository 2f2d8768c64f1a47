"""Documents cut into chunks: one layout for packed and plain batches.

A document of n tokens is cut into ceil(n / C) chunks of C tokens, the last one padded with zeros. Chunks are
ordered by step: first chunk 0 of every document, then chunk 1 of every document that has one, and so on, with
documents sorted by length, the longest first. So the documents alive at a step are a prefix of those alive at
the step before, and a scan over steps works on contiguous slices. Plain rows are documents of equal length.

The steps are worked off in segments, few enough at a time for the caches of the processor.

Legend: B rows, T tokens a row, N documents, C tokens a chunk, P chunks, H heads, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridlm_kernels.packing import CuSeqlens

# Numbers in one tensor of a segment: what fits the second-level cache on CPUs, what fills the device elsewhere.
SEGMENT_NUMBERS = {"cpu": 2**18, "cuda": 2**26}


class Layout:
    """Where the tokens of a batch stand in its chunks. Made by `layout_of`, which remembers it."""

    def __init__(self, batch: int, length: int, chunk: int, lengths: list[int], packed: bool,
                 device: torch.device):
        self.batch, self.length, self.chunk, self.packed, self.device = batch, length, chunk, packed, device
        order = np.argsort(-np.asarray(lengths), kind="stable")
        sizes = -(-np.asarray(lengths)[order] // chunk)  # chunks of every document, descending
        self.counts = [int((sizes > s).sum()) for s in range(int(sizes[0]))]  # documents alive at every step
        self.starts = [0, *accumulate(self.counts)]  # first chunk of every step
        self._cache: dict[tuple, Tensor] = {}
        self._segments: dict[int, list[Segment]] = {}
        sorted_already = bool((order == np.arange(len(order))).all())
        self.order = None if sorted_already else self._tensor(order)
        self.inverse_order = None if sorted_already else self._tensor(np.argsort(order))
        step = np.repeat(np.arange(len(self.counts)), self.counts)
        document = np.concatenate([np.arange(n) for n in self.counts])
        left = np.asarray(lengths)[order][document] - step * chunk
        self._first_token = np.cumsum([0, *lengths[:-1]])[order][document] + step * chunk
        self._filled = np.minimum(left, chunk)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

    def rows(self, heads: int) -> Tensor:
        """int64 [P, heads, C]: the row of every chunk position in a tensor [B*T*heads, D]; any for padding."""
        if ("rows", heads) not in self._cache:
            within = np.arange(self.chunk)
            token_PC = np.where(within < self._filled[:, None], self._first_token[:, None] + within, 0)
            head_H1 = torch.arange(heads, device=self.device)[:, None]
            self._cache["rows", heads] = self._tensor(token_PC)[:, None] * heads + head_H1
        return self._cache["rows", heads]

    def positions(self, heads: int) -> Tensor:
        """int64 [B*T*heads]: for every row of a tensor [B*T*heads, D], where it stands in [P*heads*C, D]."""
        if ("positions", heads) not in self._cache:
            chunk, place = np.nonzero(np.arange(self.chunk) < self._filled[:, None])
            first_head = np.empty(self.batch * self.length, dtype=np.int64)
            first_head[self._first_token[chunk] + place] = chunk * heads * self.chunk + place
            head_H = torch.arange(heads, device=self.device) * self.chunk
            self._cache["positions", heads] = (self._tensor(first_head)[:, None] + head_H).view(-1)
        return self._cache["positions", heads]

    def segments(self, width: int) -> list[Segment]:
        """The steps in order, in groups of about SEGMENT_NUMBERS / (C * width) chunks (at least one step)."""
        if width not in self._segments:
            limit = SEGMENT_NUMBERS.get(self.device.type, SEGMENT_NUMBERS["cuda"]) // (self.chunk * width)
            borders = [0]
            for s in range(1, len(self.counts)):
                if self.starts[s + 1] - self.starts[borders[-1]] > limit:
                    borders.append(s)
            borders.append(len(self.counts))
            self._segments[width] = [Segment(self, a, b) for a, b in pairwise(borders)]
        return self._segments[width]

    def new_output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for what `Segment.scatter` writes; `finish` makes a tensor of `shape` [B, T, heads(, dim)] of it."""
        heads, dim = shape[2], (shape[3] if len(shape) > 3 else 1)
        room = ((self.starts[-1], heads, self.chunk, dim) if self.packed
                else (self.batch, self.length, heads, dim))
        return torch.empty(room, dtype=dtype, device=self.device)

    def finish(self, room: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of `shape` from the filled room."""
        if self.packed:
            heads, dim = room.shape[1], room.shape[3]
            room = room.view(-1, dim).index_select(0, self.positions(heads))
        return room.view(shape)

    def new_states(self, state_NGKV: Tensor | None, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A copy of the states [N, G, K, V] in the layout's order of documents, zero for None."""
        if state_NGKV is None:
            return torch.zeros(self.counts[0], *shape, dtype=dtype, device=self.device)
        return self.sort(state_NGKV).to(dtype, copy=True)

    def sort(self, state_N: Tensor) -> Tensor:
        """From the caller's order of documents to the layout's."""
        return state_N if self.order is None else state_N.index_select(0, self.order)

    def unsort(self, state_N: Tensor) -> Tensor:
        """Back to the caller's order."""
        return state_N if self.inverse_order is None else state_N.index_select(0, self.inverse_order)


class Segment:
    """Consecutive steps of a layout, worked off together: chunks `start` to `end`."""

    def __init__(self, layout: Layout, first_step: int, end_step: int):
        self.layout, self.first_step, self.end_step = layout, first_step, end_step
        self.start, self.end = layout.starts[first_step], layout.starts[end_step]
        self.counts = layout.counts[first_step:end_step]
        self.chunks = self.end - self.start
        self.live = self.counts[0]  # documents that enter
        self.scan = Scan(self.counts, layout)
        filled = layout._filled[self.start : self.end]
        chunk, position = np.nonzero(np.arange(layout.chunk) >= filled[:, None])
        # Where padding stands (chunks and positions in them), and the tokens of every chunk; None without padding.
        self.padding = (layout._tensor(chunk), layout._tensor(position)) if len(chunk) else None
        self.filled = layout._tensor(filled) if len(chunk) else None

    def gather(self, x_BTHD: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[P, H, C, D] of this segment's chunks, zero where padded: in `out`, else in a new tensor."""
        layout, C = self.layout, self.layout.chunk
        B, T, H, D = x_BTHD.shape
        if layout.packed:
            rows = layout.rows(H)[self.start : self.end].reshape(-1)
            x_PHCD = x_BTHD.reshape(B * T * H, D).index_select(0, rows).to(dtype).view(self.chunks, H, C, D)
            if self.padding is not None:
                chunk, position = self.padding
                x_PHCD[chunk, :, position] = 0
            return x_PHCD if out is None else out.copy_(x_PHCD)
        first, end = self.first_step * C, min(self.end_step * C, T)
        x_BtHD = x_BTHD[:, first:end]
        if self.end_step * C > T:
            x_BtHD = pad(x_BtHD, (0, 0, 0, 0, 0, self.end_step * C - T))
        if out is None:
            out = torch.empty(self.chunks, H, C, D, dtype=dtype, device=layout.device)
        out.unflatten(0, (-1, B)).copy_(x_BtHD.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4))
        return out

    def scatter(self, y_PHCD: Tensor, room: Tensor) -> None:
        """Write this segment's chunks into `room`, which `Layout.new_output` made."""
        layout, C = self.layout, self.layout.chunk
        if layout.packed:
            room[self.start : self.end] = y_PHCD
            return
        first, end = self.first_step * C, min(self.end_step * C, layout.length)
        whole = (end - first) // C
        y_BSCHD = y_PHCD.unflatten(0, (-1, layout.batch)).permute(1, 0, 3, 2, 4)
        out_BtHD = room[:, first:end]
        out_BtHD[:, : whole * C].unflatten(1, (whole, C)).copy_(y_BSCHD[:, :whole])
        if whole * C < end - first:
            out_BtHD[:, whole * C :].copy_(y_BSCHD[:, whole, : end - first - whole * C])


    def sum_tokens(self, x_PGC1: Tensor) -> Tensor:
        """[G]: the sum over this segment's tokens. Sets the padding of `x` to zero."""
        if self.padding is not None:
            chunk, position = self.padding
            x_PGC1[chunk, :, position] = 0
        return x_PGC1.sum((0, 2, 3))


class Scan:
    """Room for the states of a segment's scan, such that every step reads and writes one contiguous slice.

    Slot s holds the states at the start of step s of all documents that were alive at step s - 1: first those
    that go on, then those that have ended. The last slot follows the last step.
    """

    def __init__(self, counts: list[int], layout: Layout):
        before = [counts[0], *counts]  # entries of every slot
        self.slots = [0, *accumulate(before)]
        self.counts = counts
        self.live = counts[0]
        self.size = self.slots[-1]
        self.uniform = counts[0] == counts[-1]
        if not self.uniform:
            entry, after, last = [], [], np.zeros(counts[0], dtype=np.int64)
            for s, n in enumerate(counts):
                entry.append(self.slots[s] + np.arange(n))
                after.append(self.slots[s + 1] + np.arange(n))
                last[:n] = after[-1]
            self.entry_P = layout._tensor(np.concatenate(entry))
            self.after_P = layout._tensor(np.concatenate(after))
            self.last_N = layout._tensor(last)

    def steps(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For every step (states at its start, states after it), slices [n * heads, K, V] of the room
        `states` [size, heads, K, V]."""
        heads = states.shape[1]
        slots = states.flatten(0, 1).split([n * heads for n in (self.counts[0], *self.counts)])
        if self.uniform:
            return list(pairwise(slots))
        return [(slot[: n * heads], after) for slot, after, n in zip(slots, slots[1:], self.counts, strict=False)]

    def split(self, x_XD: Tensor, heads: int) -> Sequence[Tensor]:
        """The slices [n * heads, ...] of every step of `x` [P * heads, ...]."""
        return x_XD.split([n * heads for n in self.counts])

    def at_start(self, states: Tensor) -> Tensor:
        """[P, ...]: the state at the start of every chunk."""
        return states[: -self.live] if self.uniform else states.index_select(0, self.entry_P)

    def after(self, states: Tensor) -> Tensor:
        """[P, ...]: the state after every chunk."""
        return states[self.live :] if self.uniform else states.index_select(0, self.after_P)

    def last(self, states: Tensor) -> Tensor:
        """[live, ...]: the state of every document that entered, after its last step here."""
        return states[-self.live :] if self.uniform else states.index_select(0, self.last_N)

    def put_last(self, states: Tensor, value: Tensor) -> None:
        """The inverse of `last`."""
        if self.uniform:
            states[-self.live :] = value
        else:
            states.index_copy_(0, self.last_N, value)

    def put_at_start(self, states: Tensor, value: Tensor) -> None:
        """The inverse of `at_start`."""
        if self.uniform:
            states[: -self.live] = value
        else:
            states.index_copy_(0, self.entry_P, value)


def chunk_size(length: int, borders: CuSeqlens | None, device: torch.device) -> int:
    """Tokens a chunk, a power of two from 16; short documents need no more than their length."""
    longest = length if borders is None else max(borders.lengths)
    return min(max(16, 1 << (longest - 1).bit_length()), 32 if device.type == "cpu" else 64)


def layout_of(batch: int, length: int, chunk: int, borders: CuSeqlens | None, device: torch.device) -> Layout:
    """The layout of a batch; packed ones are kept with their borders, plain ones by their size."""
    if borders is None:
        return _plain_layout(batch, length, chunk, device)
    key = ("chunks", batch, length, chunk, device)
    if key not in borders.cache:
        borders.cache[key] = Layout(batch, length, chunk, borders.lengths, True, device)
    return borders.cache[key]


@lru_cache(maxsize=64)
def _plain_layout(batch: int, length: int, chunk: int, device: torch.device) -> Layout:
    return Layout(batch, length, chunk, [length] * batch, False, device)
