"""Every kernel of linear attention in bfloat16 with K = V = D, for the compile check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm_kernels.ops.linear_attention.triton_channel import chunk_kernel, gradients_kernel, pair_gradients_kernel
from hybridlm_kernels.ops.linear_attention.triton_decode import decode_kernel
from hybridlm_kernels.ops.linear_attention.triton_scan import (
    gate_gradient_kernel,
    pairs_kernel,
    scan_kernel,
    token_decays_kernel,
)
from hybridlm_kernels.recurrence.triton_join import compile_case as join_compile_case
from hybridlm_kernels.triton_support import CompileCase

GATE = {"g_ptr": "*bf16", "A_log_ptr": "*fp32", "bias_ptr": "*fp32", "gate_constant": "fp32"}
MERGED = {"MERGED": 5, "CHECKED": True}
HEAD_DIMS = (32, 64, 128, 256)
BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return {f"{name}_ptr": kind for name in names}


def _scan(label: str, D: int, decay: str, **flags: bool) -> CompileCase:
    flags = {"REVERSE": False, "OUTPUT": True, "PAIRS": False, "STATES": False, "DOTS": False} | flags
    types = (_pointers(BF16, "x", "y", "z", "w", "A", "out", "states") | _pointers(INT64, "segments")
             | _pointers(FP32, "g", "decays", "chunk_total", "start", "last", "total", "dots", "carry")
             | {"scale": "fp32"} | dict.fromkeys(("tokens", "chunks", "full"), "i32"))
    absent = {"total_ptr"} | ({"w_ptr", "dots_ptr", "carry_ptr", "states_ptr"} if not flags["DOTS"] else set())
    if decay != "channel":
        absent |= {"chunk_total_ptr"}
    if decay != "constant":
        absent |= {"g_ptr"}
    if decay != "scalar":
        absent |= {"decays_ptr"}
    if flags["PAIRS"] and (decay == "constant" or flags["REVERSE"]):
        absent |= {"A_ptr"}
    if flags["STATES"]:
        absent -= {"states_ptr"}
    constants: dict[str, Any] = dict.fromkeys(absent) | flags | {
        "HV": 16, "XY_GROUP": 1, "Z_GROUP": 1, "Y": D, "Z": D, "BY": D, "BZ": 32 if D > 128 else min(D, 64),
        "DECAY": decay, "EXACT": False}
    types = {name: kind for name, kind in types.items() if name not in constants}
    return CompileCase(f"scan {label} {decay} D={D}", scan_kernel, types, constants, head_dim=D)


def _channel_chunks(D: int, scores: bool) -> CompileCase:
    types = (_pointers(BF16, "q", "k", "A", "queries", "writes") | GATE | _pointers(FP32, "total", "sums")
             | _pointers(INT64, "chunks") | {"scale": "fp32", "H": "i32", "HV": "i32"})
    constants = {"K": D, "GATE": "softplus", "SCORES": scores, "EXACT": False} | MERGED
    if not scores:
        constants |= {"A_ptr": None, "total_ptr": None}
        types = {name: kind for name, kind in types.items() if name not in constants}
    return CompileCase(f"chunks{'' if scores else ' again'} D={D}", chunk_kernel, types, constants, head_dim=D)


def _channel_gradients(D: int) -> Iterator[CompileCase]:
    shared = (_pointers(BF16, "q", "k", "v", "do", "dq_pairs", "dk_pairs", "dg_pairs") | _pointers(INT64, "chunks")
              | _pointers(FP32, "sums", "itself") | {"scale": "fp32", "H": "i32", "HV": "i32"})
    constants = {"K": D, "V": D, "EXACT": False}
    yield CompileCase(f"pair gradients D={D}", pair_gradients_kernel, shared | _pointers(BF16, "scratch"),
                      constants | {"MERGED": MERGED["MERGED"]}, head_dim=D)
    types = (shared | _pointers(BF16, "S", "dS", "dq", "dk", "dg") | GATE
             | _pointers(FP32, "total", "d_A_log", "d_bias"))
    yield CompileCase(f"gradients D={D}", gradients_kernel, types, constants | {"GATE": "softplus"}, head_dim=D)


def _pairs(D: int) -> CompileCase:
    types = (_pointers(BF16, "x", "y", "A", "other") | _pointers(FP32, "dots", "decays") | _pointers(INT64, "chunks")
             | {"scale": "fp32", "HV": "i32", "XY_GROUP": "i32"})
    constants = {"Y": D, "BY": min(D, 64), "EXACT": False}
    return CompileCase(f"pairs D={D}", pairs_kernel, types, constants, head_dim=D)


def _decode(D: int) -> CompileCase:
    types = (_pointers(BF16, "q", "k", "v", "o") | GATE | _pointers(FP32, "state", "last") | {"scale": "fp32"}
             | dict.fromkeys(("T", "H", "HV"), "i32"))
    constants = {"K": D, "V": D, "BK": D, "BV": min(D, max(16, 4096 // D)), "DECAY": "channel", "GATE": "softplus"}
    return CompileCase(f"decode D={D}", decode_kernel, types, constants, head_dim=D)


def _token_decays() -> CompileCase:
    types = _pointers(FP32, "decays") | GATE | _pointers(INT64, "chunks") | {"HV": "i32"}
    return CompileCase("decays of tokens", token_decays_kernel, types, {"GATE": "softplus"}, num_warps=2)


def _gate_gradient() -> CompileCase:
    types = (_pointers(FP32, "pairs", "dots", "reverse_dots", "carry", "d_A_log", "d_bias") | GATE
             | _pointers(INT64, "chunks") | _pointers(BF16, "dg") | dict.fromkeys(("tokens", "chunks", "HV"), "i32"))
    return CompileCase("gate gradient", gate_gradient_kernel, types, {"BLOCKS": 2, "GATE": "softplus"})


def _cases() -> Iterator[CompileCase]:
    for D in HEAD_DIMS:
        for decay in ("constant", "scalar", "channel"):
            yield _scan("forward", D, decay, PAIRS=decay != "channel")
        for decay in ("constant", "scalar"):
            yield _scan("backward", D, decay, REVERSE=True, PAIRS=decay == "constant")
        yield _scan("states", D, "channel", OUTPUT=False, STATES=True)
        yield _scan("backward, states", D, "channel", REVERSE=True, STATES=True)
        yield _scan("dq, states, dots", D, "scalar", STATES=True, DOTS=True)
        yield _scan("dk, dots", D, "scalar", REVERSE=True, DOTS=True)
        yield _pairs(D)
        yield _channel_chunks(D, scores=True)
        yield _channel_chunks(D, scores=False)
        yield from _channel_gradients(D)
        yield join_compile_case(D, "channel")
        yield _decode(D)
    yield _token_decays()
    yield _gate_gradient()


COMPILE_CASES = list(_cases())
