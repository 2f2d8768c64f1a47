"""Small sums that the cost methods of several mixers share. A multiply-add counts as 2 FLOPs."""

from __future__ import annotations


def visible_keys(context_length: int, limit: int | None = None) -> float:
    """Mean number of keys a token sees in a causal sequence, at most `limit` (window, top-k) each."""
    length = context_length
    if limit is None or limit >= length:
        return (length + 1) / 2
    # The first `limit` tokens see 1, 2, ..., limit keys, all others `limit`.
    return limit - limit * (limit - 1) / (2 * length)


def visible_pools(context_length: int, size: int, limit: int | None = None) -> float:
    """Mean number of complete pools of `size` tokens that a token of a causal sequence sees, at most `limit` each."""
    pools, rest = divmod(context_length, size)
    most = pools if limit is None else min(limit, pools)
    below = min(pools - 1, most) if pools else 0
    # `size` tokens see j pools each for j = 1 .. pools - 1, and those from the end of the last pool on see all.
    inner = below * (below + 1) // 2 + max(0, pools - 1 - below) * most
    return (size * inner + (rest + 1) * most) / context_length if pools else 0.0


def open_tail(context_length: int, size: int) -> float:
    """Mean number of tokens behind the last complete pool, the token itself included."""
    pools, rest = divmod(context_length, size)
    return (pools * size * (size - 1) / 2 + rest * (rest + 1) / 2) / context_length
