"""Checks of arguments and choices of dtypes that delta_rule and linear_attention (short_conv in part) share.

Legend: B rows, T tokens per row, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.gates import Gate
from hybridlm_kernels.registry import Call

Borders = CuSeqlens | Tensor | Sequence[int] | None
# Largest key dims of the Triton kernels: a program keeps all rows of some columns of a state in registers.
MAX_KEY_DIM = 256
MAX_KEY_DIM_FP32 = 128


def borders_of(cu_seqlens: Borders, batch: int, length: int, device: torch.device) -> CuSeqlens | None:
    """The checked borders of packed documents, or None when every row is one document.

    Args:
        cu_seqlens: cumulative lengths over the flattened batch x length tokens, in any of the accepted forms.
        batch: number of rows.
        length: tokens per row.
        device: where tables made from the borders will be needed.

    Raises:
        ValueError: the borders do not cover the tokens, or a document crosses the end of a row.
    """
    if cu_seqlens is None:
        return None
    borders = CuSeqlens.of(cu_seqlens, device)
    borders.check(batch, length)
    return borders


def filled_borders_of(cu_seqlens: Borders, batch: int, length: int, device: torch.device) -> CuSeqlens | None:
    """The checked borders of the documents that have tokens, for operations that return nothing per document."""
    borders = borders_of(cu_seqlens, batch, length, device)
    return None if borders is None else borders.filled


def without_empty_documents(run: Callable[[Tensor | None, CuSeqlens | None], tuple[Tensor, Tensor]],
                            state_N: Tensor | None, borders: CuSeqlens | None,
                            final_state: bool = True) -> tuple[Tensor, Tensor]:
    """Apply `run(state, borders) -> (o, final_state)` to the documents that have tokens.

    Args:
        run: the operation, which never sees an empty document.
        state_N: initial states [N, ...] of all documents; None is zero.
        borders: borders of all documents, None where every row is one.
        final_state: whether final states are wanted.

    Returns:
        The outputs, and the final states [N, ...] of all documents: those of empty ones are their initial states.
        Without `final_state` there are none: [0, ...].
    """
    filled = None if borders is None or borders.filled is borders else borders.filled_documents()
    first = state_N if filled is None or state_N is None else state_N.index_select(0, filled)
    o, last = run(first, None if borders is None else borders.filled)
    if not final_state:
        return o, last[:0]
    if borders is None or filled is None:
        return o, last
    before = last.new_zeros(borders.num_documents, *last.shape[1:]) if state_N is None else state_N.to(last.dtype)
    return o, before.index_copy(0, filled, last)


def check_shapes(name: str, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, state_NHvKV: Tensor | None,
                 borders: CuSeqlens | None) -> None:
    """Raise ValueError unless queries, keys, values and state fit together."""
    for label, x in (("q", q_BTHK), ("k", k_BTHK), ("v", v_BTHvV)):
        if x.dim() != 4:
            raise ValueError(f"{name}: {label} must be [batch, time, heads, dim]; got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: {label} must be a floating point tensor; got {x.dtype}")
    if q_BTHK.shape != k_BTHK.shape:
        raise ValueError(f"{name}: q and k must have the same shape; "
                         f"got {list(q_BTHK.shape)} and {list(k_BTHK.shape)}")
    B, T, H, K = k_BTHK.shape
    HV, V = v_BTHvV.shape[2:]
    if v_BTHvV.shape[:2] != (B, T):
        raise ValueError(f"{name}: v has batch and time {list(v_BTHvV.shape[:2])}, q and k have {[B, T]}")
    if 0 in (B, T, H, K, HV, V):
        raise ValueError(f"{name}: no dimension may be 0; got q {list(q_BTHK.shape)}, v {list(v_BTHvV.shape)}")
    if HV % H:
        raise ValueError(f"{name}: the {HV} value heads must be a multiple of the {H} key heads")
    N = B if borders is None else borders.num_documents
    if state_NHvKV is not None and state_NHvKV.shape != (N, HV, K, V):
        kind = "rows" if borders is None else "documents"
        raise ValueError(f"{name}: initial_state must be [{kind}, value heads, key dim, value dim] = "
                         f"{[N, HV, K, V]}; got {list(state_NHvKV.shape)}")


def check_decay(name: str, g: Tensor | None, gate: Gate | None, allowed: dict[str, tuple[int, ...]]) -> str:
    """The kind of decay that g stands for: "none" without g, else the name of its shape in `allowed`.

    Raises:
        ValueError: g has none of the allowed shapes, or does not fit its gate.
    """
    if g is None:
        if gate is not None:
            raise ValueError(f"{name}: a gate needs g, the raw output of a projection")
        return "none"
    decay = check_per_token(name, "g", g, allowed)
    if gate is not None:
        gate.check(name, g)
    return decay


def check_per_token(name: str, label: str, x: Tensor, allowed: dict[str, tuple[int, ...]]) -> str:
    """The name of the shape of `x` in `allowed`.

    Raises:
        ValueError: `x` has none of the allowed shapes.
    """
    for kind, shape in allowed.items():
        if tuple(x.shape) == shape:
            return kind
    shapes = " or ".join(f"{list(shape)} ({kind})" for kind, shape in allowed.items())
    raise ValueError(f"{name}: {label} must have shape {shapes}; got {list(x.shape)}")


def fits_triton(call: Call) -> tuple[bool, str]:
    """Whether the Triton kernels accept the key dims of the call, and if not, the reason. They take any value dims."""
    K = call.get("key_dim")
    if K > MAX_KEY_DIM:
        return False, f"has key head dims up to {MAX_KEY_DIM}; got {K}"
    if K > MAX_KEY_DIM_FP32 and call.dtype == torch.float32:
        return False, (f"in float32 has key head dims up to {MAX_KEY_DIM_FP32}, beyond which registers do not suffice; "
                       f"got {K}; use bfloat16")
    return True, ""


def math_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums of decays: float64 for float64 tensors, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_states(k_BTHK: Tensor, v_BTHvV: Tensor, borders: CuSeqlens | None, wanted: bool = True) -> Tensor:
    """Memory for the final states [N, HV, K, V] of these keys and values, or [0, HV, K, V] where not `wanted`."""
    N = k_BTHK.shape[0] if borders is None else borders.num_documents
    N = N if wanted else 0
    return v_BTHvV.new_empty((N, v_BTHvV.shape[2], k_BTHK.shape[3], v_BTHvV.shape[3]), dtype=math_dtype(v_BTHvV))


def each_document(run: Callable[..., tuple[Tensor, Tensor]], borders: CuSeqlens | None,
                  tokens: Sequence[Tensor | None], state_NHvKV: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply `run(*tokens, state) -> (o, final_state)` to each packed document by itself, or to all rows at once.

    Args:
        run: the operation on rows that are one document each.
        borders: borders of packed documents, None where every row is a document.
        tokens: tensors [B, T, ...]; None entries are passed on.
        state_NHvKV: initial states [N, ...], or None.

    Returns:
        The outputs put together, [B, T, ...], and the final states [N, ...].
    """
    if borders is None:
        return run(*tokens, state_NHvKV)
    B, T = next(x.shape[:2] for x in tokens if x is not None)
    flat = [None if x is None else x.reshape(1, B * T, *x.shape[2:]) for x in tokens]
    outputs, states = [], []
    for n, (start, end) in enumerate(zip(borders.host, borders.host[1:], strict=False)):
        document = [None if x is None else x[:, start:end] for x in flat]
        o, state = run(*document, None if state_NHvKV is None else state_NHvKV[n : n + 1])
        outputs.append(o)
        states.append(state)
    o = torch.cat(outputs, dim=1)
    return o.reshape(B, T, *o.shape[2:]), torch.cat(states)
