"""Long documents in pieces, for tokenizers whose memory grows with the text they encode at once.

Some tokenizers treat the start and the end of what they encode: SentencePiece's put a space before it (a normaliser
`Prepend`, a pre-tokenizer `Metaspace`), a byte-level one may do so too (`add_prefix_space`), others strip white space
at both ends. That belongs to the document. So its first piece is encoded with what acts at the start alone, its last
with what acts at the end, and those between with neither. Pieces of such a tokenizer begin with a single space where
there is one, which is where its words begin, so that the ids are those of the undivided text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def cut_text(text: str, limit: int) -> list[str]:
    """Cut `text` into pieces of at most `limit` characters, after a line end, else a space, else anywhere."""
    pieces, start = [], 0
    while len(text) - start > limit:
        end = _line_end(text, start, limit)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def cut_before_words(text: str, limit: int) -> list[str]:
    """Cut `text` into pieces of at most `limit` characters, before a single space, else as `cut_text` does.

    >>> cut_before_words("to be or not to be", 8)
    ['to be or', ' not to', ' be']
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        end = next(_single_spaces(text, start + limit // 2, start + limit), None) or _line_end(text, start, limit)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _line_end(text: str, start: int, limit: int) -> int:
    window = start + limit // 2, start + limit
    end = max(text.rfind("\n", *window), text.rfind(" ", *window) if "\n" not in text[slice(*window)] else -1)
    return end + 1 if end >= 0 else start + limit


def _single_spaces(text: str, first: int, last: int) -> Iterator[int]:
    """Places of spaces between two characters that are not white space, from `last` down to `first`."""
    place = text.rfind(" ", first, last + 1)
    while place > 0:
        if not text[place - 1].isspace() and not text[place + 1:place + 2].isspace():
            yield place
        place = text.rfind(" ", first, place)


def acts_at_edges(state: dict[str, Any]) -> bool:
    """Whether a tokenizer, as the content of tokenizer.json, treats the start or the end of a text in its own way."""
    return piece_state(state, first=False, last=False, spaced=False) != state


def piece_state(state: dict[str, Any], *, first: bool, last: bool, spaced: bool) -> dict[str, Any]:
    """The tokenizer for one piece of a document: without what acts at edges that are not the document's.

    Args:
        state: the content of tokenizer.json.
        first: the piece starts the document.
        last: the piece ends it.
        spaced: the piece begins with a space. What puts one before a text that has none does nothing there, and is
            kept, because it also acts behind tokens that stand in the text. `Prepend` would add a second one: the
            caller leaves the space out (`puts_a_space`), and `Prepend` puts it back.
    """
    return {**state, "normalizer": _inner(state["normalizer"], first, last, spaced),
            "pre_tokenizer": _inner(state["pre_tokenizer"], first, last, spaced)}


def puts_a_space(state: dict[str, Any]) -> bool:
    """Whether a normaliser puts a space before every text, also before one that begins with a space."""
    def found(stage: dict[str, Any] | None) -> bool:
        return stage is not None and (stage["type"] == "Prepend" or any(map(found, stage.get("normalizers", ()))))

    return found(state["normalizer"])


def _inner(stage: dict[str, Any] | None, first: bool, last: bool, spaced: bool) -> dict[str, Any] | None:
    kind = None if stage is None else stage["type"]
    if stage is None or (kind == "Prepend" and not first and not spaced):
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in stage:
            inner = [_inner(part, first, last, spaced) for part in stage[key]]
            return {**stage, key: [part for part in inner if part is not None]}
    if kind == "Strip":
        return {**stage, "strip_left": stage["strip_left"] and first, "strip_right": stage["strip_right"] and last}
    if kind == "Metaspace" and not first and (stage["prepend_scheme"] == "first" or not spaced):
        return {**stage, "prepend_scheme": "never"}
    if kind == "ByteLevel" and not first and not spaced:
        return {**stage, "add_prefix_space": False}
    return stage
