"""The benchmark of the kernels: every case runs, rates follow from times, and wrong names are refused."""

import json
import sys

import pytest
import torch

from hybridlm.cli import main
from hybridlm_kernels import registry
from hybridlm_kernels.cases import BenchCase, Shape
from hybridlm_kernels.tools import bench
from hybridlm_kernels.tools.cases import COMMON_SHAPES, SMALL_SHAPES, bench_cases

TINY = Shape(1, 64, 2, 16)
HERE = bench.Machine("cpu", "here", "float32", 1e9, 1e12, 1, torch.__version__, None)


def label(case):
    return f"{case.operation} {case.label}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "READING_SECONDS", 0.0)


@pytest.mark.parametrize("case", list(bench_cases()), ids=label)
def test_every_case_is_timed_forward_and_backward(case, monkeypatch):
    monkeypatch.setattr("hybridlm_kernels.ops.linear_cross_entropy.cases.VOCABULARY", 64)
    row, = bench.bench(case, TINY, HERE, ["torch"])
    assert row.problem == ""
    assert row.forward_ms > 0
    assert (row.both_ms is not None) == bool(case.trained)
    seconds = (row.both_ms or row.forward_ms) / 1e3
    assert row.flops_per_second == pytest.approx(1e9 * row.gigaflops / seconds)
    assert row.of_copy == pytest.approx(1e9 * row.gigabytes / seconds / HERE.copy)


def test_floor_of_bytes_and_flops_of_the_mathematics():
    norm = next(case for case in bench_cases() if case.operation == "rms_norm")
    row, = bench.bench(norm, TINY, HERE, ["torch"])
    x, weight = 64 * 32 * 4, 32 * 4
    assert row.gigabytes * 1e9 == pytest.approx(2 * (x + weight + x) + x + weight)  # in, out; both again; gradients
    rule = next(case for case in bench_cases() if case.label == "GDN")
    assert rule.flops(TINY) == 7 * 64 * 2 * 16**2


def test_shapes():
    assert len(COMMON_SHAPES) == 6
    assert bench.shapes([], "cuda") == list(COMMON_SHAPES)
    assert bench.shapes([], "cpu") == list(SMALL_SHAPES)
    assert bench.shapes(["B1 T64 H2 D16"], "cpu") == [TINY]
    with pytest.raises(registry.KernelUnavailable, match="'B1 T0 H2 D16' is no shape"):
        bench.shapes(["B1 T0 H2 D16"], "cpu")


def test_a_backend_that_refuses_says_so_in_its_row(monkeypatch):
    def refuse(call):
        return False, "not today"

    operation = next(op for op in registry.operations() if op.name == "swiglu")
    broken = registry.Operation("swiglu", (registry.Backend("fast", abs, refuse), *operation.backends))
    monkeypatch.setattr(sys.modules["hybridlm_kernels.ops.swiglu"], "SWIGLU", broken)
    monkeypatch.setitem(registry._operations, "swiglu", broken)
    case = next(case for case in bench_cases() if case.operation == "swiglu")
    rows = {row.backend: row for row in bench.bench(case, TINY, HERE)}
    assert "not today" in rows["fast"].problem
    assert rows["torch"].forward_ms > 0
    assert "not today" in bench.table(list(rows.values()), HERE)


@pytest.fixture
def broken(monkeypatch):
    """swiglu has a backend that fails, before the others."""
    def fail(gate, up, limit, soft_caps):
        raise ValueError("illegal instruction\nmore")

    operation = next(op for op in registry.operations() if op.name == "swiglu")
    replaced = registry.Operation("swiglu", (*operation.backends, registry.Backend("fast", fail)))
    monkeypatch.setattr(sys.modules["hybridlm_kernels.ops.swiglu"], "SWIGLU", replaced)
    monkeypatch.setitem(registry._operations, "swiglu", replaced)


def test_a_backend_that_fails_leaves_the_others_their_figures(broken, capsys):
    assert main(["bench", "kernels", "swiglu", "--shapes", "B1 T64 H2 D16", "--json"]) == 1
    rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["fast"]["problem"] == "ValueError: illegal instruction"
    assert rows["torch"]["forward_ms"] > 0


def test_what_there_is_no_time_for_is_named(capsys):
    assert main(["bench", "kernels", "swiglu", "rotary", "--shapes", "B1 T64 H2 D16", "--seconds", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["operation"], row["problem"]) for row in rows] == [
        ("rotary", "left out: no time was left"), ("swiglu", "left out: no time was left")]


def test_an_interrupt_leaves_what_was_measured(monkeypatch, capsys):
    def interrupted(case, *rest):
        if case.operation == "swiglu":
            raise KeyboardInterrupt
        return [bench.Timing(case.operation, case.label, str(TINY), "torch", 1.0)]

    monkeypatch.setattr(bench, "bench", interrupted)
    assert main(["bench", "kernels", "swiglu", "rotary", "--shapes", "B1 T64 H2 D16", "--json"]) == 1
    assert [row["operation"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["rotary"]


def test_memory_of_a_call_on_cuda(monkeypatch):
    allocated = {"now": 3 * 2**20, "peak": 100 * 2**20}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"]))
    assert bench._peak_mib(lambda: allocated.update(peak=5 * 2**20), "cuda") == 2.0
    assert bench._peak_mib(lambda: None, "cpu") is None


def test_the_table_compares_with_flash_linear_attention_where_it_ran():
    ours, theirs, plain = (bench.Timing("delta_rule", "GDN", "B1", name, 1.0, both, peak_mib=peak)
                           for name, both, peak in (("triton", 2.0, 10.0), ("fla", 3.0, 30.0), ("torch", 8.0, None)))
    head, first, *_ = bench.table([ours, theirs, plain], HERE).splitlines()[1:]
    assert head.endswith("against torch  against fla")
    assert first.split()[-2:] == ["4.00x", "1.50x"]
    assert "against fla" not in bench.table([ours, plain], HERE)


def test_command(capsys):
    code = main(["bench", "kernels", "swiglu", "--shapes", "B1 T64 H2 D16", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["machine"]["copy"] > 0
    assert {row["operation"] for row in report["rows"]} == {"swiglu"}
    assert main(["bench", "kernels", "swiglu", "--shapes", "B1 T64 H2 D16"]) == 0
    assert "against torch" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["kernels", "swigl"], "no benchmark of 'swigl'"),
    (["kernels", "swiglu", "--backends", "fast"], "no backend 'fast'"),
    (["kernels", "swiglu", "--shapes", "T4"], "'T4' is no shape"),
    (["models"], "invalid choice: 'models'"),
])
def test_bad_words(words, message, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_median_counts():
    calls = []
    assert set(bench.median_seconds({"a": lambda: calls.append(1)}, "cpu")) == {"a"}
    assert calls


def test_cases_are_named_apart():
    names = [label(case) for case in bench_cases()]
    assert len(names) == len(set(names))
    assert all(isinstance(case, BenchCase) for case in bench_cases())
