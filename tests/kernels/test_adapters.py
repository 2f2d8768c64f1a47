"""Adapters to other kernels, with packages that are missing, broken, too old, or made up of our reference."""

import argparse
import importlib.metadata
import json
import logging
import sys
import types

import pytest
import torch

from hybridlm_kernels import attention, delta_rule, linear_attention, registry
from hybridlm_kernels import optional_packages as optional
from hybridlm_kernels.recurrence import fla_call
from hybridlm_kernels.registry import Backend, KernelUnavailable, Operation
from hybridlm_kernels.tools import bench, doctor
from tests.support.kernel_compare import error, tensors

B, T, H, HV, K, V = 2, 12, 2, 4, 16, 8
BORDERS = [0, 5, 12, 13, 24]


@pytest.fixture
def installed(monkeypatch):
    """`installed(package, version, **modules)`: a package with these modules, and adapters that run on a CPU."""

    def install(package, version, modules):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else missing(name))
        for name, functions in modules.items():
            for parent in (".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)):
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**functions))
        for operation in registry.operations():
            backends = tuple(Backend(b.name, b.run, b.supports) for b in operation.backends)
            here = Operation(operation.name, backends)
            monkeypatch.setitem(registry._operations, operation.name, here)
            module = sys.modules[f"hybridlm_kernels.ops.{operation.name}"] if operation.name in (
                "delta_rule", "linear_attention", "attention") else None
            if module is not None:
                monkeypatch.setattr(module, "ATTENTION" if operation.name == "attention" else "OPERATION", here)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    optional.find.cache_clear()
    registry.configure({})
    yield install
    optional.find.cache_clear()
    registry.configure({})


def recurrence_of(operation):
    """A function with flash-linear-attention's parameters, computed by our reference; notes what it was given."""

    def run(q, k, v, *, scale, initial_state, output_final_state, cu_seqlens=None, cu_seqlens_cpu=None, **options):
        assert output_final_state
        run.shapes = {name: tuple(x.shape) for name, x in {"q": q, "v": v, **options}.items()
                      if isinstance(x, torch.Tensor)}
        if cu_seqlens is not None:
            assert q.shape[0] == 1
            assert cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
        options = {{"use_qk_l2norm_in_kernel": "qk_l2norm", "g_gamma": "g"}.get(name, name): value
                   for name, value in options.items()}
        return operation(q, k, v, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, backend="reference",
                         **options)

    return run


