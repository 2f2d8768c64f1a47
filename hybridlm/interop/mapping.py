"""Key mapping: how the tensors of another library's checkpoint become ours, and back.

A `Rule` ties a group of our tensors to a group of theirs through a `Rearrangement` that works in both directions.
A family is a list of such rules, so import and export cannot drift apart, and shapes are checked from the file
headers alone: what a rule would export from our shapes is what it expects to find.

Tensors come as `Read` functions and are asked for one at a time: a layer of a thousand experts is put together
without two copies of it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.errors import CheckpointError

Read = Callable[[], Tensor]


class Rearrangement:
    """A bijection between groups of tensors: values are moved, never computed."""

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        raise TypeError(f"{type(self).__name__} has no to_ours")

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        raise TypeError(f"{type(self).__name__} has no to_theirs")


@dataclass(frozen=True)
class Same(Rearrangement):
    """As many tensors on both sides, unchanged."""

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        return [read() for read in theirs]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        for read in ours:
            yield read()


@dataclass(frozen=True)
class Reshape(Rearrangement):
    """One tensor, same order of elements: `ours` and `theirs` are the two shapes."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        (read,) = theirs
        return [read().reshape(self.ours)]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        (read,) = ours
        yield read().reshape(self.theirs)


@dataclass(frozen=True)
class Split(Rearrangement):
    """One of their tensors holds several of ours along the first dim.

    The rows form `groups` equal groups (heads), each with `sizes[i]` rows of our i-th tensor: groups=1 is a plain
    concatenation, groups=H the per-head packing [q_0 | k_0 | q_1 | k_1 ...].
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        (read,) = theirs
        packed = read().unflatten(0, (self.groups, sum(self.sizes)))
        return [part.flatten(0, 1).contiguous() for part in packed.split(self.sizes, dim=1)]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        yield torch.cat([read().unflatten(0, (self.groups, -1)) for read in ours], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Stack(Rearrangement):
    """`count` experts with `parts` tensors each, one after the other; one of ours [count, parts * rows, ...]."""

    count: int
    parts: int = 1

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        stacked: Tensor | None = None
        for index, read in enumerate(theirs):
            part = read()
            if stacked is None:
                stacked = part.new_empty(self.count, self.parts, *part.shape)
            stacked[index // self.parts, index % self.parts] = part
        assert stacked is not None
        return [stacked.flatten(1, 2)]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        (read,) = ours
        for expert in read():
            yield from expert.chunk(self.parts)


@dataclass(frozen=True)
class Copies(Rearrangement):
    """Theirs repeat one tensor of ours under `count` names."""

    count: int

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        first = theirs[0]()
        if not all(torch.equal(first, read()) for read in theirs[1:]):
            raise CheckpointError("should be copies of one tensor, but differ from each other")
        return [first]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        (read,) = ours
        for _ in range(self.count):
            yield read()


@dataclass(frozen=True)
class Each(Rearrangement):
    """As many tensors on both sides, the i-th rearranged by `ops[i]`, which takes one and gives one."""

    ops: tuple[Rearrangement, ...]

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        return [op.to_ours([read])[0] for op, read in zip(self.ops, theirs, strict=True)]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        for op, read in zip(self.ops, ours, strict=True):
            yield from op.to_theirs([read])


@dataclass(frozen=True)
class Chain(Rearrangement):
    """From their side: `first`, then `second`."""

    first: Rearrangement
    second: Rearrangement

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        return self.second.to_ours([partial(_give, part) for part in self.first.to_ours(theirs)])

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        return self.first.to_theirs([partial(_give, part) for part in self.second.to_theirs(ours)])


@dataclass(frozen=True)
class Rows(Rearrangement):
    """Several tensors on both sides, one along the first dim, cut differently: into `ours` and `theirs` rows."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def to_ours(self, theirs: Sequence[Read]) -> list[Tensor]:
        return [part.contiguous() for part in torch.cat([read() for read in theirs]).split(self.ours)]

    def to_theirs(self, ours: Sequence[Read]) -> Iterator[Tensor]:
        yield from torch.cat([read() for read in ours]).split(self.theirs)


