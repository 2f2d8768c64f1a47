"""What tuning times and what it leaves out, by the compiler's report: on the device at hand and in the check."""

import contextlib
import dataclasses
import types

import pytest
import torch

from hybridlm_kernels import triton_support
from hybridlm_kernels.registry import Call
from hybridlm_kernels.tools import compile_check
from hybridlm_kernels.tools.compile_check import Compiled, compile_cases, configurations, judge_configurations
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED, tuned, worth_timing

pytestmark = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")


@pytest.mark.parametrize(("spilled", "kept"), [([0, 8, 0], "ac"), ([8, 0, None], "b"), ([8, None, 16], "ac"),
                                               ([None, None, None], "abc")])
def test_worth_timing(spilled, kept):
    assert worth_timing("abc", spilled) == list(kept)


class Driver:
    """Of a GPU that is not there: kernels are built for it and loaded, and spill by their number of warps. None: the
    kernel does not fit it, a text: it cannot be built."""

    def __init__(self, spilled):
        self.utils, self.spilled, self.loaded = self, spilled, []

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**20}

    def launcher_cls(self, source, metadata):
        self.loaded.append(metadata.num_warps)

    def load_binary(self, name, binary, shared, device):
        from triton.runtime.errors import OutOfResources

        assert binary.startswith(b"\x7fELF")
        spilled = self.spilled[self.loaded[-1]]
        if spilled is None:
            raise OutOfResources(200, 100, "shared memory")
        return None, 0, 32, spilled, 1024


def tuner_of(driver, spilled, monkeypatch):
    """The tuner of a kernel with a configuration for each number of warps in `spilled`, as `driver` reports on them."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        tl.static_assert(BLOCK > 0)
        tl.store(x_ptr + tl.arange(0, BLOCK), N * WIDTH)

    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    configs = [triton.Config({"BLOCK": 0 if amount == "broken" else 16}, num_warps=warps)
               for warps, amount in spilled.items()]
    tuner = tuned(configs, ["N"])(kernel)
    tuner.nargs = {"x_ptr": torch.zeros(64, dtype=torch.int32), "N": 5}
    return tuner


@pytest.mark.parametrize(("spilled", "kept"), [({1: 0, 2: 0, 4: 4, 8: None}, [1, 2]),
                                               ({1: 4, 2: 2, 4: None, 8: "broken"}, [1, 2]),
                                               ({1: None, 2: "broken"}, [1, 2])])
def test_the_tuner_builds_each_configuration_and_prunes(spilled, kept, monkeypatch):
    driver = Driver(spilled)
    tuner = tuner_of(driver, spilled, monkeypatch)
    found = tuner.prune_configs({"WIDTH": 3, "grid": (1,), "warmup": False})
    assert [config.num_warps for config in found] == kept
    assert driver.loaded == [warps for warps, amount in spilled.items() if amount != "broken"]
    assert tuner.cache_results  # on disk


@pytest.mark.parametrize(("spilled", "chosen", "built"), [
    ({1: 0, 2: 0}, 1, [1]),
    ({1: None, 2: 8, 4: 0, 8: 0}, 4, [1, 2, 4]),
    ({1: "broken", 2: None, 4: 8}, 4, [2, 4]),
    ({1: None, 2: None}, 1, [1, 2])])
def test_without_tuning_the_first_that_can_be_used_is_taken(spilled, chosen, built, monkeypatch):
    """The first configuration may spill, or need too much shared memory, at sizes of heads for which others do not."""
    monkeypatch.setenv("HYBRIDLM_TUNE", "0")
    driver = Driver(spilled)
    tuner = tuner_of(driver, spilled, monkeypatch)
    assert [config.num_warps for config in tuner.prune_configs({"WIDTH": 3, "grid": (1,)})] == [chosen]
    assert driver.loaded == built
    assert not tuner.cache_results  # for tuned runs to find


@pytest.mark.parametrize(("full", "chosen"), [(0, 1), (1, 2)])
def test_without_tuning_many_programs_have_a_configuration_of_their_own(full, chosen, monkeypatch):
    import triton

    @triton.jit(do_not_specialize=["full"])
    def kernel(x_ptr, full, BLOCK: triton.language.constexpr):
        triton.language.store(x_ptr, BLOCK)

    monkeypatch.setenv("HYBRIDLM_TUNE", "0")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver({1: 0, 2: 0}), raising=False)
    configs = [triton.Config({"BLOCK": 16}, num_warps=warps) for warps in (1, 2)]
    tuner = tuned(configs, ["full"], many=configs[1])(kernel)
    tuner.nargs = {"x_ptr": torch.zeros(1, dtype=torch.int32)}
    assert [config.num_warps for config in tuner.prune_configs({"full": full, "grid": (1,)})] == [chosen]


@pytest.mark.parametrize(("programs", "full"), [(98, 0), (99, 1), (1000, 1)])
def test_a_device_is_full_where_three_in_four_multiprocessors_are_busy(programs, full, monkeypatch):
    about = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert triton_support.fill_device(programs, torch.device("cuda", 0)) == full
    assert triton_support.fill_device(programs, torch.device("cpu")) == 1


@pytest.mark.parametrize(("shared_kib", "spilled", "parallel"), [(64, 0, 160), (3, 0, 30), (64, None, 10)])
def test_programs_side_by_side_follow_from_the_built_kernel(shared_kib, spilled, parallel, monkeypatch):
    """32 registers by the stand-in's report: 16 blocks of four warps fill the warps of a multiprocessor, and 3 KiB hold
    three blocks, each of which takes one for itself. A kernel that cannot be launched counts as one block."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, absent_ptr, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, BLOCK), N * WIDTH)

    about = types.SimpleNamespace(regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=shared_kib * 1024,
                                  max_threads_per_multi_processor=2048, multi_processor_count=10)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver({4: spilled}), raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((16, 8), (32, 4))]
    tuner = tuned(configs, ["N"])(kernel)
    arguments = (torch.device("cuda", 0), tuner, {"x_ptr": torch.int32}, {"WIDTH": 3, "BLOCK": 32})
    assert triton_support.parallel_programs(*arguments) == parallel
    assert triton_support.parallel_programs(torch.device("cpu"), *arguments[1:]) == 0