def gates(decay, dtype=torch.float32):
    shape = {"constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}.get(decay)
    return None if shape is None else -torch.rand(shape, dtype=dtype)


@pytest.mark.parametrize("borders", [None, BORDERS])
@pytest.mark.parametrize(("decay", "module", "function"), [
    ("none", "fla.ops.delta_rule", "chunk_delta_rule"),
    ("scalar", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"), ("channel", "fla.ops.kda", "chunk_kda")])
def test_delta_rule_through_flash_linear_attention(installed, decay, module, function, borders):
    peer = recurrence_of(delta_rule)
    installed("flash-linear-attention", "0.6.0", {module: {function: peer}})
    q, k, v, state = tensors((B, T, H, K), (B, T, H, K), (B, T, HV, V), (4 if borders else B, HV, K, V),
                             dtype=torch.float32)
    g, beta = gates(decay), torch.rand(B, T, HV)

    def run(backend):
        return delta_rule(q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=borders, qk_l2norm=True, scale=0.3,
                          backend=backend)

    for ours, expected in zip(run("fla"), run("reference"), strict=True):
        assert error(ours, expected) < 1e-6
    assert peer.shapes["q"][2] == (HV if decay == "none" else H)  # its DeltaNet knows no grouped heads


@pytest.mark.parametrize("borders", [None, BORDERS])
@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "channel"])
def test_linear_attention_through_flash_linear_attention(installed, decay, borders):
    peer = recurrence_of(linear_attention)
    module, function = (("fla.ops.gla", "chunk_gla") if decay == "channel" else
                        ("fla.ops.simple_gla", "chunk_simple_gla"))
    installed("flash-linear-attention", "0.6.1", {module: {function: peer}})
    q, k, v = tensors((B, T, H, K), (B, T, H, K), (B, T, HV, V), dtype=torch.float32)
    g = gates(decay)
    for ours, expected in zip(*(linear_attention(q, k, v, g=g, cu_seqlens=borders, backend=backend)
                                for backend in ("fla", "reference")), strict=True):
        assert error(ours, expected) < 1e-6
    assert ("g_gamma" in peer.shapes) == (decay == "constant")


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("borders", [None, BORDERS])
def test_attention_through_flash_attention(installed, window, borders):
    def rows(q, k, v, *, softmax_scale, causal, window_size):
        assert causal
        left = None if window_size[0] < 0 else window_size[0] + 1
        return attention(q, k, v, scale=softmax_scale, window=left, backend="reference")

    def packed(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
        assert causal
        assert cu_q.tolist() == cu_k.tolist() == BORDERS
        assert max_q == max_k == 11
        left = None if window_size[0] < 0 else window_size[0] + 1
        return attention(q[None], k[None], v[None], scale=softmax_scale, window=left, cu_seqlens=cu_q,
                         backend="reference")[0]

    installed("flash-attn", "2.8.3.post1", {"flash_attn": {"flash_attn_func": rows, "flash_attn_varlen_func": packed}})
    q, k, v = tensors((B, T, HV, K), (B, T, H, K), (B, T, H, K), dtype=torch.bfloat16)
    run = {backend: attention(q, k, v, window=window, cu_seqlens=borders, backend=backend)
           for backend in ("flash_attn", "reference")}
    assert torch.equal(run["flash_attn"], run["reference"])


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_implementations_that_the_package_chose_are_named(installed, monkeypatch, caplog, level, capsys):
    logger = logging.getLogger("fla.backends")
    monkeypatch.setattr(fla_call, "_replacements", {})
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    caplog.set_level(level)
    peer = recurrence_of(delta_rule)

    def run(*args, **options):
        logger.info("[FLA Backend] kda.chunk_kda_fwd -> tilelang rejected: no nvcc")
        logger.info("[FLA Backend] kda.chunk_kda_fwd -> flash_kda")
        return peer(*args, **options)

    installed("flash-linear-attention", "0.6.0", {"fla.ops.delta_rule": {"chunk_delta_rule": run}})
    fla_call._watch_log.cache_clear()
    call_fla()
    assert fla_call.replacements() == ["kda.chunk_kda_fwd -> flash_kda"]
    assert len(caplog.records) == (2 if level == logging.INFO else 0)  # nobody sees more of the log than before


def test_doctor_and_bench_say_what_was_replaced(monkeypatch, capsys):
    monkeypatch.setattr(fla_call, "_replacements", {"kda.chunk_kda_fwd -> flash_kda": None})
    assert doctor.main(["swiglu"]) == 0
    assert "replaced in fla: kda.chunk_kda_fwd -> flash_kda\n" in capsys.readouterr().out
    options = argparse.Namespace(operations=["swiglu"], backends=[], shapes=["B1 T8 H1 D8"], dtype="float32",
                                 device="cpu", seconds=60.0, json=True)
    assert bench.show(options) == 0
    assert json.loads(capsys.readouterr().out)["replacements"] == ["fla: kda.chunk_kda_fwd -> flash_kda"]


def call_fla(dtype=torch.float32):
    q, k, v = tensors((B, T, H, K), (B, T, H, K), (B, T, H, V), dtype=dtype)
    return delta_rule(q, k, v, backend="fla")


def test_reasons(installed, monkeypatch):
    with pytest.raises(KernelUnavailable, match="made for cuda, the tensors are on cpu"):
        call_fla()
    installed("another", "1.0", {})
    with pytest.raises(KernelUnavailable, match=r"is not installed \(pip install 'flash-linear-attention>=0\.6'\)"):
        call_fla()
    optional.find.cache_clear()
    installed("flash-linear-attention", "0.5.2", {})
    with pytest.raises(KernelUnavailable, match=r"0\.5\.2 is too old"):
        call_fla()
    optional.find.cache_clear()
    installed("flash-linear-attention", "0.6.0", {"fla.ops.delta_rule": {}})
    with pytest.raises(KernelUnavailable, match=r"cannot be imported: AttributeError"):
        call_fla()
    with pytest.raises(KernelUnavailable, match="the tensors are float64"):
        call_fla(torch.float64)


@pytest.mark.parametrize(("options", "dtype", "reason"), [
    ({"sinks_H": torch.zeros(HV)}, torch.bfloat16, "knows no sinks"),
    ({}, torch.float32, "computes in float16 and bfloat16"),
])
def test_flash_attention_says_what_it_cannot(installed, options, dtype, reason):
    installed("flash-attn", "2.8.3", {"flash_attn": {"flash_attn_func": print}})
    q, k, v = tensors((B, T, HV, K), (B, T, H, K), (B, T, H, K), dtype=dtype)
    with pytest.raises(KernelUnavailable, match=reason):
        attention(q, k, v, backend="flash_attn", **options)
