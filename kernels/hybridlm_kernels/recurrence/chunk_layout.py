"""Documents cut into chunks: one layout for packed and plain batches.

A document of n tokens is cut into ceil(n / C) chunks of C tokens, the last one padded with zeros. Chunks are
ordered by step: first chunk 0 of every document, then chunk 1 of every document that has one, and so on, with
documents sorted by length, the longest first. So the documents that have a chunk at one step are a prefix of those at
the step before, and a scan over steps works on contiguous slices. Plain rows are documents of equal length.

The steps are processed in groups, each small enough for the caches of the processor.

Legend: B rows, T tokens per row, N documents, C tokens per chunk, P chunks, H heads, D dim.
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

# Elements in one tensor of a group of steps: what fits the second-level cache on CPUs, what fills the device elsewhere.
STEP_GROUP_MAX_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
MIN_CHUNK_TOKENS = 16
MAX_CHUNK_TOKENS_CPU = 32
MAX_CHUNK_TOKENS = 64


class ChunkLayout:
    """Positions of a batch's tokens in its chunks. `get_chunk_layout` makes it, and keeps it for later calls."""

    def __init__(self, batch: int, length: int, chunk: int, lengths: list[int], packed: bool, device: torch.device):
        self.batch = batch
        self.length = length
        self.chunk = chunk  # tokens per chunk
        self.packed = packed
        self.device = device
        order = np.argsort(-np.asarray(lengths), kind="stable")
        sizes = -(-np.asarray(lengths)[order] // chunk)  # chunks of every document, descending
        self.counts = [int((sizes > s).sum()) for s in range(int(sizes[0]))]  # documents that have a chunk at each step
        self.starts = [0, *accumulate(self.counts)]  # first chunk of every step
        self._cache: dict[tuple, Tensor] = {}
        self._step_groups: dict[int, list[StepGroup]] = {}
        sorted_already = bool((order == np.arange(len(order))).all())
        self.order = None if sorted_already else self.to_device(order)
        self.inverse_order = None if sorted_already else self.to_device(np.argsort(order))
        step = np.repeat(np.arange(len(self.counts)), self.counts)
        document = np.concatenate([np.arange(n) for n in self.counts])
        left = np.asarray(lengths)[order][document] - step * chunk
        self._first_token = np.cumsum([0, *lengths[:-1]])[order][document] + step * chunk
        self.tokens_per_chunk = np.minimum(left, chunk)  # [P] without padding

    def to_device(self, array: np.ndarray) -> Tensor:
        """The array as an int64 tensor on the layout's device."""
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

    def rows(self, heads: int) -> Tensor:
        """Row of every chunk position in a tensor [B*T*heads, D], int64 [P, heads, C]; any row for padding."""
        if ("rows", heads) not in self._cache:
            within = np.arange(self.chunk)
            token_PC = np.where(within < self.tokens_per_chunk[:, None], self._first_token[:, None] + within, 0)
            with torch.inference_mode(False):  # it may serve training after generation
                head_H1 = torch.arange(heads, device=self.device)[:, None]
                self._cache["rows", heads] = self.to_device(token_PC)[:, None] * heads + head_H1
        return self._cache["rows", heads]

    def positions(self, heads: int) -> Tensor:
        """Position in [P*heads*C, D] of every row of a tensor [B*T*heads, D], int64 [B*T*heads]."""
        if ("positions", heads) not in self._cache:
            chunk, position = np.nonzero(np.arange(self.chunk) < self.tokens_per_chunk[:, None])
            first_head = np.empty(self.batch * self.length, dtype=np.int64)
            first_head[self._first_token[chunk] + position] = chunk * heads * self.chunk + position
            with torch.inference_mode(False):
                head_H = torch.arange(heads, device=self.device) * self.chunk
                self._cache["positions", heads] = (self.to_device(first_head)[:, None] + head_H).view(-1)
        return self._cache["positions", heads]

    def step_groups(self, width: int) -> list[StepGroup]:
        """The steps in order, in groups whose tensors [P, C, width] stay below STEP_GROUP_MAX_ELEMENTS.

        A group has at least one step, whatever its size.
        """
        if width not in self._step_groups:
            elements = STEP_GROUP_MAX_ELEMENTS.get(self.device.type, STEP_GROUP_MAX_ELEMENTS["cuda"])
            max_chunks = elements // (self.chunk * width)
            borders = [0]
            for s in range(1, len(self.counts)):
                if self.starts[s + 1] - self.starts[borders[-1]] > max_chunks:
                    borders.append(s)
            borders.append(len(self.counts))
            self._step_groups[width] = [StepGroup(self, a, b) for a, b in pairwise(borders)]
        return self._step_groups[width]

    def allocate_output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A buffer that `StepGroup.scatter` fills, for an output of `shape` [B, T, heads] or [B, T, heads, dim]."""
        heads = shape[2]
        dim = shape[3] if len(shape) > 3 else 1
        if self.packed:
            buffer_shape = (self.starts[-1], heads, self.chunk, dim)
        else:
            buffer_shape = (self.batch, self.length, heads, dim)
        return torch.empty(buffer_shape, dtype=dtype, device=self.device)

    def finish_output(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        """The output of `shape` from its filled buffer."""
        if self.packed:
            heads, dim = buffer.shape[1], buffer.shape[3]
            buffer = buffer.view(-1, dim).index_select(0, self.positions(heads))
        return buffer.view(shape)

    def copy_states(self, state_NHvKV: Tensor | None, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A copy of the states [N, HV, K, V] in the layout's order of documents, zero for None."""
        if state_NHvKV is None:
            return torch.zeros(self.counts[0], *shape, dtype=dtype, device=self.device)
        return self.sort_documents(state_NHvKV).to(dtype, copy=True)

    def sort_documents(self, state_N: Tensor) -> Tensor:
        """Reorder tensors [N, ...] from the caller's order of documents to the layout's."""
        return state_N if self.order is None else state_N.index_select(0, self.order)

    def unsort_documents(self, state_N: Tensor) -> Tensor:
        """Reorder tensors [N, ...] from the layout's order of documents back to the caller's."""
        return state_N if self.inverse_order is None else state_N.index_select(0, self.inverse_order)


class StepGroup:
    """Consecutive steps of a layout that are processed together: chunks `start` to `end`."""

    def __init__(self, layout: ChunkLayout, first_step: int, end_step: int):
        self.layout = layout
        self.first_step = first_step
        self.end_step = end_step
        self.start = layout.starts[first_step]
        self.end = layout.starts[end_step]
        self.counts = layout.counts[first_step:end_step]
        self.chunks = self.end - self.start
        self.live = self.counts[0]  # documents that have a chunk in the group
        self.slots = StateSlots(self.counts, layout)
        tokens_per_chunk = layout.tokens_per_chunk[self.start : self.end]
        chunk, position = np.nonzero(np.arange(layout.chunk) >= tokens_per_chunk[:, None])
        # Padded positions (chunks, and positions in them) and the tokens of every chunk; None without padding.
        self.padding = (layout.to_device(chunk), layout.to_device(position)) if len(chunk) else None
        self.tokens_per_chunk = layout.to_device(tokens_per_chunk) if len(chunk) else None

    def gather(self, x_BTHD: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The chunks [P, H, C, D] of this group, zero where padded: in `out`, else in a new tensor."""
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

    def scatter(self, y_PHCD: Tensor, buffer: Tensor) -> None:
        """Write this group's chunks into `buffer`, which `ChunkLayout.allocate_output` made."""
        layout, C = self.layout, self.layout.chunk
        if layout.packed:
            buffer[self.start : self.end] = y_PHCD
            return
        first, end = self.first_step * C, min(self.end_step * C, layout.length)
        full_chunks = (end - first) // C
        y_BSCHD = y_PHCD.unflatten(0, (-1, layout.batch)).permute(1, 0, 3, 2, 4)
        out_BtHD = buffer[:, first:end]
        out_BtHD[:, : full_chunks * C].unflatten(1, (full_chunks, C)).copy_(y_BSCHD[:, :full_chunks])
        if full_chunks * C < end - first:
            out_BtHD[:, full_chunks * C :].copy_(y_BSCHD[:, full_chunks, : end - first - full_chunks * C])

    def sum_tokens(self, x_PHvC1: Tensor) -> Tensor:
        """The sum over this group's tokens, [HV]. Sets the padding of `x` to zero."""
        if self.padding is not None:
            chunk, position = self.padding
            x_PHvC1[chunk, :, position] = 0
        return x_PHvC1.sum((0, 2, 3))


class StateSlots:
    """Slots for the states of a scan over a group of steps: every step reads and writes one contiguous slice.

    Slot s holds the states at the start of step s of all documents that had a chunk at step s - 1: first those
    that go on, then those that have ended. The last slot follows the last step.
    """

    def __init__(self, counts: list[int], layout: ChunkLayout):
        entries = [counts[0], *counts]  # states per slot
        first_of_slot = [0, *accumulate(entries)]
        self.counts = counts
        self.live = counts[0]
        self.size = first_of_slot[-1]
        self.uniform = counts[0] == counts[-1]  # no document ends before the last step
        if not self.uniform:
            before, after, last = [], [], np.zeros(counts[0], dtype=np.int64)
            for s, n in enumerate(counts):
                before.append(first_of_slot[s] + np.arange(n))
                after.append(first_of_slot[s + 1] + np.arange(n))
                last[:n] = after[-1]
            self.before_P = layout.to_device(np.concatenate(before))
            self.after_P = layout.to_device(np.concatenate(after))
            self.last_N = layout.to_device(last)

    def steps(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For every step the states at its start and those after it: slices [n * heads, K, V] of the memory
        `states` [size, heads, K, V]."""
        heads = states.shape[1]
        slots = states.flatten(0, 1).split([n * heads for n in (self.counts[0], *self.counts)])
        if self.uniform:
            return list(pairwise(slots))
        return [(slot[: n * heads], after) for slot, after, n in zip(slots, slots[1:], self.counts, strict=False)]

    def slice_steps(self, x_XD: Tensor, heads: int) -> Sequence[Tensor]:
        """The slices [n * heads, ...] of every step of `x` [P * heads, ...]."""
        return x_XD.split([n * heads for n in self.counts])

    def before_chunks(self, states: Tensor) -> Tensor:
        """The state at the start of every chunk, [P, ...]."""
        return states[: -self.live] if self.uniform else states.index_select(0, self.before_P)

    def after_chunks(self, states: Tensor) -> Tensor:
        """The state after every chunk, [P, ...]."""
        return states[self.live :] if self.uniform else states.index_select(0, self.after_P)

    def last(self, states: Tensor) -> Tensor:
        """The state of every document after its last step in the group, [live, ...]."""
        return states[-self.live :] if self.uniform else states.index_select(0, self.last_N)

    def put_last(self, states: Tensor, value: Tensor) -> None:
        """Write what `last` reads."""
        if self.uniform:
            states[-self.live :] = value
        else:
            states.index_copy_(0, self.last_N, value)

    def put_before_chunks(self, states: Tensor, value: Tensor) -> None:
        """Write what `before_chunks` reads."""
        if self.uniform:
            states[: -self.live] = value
        else:
            states.index_copy_(0, self.before_P, value)


def to_chunks(x_BTHD: Tensor, layout: ChunkLayout) -> Tensor:
    """The chunks [P, H, C, D] of all tokens, in the layout's order; autograd sees through it.

    Those of packed documents are padded with copies of other tokens, those of plain rows with zeros.
    """
    B, T, H, D = x_BTHD.shape
    if layout.packed:
        return x_BTHD.reshape(B * T * H, D).index_select(0, layout.rows(H).flatten()).view(-1, H, layout.chunk, D)
    padded = pad(x_BTHD, (0, 0, 0, 0, 0, -T % layout.chunk))
    return padded.unflatten(1, (-1, layout.chunk)).permute(1, 0, 3, 2, 4).flatten(0, 1)


def from_chunks(x_PHCD: Tensor, layout: ChunkLayout) -> Tensor:
    """The inverse of `to_chunks`: [B, T, H, D]."""
    _, H, _, D = x_PHCD.shape
    if layout.packed:
        return x_PHCD.reshape(-1, D).index_select(0, layout.positions(H)).view(layout.batch, layout.length, H, D)
    return x_PHCD.unflatten(0, (-1, layout.batch)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : layout.length]


def chunk_size(length: int, borders: CuSeqlens | None, device: torch.device) -> int:
    """Tokens per chunk, a power of two; short documents get chunks that are no longer than they need."""
    longest = length if borders is None else max(borders.lengths)
    most = MAX_CHUNK_TOKENS_CPU if device.type == "cpu" else MAX_CHUNK_TOKENS
    return min(max(MIN_CHUNK_TOKENS, 1 << (longest - 1).bit_length()), most)


def get_chunk_layout(batch: int, length: int, chunk: int, borders: CuSeqlens | None,
                     device: torch.device) -> ChunkLayout:
    """The layout of a batch; layouts of packed batches are kept with their borders, plain ones by their size."""
    if borders is None:
        return _layout_of_plain_rows(batch, length, chunk, device)
    key = ("chunks", batch, length, chunk, device)
    if key not in borders.cache:
        borders.cache[key] = ChunkLayout(batch, length, chunk, borders.lengths, True, device)
    return borders.cache[key]


@lru_cache(maxsize=64)
def _layout_of_plain_rows(batch: int, length: int, chunk: int, device: torch.device) -> ChunkLayout:
    return ChunkLayout(batch, length, chunk, [length] * batch, False, device)
