"""Log-linear attention in mixers: scales of the levels, and the call that continues a decode state.

    lambda_t^l = softplus(level_scale_l * u_t^l),   u = W x

(Guo et al. 2025, Log-Linear Attention, section 3.1, and the authors' code.)

B rows, T tokens, HV value heads, K key dim, V value dim, L levels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import ConfigError, require
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import log_linear_attention
from hybridlm_kernels.ops.log_linear_attention.torch_backend import TILE, TILE_LEVELS
from hybridlm_kernels.precision import wide


def check_levels(levels: int | None) -> None:
    """Refuse fewer than two levels.

    Raises:
        ConfigError: `levels` is neither null nor at least 2.
    """
    require(levels is None or levels >= 2, "levels", "must be null or at least 2: a token and what is older",
            got=levels)


def refuse_split_rows(kind: str) -> None:
    """Refuse rows that are divided between processes.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("levels", "cannot work on split rows: blocks of a level reach over the borders of shards",
                      got=kind, expected="engine.context_parallel=1, or levels=null")


def count_states(levels: int | None) -> int:
    """States of one head: one, or one per level above 0.

    >>> count_states(None), count_states(15)
    (1, 14)
    """
    return 1 if levels is None else levels - 1


def count_calls(levels: int | None, max_position: int) -> int:
    """Calls of the recurrence that a row of `max_position` tokens takes: for tiles, and for the levels above them.

    >>> count_calls(None, 4096), count_calls(15, 32), count_calls(15, 4096), count_calls(9, 4096)
    (1, 1, 8, 5)
    """
    if levels is None:
        return 1
    last_block = max(TILE, 1 << (levels - 2))
    between = range(TILE_LEVELS + 1, min((max_position - 1).bit_length(), levels - 2) + 1)
    return 1 + len(between) + (max_position > last_block) + (max_position > 2 * last_block)


def level_activations(levels: int | None, heads: int) -> int:
    """Numbers per token kept for the scales of the levels and for the weights inside a tile, which stand four times."""
    return 0 if levels is None else heads * (2 * levels + 4 * TILE)


def level_flops(levels: int | None) -> float:
    """FLOPs per token and element of a state, beside those of one state: half the levels hold a block to be read."""
    return 0.0 if levels is None else float(levels - 2)


def compute_level_scales(u_BTX: Tensor, level_scale_X: Tensor, heads: int) -> Tensor:
    """The scale of every level at every token, [B, T, heads, L] in fp32 at least, from projections u [B, T, heads L].

    >>> import torch
    >>> compute_level_scales(torch.zeros(1, 1, 4), torch.ones(4), heads=2)
    tensor([[[[0.6931, 0.6931],
              [0.6931, 0.6931]]]])
    """
    return F.softplus(wide(level_scale_X) * wide(u_BTX)).unflatten(-1, (heads, -1))


def run_levels(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, lambda_BTHvL: Tensor, seq: SequenceInfo,
               start: Tensor | None, *, decodes: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """The operation on the tokens of each document, from a decode state on.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHvV: values.
        lambda_BTHvL: scales of the levels.
        seq: borders of the documents and positions.
        start: states of the levels, [B, L - 1, HV, K, V]; None before the first token.
        decodes: whether the states after the last token are needed.
        options: of the operation.

    Returns:
        o [B, T, HV, V], and the states.
    """
    seen = 0 if start is None else seq.last_position + 1 - v_BTHvV.shape[1]
    return log_linear_attention(q_BTHK, k_BTHK, v_BTHvV, lambda_BTHvL, initial_state=start, tokens_seen=seen,
                                final_state=decodes, cu_seqlens=seq.cu_seqlens, **options)
