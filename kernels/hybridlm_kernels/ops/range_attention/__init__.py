"""Softmax attention of each query to a range of keys of its own, such as the compressed entries before it.

B rows, T queries, E keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.range_attention import reference, torch_backend
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

MAX_TRITON_HEAD_DIM = 256  # that a tile of the Triton kernels holds


def _fits_triton(call: Call) -> tuple[bool, str]:
    widest = max(call.get("key_dim"), call.get("value_dim"))
    return (True, "") if widest <= MAX_TRITON_HEAD_DIM else (
        False, f"holds heads of up to {MAX_TRITON_HEAD_DIM} dims; got {widest}")


OPERATION = register(Operation("range_attention", (
    lazy_triton_backend(f"{__name__}.triton_backend", "range_attention", _fits_triton),
    Backend("torch", torch_backend.range_attention),
    Backend("reference", reference.range_attention))))


def _outputs(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    return v_BEGV.new_empty((*q_BTHK.shape[:3], v_BEGV.shape[3])), q_BTHK.new_empty(q_BTHK.shape[:3], dtype=wide)


@compilable(_outputs, keeps=("q_BTHK", "k_BEGK", "v_BEGV", "first_BT", "count_BT"), keeps_outputs=(0, 1))
def range_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, first_BT: Tensor, count_BT: Tensor, *,
                    scale: float | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of query t to the keys first_t, ..., first_t + count_t - 1; zeros where count is 0.

    Neither first_t nor first_t + count_t may fall along a row: what a token sees begins and ends no earlier than what
    the token before it sees. That is not checked.

    Args:
        q_BTHK: queries [B, T, H, K], activated. Query head h reads key head h // (H/G).
        k_BEGK: keys [B, E, G, K], activated like the queries.
        v_BEGV: values [B, E, G, V].
        first_BT: the first key of each query [B, T], integers from 0 on.
        count_BT: number of its keys [B, T]; first + count is at most E.
        scale: factor on the products of queries and keys, K**-0.5 by default.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype, and the logarithm of the sum of exponentials [B, T, H] in fp32 at least, -inf where
        nothing is seen. Differentiable in q, k and v, through both.

    Raises:
        ValueError: the shapes do not fit one another.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Yuan et al. 2025, Native Sparse Attention (arXiv 2502.11089), section 3.3.1: attention to the entries of
    complete windows.

    >>> q, k, v = torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4), torch.tensor([2.0, 4.0, 6.0]).view(1, 3, 1, 1)
    >>> o, _ = range_attention(q, k, v, torch.tensor([[0, 0]]), torch.tensor([[0, 2]]))
    >>> o.flatten()
    tensor([0., 3.])
    """
    if q_BTHK.dim() != 4 or k_BEGK.dim() != 4 or v_BEGV.dim() != 4 or k_BEGK.shape[:3] != v_BEGV.shape[:3]:
        raise ValueError("range_attention: q, k and v must be [B, T, H, K], [B, E, G, K] and [B, E, G, V]; got "
                         f"{list(q_BTHK.shape)}, {list(k_BEGK.shape)} and {list(v_BEGV.shape)}")
    if k_BEGK.shape[0] != len(q_BTHK) or k_BEGK.shape[3] != q_BTHK.shape[3] or q_BTHK.shape[2] % k_BEGK.shape[2]:
        raise ValueError(f"range_attention: q {list(q_BTHK.shape)} does not fit k {list(k_BEGK.shape)}: equal rows and "
                         "head dims, and a multiple of the key heads are needed")
    for name, x in (("first", first_BT), ("count", count_BT)):
        if x.shape != q_BTHK.shape[:2]:
            raise ValueError(f"range_attention: {name} must be {list(q_BTHK.shape[:2])}; got {list(x.shape)}")
    dim = q_BTHK.shape[3]
    chosen = choose(OPERATION, Call.of(q_BTHK, k_BEGK, v_BEGV, key_dim=dim, value_dim=v_BEGV.shape[3]), backend)
    with autocast(q_BTHK.device.type, enabled=False):
        return chosen.run(q_BTHK, k_BEGK, v_BEGV, first_BT, count_BT, dim**-0.5 if scale is None else scale)
