"""Longest match of the last queries among earlier keys, of which the value behind the match is read (ROSA, RWKV-8).

Legend: B rows, T queries, S keys, C channels, G streams of C / bits, R run lengths of the last query.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.suffix_match import automaton, reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders, filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

MAX_BITS = 8  # of a symbol

OPERATION = register(Operation("suffix_match", (
    Backend("torch", torch_backend.suffix_match),
    Backend("automaton", automaton.suffix_match, automaton.supports),
    Backend("reference", reference.suffix_match, reference.supports))))


def _outputs(q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor, scale_C: Tensor, *, bits: int = 1, final_runs: bool = False,
             **_: Any) -> tuple[Tensor, Tensor | None]:
    B, S, C = k_BSC.shape
    runs = k_BSC.new_empty((B, S - 1, C // bits), dtype=torch.int32) if final_runs else None
    return q_BTC.new_empty(q_BTC.shape), runs


@compilable(_outputs, keeps=("q_BTC", "k_BSC", "v_BSC", "scale_C"))
def suffix_match(q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor, scale_C: Tensor, *, bits: int = 1,
                 unmatched: Literal["minus", "zero"] = "minus", runs_BRG: Tensor | None = None,
                 final_runs: bool = False, cu_seqlens: Borders = None,
                 backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """Read the value behind the longest earlier match of the queries so far.

    The signs of `bits` neighbouring channels are one symbol, so that C channels are C / bits streams of symbols. For
    every stream and token t let w be the largest number for which the last w symbols of q, up to t, are symbols of k
    up to some j < t, and j the latest such. The output is the symbol of v at j + 1, each bit as +scale or -scale.

    The function is piecewise constant in q, k and v. Their gradient is the published one: for every bit alone, the
    difference of (gradient of y) . y with the bit set and not set, over twice the larger of |x| and 0.001.

    Args:
        q_BTC: queries, those of the last T tokens.
        k_BSC: keys; only whether they are above zero counts, as for queries and values. They may be bool in decoding.
        v_BSC: values.
        scale_C: size of the output of each channel.
        bits: channels per symbol, 1 to 8.
        unmatched: what stands where no symbol matches: -scale (`minus`) or 0 (`zero`).
        runs_BRG: int32 run lengths after the token before the first query; needed where T < S.
        final_runs: whether the run lengths after the last token are returned.
        cu_seqlens: cumulative lengths of packed documents over the flattened B S tokens, with the start of every row
            among them; T == S then. No token sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [B, T, C] in the dtype of q, and run lengths [B, S - 1, G] or None: for every earlier key but the last, how
        many symbols up to it are those up to the last query.

    Raises:
        ValueError: the shapes do not fit one another, or borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Peng, RWKV-LM, folder RWKV-v8 (ROSA: rapid online suffix automaton).

    >>> import torch
    >>> bits = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0]).view(1, 5, 1)  # the end, 1 0, was followed by 0
    >>> suffix_match(bits, bits, bits, torch.ones(1), unmatched="zero")[0].flatten()
    tensor([ 0.,  0., -1., -1., -1.])
    """
    if q_BTC.dim() != 3 or 0 in q_BTC.shape or k_BSC.shape != v_BSC.shape or k_BSC.dim() != 3 or (
            q_BTC.shape[::2] != k_BSC.shape[::2]) or scale_C.shape != q_BTC.shape[2:]:
        raise ValueError("suffix_match: q, k and v must be [batch, time, channels], none of them 0, and scale "
                         f"[channels]; got {list(q_BTC.shape)}, {list(k_BSC.shape)}, {list(v_BSC.shape)} and "
                         f"{list(scale_C.shape)}")
    B, S, C = k_BSC.shape
    T = q_BTC.shape[1]
    if not 1 <= bits <= MAX_BITS or C % bits:
        raise ValueError(f"suffix_match: bits must be 1 to {MAX_BITS} and divide {C} channels; got {bits}")
    if unmatched not in ("minus", "zero"):
        raise ValueError(f"suffix_match: unmatched must be 'minus' or 'zero'; got {unmatched!r}")
    borders = None if cu_seqlens is None else filled_borders_of(cu_seqlens, B, S, k_BSC.device)
    if T > S or (borders is not None and (T != S or final_runs)):
        raise ValueError(f"suffix_match: got {T} queries of {S} keys; packed rows have as many, and no run lengths at "
                         "the end")
    expected = None if T == S else (B, S - T - 1, C // bits)
    if (None if runs_BRG is None else tuple(runs_BRG.shape)) != expected:
        raise ValueError(f"suffix_match: run lengths must be {'None' if expected is None else list(expected)}; got "
                         f"{'None' if runs_BRG is None else list(runs_BRG.shape)}")
    call = Call.of(q_BTC, scale_C, k_BSC, v_BSC, packed=borders is not None, continued=runs_BRG is not None,
                   final_runs=final_runs)
    with autocast(q_BTC.device.type, enabled=False):
        return choose(OPERATION, call, backend).run(q_BTC, k_BSC, v_BSC, scale_C, bits, unmatched, runs_BRG,
                                                    final_runs, borders)
