import random

import pytest

from hybridlm.data.split import Split, cut_place, plan_split, plan_split_by_documents
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


@pytest.mark.parametrize("fraction", [1e-6, 0.02, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_small_corpora_fill_both_sides_in_any_order(fraction, count):
    for first in range(0, 40, 4):
        texts = TEXTS[first:first + count]
        found = sides(plan_split(texts, fraction, "x"), texts)
        assert {part for parts in found.values() for part in parts} == {"train", "validation"}
        assert found == sides(plan_split(texts[::-1], fraction, "x"), texts)
    if fraction == 1e-6:
        assert sum("validation" in parts for parts in found.values()) == 1


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


def held_out_bytes(split, texts):
    return sum(len(text) for t in texts for part, text in split.parts(t) if part == "validation")


@pytest.mark.parametrize("fraction", [0.003, 0.03, 0.5, 0.97])
@pytest.mark.parametrize("sizes", [
    [900_000, 5_000, 300, 70_000, 12_000, 40_000, 80, 650_000, 20_000, 31_000], [200_000] * 5, [1000] * 300,
    [40] * 2000 + [500_000], [500_000, 3]])
def test_bytes_are_split_whatever_the_sizes(sizes, fraction):
    for seed in range(4):
        draw = random.Random(seed)
        texts = [(b"%d %d " % (seed, i) + b"word " * size)[:size] for i, size in enumerate(sizes)]
        split = plan_split(texts, fraction, "x")
        wanted = fraction * sum(sizes)
        assert abs(held_out_bytes(split, texts) - wanted) <= 0.34 * min(wanted, sum(sizes) - wanted)
        assert sum(len(text) for t in texts for _, text in split.parts(t)) == sum(sizes)
        assert split == plan_split(draw.sample(texts, len(texts)), fraction, "x")


def test_documents_are_cut_only_where_whole_ones_miss_by_far():
    for count, fraction, cut in ((60, 0.02, 0), (10, 0.1, 0), (10, 0.02, 1), (3, 0.3, 0), (3, 0.1, 1)):
        texts = [b"%03d " % i + b"word " * 200 for i in range(count)]
        split = plan_split(texts, fraction, "x")
        assert sum(len(list(split.parts(t))) - 1 for t in texts) == cut


def test_a_threshold_that_meets_the_bytes_stays():
    """So that adding documents does not move others, in all but small or lumpy corpora."""
    texts = [b"document %d" % i for i in range(60_000)]
    assert plan_split(texts, 0.1, "x") == Split(0.1)


def test_large_corpora_are_measured_in_part(monkeypatch):
    monkeypatch.setattr("hybridlm.data.split.PLAN_MIN_BYTES", 5000)
    read = []

    def documents():
        for number in range(100_000):
            read.append(number)
            yield b"document %06d" % number

    assert plan_split(documents(), 0.3, "x") == Split(0.3)
    assert 2500 < len(read) < 2700  # (1 - 0.3) / 0.3 / 0.03^2 = 2593 documents of one size


def test_copies_count_once_each():
    texts = [b"copy of a text " * 20] * 50 + [b"another %d" % i for i in range(50)]
    split = plan_split(texts, 0.05, "x")
    assert abs(held_out_bytes(split, texts) / sum(map(len, texts)) - 0.05) < 0.006


def test_documents_of_one_character():
    for texts in ([b"a", b"b"], ["é".encode(), "日".encode(), b"c"]):
        parts = [part for t in texts for part, _ in plan_split(texts, 0.01, "x").parts(t)]
        assert parts.count("validation") == 1
        assert parts.count("train") == len(texts) - 1


def test_data_of_an_earlier_version_is_split_by_documents():
    split = plan_split_by_documents(TEXTS[:3], 1e-6, "x")
    assert sorted(part for t in TEXTS[:3] for part, _ in split.parts(t)) == ["train", "train", "validation"]
    text = b"".join(b"line %03d\n" % i for i in range(1000))
    assert [part for part, _ in plan_split_by_documents([text], 0.1, "x").parts(text)] == ["train", "validation"]
    read = iter(TEXTS)
    assert plan_split_by_documents(read, 0.3, "x") == Split(0.3)
    assert sum(1 for _ in read) > 350
