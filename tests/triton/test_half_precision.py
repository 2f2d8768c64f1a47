"""Errors of the bf16 kernels, emulated: outputs 0.005, dq dk dv 0.008, gradients of gates and of beta 0.02."""

import pytest
import torch

from hybridlm_kernels.ops.delta_rule import triton_backend as delta_rule
from hybridlm_kernels.ops.delta_rule import triton_chunk, triton_gradients
from hybridlm_kernels.recurrence import triton_tiles
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.emulated_bf16 import Emulation, assert_within_bounds, half, launches_in_half, sum_over
from tests.support.kernel_compare import error
from tests.triton import test_delta_rule

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU computes in bf16 itself")


@pytest.mark.parametrize(("decay", "gate"), [("scalar", "softplus"), ("channel", "softplus"),
                                             ("channel", "lower_bounded")])
def test_errors_of_the_delta_rule(decay, gate, device, monkeypatch):
    inputs = test_delta_rule.make_inputs(decay, T=80, K=32, V=32, raw=True)
    generator = torch.Generator().manual_seed(3)
    inputs = {name: x if name == "initial_state" else half(x) for name, x in inputs.items()}
    inputs["dt_bias"] = torch.randn(inputs["g"].shape[2:], generator=generator, dtype=torch.float64)
    inputs["A_log"] = torch.randn(1, generator=generator, dtype=torch.float64)
    options = {"gate": gate, "beta_sigmoid": 1.0, "qk_l2norm": True, "device": device}
    expected = test_delta_rule.run(inputs, "reference", **options)
    emulation = Emulation()
    emulation.install(monkeypatch)
    launches_in_half(monkeypatch, delta_rule._DeltaRuleLaunches, emulation, lambda this: this.flags.update(EXACT=False))
    for module in (triton_tiles, triton_chunk, triton_gradients):
        monkeypatch.setattr(module, "sum_over", sum_over(emulation))
    monkeypatch.setattr(triton_chunk, "_solve", emulation.with_bits(triton_chunk._solve, 11))
    got = test_delta_rule.run(inputs, "triton", **options)
    x, du = (inputs["g"] + inputs["dt_bias"]).detach(), expected["g"]
    by_rate = x if gate == "lower_bounded" else torch.nn.functional.softplus(x) / x.sigmoid()  # dg/dA_log over dg/du
    assert_within_bounds(got, expected, error, {"dt_bias": du, "A_log": du * by_rate})
