"""Causal attention on FlashAttention's own kernels, for comparison and for who has it installed.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.optional_packages import find
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import Call

PACKAGE = ("flash-attn", "2.6")
ROWS_FUNCTION = ("flash_attn", "flash_attn_func")
PACKED_FUNCTION = ("flash_attn", "flash_attn_varlen_func")
MAX_HEAD_DIM = 256


def supports(call: Call) -> tuple[bool, str]:
    """Accepts half precision, no sinks, and equal key and value head dims up to 256, where flash-attn is installed."""
    if call.dtype not in (torch.float16, torch.bfloat16):
        return False, f"computes in float16 and bfloat16; the tensors are {call.dtype}"
    if call.get("sinks"):
        return False, "knows no sinks"
    key_dim, value_dim = call.get("key_dim"), call.get("value_dim")
    if key_dim != value_dim or key_dim > MAX_HEAD_DIM:
        return False, f"equal key and value head dims up to {MAX_HEAD_DIM}; got {key_dim} and {value_dim}"
    found, why = find(*ROWS_FUNCTION, *PACKAGE)
    return found is not None, why


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float | None, window: int | None,
              sinks_H: Tensor | None, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The FlashAttention backend; arguments as in the public function, already checked."""
    # Its window counts the keys before the query's own; its causal mask lets the last query see the last key.
    options = {"softmax_scale": scale, "causal": True, "window_size": (-1 if window is None else window - 1, 0)}
    if cu_seqlens is None:
        run, why = find(*ROWS_FUNCTION, *PACKAGE)
        assert run is not None, why
        return run(q_BTHK, k_BSGK, v_BSGV, **options)
    run, why = find(*PACKED_FUNCTION, *PACKAGE)
    assert run is not None, why
    borders, longest = cu_seqlens.tensor(), max(cu_seqlens.lengths)
    flat = [x.flatten(0, 1) for x in (q_BTHK, k_BSGK, v_BSGV)]
    return run(*flat, borders, borders, longest, longest, **options).view(*q_BTHK.shape[:3], v_BSGV.shape[3])
