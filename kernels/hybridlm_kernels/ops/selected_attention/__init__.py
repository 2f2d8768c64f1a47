"""Softmax attention over listed tokens or blocks, per token and group of heads, and over a window. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.index_checks import check_indices
from hybridlm_kernels.ops.selected_attention import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend


def _fits(call: Call) -> tuple[bool, str]:
    key_dim, value_dim = call.get("key_dim"), call.get("value_dim")
    if max(key_dim, value_dim) > 256:
        return False, f"holds heads of up to 256 dims; got keys of {key_dim} and values of {value_dim}"
    if call.get("units") == "tokens":
        return False, "reads blocks and windows, which many queries share; got lists of tokens"
    return True, ""


SELECTED_ATTENTION = register(Operation("selected_attention", (
    lazy_triton_backend(f"{__name__}.triton_backend", "selected_attention", _fits),
    Backend("torch", torch_backend.selected_attention), Backend("reference", reference.selected_attention))))


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    return (v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3])),
            q_BTHK.new_empty(q_BTHK.shape[:3], dtype=wide))


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BSGV", "indices_BTUN"))
def selected_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTUN: Tensor, *,
                       scale: float | None = None, block: int | None = None, window: int | None = None,
                       window_k_BWGK: Tensor | None = None, window_v_BWGV: Tensor | None = None,
                       sinks_H: Tensor | None = None, bias_BTUN: Tensor | None = None,
                       cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
                       backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the tokens or blocks listed for it, and over a window: one softmax for all.

    Args:
        q_BTHK: queries [B, T, H, K], activated, the last T of the S positions.
        k_BSGK: keys [B, S, G, K], activated; query head h reads key head h // (H/G).
        v_BSGV: values [B, S, G, V], activated.
        indices_BTUN: integers [B, T, U, N], distinct per list, -1 for none. U = 1: one list for all heads; U = G: one
            per key head; U = H: one per query head. They are positions 0..S-1 of keys; with `block` they are numbers
            of blocks.
        scale: factor on the scores, K**-0.5 by default.
        block: entries are blocks of so many tokens, counted from the start of the query's document; tokens later than
            the query, or outside of its document, are not read. None: entries are keys, and the list decides what may
            be seen.
        window: a query also reads the last so many tokens of its document, its own included; a listed token among
            them counts once.
        window_k_BWGK: keys [B, W, G, K] of the window, where it has keys of its own: then listed keys are never counted
            as part of the window, and the queries are the last T of its W positions.
        window_v_BWGV: values [B, W, G, V] of the window.
        sinks_H: logits [H] that take part in the softmax and carry no value.
        bias_BTUN: [B, T, U, N], added to the scores of all keys of the unit.
        cu_seqlens: cumulative lengths of packed documents over the flattened rows of S tokens (of W with keys of the
            window's own); blocks and window read them.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype, zeros where a query reads nothing, and the logarithm of the sum of exponentials,
        sinks included, [B, T, H] in fp32 at least, -inf where there is nothing. Differentiable in q, k, v, the keys and
        values of the window, sinks and bias, from both.

    Raises:
        ValueError: the shapes do not fit one another.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Yuan et al. 2025, NSA, section 3.3.2 (lists of blocks per group); Lu et al. 2025, MoBA, section 2.2 (per
    head); DeepSeek-V4, 2026, section 2.3 (a window and entries in one softmax, with sinks).

    >>> import torch
    >>> q = k = torch.zeros(1, 6, 1, 2)  # equal scores: the mean over what is read
    >>> v = torch.arange(6.0).view(1, 6, 1, 1)
    >>> lists = torch.tensor([[-1], [-1], [-1], [-1], [-1], [0]]).view(1, 6, 1, 1)  # the last query: the first block
    >>> selected_attention(q, k, v, lists, block=2, window=2)[0].flatten()
    tensor([0.0000, 0.5000, 1.5000, 2.5000, 3.5000, 2.5000])
    """
    batch, queries, heads, dim = q_BTHK.shape
    if k_BSGK.dim() != 4 or k_BSGK.shape[:3] != v_BSGV.shape[:3] or k_BSGK.shape[0] != batch:
        raise ValueError(f"selected_attention: k and v must be [{batch}, S, G, *] with equal S and G; "
                         f"got {list(k_BSGK.shape)} and {list(v_BSGV.shape)}")
    groups = k_BSGK.shape[2]
    if k_BSGK.shape[3] != dim or heads % groups:
        raise ValueError(f"selected_attention: q {list(q_BTHK.shape)} does not fit k {list(k_BSGK.shape)}: "
                         "equal head dims and a multiple of the key heads are needed")
    if (indices_BTUN.dim() != 4 or indices_BTUN.shape[:2] != (batch, queries) or indices_BTUN.is_floating_point()
            or indices_BTUN.shape[2] not in (1, groups, heads)):
        raise ValueError(f"selected_attention: indices must be integers [{batch}, {queries}, 1, {groups} or {heads}, "
                         f"N]; got {indices_BTUN.dtype} {list(indices_BTUN.shape)}")
    for name, least in (("block", block), ("window", window)):
        if least is not None and least < 1:
            raise ValueError(f"selected_attention: {name} must be at least 1; got {least}")
    if bias_BTUN is not None and bias_BTUN.shape != indices_BTUN.shape:
        raise ValueError(f"selected_attention: bias must be {list(indices_BTUN.shape)}; got {list(bias_BTUN.shape)}")
    if sinks_H is not None and sinks_H.shape != (heads,):
        raise ValueError(f"selected_attention: sinks must be [{heads}]; got {list(sinks_H.shape)}")
    _check_window(k_BSGK, v_BSGV, window, window_k_BWGK, window_v_BWGV)
    rows = k_BSGK if window_k_BWGK is None else window_k_BWGK
    if (block is not None or window is not None) and rows.shape[1] < queries:
        raise ValueError(f"selected_attention: {queries} queries cannot be the last of {rows.shape[1]} tokens")
    if block is not None and rows.shape[1] != k_BSGK.shape[1]:
        raise ValueError(f"selected_attention: blocks need as many keys as the window has; got {k_BSGK.shape[1]} and "
                         f"{rows.shape[1]}")
    check_indices("selected_attention", "indices", indices_BTUN, -(-k_BSGK.shape[1] // (block or 1)), lowest=-1,
                  distinct=True)
    borders = None
    if block is not None or window is not None:
        borders = filled_borders_of(cu_seqlens, batch, rows.shape[1], q_BTHK.device)
    units = "blocks" if block is not None or not indices_BTUN.shape[3] else "tokens"
    call = Call.of(q_BTHK, k_BSGK, v_BSGV, window_k_BWGK, window_v_BWGV, sinks_H, bias_BTUN, key_dim=dim,
                   value_dim=v_BSGV.shape[3], units=units)
    chosen = choose(SELECTED_ATTENTION, call, backend)
    return chosen.run(q_BTHK, k_BSGK, v_BSGV, indices_BTUN, dim**-0.5 if scale is None else scale, block, window,
                      window_k_BWGK, window_v_BWGV, sinks_H, bias_BTUN, borders)


def _check_window(k_BSGK: Tensor, v_BSGV: Tensor, window: int | None, window_k: Tensor | None,
                  window_v: Tensor | None) -> None:
    """Raises ValueError unless the window's own keys and values fit, or are both missing."""
    if window_k is None and window_v is None:
        return
    if window_k is None or window_v is None or window is None:
        raise ValueError("selected_attention: a window with keys of its own needs window, window_k and window_v")
    for name, own, other in (("window_k", window_k, k_BSGK), ("window_v", window_v, v_BSGV)):
        if own.dim() != 4 or own.shape[0] != other.shape[0] or own.shape[2:] != other.shape[2:]:
            raise ValueError(f"selected_attention: {name} must be {[other.shape[0], 'W', *other.shape[2:]]}; got "
                             f"{list(own.shape)}")
    if window_k.shape[1] != window_v.shape[1]:
        raise ValueError(f"selected_attention: window_k and window_v must be equally long; got {window_k.shape[1]} and "
                         f"{window_v.shape[1]} tokens")
