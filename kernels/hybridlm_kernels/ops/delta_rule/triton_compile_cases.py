"""Every kernel of the delta rule in bfloat16, for the compile check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from hybridlm_kernels.ops.delta_rule.triton_chunk import chunk_kernel
from hybridlm_kernels.ops.delta_rule.triton_decayed import decayed_kernel
from hybridlm_kernels.ops.delta_rule.triton_decode import decode_kernel
from hybridlm_kernels.ops.delta_rule.triton_gradients import gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_pair_gradients import pair_gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_scan import scan_back_kernel, scan_kernel
from hybridlm_kernels.ops.delta_rule.triton_value_keys import (
    KEY_GRADIENTS,
    value_key_gradients_kernel,
    value_products_kernel,
    written_value_gradients_kernel,
)
from hybridlm_kernels.recurrence.triton_join import compile_case as join_compile_case
from hybridlm_kernels.triton_support import CompileCase

HEAD_DIMS = (32, 64, 128, 256)
BF16_TENSORS = ("q p k value_keys g beta queries keys writes value_writes w n v written own A L X value_A value_L "
                "reads outputs o states y do d_states z dq dp dk d_value_keys dv dg d_beta S dS scratch dq_pairs "
                "dp_pairs dk_pairs dg_pairs from_vectors_dq from_vectors_dp from_vectors_dg")
# Pointers that are None in the plain rule, which reads, erases and writes at the key after the decay.
OF_ERASE = "p value_keys value_writes n written own L dp dp_pairs"
PLAIN = {"VALUE_KEYS": False, "OWN": False, "FREE": False, "BEFORE": False, "STEPS": 1}
FP32_TENSORS = "itself blocks sums A_log bias factors total state last transitions d_last d_state d_A_log d_bias"
TYPES = ({f"{name}_ptr": "*bf16" for name in BF16_TENSORS.split()}
         | {f"{name}_ptr": "*fp32" for name in FP32_TENSORS.split()}
         | dict.fromkeys(("chunks_ptr", "documents_ptr", "segments_ptr"), "*i64")
         | dict.fromkeys(("tokens", "full", "H", "HV"), "i32")
         | dict.fromkeys(("scale", "inverse_scale", "gate_constant", "beta_scale"), "fp32"))


def _compile_case(label: str, kernel: Any, constants: dict[str, Any], absent: str = "", of_erase: str = OF_ERASE
                  ) -> CompileCase:
    """One case; `absent` names the pointers that are None, and `of_erase` those that belong to other erasing forms."""
    inner = kernel
    while not hasattr(inner, "arg_names") or hasattr(inner, "configs"):
        inner = inner.fn
    none = {f"{name}_ptr": None for name in f"{absent} {of_erase}".split() if f"{name}_ptr" in inner.arg_names}
    constants = {name: flag for name, flag in PLAIN.items() if name in inner.arg_names} | constants
    types = {name: TYPES[name] for name in inner.arg_names if name in TYPES and name not in none}
    return CompileCase(label, kernel, types, constants | none, head_dim=constants["V" if "V" in constants else "K"])


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


def _erase_cases(D: int) -> Iterator[CompileCase]:
    """Yields what RWKV-7 launches (free erase vectors, decay per channel), and Comba with erase keys (scalar decay)."""
    sizes, free, before = {"K": D, "V": D}, {"OWN": True, "FREE": True}, {"BEFORE": True}
    flags = {"GATE": "none", "L2NORM": False, "SIGMOID": False, "EXACT": False}
    no_gate, merged = "beta A_log bias d_beta d_A_log d_bias", {"MERGED": 5, "CHECKED": True}
    channel = {"DECAY": "channel", "BEFORE": True}
    label = f"free erase vectors, D={D}"
    yield _compile_case(f"decayed, {label}", decayed_kernel, flags | before | {"K": D, "FACTORS": True}, no_gate, "")
    yield _compile_case(f"chunk, {label}", chunk_kernel, flags | channel | merged | {"K": D}, f"g total {no_gate}", "L")
    yield _compile_case(f"chunk of value keys, {label}", chunk_kernel, flags | channel | merged | {"K": D},
                        f"g total X blocks {no_gate}", "")
    yield _compile_case(f"pair gradients, {label}", pair_gradients_kernel, sizes | before | {
        "OWN": True, "SIGMOID": False, "EXACT": False, "MERGED": 5}, "dv d_beta", "")
    yield _compile_case(f"pair gradients of values, {label}", pair_gradients_kernel, sizes | before | {
        "OWN": True, "VALUE_KEYS": True, "SIGMOID": False, "EXACT": False, "MERGED": 5}, "dv d_beta", "")
    yield replace(_compile_case(f"value key gradients, {label}", value_key_gradients_kernel,
                                sizes | KEY_GRADIENTS | {"EXACT": False}, "", ""), num_stages=1)
    yield _compile_case(f"gradients, {label}", gradients_kernel, flags | sizes | channel | {"OWN": True},
                        f"dv {no_gate}", "")
    scan = sizes | free | {"BK": D, "CHANNEL": True, "EXACT": False}
    yield _compile_case(f"scan, {label}", scan_kernel, scan | {"MODE": "outputs"}, "transitions states y", "")
    yield _compile_case(f"states, {label}", scan_kernel, scan | {"MODE": "states"}, "own o last transitions", "")
    yield _compile_case(f"value products, {label}", value_products_kernel, {"V": D, "EXACT": False}, "", "")
    yield _compile_case(f"value gradients, {label}", written_value_gradients_kernel, sizes | {"EXACT": False}, "", "")
    label = f"erase keys, scalar decay, D={D}"
    flags |= {"DECAY": "scalar", "BEFORE": True, "L2NORM": True, "SIGMOID": True}
    yield _compile_case(f"chunk, {label}", chunk_kernel, flags | {"K": D, "MERGED": 0, "CHECKED": False},
                        "sums A_log bias", "L")
    yield _compile_case(f"gradients, {label}", gradients_kernel, flags | sizes | {"OWN": True},
                        "sums itself dq_pairs dp_pairs dk_pairs dg_pairs A_log bias d_A_log d_bias", "")
    scan = sizes | {"OWN": True, "BK": D, "CHANNEL": False, "EXACT": False}
    of_values = "n written own"
    yield _compile_case(f"scan, {label}", scan_kernel, scan | {"MODE": "outputs"}, "transitions states y", of_values)
    yield _compile_case(f"scan back, {label}", scan_back_kernel, scan | {"FIRST_STATES_ONLY": False})


def _product_cases(D: int) -> Iterator[CompileCase]:
    """Yields what Gated DeltaProduct launches with three writes per token."""
    flags = {"DECAY": "scalar", "GATE": "softplus", "L2NORM": True, "SIGMOID": True, "STEPS": 3, "EXACT": False}
    sizes, label = {"K": D, "V": D}, f"three writes per token, D={D}"
    yield _compile_case(f"chunk, {label}", chunk_kernel, flags | {"K": D, "MERGED": 0, "CHECKED": False}, "sums")
    yield _compile_case(f"gradients, {label}", gradients_kernel, flags | sizes,
                        "sums itself dq_pairs dk_pairs dg_pairs")
    scan = sizes | {"BK": D, "CHANNEL": False, "STEPS": 3, "EXACT": False}
    yield _compile_case(f"scan, {label}", scan_kernel, scan | {"MODE": "outputs"}, "transitions states y")
    yield _compile_case(f"scan back, {label}", scan_back_kernel, scan | {"FIRST_STATES_ONLY": False})


def _cases() -> Iterator[CompileCase]:
    for D in HEAD_DIMS:
        for decay in ("scalar", "channel"):
            yield from _chunk_cases(D, decay)
        yield from _erase_cases(D)
        yield from _product_cases(D)
        yield join_compile_case(D, "matrix")
        yield _compile_case(f"decode, channel decay, D={D}", decode_kernel, {
            "K": D, "V": D, "BK": D, "BV": 32, "DECAY": "channel", "GATE": "softplus", "L2NORM": True, "SIGMOID": True})
    for D, channel in product(HEAD_DIMS, (False, True)):
        yield from _scan_cases(D, channel)


COMPILE_CASES = list(_cases())
