"""The split into training and validation text: by a hash of each document's content, measured in bytes.

Documents are held out in the order of their hashes until they make up the wanted fraction of the bytes. So the choice
does not depend on the order of documents or on files, and equal documents fall on the same side. In a corpus of many
documents the rule is nearly that of a threshold, `hash < fraction * 2^64`; where this threshold misses the fraction of
the bytes by more than a tenth (few documents, or a few that are large), documents are chosen by their sizes too, and
where no whole document fits, the end of one is held out (see `plan_split`).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hybridlm.errors import DataError

Part = Literal["train", "validation"]
TOLERANCE = 0.1  # of the bytes of the smaller side, within which a threshold meets the fraction
WHOLE_TOLERANCE = 1 / 3  # of the same, within which whole documents do; beyond it one is cut
PLAN_MIN_BYTES = 1 << 25  # text that is measured at least, if there is so much
PLAN_DEVIATION = 0.03  # expected relative deviation of a threshold's bytes at which no more text is measured
PLAN_MAX_DOCUMENTS = 1 << 22  # documents that are measured at most
MAX_CHARACTER_BYTES = 4  # of UTF-8: a longer text has two characters and can be cut
_TOO_SHORT = ("{}: one document of one character cannot be split into training and validation; add text, or set "
              "data.validation_path")


def content_hash(text: bytes) -> int:
    """Hash the content into 64 evenly spread bits."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"hybridlm-split").digest(), "little")


@dataclass(frozen=True)
class Split:
    """The rule of a split: documents whose hash falls below `fraction` of the range are validation.

    `moved`: hashes of documents that go to the other side than their hash says. `cut`: hash of the document whose end
    becomes validation, and `cut_fraction` the size of that end. `everything`: no rule, all documents go there.
    """

    fraction: float = 0.0
    everything: Part | None = None
    moved: frozenset[int] = field(default_factory=frozenset)
    cut: int | None = None
    cut_fraction: float = 0.0

    def parts(self, text: bytes) -> Iterator[tuple[Part, bytes]]:
        """Yield the part that a document goes to, or both with their texts for the document that is cut."""
        if self.everything:
            yield self.everything, text
            return
        key = content_hash(text)
        if key == self.cut:
            border = cut_place(text, self.cut_fraction)
            yield "train", text[:border]
            yield "validation", text[border:]
        else:
            yield self._side(key), text

    def _side(self, key: int) -> Part:
        held_out = key < self.fraction * 2.0**64
        return "validation" if held_out != (key in self.moved) else "train"


def plan_split(documents: Iterable[bytes], fraction: float, label: str) -> Split:
    """Plan a split whose validation text is `fraction` of the bytes.

    The documents are measured until the threshold is sure to meet the fraction: from PLAN_MIN_BYTES on, when its
    expected deviation sqrt((1 - fraction) / fraction * sum(bytes^2)) / sum(bytes) is at most PLAN_DEVIATION. A corpus
    that ends before that is known to the byte. If the threshold misses by more than TOLERANCE, documents are held out
    in the order of their hashes, those that are too large passed over. If whole documents miss by more than
    WHOLE_TOLERANCE, the end of one more becomes validation, from the start of a line if one is near.

    Args:
        documents: the texts, empty ones too.
        fraction: of the bytes, above 0 and below 1.
        label: name of the corpus in errors.

    Raises:
        DataError: no text at all, or one document of one character, which cannot be cut.
    """
    hashes, sizes = array("Q"), array("Q")
    total = squares = 0
    threshold = fraction * 2.0**64
    found: set[bool] = set()
    last = b""
    for text in documents:
        if not text:
            continue
        hashes.append(content_hash(text))
        sizes.append(len(text))
        total += len(text)
        squares += len(text)**2
        found.add(hashes[-1] < threshold)
        last = text
        sure = total >= PLAN_MIN_BYTES and math.sqrt((1 - fraction) / fraction * squares) <= PLAN_DEVIATION * total
        if len(found) == 2 and (sure or len(hashes) >= PLAN_MAX_DOCUMENTS):
            return Split(fraction)
    if not total:
        raise DataError(f"{label}: no text found; every document is empty")
    sizes_N = np.frombuffer(sizes, dtype=np.uint64)
    below = int(sizes_N[np.frombuffer(hashes, dtype=np.uint64) < threshold].sum())
    if len(found) == 2 and abs(below - fraction * total) <= _tolerance(fraction, total):
        return Split(fraction)
    size_of = dict(zip(hashes, sizes, strict=True))
    if len(size_of) == 1 and len(last.decode("utf-8")) < 2:
        raise DataError(_TOO_SHORT.format(label))
    if len(size_of) == 1:
        return Split(fraction, cut=hashes[0], cut_fraction=fraction)
    return _choose(Counter(hashes), size_of, fraction)


