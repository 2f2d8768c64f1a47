"""The split into training and validation documents, by a hash of their content.

It does not depend on order or files, and equal documents fall on the same side. A corpus too small for the hash to fill
both sides gets one document moved (see `plan_split`), so that even a single file gives both training and validation
text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import DataError

Part = Literal["train", "validation"]


def content_hash(text: bytes) -> int:
    """Hash the content into 64 evenly spread bits."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"hybridlm-split").digest(), "little")


@dataclass(frozen=True)
class Split:
    """The rule of a split: documents whose hash falls below `fraction` of the range are validation.

    `moved`: hash of one document that goes to the other side than its hash says. `cut`: hash of the only
    document, whose end becomes validation. `everything`: no rule, all documents go there.
    """

    fraction: float = 0.0
    everything: Part | None = None
    moved: int | None = None
    cut: int | None = None

    def parts(self, text: bytes) -> Iterator[tuple[Part, bytes]]:
        """Yield the part that a document goes to, or both with their texts for the document that is cut."""
        if self.everything:
            yield self.everything, text
            return
        key = content_hash(text)
        if key == self.cut:
            border = cut_place(text, self.fraction)
            yield "train", text[:border]
            yield "validation", text[border:]
        else:
            yield self._side(key), text

    def _side(self, key: int) -> Part:
        held_out = key < self.fraction * 2.0**64
        return "validation" if held_out != (key == self.moved) else "train"


def plan_split(documents: Iterable[bytes], fraction: float, label: str) -> Split:
    """Plan the split of a corpus, reading it only until both sides have a document.

    When all documents would fall on one side, the one nearest to the threshold changes sides. When there is
    only one (or only copies of one), its last `fraction` is validation, from the start of a line if one is near.

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
        return Split(fraction, moved=lowest if "train" in found else highest)
    if len(last.decode("utf-8")) < 2:
        raise DataError(f"{label}: one document of one character cannot be split into training and validation; "
                        "add text, or set data.validation_path")
    return Split(fraction, cut=lowest)


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
