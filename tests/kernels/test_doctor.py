"""The doctor must pass what is right and, above all, fail what is wrong."""

import sys

import pytest
import torch

from hybridlm_kernels import registry
from hybridlm_kernels.tools import doctor
from hybridlm_kernels.tools.cases import check_cases


@pytest.fixture
def plant():
    """Add a backend to swiglu for one test."""
    operation = next(op for op in registry.operations() if op.name == "swiglu")
    original = operation.backends

    def add(run):
        object.__setattr__(operation, "backends", (*original, registry.Backend("planted", run)))
        return next(case for case in check_cases() if case.operation == "swiglu")

    yield add
    object.__setattr__(operation, "backends", original)


def test_every_backend_of_this_machine_passes():
    results = list(doctor.run("cpu"))
    assert results
    assert [doctor.describe(r) for r in results if not r.ok] == []


def test_every_operation_is_checked_or_has_no_gradient():
    checked = {case.operation for case in check_cases()}
    missing = {op.name for op in registry.operations()} - checked
    assert missing <= {"indexer_topk", "pooled_topk"}


def test_what_each_operation_uses_here(monkeypatch):
    choices = {choice.operation: choice for choice in doctor.chosen("cpu")}
    assert set(choices) == {op.name for op in registry.operations()}
    assert (choices["delta_rule"].backend, choices["delta_rule"].why) == ("torch", "preferred")
    assert choices["pooled_topk"].backend == "torch"
    operation = next(op for op in registry.operations() if op.name == "swiglu")
    monkeypatch.setattr(registry, "_strict", True)
    refusing = registry.Backend("fast", abs, lambda call: (False, "not today"))
    monkeypatch.setattr(sys.modules["hybridlm_kernels.ops.swiglu"], "SWIGLU",
                        registry.Operation("swiglu", (refusing, *operation.backends)))
    refused = next(choice for choice in doctor.chosen("cpu") if choice.operation == "swiglu")
    assert refused.backend == ""
    assert "not today; mend that, or accept a slower one with kernels.strict=false" in refused.why


def test_some_operations(capsys):
    assert doctor.main(["swiglu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "uses swiglu: torch (preferred)"
    assert lines[1].startswith("ok   swiglu (clamped) torch float32")
    assert lines[2] == "1 checks passed, 0 failed, 0 skipped"
    with pytest.raises(SystemExit):
        doctor.main(["swigl"])


def test_a_wrong_output_fails(plant):
    case = plant(lambda gate, up, limit, soft_caps: torch.nn.functional.silu(gate) * up * 1.001)
    result = doctor.check(case, "planted", torch.float32, "cpu")
    assert not result.ok
    assert result.output_error > 1e-5


def test_a_wrong_gradient_alone_fails(plant):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
            return torch.nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            return grad, grad

    case = plant(lambda gate, up, limit, soft_caps: Wrong.apply(gate, up))
    result = doctor.check(case, "planted", torch.float32, "cpu")
    assert not result.ok
    assert result.output_error < 1e-5 < result.gradient_error


def test_a_crash_is_a_result(plant):
    def crash(gate, up, limit, soft_caps):
        raise RuntimeError("no such instruction")

    result = doctor.check(plant(crash), "planted", torch.float32, "cpu")
    assert not result.ok
    assert "no such instruction" in result.problem
