"""Entropies of a text in bits per byte, which a trained model has to beat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hybridlm.data.shards import TokenStore
    from hybridlm.data.tokenizer import Tokenizer


def entropies(documents: bytes | Iterable[bytes]) -> tuple[float, float]:
    """Unigram and bigram entropy of the documents' own bytes, both in bits per byte.

    Unigram: H(x_t) over all bytes. Bigram: H(x_t | x_{t-1}) over the pairs within documents. Both use the text's
    own counts, so they are what a model that knew these frequencies beforehand would reach.

    Raises:
        ValueError: no byte (unigram) or no pair of bytes (bigram) to count.

    >>> entropies([b"abab", b"abab"])
    (1.0, 0.0)
    """
    singles_C = np.zeros(256, dtype=np.int64)
    pairs = np.zeros(65536, dtype=np.int64)
    for document in [documents] if isinstance(documents, bytes) else documents:
        for start in range(0, len(document), 1 << 24):  # bounds the temporaries; pieces overlap by one byte
            part = np.frombuffer(document, dtype=np.uint8)[start:start + (1 << 24) + 1].astype(np.int64)
            singles_C += np.bincount(part[:1 << 24], minlength=256)
            pairs += np.bincount(part[:-1] * 256 + part[1:], minlength=65536)
    if not pairs.any():
        raise ValueError("the entropy of bigrams needs a document of at least two bytes")
    pairs_CC = pairs.reshape(256, 256)
    return _bits(singles_C), _bits(pairs_CC) - _bits(pairs_CC.sum(axis=1))


def unigram_entropy(documents: bytes | Iterable[bytes]) -> float:
    """Bits per byte of a model that knows the frequency of each byte. See `entropies`."""
    return entropies(documents)[0]


def bigram_entropy(documents: bytes | Iterable[bytes]) -> float:
    """Bits per byte of a model that knows the frequency of each byte after each other. See `entropies`."""
    return entropies(documents)[1]


def _bits(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def store_entropies(store: TokenStore, tokenizer: Tokenizer, stop: int | None = None) -> tuple[float, float]:
    """The `entropies` of the text of a store, or of its first `stop` tokens, with which a loss is compared.

    Raises:
        ValueError: see `entropies`.
    """
    return entropies(tokenizer.decode_bytes(ids) for ids in store.documents(stop))
