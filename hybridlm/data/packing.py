"""Windows of packed documents, and batches of them.

The tokens of a split are one stream, cut into windows of T tokens; the last one is padded. Every document ends
with the end-of-text token. Shapes: B rows, T tokens per row, D = 1 + depth targets per position.
    targets[t, d] = token t + 1 + d, or -100 where that lies in another document (or is padding).
Targets at the end of a window come from the tokens after it, so no token of a document is predicted by nobody
except its first, and none is predicted twice in an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hybridlm.data.order import SampleOrder, WindowPlace
from hybridlm.data.shards import TokenStore
from hybridlm.errors import DataError
from hybridlm_kernels.packing import CuSeqlens

IGNORE = -100  # target of a position that counts in no loss


@dataclass
class Sample:
    """One window of tokens; `borders` are the starts of its documents and of its padding, 0 first."""

    input_ids: Tensor  # int64 [T]
    targets: Tensor  # int64 [T, D]
    borders: list[int]
    num_tokens: int  # positions with a next-token target
    num_bytes: int  # UTF-8 bytes of those targets
    index: int
    place: WindowPlace
    num_text_tokens: int  # tokens before the padding


@dataclass
class Batch:
    """Rows of packed documents with their targets and borders.

    `num_tokens` and `num_bytes` count the next-token targets: loss sum / (num_bytes ln 2) is bits per byte.
    `sample_ids` are the sample indices of the rows.
    """

    input_ids: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T, D]
    cu_seqlens: CuSeqlens
    num_bytes: int
    num_tokens: int
    sample_ids: tuple[int, ...]
    text_mask: Tensor | None = None  # bool [B, T], False for padding; None: there is none

    @property
    def num_text_tokens(self) -> int:
        """Number of tokens that are no padding."""
        return self.input_ids.numel() if self.text_mask is None else int(self.text_mask.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy the batch to `device`."""
        return replace(self, input_ids=self.input_ids.to(device, non_blocking=non_blocking),
                       targets=self.targets.to(device, non_blocking=non_blocking),
                       cu_seqlens=CuSeqlens(self.cu_seqlens.host, device))

    def pin_memory(self) -> Batch:
        """Copy the batch into page-locked memory, from which a GPU copies without making the host wait."""
        return replace(self, input_ids=self.input_ids.pin_memory(), targets=self.targets.pin_memory())


class PackedDataset(Dataset):
    """Packed windows of token stores, numbered without end; a map-style dataset of torch for use with `collate`.

    `sample(index)` is a pure function of the arguments and the index. `len` is the number of windows of all stores.

    Args:
        stores: tokenized sources.
        sequence_length: tokens T per window, at least 2.
        depth: targets beyond the next token (multi-token prediction).
        seed: of the order.
        weights: of the sources in the mixture; default the stores' own.
        shuffle: a new order of windows in every epoch, sources mixed by weight; False reads the stream in order, as
            validation does.
        whole_blocks: the order of runs of an earlier version; see `SampleOrder`.

    Raises:
        DataError: no tokens; a sequence length below 2.
    """

    def __init__(self, stores: TokenStore | Sequence[TokenStore], sequence_length: int, depth: int = 0,
                 seed: int = 0, *, weights: Sequence[float] | None = None, shuffle: bool = True,
                 whole_blocks: bool = False):
        self.stores = [stores] if isinstance(stores, TokenStore) else list(stores)
        if sequence_length < 2:
            raise DataError(f"sequence length: got {sequence_length}; a window needs at least 2 tokens")
        empty = [store.name or "the token store" for store in self.stores if store.num_tokens < 2]
        if empty or not self.stores:
            raise DataError(f"{', '.join(empty) or 'data'}: no tokens to read")
        self.sequence_length, self.depth, self.seed = sequence_length, depth, seed
        windows = [count_windows(store.num_tokens, sequence_length) for store in self.stores]
        self.order = SampleOrder(windows, weights or [store.weight for store in self.stores], seed, shuffle,
                                 whole_blocks)

    def __len__(self) -> int:
        return sum(self.order.windows)

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}; `sample` goes on into the next epoch")
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """Read the window of sample `index`, for any index >= 0."""
        place = self.order.place(int(index))
        store = self.stores[place.source]
        inputs_T, targets_TD, borders = read_window(store, place.window, self.sequence_length, self.depth)
        counted = targets_TD[:, 0][targets_TD[:, 0] != IGNORE]
        start = place.window * self.sequence_length
        num_text_tokens = min(self.sequence_length, store.num_tokens - start)
        return Sample(torch.from_numpy(inputs_T), torch.from_numpy(targets_TD), borders, len(counted),
                      int(store.byte_lengths[counted].sum()), int(index), place, num_text_tokens)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collate the samples with these indices into one batch."""
        return collate([self.sample(index) for index in indices])

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Yield batches of the samples start .. stop-1 in order; the last may be smaller."""
        for first in range(start, stop, batch_size):
            yield self.batch(range(first, min(first + batch_size, stop)))


def count_windows(num_tokens: int, sequence_length: int) -> int:
    """Count the windows that hold every target once.

    The last token of a stream predicts nothing, so a window of it alone is not counted.

    >>> count_windows(9, 4), count_windows(10, 4)
    (2, 3)
    """
    return max(1, -(-(num_tokens - 1) // sequence_length))


def read_window(store: TokenStore, window: int, length: int, depth: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Read inputs [T], targets [T, 1 + depth] and borders of one window of the stream."""
    start = window * length
    stop = min(start + length, store.num_tokens)
    ids = store.read(start, min(stop + 1 + depth, store.num_tokens))
    ends = store.ends(start, stop) - start
    count = stop - start
    inputs_T = np.full(length, ids[min(count, len(ids)) - 1], dtype=np.int64)  # padding repeats the end of text
    inputs_T[:count] = ids[:count]
    targets_TD = np.full((length, 1 + depth), IGNORE, dtype=np.int64)
    lengths = np.diff(ends.clip(max=count), prepend=0)
    end_T = np.repeat(ends, lengths)
    place_T = np.arange(count)
    for d in range(1 + depth):
        inside_T = place_T + 1 + d < end_T
        found_T = ids[np.minimum(place_T + 1 + d, len(ids) - 1)]
        targets_TD[:count, d] = np.where(inside_T, found_T, IGNORE)
    borders = [0, *(int(e) for e in ends if e < count)]
    return inputs_T, targets_TD, borders if count == length else [*borders, count]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples as rows of a batch; document borders count the tokens of all rows."""
    length = len(samples[0].input_ids)
    text_lengths = torch.tensor([sample.num_text_tokens for sample in samples])
    text_mask = None if bool((text_lengths == length).all()) else torch.arange(length) < text_lengths[:, None]
    borders = [row * length + border for row, sample in enumerate(samples) for border in sample.borders]
    return Batch(torch.stack([s.input_ids for s in samples]), torch.stack([s.targets for s in samples]),
                 CuSeqlens([*borders, len(samples) * length]), sum(s.num_bytes for s in samples),
                 sum(s.num_tokens for s in samples), tuple(s.index for s in samples), text_mask)
