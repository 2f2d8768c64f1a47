"""Cases of the delta rule for the doctor, the tests and the benchmark."""

from functools import partial

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.delta_rule import delta_rule
from hybridlm_kernels.random_inputs import (
    bench_erase_inputs,
    bench_inputs,
    bench_product_inputs,
    check_inputs,
    erase_inputs,
)
from hybridlm_kernels.recurrence.gates import Gate

CHECKS = [CheckCase("delta_rule", f"{decay} decay", delta_rule, check_inputs(decay, True), causal=True)
          for decay in ("none", "scalar", "channel")]
CHECKS.append(CheckCase("delta_rule", "channel decay, packed", delta_rule, check_inputs("channel", True),
                        {"cu_seqlens": [0, 1, 65, 131, 140, 262]}))
CHECKS += [CheckCase("delta_rule", label, delta_rule, erase_inputs(decay, free), {"erase_before_decay": before})
           for label, decay, free, before in (("scalar decay, read before it", "scalar", False, True),
                                              ("channel decay, own erase key", "channel", False, False),
                                              ("channel decay, free erase vector", "channel", True, True))]


def _flops(per_entry: float, s: Shape) -> float:
    return per_entry * s.tokens * s.H * s.D**2


BENCHES = [BenchCase(label, delta_rule, bench_erase_inputs(decay, free), partial(_flops, flops),
                     ("q", "k", "v", "g", *trained), {"erase_before_decay": True, "final_state": False},
                     one_head_stands_for_all=True)
           for label, decay, free, flops, trained in (("Comba", "scalar", False, 7.0, ("beta",)),
                                                      ("RWKV-7", "channel", True, 9.0, ("erase_key", "erase_vector")))]

BENCHES.append(BenchCase("DeltaProduct, 3 writes", delta_rule, bench_product_inputs("scalar", 3), partial(_flops, 15.0),
                         ("q", "k", "v", "g", "beta"), {"steps": 3, "qk_l2norm": True, "final_state": False},
                         one_head_stands_for_all=True))


def _bounded_gate(inputs: Inputs) -> dict[str, Gate]:
    """A gate whose decay per token is at most e^5, with parameters that do not learn."""
    heads, channels = inputs["g"].shape[2:]
    zero = torch.zeros(heads, channels, device=inputs["g"].device)
    return {"gate": Gate("lower_bounded", zero[:, 0].contiguous(), zero, lower_bound=-5.0)}


BOUNDED = BenchCase("KDA, bounded gate", delta_rule, bench_inputs("channel", delta=True),
                    lambda s: 7.0 * s.tokens * s.H * s.D**2, ("q", "k", "v", "g", "beta"),
                    {"qk_l2norm": True, "beta_sigmoid": 1.0, "final_state": False}, _bounded_gate,
                    one_head_stands_for_all=True)
CASES: list[OperationCases] = [(CHECKS, [
    BenchCase(label, delta_rule, bench_inputs(decay, delta=True), lambda s: 7.0 * s.tokens * s.H * s.D**2,
              ("q", "k", "v", "g", "beta"), {"qk_l2norm": True, "final_state": False},
              one_head_stands_for_all=True)
    for label, decay in (("DeltaNet", "none"), ("GDN", "scalar"), ("KDA", "channel"))] + [BOUNDED, *BENCHES])]
