"""Every kernel of the delta rule in bfloat16, for the compile check."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from hybridlm_kernels.ops.delta_rule.triton_chunk import chunk_kernel
from hybridlm_kernels.ops.delta_rule.triton_decayed import decayed_kernel
from hybridlm_kernels.ops.delta_rule.triton_decode import decode_kernel
from hybridlm_kernels.ops.delta_rule.triton_gradients import gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_pair_gradients import pair_gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_scan import scan_back_kernel, scan_kernel
from hybridlm_kernels.recurrence.triton_join import compile_case as join_compile_case
from hybridlm_kernels.triton_support import CompileCase

HEAD_DIMS = (32, 64, 128, 256)
BF16_TENSORS = ("q k g beta queries keys writes w v A X o states y do d_states z dq dk dv dg d_beta S dS scratch "
                "dq_pairs dk_pairs dg_pairs")
FP32_TENSORS = "itself blocks sums A_log bias factors total state last transitions d_last d_state d_A_log d_bias"
TYPES = ({f"{name}_ptr": "*bf16" for name in BF16_TENSORS.split()}
         | {f"{name}_ptr": "*fp32" for name in FP32_TENSORS.split()}
         | dict.fromkeys(("chunks_ptr", "documents_ptr", "segments_ptr"), "*i64")
         | dict.fromkeys(("tokens", "full", "H", "HV"), "i32")
         | dict.fromkeys(("scale", "inverse_scale", "gate_constant", "beta_scale"), "fp32"))


def _compile_case(label: str, kernel: Any, constants: dict[str, Any], absent: str = "") -> CompileCase:
    """One case; `absent` names the pointers that are None."""
    inner = kernel
    while not hasattr(inner, "arg_names") or hasattr(inner, "configs"):
        inner = inner.fn
    none = {f"{name}_ptr": None for name in absent.split()}
    types = {name: TYPES[name] for name in inner.arg_names if name in TYPES and name not in none}
    return CompileCase(label, kernel, types, constants | none, head_dim=constants["K"])


def _chunk_cases(D: int, decay: str) -> Iterator[CompileCase]:
    sizes = {"K": D, "V": D}
    flags = {"DECAY": decay, "GATE": "softplus", "L2NORM": True, "SIGMOID": True, "EXACT": False}
    label = f"{decay} decay, D={D}"
    if decay == "scalar":
        yield _compile_case(f"gradients, {label}", gradients_kernel, flags | sizes,
                            "sums itself dq_pairs dk_pairs dg_pairs")
        flags |= {"MERGED": 0, "CHECKED": False}
        yield _compile_case(f"chunk, {label}", chunk_kernel, flags | {"K": D}, "sums")
        return
    for bound, gate in (("", {"MERGED": 5, "CHECKED": True}), (", bounded", {"MERGED": 4, "CHECKED": False})):
        constants = flags | gate
        yield _compile_case(f"pair gradients, {label}{bound}", pair_gradients_kernel, {
            "SIGMOID": True, "EXACT": False, "MERGED": gate["MERGED"]} | sizes)
        yield _compile_case(f"chunk, {label}{bound}", chunk_kernel, constants | {"K": D}, "g beta A_log bias total")
    yield _compile_case(f"gradients, {label}", gradients_kernel, flags | sizes)
    for factors in (True, False):
        constants = {name: value for name, value in flags.items() if name != "DECAY"}
        yield _compile_case(f"decayed, {label}{'' if factors else ', again'}", decayed_kernel,
                            constants | {"K": D, "FACTORS": factors}, "" if factors else "beta total")


def _scan_cases(D: int, channel: bool) -> Iterator[CompileCase]:
    sizes = {"K": D, "V": D, "BK": D, "CHANNEL": channel, "EXACT": False}
    label = f"{'channel' if channel else 'scalar'} decay, D={D}"
    yield _compile_case(f"scan, {label}", scan_kernel, sizes | {"MODE": "outputs"}, "transitions states y")
    yield _compile_case(f"states, {label}", scan_kernel, sizes | {"MODE": "states"}, "o last transitions")
    yield _compile_case(f"segments, {label}", scan_kernel, sizes | {"MODE": "segments"}, "state o states y")
    yield _compile_case(f"scan back, {label}", scan_back_kernel, sizes | {"FIRST_STATES_ONLY": False})
    yield _compile_case(f"segments back, {label}", scan_back_kernel, sizes | {"FIRST_STATES_ONLY": True},
                        "d_last d_states z")


def _cases() -> Iterator[CompileCase]:
    for D in HEAD_DIMS:
        for decay in ("scalar", "channel"):
            yield from _chunk_cases(D, decay)
        yield join_compile_case(D, "matrix")
        yield _compile_case(f"decode, channel decay, D={D}", decode_kernel, {
            "K": D, "V": D, "BK": D, "BV": 32, "DECAY": "channel", "GATE": "softplus", "L2NORM": True, "SIGMOID": True})
    for D, channel in product(HEAD_DIMS, (False, True)):
        yield from _scan_cases(D, channel)


COMPILE_CASES = list(_cases())