def _give(tensor: Tensor) -> Tensor:
    return tensor


class Spec(NamedTuple):
    """What a file header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Their names of a group of tensors, in the order that `op` expects."""

    names: tuple[str, ...]
    op: Rearrangement = Same()


@dataclass(frozen=True)
class Rule:
    """Our tensors `ours` and the ways theirs may hold them; the first layout is what is written, all are read."""

    ours: tuple[str, ...]
    layouts: tuple[Layout, ...]

    def theirs(self, our_specs: Mapping[str, Spec], layout: Layout) -> list[tuple[str, Spec]]:
        """Names and specs of what `layout` holds, computed on the meta device."""
        dtype = our_specs[self.ours[0]].dtype
        metas = [torch.empty(our_specs[name].shape, dtype=our_specs[name].dtype, device="meta") for name in self.ours]
        parts = layout.op.to_theirs([partial(_give, meta) for meta in metas])
        return [(name, Spec(dtype, tuple(part.shape))) for name, part in zip(layout.names, parts, strict=True)]


def rule(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], op: Rearrangement | None = None,
         *others: Layout) -> Rule:
    """One rule; `others` are further layouts that are read."""
    ours = (ours,) if isinstance(ours, str) else ours
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return Rule(ours, (Layout(theirs, op or Same()), *others))


@dataclass(frozen=True)
class Step:
    """One rule with the layout in which the source holds it. `source` are the names as the source spells them."""

    ours: tuple[str, ...]
    layout: Layout
    source: tuple[str, ...]


def match(rules: Sequence[Rule], theirs: Mapping[str, Spec], our_specs: Mapping[str, Spec], where: str,
          spelling: Mapping[str, str], ignored: Callable[[str], bool]) -> list[Step]:
    """Which layout the source has for every rule; names, shapes and dtypes are checked before any tensor is read.

    `spelling` gives the source's own name of an official one.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or quantised in a form that is not known.
    """
    problems: list[str] = []
    steps: list[Step] = []
    used: set[str] = set()
    for r in rules:
        layout = _present(r, theirs, our_specs)
        missing = [name for name in layout.names if name not in theirs]
        problems += [f"'{name}' is missing" for name in missing]
        used.update(layout.names)
        if missing:
            continue
        for name, spec in r.theirs(our_specs, layout):
            if theirs[name].shape != spec.shape:
                problems.append(f"'{spelling.get(name, name)}' is {list(theirs[name].shape)}, the config asks for "
                                f"{list(spec.shape)}")
            elif not theirs[name].dtype.is_floating_point or theirs[name].dtype.itemsize == 1:
                problems.append(f"'{spelling.get(name, name)}' is quantised ({theirs[name].dtype}) and has no block "
                                "scales beside it: convert it to bf16 with the tool that made it")
        steps.append(Step(r.ours, layout, tuple(spelling.get(name, name) for name in layout.names)))
    problems += [f"'{spelling.get(name, name)}' is not part of the model" for name in theirs
                 if name not in used and not ignored(name)]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the tensors of {where} do not fit its config: " + "; ".join(problems[:4]) + more)
    return steps


def _present(r: Rule, theirs: Mapping[str, Spec], our_specs: Mapping[str, Spec]) -> Layout:
    """The layout the source has: all its names there, and of several such, shapes that fit. Else the nearest one."""
    whole = [layout for layout in r.layouts if all(name in theirs for name in layout.names)]
    for layout in whole:
        if all(theirs[name].shape == spec.shape for name, spec in r.theirs(our_specs, layout)):
            return layout
    if whole:
        return whole[0]
    return max(r.layouts, key=lambda layout: sum(name in theirs for name in layout.names) / len(layout.names))
