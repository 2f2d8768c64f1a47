import itertools
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from hybridlm.data.statistics import bigram_entropy, entropies, unigram_entropy


def by_counting(documents):
    pairs, first = {}, {}
    for text in documents:
        for a, b in itertools.pairwise(text):
            pairs[a, b] = pairs.get((a, b), 0) + 1
            first[a] = first.get(a, 0) + 1
    total = sum(pairs.values())
    return -sum(n / total * math.log2(n / first[a]) for (a, _), n in pairs.items())


def test_against_counting():
    text = Path(sysconfig.get_paths()["stdlib"], "textwrap.py").read_bytes()
    documents = [text[:5000], b"", text[5000:5001], text[5001:]]
    assert bigram_entropy(documents) == pytest.approx(by_counting(documents), abs=1e-9)


def test_known_texts():
    assert bigram_entropy(b"ab" * 100) == pytest.approx(0, abs=1e-9)
    assert unigram_entropy(b"ab" * 100) == pytest.approx(1)
    noise = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    unigram, bigram = entropies(noise)
    assert unigram == pytest.approx(8, abs=0.001)
    assert bigram == pytest.approx(8, abs=0.03)


def test_pairs_stay_within_documents():
    assert bigram_entropy([b"aab", b"aab"]) == pytest.approx(1)
    assert bigram_entropy([b"aa", b"bb"]) == pytest.approx(0)


def test_long_document_is_counted_across_parts():
    text = b"ab" * (1 << 23) + b"ac"
    n = (1 << 23) + 1  # times a comes before something; once that is c
    expected = (math.log2(n) - (n - 1) * math.log2((n - 1) / n)) / (len(text) - 1)
    assert bigram_entropy(text) == pytest.approx(expected, abs=1e-10)
    assert expected > 1e-6


def test_nothing_to_count():
    with pytest.raises(ValueError, match="two bytes"):
        bigram_entropy([b"a", b""])