@pytest.mark.parametrize("said", [None, "1"])
def test_checks_tune_nothing_unless_told_to(said, monkeypatch):
    import triton

    @triton.jit
    def kernel(x_ptr, N, BLOCK: triton.language.constexpr):
        pass

    monkeypatch.delenv("HYBRIDLM_TUNE", raising=False)
    if said:
        monkeypatch.setenv("HYBRIDLM_TUNE", said)
    configs = [triton.Config({"BLOCK": block}) for block in (16, 32)]
    with triton_support.untuned():
        assert tuned(configs, ["N"])(kernel).cache_results == bool(said)  # of times
    assert tuned(configs, ["N"])(kernel).cache_results


def test_no_number_of_tokens_chooses_a_configuration():
    """Keys are constants of the code, numbers of heads, or whether the device is full; other integers come from the
    batch at hand."""
    kernels = {case.kernel for _, case in compile_cases(head_dims=None) if hasattr(case.kernel, "keys")}
    assert len(kernels) > 10
    of_batch = {(kernel, key) for kernel in kernels for key in kernel.keys
                if key not in ("H", "HV", "G", "J", "full") and not _is_constant(kernel, key)}
    assert not of_batch


def test_integers_that_change_from_batch_to_batch_are_not_specialised():
    """Else a packed batch with another number of chunks compiles again, for seconds, while other ranks wait."""
    changing = {"tokens", "chunks", "start", "low", "Q", "tiles", "steps"}
    kernels = {compile_check._untuned(case.kernel) for _, case in compile_cases(head_dims=None)}
    specialised = {(kernel.__name__, p.name) for kernel in kernels for p in kernel.params
                   if p.name in changing and not p.is_constexpr and not p.do_not_specialize}
    assert len(kernels) > 30
    assert not specialised


