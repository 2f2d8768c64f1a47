"""Every kernel of the delta rule in bfloat16, for the compile check."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from hybridlm_kernels.ops.delta_rule.triton_chunk import chunk_kernel
from hybridlm_kernels.ops.delta_rule.triton_decode import decode_kernel
from hybridlm_kernels.ops.delta_rule.triton_fused import fused_channel_kernel, fused_kernel
from hybridlm_kernels.ops.delta_rule.triton_gradients import gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_scan import scan_back_kernel, scan_kernel
from hybridlm_kernels.recurrence.triton_join import compile_case as join_compile_case
from hybridlm_kernels.triton_support import CompileCase

HEAD_DIMS = (32, 64, 128, 256)
HALF = "q k g beta queries keys writes w v A X o states y do d_states z dq dk dv dg d_beta S dS scratch"
SINGLE = "A_log bias factors total state last transitions d_last d_state d_A_log d_bias"
TYPES = ({f"{name}_ptr": "*bf16" for name in HALF.split()} | {f"{name}_ptr": "*fp32" for name in SINGLE.split()}
         | {"chunks_ptr": "*i64", "documents_ptr": "*i64", "tokens": "i32", "H": "i32", "G": "i32"}
         | dict.fromkeys(("scale", "inverse_scale", "gate_constant", "beta_scale"), "fp32"))


def _specimen(label: str, kernel: Any, constants: dict[str, Any], without: str = "") -> CompileCase:
    """`without` names pointers that are None."""
    inner = kernel
    while not hasattr(inner, "arg_names") or hasattr(inner, "configs"):
        inner = inner.fn
    absent = {f"{name}_ptr": None for name in without.split()}
    types = {name: TYPES[name] for name in inner.arg_names if name in TYPES and name not in absent}
    return CompileCase(label, kernel, types, constants | absent, head_dim=constants["K"])


def _all() -> Iterator[CompileCase]:
    for D in HEAD_DIMS:
        sizes = {"K": D, "V": D}
        for decay in ("head", "channel"):
            flags = {"DECAY": decay, "GATE": "softplus", "L2NORM": True, "SIGMOID": True, "EXACT": False}
            label, channel = f"{decay} decay, D={D}", decay == "channel"
            yield _specimen(f"gradients, {label}", gradients_kernel, flags | sizes)
            for bound, merged in (("", 0), (", bounded", 4))[:2 if channel else 1]:
                also = flags | {"MERGED": merged} | ({"GATE": "lower_bounded"} if merged else {})
                yield _specimen(f"chunk, {label}{bound}", chunk_kernel, also | {"K": D, "SCORES": True},
                                "" if channel else "queries keys writes")
                yield _specimen(f"fused, {label}{bound}", fused_channel_kernel if channel else fused_kernel,
                                also | sizes | {"PADDED": D}, "" if channel else "scratch")
        yield join_compile_case(D, "matrix")
        yield _specimen(f"decode, channel decay, D={D}", decode_kernel, sizes | {
            "BK": D, "BV": 32, "DECAY": "channel", "GATE": "softplus", "L2NORM": True, "SIGMOID": True})
    for D, channel in product(HEAD_DIMS, (False, True)):
        sizes = {"K": D, "V": D, "BK": D, "CHANNEL": channel, "EXACT": False}
        label = f"{'channel' if channel else 'head'} decay, D={D}"
        yield _specimen(f"scan, {label}", scan_kernel, sizes | {"MODE": "outputs"}, "transitions states y")
        yield _specimen(f"states, {label}", scan_kernel, sizes | {"MODE": "states"}, "o last transitions")
        yield _specimen(f"pieces, {label}", scan_kernel, sizes | {"MODE": "pieces"}, "state o states y")
        yield _specimen(f"scan back, {label}", scan_back_kernel, sizes | {"PIECES": False})
        yield _specimen(f"pieces back, {label}", scan_back_kernel, sizes | {"PIECES": True}, "d_last d_states z")


COMPILE_CASES = list(_all())
