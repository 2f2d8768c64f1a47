"""Moves values between our tensors and those of another library's checkpoint, in both directions.

A checkpoint of another library may pack, stack, cut or repeat the values of one of our tensors. Values are moved, never
computed. Tensors are passed as functions that read them, one at a time, so that the experts of a layer are stacked
without two copies of them in memory. "Ours" are tensors of hybridlm, "theirs" those of the other checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hybridlm.errors import CheckpointError

ReadTensor = Callable[[], Tensor]


def readers(tensors: Sequence[Tensor]) -> list[ReadTensor]:
    """Wrap tensors in memory as functions that read them."""
    return [partial(_identity, tensor) for tensor in tensors]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class Rearrangement:
    """A bijection between a group of their tensors and a group of ours."""

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        """Make our tensors from theirs.

        Args:
            theirs: functions that read their tensors, in the order of the rule.

        Returns:
            Our tensors, in the order of the rule.

        Raises:
            CheckpointError: values that should be copies of one tensor differ.
        """
        raise TypeError(f"{type(self).__name__} has no to_ours")

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        """Yield their tensors, made from ours, in the order of the rule.

        Args:
            ours: functions that read our tensors, in the order of the rule.
        """
        raise TypeError(f"{type(self).__name__} has no to_theirs")


@dataclass(frozen=True)
class Unchanged(Rearrangement):
    """Equal tensors on both sides, in the same order."""

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        return [read() for read in theirs]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        for read in ours:
            yield read()


@dataclass(frozen=True)
class Reshape(Rearrangement):
    """One tensor with the same order of elements; `ours` and `theirs` are the two shapes."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        (read,) = theirs
        return [read().reshape(self.ours)]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        (read,) = ours
        yield read().reshape(self.theirs)


@dataclass(frozen=True)
class PackedRows(Rearrangement):
    """One of their tensors holds several of ours along the first dimension.

    Its rows form `groups` equal groups (heads), each with `sizes[i]` rows of our i-th tensor: one group is a plain
    concatenation, H groups are the packing by head [q_0 | k_0 | q_1 | k_1 ...].

    >>> packed = torch.arange(6)[:, None]
    >>> [t.flatten().tolist() for t in PackedRows((2, 1), groups=2).to_ours(readers([packed]))]
    [[0, 1, 3, 4], [2, 5]]
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        (read,) = theirs
        packed = read().unflatten(0, (self.groups, sum(self.sizes)))
        return [rows.flatten(0, 1).contiguous() for rows in packed.split(self.sizes, dim=1)]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        yield torch.cat([read().unflatten(0, (self.groups, -1)) for read in ours], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class StackedExperts(Rearrangement):
    """One of our tensors [count, parts * rows, ...] holds `count` experts of `parts` tensors [rows, ...] each."""

    count: int
    parts: int = 1

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        stacked: Tensor | None = None
        for index, read in enumerate(theirs):
            tensor = read()
            if stacked is None:
                stacked = tensor.new_empty(self.count, self.parts, *tensor.shape)
            stacked[index // self.parts, index % self.parts] = tensor
        assert stacked is not None
        return [stacked.flatten(1, 2)]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        (read,) = ours
        for expert in read():
            yield from expert.chunk(self.parts)


@dataclass(frozen=True)
class RepeatedTensor(Rearrangement):
    """One of our tensors is stored in their checkpoint `count` times, under as many names."""

    count: int

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        first = theirs[0]()
        if not all(torch.equal(first, read()) for read in theirs[1:]):
            raise CheckpointError("should be copies of one tensor, but differ from each other")
        return [first]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        (read,) = ours
        for _ in range(self.count):
            yield read()


@dataclass(frozen=True)
class CopiedTensor(Rearrangement):
    """One of their tensors is held by `count` of ours; theirs can be made only where these are equal."""

    count: int

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        (read,) = theirs
        tensor = read()
        return [tensor, *(tensor.clone() for _ in range(self.count - 1))]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        first, *others = (read() for read in ours)
        if not first.is_meta and not all(torch.equal(first, other) for other in others):
            raise CheckpointError("should be copies of one tensor, which is what the format holds, but differ from "
                                  "each other: they were trained apart")
        yield first


@dataclass(frozen=True)
class SideBySide(Rearrangement):
    """One of our matrices has `parts` blocks of rows below each other, which stand side by side in theirs.

    >>> SideBySide(2).to_ours(readers([torch.arange(6).view(1, 6)]))[0].tolist()
    [[0, 1, 2], [3, 4, 5]]
    """

    parts: int

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        (read,) = theirs
        return [torch.cat(read().chunk(self.parts, 1))]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        (read,) = ours
        yield torch.cat(read().chunk(self.parts), 1)


@dataclass(frozen=True)
class PerTensor(Rearrangement):
    """Equally many tensors on both sides, of which `rearrangements[i]` rearranges the i-th."""

    rearrangements: tuple[Rearrangement, ...]

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        return [each.to_ours([read])[0] for each, read in zip(self.rearrangements, theirs, strict=True)]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        for each, read in zip(self.rearrangements, ours, strict=True):
            yield from each.to_theirs([read])


@dataclass(frozen=True)
class Chain(Rearrangement):
    """Two rearrangements in a row; from their side, `first` is applied first."""

    first: Rearrangement
    second: Rearrangement

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        return self.second.to_ours(readers(self.first.to_ours(theirs)))

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        return self.first.to_theirs(readers(list(self.second.to_theirs(ours))))


@dataclass(frozen=True)
class RecutRows(Rearrangement):
    """One concatenation along the first dimension, cut into `ours` rows on our side and `theirs` rows on theirs."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def to_ours(self, theirs: Sequence[ReadTensor]) -> list[Tensor]:
        return [rows.contiguous() for rows in torch.cat([read() for read in theirs]).split(self.ours)]

    def to_theirs(self, ours: Sequence[ReadTensor]) -> Iterator[Tensor]:
        yield from torch.cat([read() for read in ours]).split(self.theirs)
