"""Windows of consecutive tokens that one entry stands for: their places in a batch, and their number.

B rows, T queries (the last T positions), S tokens per row, E windows per row, L tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.model.sequence import SequenceInfo


@dataclass(eq=False)
class EntryWindows:
    """Windows of `length` tokens, one every `stride` tokens, counted from the start of each document.

    Only windows that lie in their document are there; a query sees those whose last token is not later than itself.

    Args:
        length: tokens of a window.
        stride: tokens from one window to the next, at most `length`.
        start_BE: first token of each window in its row; rows with fewer windows end with 0, which no query sees.
        first_BT: the first window of each query's document.
        count_BT: how many of this document the query sees.
        begin_BT: the first token of each query's document.
        position_BT: position of each query in its document.
        first_BS: the first window of the document of each token of the rows.
        place_BE: position of each window's first token in its document.
        one_document: each row is one document.

    >>> seq = SequenceInfo.make(1, 6, torch.device("cpu"))
    >>> windows = EntryWindows.of(seq, torch.zeros(1, 6), 6, length=4, stride=2)
    >>> windows.start_BE, windows.count_BT
    (tensor([[0, 2, 0]]), tensor([[0, 0, 0, 1, 1, 2]]))
    """

    length: int
    stride: int
    start_BE: Tensor
    first_BT: Tensor
    count_BT: Tensor
    begin_BT: Tensor
    position_BT: Tensor
    first_BS: Tensor
    place_BE: Tensor
    one_document: bool

    @classmethod
    def of(cls, seq: SequenceInfo, queries_BT: Tensor, keys: int, length: int, stride: int) -> EntryWindows:
        """The windows of `keys` tokens per row for queries at the last places of their rows; layers share them.

        Args:
            seq: borders of the documents.
            queries_BT: any tensor [B, T, ...].
            keys: tokens S per row.
            length: tokens of a window.
            stride: tokens from one window to the next.
        """
        queries = queries_BT.shape[1]
        if torch.compiler.is_dynamo_compiling():  # no graph depends on what others have left
            return cls._make(seq, queries_BT, keys, length, stride)
        key = f"windows {queries} {keys} {length} {stride}"
        if key not in seq.tables:
            seq.tables[key] = cls._make(seq, queries_BT, keys, length, stride)
        return seq.tables[key]

    @classmethod
    def _make(cls, seq: SequenceInfo, queries_BT: Tensor, keys: int, length: int, stride: int) -> EntryWindows:
        batch, queries = queries_BT.shape[:2]
        device, borders = queries_BT.device, seq.history_borders
        token_S = torch.arange(keys, device=device)
        if borders is None:
            position_BS = token_S.expand(batch, keys)
            left_BS = (keys - token_S).expand(batch, keys)
        else:
            borders = borders.filled
            position_BS = borders.positions().view(batch, keys)
            end_BS = borders.ends()[borders.document_ids()].view(batch, keys)
            left_BS = end_BS - torch.arange(batch * keys, device=device).view(batch, keys)
        starts_BS = (position_BS % stride == 0) & (left_BS >= length)
        before_BS = starts_BS.cumsum(1) - starts_BS.long()  # windows of the row that start before the token
        most = max(1, keys // stride)
        start_BE = token_S.new_zeros(batch, most + 1).scatter(
            1, before_BS.masked_fill(~starts_BS, most), token_S.expand(batch, keys))[:, :most]
        begin_BS = token_S - position_BS
        first_BS = before_BS.gather(1, begin_BS)
        position_BT = position_BS[:, keys - queries :]
        count_BT = ((position_BT + 1 - length).div(stride, rounding_mode="floor") + 1).clamp(min=0)
        return cls(length, stride, start_BE, first_BS[:, keys - queries :], count_BT, begin_BS[:, keys - queries :],
                   position_BT, first_BS, position_BS.gather(1, start_BE),
                   borders is None or borders.num_documents == batch)

    @property
    def number(self) -> int:
        """Windows per row E."""
        return self.start_BE.shape[1]

    @property
    def regular(self) -> bool:
        """Whether windows stand at equal distances in every row, and consist of whole strides."""
        return self.one_document and self.length % self.stride == 0 and self.length <= self.first_BS.shape[1]

    def visible(self, rows: slice) -> Tensor:
        """Mask [B, Q, E] of the windows that the queries `rows` see."""
        entry_E = torch.arange(self.number, device=self.start_BE.device)
        first = self.first_BT[:, rows, None]
        return (entry_E >= first) & (entry_E < first + self.count_BT[:, rows, None])

    def pad(self, entries_BE: Tensor) -> Tensor:
        """Entries of complete windows [B, E', ...], with zeros for windows that are not complete yet: [B, E, ...]."""
        missing = self.number - entries_BE.shape[1]
        if missing == 0:
            return entries_BE
        return torch.cat([entries_BE, entries_BE.new_zeros(entries_BE.shape[0], missing, *entries_BE.shape[2:])], 1)

    def gather(self, x_BS: Tensor, before: int = 0) -> Tensor:
        """The tokens of each window [B, E, before + L, ...], from those of the rows [B, S, ...].

        Args:
            x_BS: the tokens of the rows.
            before: so many tokens in front of the window come too; in front of a document these are any tokens.
        """
        strides, parts = x_BS.shape[1] // self.stride, self.length // self.stride
        if self.regular and not before:  # no index, no scatter
            split_BN = x_BS[:, : strides * self.stride].unflatten(1, (strides, self.stride))
            complete = strides - parts + 1
            found_BE = torch.cat([split_BN[:, part : part + complete] for part in range(parts)], 2)
            return self.pad(found_BE)
        offset_L = torch.arange(-before, self.length, device=self.start_BE.device)
        token_BX = (self.start_BE[..., None] + offset_L).clamp_(min=0, max=x_BS.shape[1] - 1).flatten(1)
        row_B1 = torch.arange(token_BX.shape[0], device=token_BX.device)[:, None]
        return x_BS[row_B1, token_BX].unflatten(1, (self.number, before + self.length))


def count_entries(context_length: int, length: int, stride: int) -> tuple[int, int]:
    """Number of complete windows, and of tokens kept for windows that are still open.

    >>> count_entries(7, length=4, stride=2)
    (2, 3)
    """
    entries = max(0, (context_length - length) // stride + 1)
    return entries, context_length - entries * stride


def count_seen_entries(context_length: int, length: int, stride: int) -> float:
    """Mean number of complete windows that a token of a causal sequence sees.

    >>> count_seen_entries(4, length=2, stride=2)
    1.0
    """
    see_some = max(0, context_length - length + 1)  # tokens at or behind the end of the first window
    whole, rest = divmod(see_some, stride)
    return (see_some + stride * whole * (whole - 1) / 2 + whole * rest) / max(1, context_length)
