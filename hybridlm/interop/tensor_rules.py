"""Rules that map tensors of another library's checkpoint to ours by name, in both directions.

A family is a list of such rules, so import and export cannot drift apart. Shapes are checked from the headers of files
alone: what a rule would export from our shapes is what it expects to find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hybridlm.errors import CheckpointError
from hybridlm.interop.rearrangements import Rearrangement, Unchanged, readers

MAX_PROBLEMS_SHOWN = 4  # in one error message


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor, as a file header has them."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


UNCHANGED = Unchanged()


@dataclass(frozen=True)
class KeyLayout:
    """One form in which another library stores a group of tensors: their names, in the order of the rearrangement."""

    names: tuple[str, ...]
    rearrangement: Rearrangement = UNCHANGED


@dataclass(frozen=True)
class TensorRule:
    """A group of our tensors and the layouts in which theirs may hold them; all are read, the first is written."""

    ours: tuple[str, ...]
    layouts: tuple[KeyLayout, ...]

    def specs_of_theirs(self, our_specs: Mapping[str, TensorSpec],
                        layout: KeyLayout) -> list[tuple[str, TensorSpec]]:
        """Names and specs of the tensors in `layout`, for our tensors of these specs; nothing is allocated."""
        dtype = our_specs[self.ours[0]].dtype
        ours = [torch.empty(our_specs[name].shape, dtype=our_specs[name].dtype, device="meta") for name in self.ours]
        theirs = layout.rearrangement.to_theirs(readers(ours))
        return [(name, TensorSpec(dtype, tuple(tensor.shape)))
                for name, tensor in zip(layout.names, theirs, strict=True)]


def map_tensors(ours: str | tuple[str, ...], theirs: str | tuple[str, ...],
                rearrangement: Rearrangement | None = None, *other_layouts: KeyLayout) -> TensorRule:
    """Make the rule for one group of tensors.

    Args:
        ours: our name or names.
        theirs: the names in the layout that is written.
        rearrangement: how the two groups hold the same values; None: the tensors are equal on both sides.
        other_layouts: further layouts that are read.

    >>> from hybridlm.interop.rearrangements import PackedRows
    >>> rule = map_tensors(("q", "k"), "qk", PackedRows((4, 2)))
    >>> spec = TensorSpec(torch.float32, (4, 8))
    >>> rule.specs_of_theirs({"q": spec, "k": spec._replace(shape=(2, 8))}, rule.layouts[0])
    [('qk', TensorSpec(dtype=torch.float32, shape=(6, 8)))]
    """
    ours = (ours,) if isinstance(ours, str) else ours
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return TensorRule(ours, (KeyLayout(theirs, rearrangement or UNCHANGED), *other_layouts))


@dataclass(frozen=True)
class ReadStep:
    """One rule and the layout in which the source holds it.

    Attributes:
        ours: our names.
        layout: the layout of the source.
        source: their names as the source spells them.
    """

    ours: tuple[str, ...]
    layout: KeyLayout
    source: tuple[str, ...]


def match_rules(rules: Sequence[TensorRule], theirs: Mapping[str, TensorSpec], our_specs: Mapping[str, TensorSpec],
                where: str, spelling: Mapping[str, str], ignored: Callable[[str], bool]) -> list[ReadStep]:
    """Find the layout that the source has for every rule, and check it before any tensor is read.

    Args:
        rules: the rules of a family for one model.
        theirs: the specs of the source, by official name.
        our_specs: the specs of our model.
        where: the source, for errors.
        spelling: the source's own name of each official one.
        ignored: whether a tensor may be there without being read.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or quantised in a form that is not known.
    """
    problems: list[str] = []
    steps: list[ReadStep] = []
    used: set[str] = set()
    for rule in rules:
        layout = _choose_layout(rule, theirs, our_specs)
        missing = [name for name in layout.names if name not in theirs]
        problems += [f"'{name}' is missing" for name in missing]
        used.update(layout.names)
        if missing:
            continue
        for name, expected in rule.specs_of_theirs(our_specs, layout):
            problems += _compare_specs(spelling.get(name, name), theirs[name], expected)
        steps.append(ReadStep(rule.ours, layout, tuple(spelling.get(name, name) for name in layout.names)))
    problems += [f"'{spelling.get(name, name)}' is not part of the model" for name in theirs
                 if name not in used and not ignored(name)]
    if problems:
        more = len(problems) - MAX_PROBLEMS_SHOWN
        raise CheckpointError(f"the tensors of {where} do not fit its config: "
                              + "; ".join(problems[:MAX_PROBLEMS_SHOWN]) + (f" (and {more} more)" if more > 0 else ""))
    return steps


def _compare_specs(name: str, found: TensorSpec, expected: TensorSpec) -> list[str]:
    if found.shape != expected.shape:
        return [f"'{name}' is {list(found.shape)}, the config asks for {list(expected.shape)}"]
    if not expected.dtype.is_floating_point:
        return [f"'{name}' is of {found.dtype}, the config asks for whole numbers"] if found.dtype.is_floating_point \
            else []
    if not found.dtype.is_floating_point or found.dtype.itemsize == 1:
        return [f"'{name}' is quantised ({found.dtype}) and has no block scales beside it: convert it to bf16 with "
                "the tool that made it"]
    return []


def _choose_layout(rule: TensorRule, theirs: Mapping[str, TensorSpec],
                   our_specs: Mapping[str, TensorSpec]) -> KeyLayout:
    """Choose the layout of which the source has all names, in fitting shapes; else the one it has most names of.

    Of several, the one with most names: it checks copies of a tensor that another one would leave over.
    """
    complete = [layout for layout in rule.layouts if all(name in theirs for name in layout.names)]
    complete.sort(key=lambda layout: len(layout.names), reverse=True)
    for layout in complete:
        if all(theirs[name].shape == spec.shape for name, spec in rule.specs_of_theirs(our_specs, layout)):
            return layout
    if complete:
        return complete[0]
    return max(rule.layouts, key=lambda layout: sum(name in theirs for name in layout.names) / len(layout.names))
