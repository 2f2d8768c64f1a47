"""A random order that needs no memory: a keyed bijection on 0 .. size-1.

A Feistel network over pairs of half-words permutes 0 .. 4^h - 1 for the smallest 4^h >= size; what falls outside
the range is put through again until it lands inside ("cycle walking", Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"), fewer than four times on average. Any element costs the same, whatever the size.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

ROUNDS = 8
MASK = 2**64 - 1  # keeps 64 bits
MIX = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: every input bit reaches the high half of the product


def round_keys(*key: int | str) -> tuple[int, ...]:
    """Derive ROUNDS numbers of 64 bits from a key; equal keys give equal numbers on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS, person=b"hybridlm-order").digest()
    return struct.unpack(f"<{ROUNDS}Q", digest)


class Permutation:
    """A bijection of 0 .. size-1, chosen by a key: `p(i)` for one index, `p.of(array)` for many.

    Raises:
        ValueError: a size below 1.

    >>> shuffled = Permutation(5, "epoch", 0)
    >>> sorted(shuffled(index) for index in range(5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, *key: int | str):
        if size < 1:
            raise ValueError(f"a permutation needs at least one element; got {size}")
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)
        self.keys = round_keys(size, *key)

    def __call__(self, index: int) -> int:
        """The element at `index` (0 <= index < size)."""
        half, low = self.half, (1 << self.half) - 1
        value = index
        while True:
            left, right = value >> half, value & low
            for key in self.keys:
                mixed = ((right ^ key) * MIX) & MASK
                mixed = ((mixed ^ (mixed >> 29)) * MIX) & MASK
                left, right = right, left ^ (mixed >> (64 - half))
            value = left << half | right
            if value < self.size:
                return value

    def of(self, index: np.ndarray) -> np.ndarray:
        """The elements at an array of indices, int64."""
        half, low = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        value = np.asarray(index).astype(np.uint64)
        todo = np.ones(value.shape, dtype=bool)
        while todo.any():
            left, right = value[todo] >> half, value[todo] & low
            for key in self.keys:
                mixed = (right ^ np.uint64(key)) * np.uint64(MIX)
                mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(MIX)
                left, right = right, left ^ (mixed >> np.uint64(64 - self.half))
            value[todo] = left << half | right
            todo = value >= np.uint64(self.size)
        return value.astype(np.int64)