def _tolerance(fraction: float, total: int) -> float:
    return TOLERANCE * min(fraction, 1 - fraction) * total


def _choose(copies: Mapping[int, int], size_of: Mapping[int, int], fraction: float) -> Split:
    """Choose the documents that are held out, of a corpus of at least two whose sizes are known.

    Args:
        copies: number of equal documents, by their hash.
        size_of: bytes of one of them, by its hash.
        fraction: of the bytes.
    """
    bytes_of = {key: size_of[key] * copies[key] for key in sorted(copies)}
    total = sum(bytes_of.values())
    target, tolerance = fraction * total, _tolerance(fraction, total)
    held_out: set[int] = set()
    done = 0
    for key, size in bytes_of.items():
        if done < target - tolerance and done + size <= target + tolerance and len(held_out) < len(copies) - 1:
            held_out.add(key)
            done += size
    missing = target - done
    if missing > tolerance and len(held_out) < len(copies) - 1:  # one document more, if that comes nearer
        nearest = min((key for key in bytes_of if key not in held_out), key=lambda key: abs(bytes_of[key] - missing))
        if abs(bytes_of[nearest] - missing) <= WHOLE_TOLERANCE / TOLERANCE * tolerance:
            held_out.add(nearest)
            missing -= bytes_of[nearest]
    cut = None
    if not held_out or missing > WHOLE_TOLERANCE / TOLERANCE * tolerance:
        cut = next((key for key in bytes_of if key not in held_out and size_of[key] > MAX_CHARACTER_BYTES), None)
        if cut is None and not held_out:  # documents of a few characters: one of them whole
            held_out.add(next(iter(bytes_of)))
    moved = frozenset(key for key in bytes_of if (key in held_out) != (key < fraction * 2.0**64))
    cut_fraction = 0.0 if cut is None else missing / bytes_of[cut]
    return Split(fraction, moved=moved, cut=cut, cut_fraction=max(cut_fraction, 0.0))


def plan_split_by_documents(documents: Iterable[bytes], fraction: float, label: str) -> Split:
    """Plan the split of data that an earlier version prepared: a fraction of the number of documents, not of the bytes.

    It reads only until both sides have a document. When all documents would fall on one side, the one nearest to the
    threshold changes sides. When there is only one (or only copies of one), its last `fraction` is validation.

    Raises:
        DataError: no text at all, or a text too short to be cut.
    """
    split = Split(fraction)
    lowest, highest, last = 2**64, -1, b""
    found: set[Part] = set()
    for text in documents:
        if not text:
            continue
        key = content_hash(text)
        lowest, highest = min(lowest, key), max(highest, key)
        found.add(split._side(key))
        if len(found) == 2:
            return split
        last = text
    if not found:
        raise DataError(f"{label}: no text found; every document is empty")
    if lowest < highest:
        return Split(fraction, moved=frozenset([lowest if "train" in found else highest]))
    if len(last.decode("utf-8")) < 2:
        raise DataError(_TOO_SHORT.format(label))
    return Split(fraction, cut=lowest, cut_fraction=fraction)


def cut_place(text: bytes, fraction: float) -> int:
    """The byte at which the last `fraction` of a text starts: a line start within a tenth of it, else a character."""
    tail = max(1, round(len(text) * fraction))
    place = max(1, len(text) - tail)
    line = text.find(b"\n", place, place + max(1, tail // 10))
    if 0 <= line < len(text) - 1:
        return line + 1
    while place < len(text) and text[place] & 0xC0 == 0x80:  # not inside a character
        place += 1
    if place == len(text):
        place -= 1
        while text[place] & 0xC0 == 0x80:
            place -= 1
    return place