def _is_constant(kernel, name):
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    return next(p.is_constexpr for p in kernel.params if p.name == name)


@pytest.mark.parametrize(("version", "problem"), [
    ("3.6.0", ""), ("3.10.0", ""), ("3.5.1", "needs triton 3.6 or newer; this is 3.5.1 (pip install 'triton>=3.6')")])
def test_an_old_triton_is_refused_with_the_fix(version, problem, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index=None: (9, 0))
    triton_support._problem_of_version.cache_clear()
    backend = triton_support.lazy_triton_backend("no.module", "function")
    assert backend.supports(Call("cuda", torch.float32, needs_grad=False)) == (not problem, problem)
    triton_support._problem_of_version.cache_clear()


@pytest.mark.parametrize(("shared", "columns", "problem"), [
    (361760, 864, "needs 361760 bytes of shared memory"), (1024, 864, "needs 864 columns of tensor memory, 512 are"),
    (1024, 512, ""), (1024, None, "")])
def test_what_is_built_beyond_the_device_is_found(shared, columns, problem, monkeypatch):
    """A compiler that is asked for too much writes a program that does nothing but trap, and says nothing."""
    import triton

    built = types.SimpleNamespace(asm={"cubin": b""}, metadata=types.SimpleNamespace(shared=shared, tmem_size=columns))
    monkeypatch.setattr(triton, "compile", lambda *args, **options: built)
    monkeypatch.setattr(compile_check, "_usage", lambda cubin: (64, 0))
    operation, compile_case = next(compile_cases())
    found = compile_check.compile_for(operation, configurations(compile_case)[0], "sm_100").problem
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def row(configuration, spilled, problem="", label="scan D=128", head_dim=128, target="sm_90"):
    return Compiled("op", "scan_kernel", label, head_dim, configuration, target, 4, 200, spilled, 1000, 0.1, problem)


def failures(rows):
    return [(r.label, r.configuration, r.problem) for r in judge_configurations(rows) if r.problem and not r.left_out]


def test_a_configuration_may_be_left_out_of_some_heads():
    rows = [row("A", 0), row("B", 8, "spills"), row("A", 0, label="scan D=64", head_dim=64),
            row("B", 0, label="scan D=64", head_dim=64)]
    assert not failures(rows)
    assert [r.left_out for r in judge_configurations(rows)] == [False, True, False, False]


def test_a_configuration_that_is_never_chosen_fails():
    rows = [row("A", 0), row("B", 8, "spills"), row("A", 0, target="sm_100"), row("B", None, "needs", target="sm_100")]
    assert failures(rows) == [("scan D=128", "B", "never chosen: spills"), ("scan D=128", "B", "never chosen: needs")]


def test_the_first_configuration_without_a_problem_stands_for_a_kernel(monkeypatch):
    """As untuned runs take it; where there is none, the row says what is wrong with the first."""
    problems = {"A": "spills", "B": "", "C": ""}
    monkeypatch.setattr(compile_check, "compile_for",
                        lambda operation, configured, target: row(configured, 0, problems[configured]))
    assert compile_check.compile_usable("op", ["A", "B", "C"], "sm_90").configuration == "B"
    assert compile_check.compile_usable("op", ["A"], "sm_90").problem == "spills"


def test_heads_of_256_may_spill():
    rows = [row("A", 8, label="scan D=256", head_dim=256), row("B", None, "needs", label="scan D=256", head_dim=256),
            row("A", 0), row("B", 0)]
    assert not failures(rows)
    worse = [dataclasses.replace(r, spilled=None, problem="needs") for r in rows[:2]]
    assert [name for name, _, _ in failures(worse + rows[2:])] == ["scan D=256"] * 2


def test_every_head_dim_is_built():
    found = {operation: {s.head_dim for _, s in compile_cases([operation], None)}
             for operation in ("delta_rule", "linear_attention")}
    assert all({32, 64, 128, 256} <= dims for dims in found.values()), found
    assert all(configurations(s) for _, s in compile_cases(head_dims=None))
