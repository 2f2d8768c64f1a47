"""Small sums that the cost methods of several mixers share. A multiply-add counts as 2 FLOPs."""

from __future__ import annotations


def visible_keys(context_length: int, limit: int | None = None) -> float:
    """Mean number of keys a token sees in a causal sequence, at most `limit` (window, top-k) each."""
    length = context_length
    if limit is None or limit >= length:
        return (length + 1) / 2
    # The first `limit` tokens see 1, 2, ..., limit keys, all others `limit`.
    return limit - limit * (limit - 1) / (2 * length)
