"""The choice of a backend, its reasons and its errors."""

import re
from pathlib import Path

import pytest
import torch

from hybridlm_kernels import registry
from hybridlm_kernels.registry import Backend, Call, KernelUnavailable, Operation, choose, configure, explain


def only_fp32(call):
    return call.dtype == torch.float32, f"dtype {call.dtype} is not float32"


@pytest.fixture
def op():
    backends = (
        Backend("fused", lambda: "fused", only_fp32, devices=("cuda",)),
        Backend("torch", lambda: "torch"),
        Backend("reference", lambda: "reference"),
    )
    yield registry.register(Operation("toy_operation", backends))
    configure({"toy_operation": None, "strict": None})
    del registry._operations["toy_operation"]


def call(device="cpu", dtype=torch.float32):
    return Call(device, dtype, needs_grad=False)


def test_first_backend_for_the_device_runs(op):
    assert choose(op, call()).name == "torch"
    assert choose(op, call("cuda")).name == "fused"


def test_explain_names_the_choice_and_the_rejections(op):
    configure({})
    choose(op, call())
    row = explain()[-1]
    assert (row.operation, row.backend) == ("toy_operation", "torch")
    assert row.rejected == ("fused: made for cuda, the tensors are on cpu",)


def test_strict_refuses_a_slower_backend_on_cuda(op):
    with pytest.raises(KernelUnavailable, match=r"float64 is not float32.*strict=false"):
        choose(op, call("cuda", torch.float64))
    configure({"strict": False})
    assert choose(op, call("cuda", torch.float64)).name == "torch"


def test_a_named_backend_wins_and_the_call_wins_over_configure(op):
    configure({"toy_operation": "reference"})
    assert choose(op, call()).name == "reference"
    assert choose(op, call(), "torch").name == "torch"
    configure({"toy_operation": "auto"})
    assert choose(op, call()).name == "torch"


def test_a_named_backend_that_cannot_run_is_an_error(op):
    with pytest.raises(KernelUnavailable, match="made for cuda"):
        choose(op, call(), "fused")


def test_unknown_names_give_the_nearest(op):
    with pytest.raises(KernelUnavailable, match="did you mean 'toy_operation'"):
        configure({"toy_operatoin": "torch"})
    with pytest.raises(KernelUnavailable, match=r"did you mean 'reference'.*it has fused, torch, reference"):
        configure({"toy_operation": "refrence"})
    with pytest.raises(KernelUnavailable, match="strict must be"):
        configure({"strict": "yes"})


def test_a_failed_configure_changes_nothing(op):
    with pytest.raises(KernelUnavailable):
        configure({"toy_operation": "reference", "nothing_like_it": "torch"})
    assert choose(op, call()).name == "torch"


def test_call_of_reads_device_dtype_and_gradients():
    x = torch.zeros(2, requires_grad=True)
    assert Call.of(x, None, decay="scalar").needs_grad
    assert Call.of(x, None, decay="scalar").get("decay") == "scalar"
    with torch.no_grad():
        assert not Call.of(x).needs_grad


def test_the_page_on_kernels_names_the_backends_of_each_operation():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| ?(.*?) ?\|$", page.split("| operation | triton |")[1], re.MULTILINE)
    written = {name: (triton, others) for names, triton, others in rows for name in re.findall(r"`(\w+)`", names)}
    known = {op.name: {backend.name for backend in op.backends} for op in registry.operations()}
    assert set(written) == set(known)
    for name, (triton, others) in written.items():
        assert {"torch", "reference"} <= known[name]
        assert (triton == "yes") == ("triton" in known[name])
        assert ("flash-linear-attention" in others) == ("fla" in known[name])
        assert ("FlashAttention" in others) == ("flash_attn" in known[name])
