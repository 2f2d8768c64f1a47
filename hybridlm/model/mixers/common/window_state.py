"""Decode state of mixers that attend to a window and keep a state matrix of the rest.

B rows, S tokens kept, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridlm.model.decode_state import TensorState, TokenCache


@dataclass
class WindowState:
    """Keys [B, S, G, K] and values [B, S, G, V] of the newest tokens, and named tensors such as a state matrix."""

    keys: TokenCache
    values: TokenCache
    rest: TensorState

    @classmethod
    def empty(cls, max_length: int, tokens: int) -> WindowState:
        """A state that keeps the `tokens` newest keys and values."""
        return cls(TokenCache(max_length, tokens + 1), TokenCache(max_length, tokens + 1), TensorState())

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return self.keys.num_bytes + self.values.num_bytes + self.rest.num_bytes
