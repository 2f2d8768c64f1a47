import random

import pytest

from hybridlm.data.split import Split, cut_place, plan_split
from hybridlm.errors import DataError

TEXTS = [f"document number {i}\n".encode() * 3 for i in range(400)]


def sides(split, texts):
    return {text: [part for part, _ in split.parts(text)] for text in texts}


def test_content_decides_whatever_the_order():
    split = plan_split(TEXTS, 0.1, "x")
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert sides(split, TEXTS) == sides(plan_split(shuffled, 0.1, "x"), TEXTS)
    held_out = sum(parts == ["validation"] for parts in sides(split, TEXTS).values())
    assert 20 < held_out < 60


def test_growing_fractions_keep_what_was_held_out():
    small, large = (sides(Split(f), TEXTS) for f in (0.1, 0.3))
    assert all(large[t] == ["validation"] for t in TEXTS if small[t] == ["validation"])


def test_reading_stops_when_both_sides_are_met():
    read = []

    def documents():
        for text in TEXTS:
            read.append(text)
            yield text

    plan_split(documents(), 0.3, "x")
    assert len(read) < 50


@pytest.mark.parametrize("fraction", [1e-6, 0.02, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_small_corpora_fill_both_sides_in_any_order(fraction, count):
    for first in range(0, 40, 4):
        texts = TEXTS[first:first + count]
        found = sides(plan_split(texts, fraction, "x"), texts)
        assert {part for parts in found.values() for part in parts} == {"train", "validation"}
        assert found == sides(plan_split(texts[::-1], fraction, "x"), texts)
    if fraction == 1e-6:
        assert sum(parts == ["validation"] for parts in found.values()) == 1


def test_single_document_is_cut_at_a_line():
    text = b"".join(b"line %03d\n" % i for i in range(1000))
    for texts in ([text], [b"", text, text]):
        (train, head), (validation, tail) = plan_split(texts, 0.1, "x").parts(text)
        assert (train, validation) == ("train", "validation")
        assert head + tail == text
        assert head.endswith(b"\n")
        assert abs(len(tail) / len(text) - 0.1) < 0.01


@pytest.mark.parametrize("text", ["ab", "é日", "日本語😀" * 5, "x" * 99, "a\n", "\n\n"])
@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_cuts_leave_whole_characters_on_both_sides(text, fraction):
    data = text.encode()
    place = cut_place(data, fraction)
    assert data[:place].decode()
    assert data[place:].decode()


@pytest.mark.parametrize("texts", [[], [b"", b""]])
def test_no_text(texts):
    with pytest.raises(DataError, match="corpus: no text found"):
        plan_split(texts, 0.1, "corpus")


def test_one_character_cannot_be_cut():
    with pytest.raises(DataError, match=r"one character.*data\.validation_path"):
        plan_split(["é".encode()], 0.1, "corpus")
