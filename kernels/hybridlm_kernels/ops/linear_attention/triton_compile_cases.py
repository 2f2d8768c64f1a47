"""The kernels of linear_attention as the compile check builds them: bf16, K = V = D."""

from __future__ import annotations

from typing import Any

from hybridlm_kernels.ops.linear_attention.triton_channel import chunk_kernel, gradients_kernel
from hybridlm_kernels.ops.linear_attention.triton_decode import decode_kernel
from hybridlm_kernels.ops.linear_attention.triton_scan import gate_gradient_kernel, pairs_kernel, scan_kernel
from hybridlm_kernels.recurrence.triton_join import compile_case as join_compile_case
from hybridlm_kernels.triton_support import CompileCase

GATE = {"g_ptr": "*bf16", "A_log_ptr": "*fp32", "bias_ptr": "*fp32", "gate_constant": "fp32"}
NO_GATE = {"g_ptr": "*fp32", "gate_constant": "fp32"}
NO_GATE_CONSTANTS = {"A_log_ptr": None, "bias_ptr": None, "GATE": "none"}
HEAD_DIMS = (32, 64, 128, 256)
HALF, SINGLE, TABLE = "*bf16", "*fp32", "*i64"


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return {f"{name}_ptr": kind for name in names}


def _scan(label: str, D: int, decay: str, **flags: bool) -> CompileCase:
    flags = {"REVERSE": False, "OUTPUT": True, "PAIRS": False, "STATES": False, "DOTS": False} | flags
    gate = GATE if decay == "head" else NO_GATE
    types = (_pointers(HALF, "x", "y", "z", "w", "A", "out", "states") | gate | _pointers(TABLE, "pieces")
             | _pointers(SINGLE, "chunk_total", "start", "last", "total", "dots", "carry")
             | {"scale": "fp32"} | dict.fromkeys(("tokens", "chunks"), "i32"))
    absent = {"total_ptr"} | ({"w_ptr", "dots_ptr", "carry_ptr", "states_ptr"} if not flags["DOTS"] else set())
    if decay != "channel":
        absent |= {"chunk_total_ptr"}
    if decay in ("none", "channel"):
        absent |= {"g_ptr"}
    if flags["PAIRS"] and (decay == "constant" or flags["REVERSE"]):
        absent |= {"A_ptr"}
    if flags["STATES"]:
        absent -= {"states_ptr"}
    constants: dict[str, Any] = dict.fromkeys(absent) | flags | {
        "G": 16, "XY_SHARE": 1, "Z_SHARE": 1, "Y": D, "Z": D, "BY": D, "BZ": 32 if D > 128 else min(D, 64),
        "DECAY": decay, "EXACT": False,
        **({"GATE": "softplus"} if decay == "head" else NO_GATE_CONSTANTS)}
    return CompileCase(f"scan {label} {decay} D={D}", scan_kernel,
                    {name: kind for name, kind in types.items() if name not in constants}, constants, head_dim=D)


def _channel(D: int) -> list[CompileCase]:
    sizes = {"K": D, "GATE": "softplus", "EXACT": False}
    rest = {"scale": "fp32", "H": "i32", "G": "i32"} | _pointers(TABLE, "chunks")
    return [
        CompileCase(f"chunks D={D}", chunk_kernel,
                 _pointers(HALF, "q", "k", "A", "queries", "writes") | GATE | _pointers(SINGLE, "total") | rest,
                 sizes | {"BK": 32, "SCORES": True}, head_dim=D),
        *(CompileCase(f"gradients, {'keys' if keys else 'queries'} D={D}", gradients_kernel,
                   _pointers(HALF, "x", "y", "left", "right", "S", "other_S", "dx", "dg") | GATE
                   | _pointers(SINGLE, "total", "sum", "d_A_log", "d_bias") | rest,
                   sizes | {"V": D, "BK": 16, "BV": 32, "KEYS": keys}, head_dim=D) for keys in (False, True))]


def _pairs(D: int) -> CompileCase:
    return CompileCase(f"pairs D={D}", pairs_kernel,
                    _pointers(HALF, "x", "y", "A", "other") | _pointers(SINGLE, "dots") | GATE
                    | _pointers(TABLE, "chunks") | {"scale": "fp32", "G": "i32", "XY_SHARE": "i32"},
                    {"Y": D, "BY": min(D, 64), "GATE": "softplus", "EXACT": False}, head_dim=D)


def _others(D: int) -> list[CompileCase]:
    decode = (_pointers(HALF, "q", "k", "v", "o") | GATE | _pointers(SINGLE, "state", "last") | {"scale": "fp32"}
              | dict.fromkeys(("T", "H", "G"), "i32"))
    sizes = {"K": D, "V": D, "BK": D, "BV": min(D, max(16, 4096 // D))}
    return [join_compile_case(D, "channel"),
            CompileCase(f"decode D={D}", decode_kernel, decode, sizes | {"DECAY": "channel", "GATE": "softplus"},
                     head_dim=D)]


COMPILE_CASES = [
    *(_scan("forward", D, decay, PAIRS=decay != "channel") for D in HEAD_DIMS
      for decay in ("constant", "head", "channel")),
    *(_scan("backward", D, decay, REVERSE=True, PAIRS=decay == "constant") for D in HEAD_DIMS
      for decay in ("constant", "head")),
    *(_scan("states", D, "channel", OUTPUT=False, STATES=True) for D in HEAD_DIMS),
    *(_scan("backward, states", D, "channel", REVERSE=True, STATES=True) for D in HEAD_DIMS),
    *(_scan("dq, states, dots", D, "head", STATES=True, DOTS=True) for D in HEAD_DIMS),
    *(_scan("dk, dots", D, "head", REVERSE=True, DOTS=True) for D in HEAD_DIMS),
    *(_pairs(D) for D in HEAD_DIMS),
    *(compile_case for D in HEAD_DIMS for compile_case in _channel(D)),
    *(compile_case for D in HEAD_DIMS for compile_case in _others(D)),
    CompileCase("gate gradient", gate_gradient_kernel,
             _pointers(SINGLE, "pairs", "dots", "reverse_dots", "carry", "d_A_log", "d_bias") | GATE
             | _pointers(TABLE, "chunks") | _pointers(HALF, "dg") | dict.fromkeys(("tokens", "chunks", "G"), "i32"),
             {"BLOCKS": 2, "GATE": "softplus"}),
]
