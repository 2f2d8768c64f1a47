"""Tuning runs a kernel many times on the same memory: what it wrote the first time must not change the next."""

from dataclasses import replace

import pytest
import torch
import triton

from hybridlm_kernels import (
    delta_rule,
    forgetting_attention,
    indexer_kl,
    indexer_topk,
    moe_experts,
    range_attention,
    selected_attention,
    sparse_attention,
)
from hybridlm_kernels.cases import CheckCase
from hybridlm_kernels.ops.delta_rule import triton_backend as delta_rule_backend
from hybridlm_kernels.ops.linear_attention import triton_backend as linear_attention_backend
from hybridlm_kernels.recurrence import triton_chunk_tables
from hybridlm_kernels.tools import doctor
from hybridlm_kernels.tools.compile_check import compile_cases
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support import erase_forms
from tests.support.recurrences import doctor_case
from tests.triton.test_moe import case, routing

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a device they are tuned")
Autotuner = triton.runtime.autotuner.Autotuner
RECURRENCES = [("delta_rule", "scalar", "softplus"), ("delta_rule", "channel", "softplus"),
               ("linear_attention", "scalar", "softplus"), ("linear_attention", "channel", "lower_bounded")]


def cases():
    for kind in RECURRENCES:
        yield doctor_case(*kind, T=18, K=16, V=16)
    for operation in ("delta_rule", "linear_attention"):
        yield replace(doctor_case(operation, "channel", None, T=65, HV=2, K=16, V=12), label="shared keys, segments")
        yield replace(doctor_case(operation, "channel", None, T=18, K=16, V=16), label="fixed decay", fixed=("g",))
    vectors, _ = erase_forms.make_inputs("free vector", "channel", T=18, H=1, HV=1)
    yield CheckCase("delta_rule", "free erase vectors", delta_rule, lambda: vectors)
    x, gate_up, down, weights = (t.detach() for t in case(9, 2, 3, 16, 8))
    yield CheckCase("moe_experts", "2 of 3", moe_experts, lambda: {
        "x": x, "gate_up": gate_up, "down": down, "expert_ids": routing(9, 2, 3), "weights": weights})
    main = {"q": (1, 8, 2, 16), "k": (1, 8, 1, 16), "v": (1, 8, 1, 16)}
    yield CheckCase("sparse_attention", "2 of 8", sparse_attention, lambda: _random(main) | {"indices": LISTS})
    latent = {"q": (1, 8, 2, 40), "k": (1, 8, 1, 40)}
    yield CheckCase("sparse_attention", "values in the keys", _absorbed, lambda: _random(latent) | {"indices": LISTS})
    heads = {"q": (1, 8, 2, 16), "k": (1, 8, 1, 16), "v": (1, 8, 1, 16), "g": (1, 8, 2)}
    yield CheckCase("forgetting_attention", "grouped", forgetting_attention, lambda: _random(heads))
    yield CheckCase("selected_attention", "2 blocks, window", selected_attention, lambda: _random(main) | {
        "indices": LISTS[:, :, None] // 4 * 4}, {"block": 2, "window": 3})
    seen = torch.arange(8)[None]
    yield CheckCase("range_attention", "earlier tokens", range_attention, lambda: _random(main) | {
        "first": seen // 4 * 4, "count": seen % 4 + 1})
    index = {"q": (1, 8, 2, 16), "k": (1, 8, 16), "w": (1, 8, 2), "main_q": (1, 8, 2, 16), "main_k": (1, 8, 1, 16)}
    for label, lists in (("all keys", {}), ("2 of 8", {"indices": LISTS})):
        yield CheckCase("indexer_kl", label, indexer_kl, lambda lists=lists: _random(index) | lists,
                          fixed=("main_q", "main_k"))
    yield CheckCase("indexer_topk", "2 of 8", lambda q, k, w, **named: indexer_topk(q, k, w, 2, **named),
                    lambda: _random({name: index[name] for name in "qkw"}), fixed=tuple("qkw"))


LISTS = torch.stack([torch.arange(8) - 1, torch.arange(8)], -1)[None].int()  # the token before, and itself


def _absorbed(q, k, indices, **named):
    return sparse_attention(q, k, k[..., :32], indices, **named)


def _random(shapes):
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


CASES = list(cases())
LAUNCHED_TWICE: dict[str, set] = {}  # kernels by case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}, {case.label}")
def test_running_a_kernel_twice_changes_nothing(case, monkeypatch):
    for backend in (delta_rule_backend, linear_attention_backend):
        monkeypatch.setattr(backend, "parallel_programs", lambda *_: 8)
        monkeypatch.setattr(backend, "MIN_SEGMENTS_PER_DOCUMENT", 2)
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)
    torch.manual_seed(0)
    inputs, launches, once = case.inputs(), [], Autotuner.run
    outputs, grads = doctor._evaluate(case, "triton", inputs, torch.float32, "cpu")

    def twice(kernel, *args, **options):
        launches.append(kernel)
        once(kernel, *args, **options)
        return once(kernel, *args, **options)

    monkeypatch.setattr(Autotuner, "run", twice)
    again, grads_again = doctor._evaluate(case, "triton", inputs, torch.float32, "cpu")
    assert launches
    LAUNCHED_TWICE[f"{case.operation}, {case.label}"] = set(launches)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(torch.equal(x, grads_again[name]) for name, x in grads.items())


def test_every_tuned_kernel_was_launched_twice():
    if len(LAUNCHED_TWICE) < len(CASES):
        pytest.skip("needs the cases above")
    tuned = {case.kernel for _, case in compile_cases(head_dims=None) if isinstance(case.kernel, Autotuner)}
    missing = tuned - set().union(*LAUNCHED_TWICE.values())
    assert len(tuned) > 30
    assert not {kernel.fn.fn.__name__ for kernel in missing}
