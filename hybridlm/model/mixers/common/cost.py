"""Counts that the cost methods of several mixers share: keys, pools and weights. A multiply-add is 2 FLOPs."""

from __future__ import annotations


def count_visible_keys(context_length: int, limit: int | None = None) -> float:
    """Mean number of keys that a token sees in a causal sequence, at most `limit` (window, top-k) per token.

    >>> count_visible_keys(4), count_visible_keys(4, limit=2)
    (2.5, 1.75)
    """
    length = context_length
    if limit is None or limit >= length:
        return (length + 1) / 2
    # The first `limit` tokens see 1, 2, ..., limit keys, all others `limit`.
    return limit - limit * (limit - 1) / (2 * length)


def count_visible_pools(context_length: int, size: int, limit: int | None = None) -> float:
    """Mean number of complete pools of `size` tokens that a token of a causal sequence sees, at most `limit` per token.

    >>> count_visible_pools(4, size=2)
    1.0
    """
    pools, open_tokens = divmod(context_length, size)
    most = pools if limit is None else min(limit, pools)
    below = min(pools - 1, most) if pools else 0
    # For each j = 1 .. pools - 1, `size` tokens see j pools; the tokens from the end of the last pool on see all pools.
    inner = below * (below + 1) // 2 + max(0, pools - 1 - below) * most
    return (size * inner + (open_tokens + 1) * most) / context_length if pools else 0.0


def count_open_tail(context_length: int, size: int) -> float:
    """Mean number of tokens behind the last complete pool of `size` tokens, the token itself included.

    >>> count_open_tail(4, size=2)
    0.5
    """
    pools, open_tokens = divmod(context_length, size)
    return (pools * size * (size - 1) / 2 + open_tokens * (open_tokens + 1) / 2) / context_length


def count_block_keys(context_length: int, block: int, topk: int, own_counts: bool) -> float:
    """Mean number of keys that a token of a causal sequence reads in at most `topk` blocks of `block` tokens.

    Args:
        context_length: tokens of the sequence.
        block: tokens per block.
        topk: blocks per token.
        own_counts: whether the token's own block, read up to the token, is one of the `topk`; else it is read besides
            them while it is open, and one of them where the token completes it.

    >>> count_block_keys(4, block=2, topk=1, own_counts=True), count_block_keys(4, block=2, topk=1, own_counts=False)
    (1.5, 2.0)
    """
    n = context_length
    tail = count_open_tail(n, block)
    if not own_counts:
        return block * count_visible_pools(n, block, topk) + tail
    # The complete blocks before the token are those that the token before it sees.
    before = block * count_visible_pools(n - 1, block, topk - 1) * (n - 1) / n if n > 1 else 0.0
    return before + tail + n // block * block / n  # a token that completes its block reads all of it


def count_low_rank_params(inputs: int, outputs: int, rank: int | None) -> int:
    """Number of weights of a projection: one matrix, or two through `rank` dims.

    >>> count_low_rank_params(64, 32, None), count_low_rank_params(64, 32, 8)
    (2048, 768)
    """
    if outputs == 0:
        return 0
    return inputs * outputs if rank is None else rank * (inputs + outputs)
