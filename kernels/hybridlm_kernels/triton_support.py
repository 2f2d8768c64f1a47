"""Common code of the Triton backends: conditions under which they run, tuning of launches, cases of the compile check.

Import it, and the module of a Triton backend, only where triton is installed (`lazy_triton_backend` does that).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hybridlm_kernels.optional_packages import version_numbers
from hybridlm_kernels.registry import Backend, Call, always

# Triton 3.10 changes the default: said here, kernels compute the same with every version. Read when one is built.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
INSTALLED = importlib.util.find_spec("triton") is not None
# Kernels run as numpy on the CPU. Triton reads the variable when a kernel is decorated: set it before Python starts.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
OLDEST_TRITON = "3.6"
OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 products and asynchronous copies
REGISTERS = 65536  # of a multiprocessor, where torch does not tell
ORDINARY_NUMBER = 48  # stands for a number of heads or tokens where a kernel is built before they matter
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
Kept = TypeVar("Kept")


def lazy_triton_backend(module: str, function: str, supports: Callable[[Call], tuple[bool, str]] = always) -> Backend:
    """The Triton backend of an operation: `function` of `module`, which is imported at the first call.

    `supports` checks what is particular to the operation (head dims, features). Device, dtype and versions are
    checked here. Kernels are launched on the device of the first tensor; those of a backward pass are, too, because
    autograd runs it there.
    """

    def run(*args: Any) -> Any:
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return getattr(importlib.import_module(module), function)(*args)

    def accepts(call: Call) -> tuple[bool, str]:
        problem = _problem(call)
        return (False, problem) if problem else supports(call)

    return Backend("triton", run, accepts, ("cuda", "cpu") if INTERPRETED else ("cuda",))


def _problem(call: Call) -> str:
    """The reason why no Triton kernel can run the call here, or an empty text."""
    if not INSTALLED:
        return "triton is not installed (pip install triton)"
    if problem := _problem_of_version():
        return problem
    if call.dtype not in HALF_OR_SINGLE:
        return f"computes in float32 and below; the tensors are {call.dtype}"
    if INTERPRETED:
        # Its bfloat16 arithmetic is wrong without an error.
        lowest = call.get("product_dtype", call.dtype)  # autocast's, where an operation has matrix products
        return "" if torch.bfloat16 not in (call.dtype, lowest) else (
            "Triton's interpreter cannot compute in bfloat16; use float32")
    capability = None if torch.version.hip else torch.cuda.get_device_capability(call.device_index)
    if capability is not None and capability < OLDEST_CAPABILITY:
        have, want = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
        return f"needs compute capability {want} or newer; this GPU has {have}"
    return ""


@functools.cache
def _problem_of_version() -> str:
    """The reason why the installed triton cannot be used, or an empty text."""
    fix = f"pip install 'triton>={OLDEST_TRITON}'"
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # it probes drivers when it is imported
        return f"triton cannot be imported: {type(error).__name__}: {error} ({fix})"
    return "" if version_numbers(version) >= version_numbers(OLDEST_TRITON) else (
        f"needs triton {OLDEST_TRITON} or newer; this is {version} ({fix})")


@contextmanager
def untuned() -> Iterator[None]:
    """Context in which kernels first used keep their first configuration, unless HYBRIDLM_TUNE is set.

    For checks, whose sizes occur nowhere else.
    """
    before = os.environ.get("HYBRIDLM_TUNE")
    os.environ.setdefault("HYBRIDLM_TUNE", "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYBRIDLM_TUNE"]


def tuned(configs: Sequence[Any], key: Sequence[str], many: Any = None) -> Callable[[Any], Any]:
    """Decorator above `@triton.jit` that times and keeps the fastest of `configs` for each value of `key`.

    The first configuration is the default: the interpreter uses it, and HYBRIDLM_TUNE=0 and the compile check do
    unless it spills or cannot be launched at these sizes: then the next one that can (`first_usable`). Of the others
    those are timed that `worth_timing` keeps on the device at hand. Choices are kept on disk in Triton's cache.

    Args:
        configs: of triton, the default one first.
        key: names of arguments that are sizes of heads and flags, never a number of tokens: packed batches would tune
            again and again in the middle of a run. Whether programs are many it may know as `full` (`fill_device`).
        many: the configuration that HYBRIDLM_TUNE=0 tries before the first where `full` is 1.
    """
    import triton

    if INTERPRETED:
        return triton.autotune(list(configs[:1]), list(key))
    timed = os.environ.get("HYBRIDLM_TUNE") != "0"

    def decorate(kernel: Any) -> Any:
        def prune(configs: list[Any], arguments: Mapping[str, Any], **constants: Any) -> list[Any]:
            constants.pop("warmup", None)
            if not timed and many is not None and constants.get("full") == 1:
                configs = [many, *configs]
            calls = [constants | config.all_kwargs() for config in configs]
            spilled = (_spilled(kernel, arguments, call) for call in calls)
            if not timed:
                return [first_usable(configs, spilled)]
            _build(kernel, arguments, calls)
            return worth_timing(configs, list(spilled))

        tuner = triton.autotune(list(configs), list(key), prune_configs_by={"early_config_prune": prune},
                                cache_results=timed)(kernel)
        tuner.many = many
        return tuner

    return decorate


def first_usable(configs: Sequence[Any], spilled: Iterable[int | None]) -> Any:
    """The first configuration that spills no registers, else the first of those that `worth_timing` keeps.

    `spilled`, as there, is read no further than needed: each entry builds a kernel.
    """
    found = []
    for config, amount in zip(configs, spilled, strict=True):
        if amount == 0:
            return config
        found.append(amount)
    return worth_timing(configs, found)[0]


def worth_timing(configs: Sequence[Any], spilled: Sequence[int | None]) -> list[Any]:
    """The configurations that spill no registers; where all do, those that can be launched; else all.

    Where none can be launched all are returned, so that the launch says why. `spilled` is in bytes per thread, None
    where a configuration cannot be launched.
    """
    without = [config for config, amount in zip(configs, spilled, strict=True) if amount == 0]
    launching = [config for config, amount in zip(configs, spilled, strict=True) if amount is not None]
    return without or launching or list(configs)


def _build(kernel: Any, arguments: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> None:
    """Builds all calls of the kernel side by side, each of which takes seconds; failures recur at the launch."""
    import triton

    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for constants in calls:
            kernel.warmup(*arguments.values(), **constants)


def _spilled(kernel: Any, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> int | None:
    """Bytes per thread that the kernel spills, built for the current device.

    None where it does not compile, or needs more shared memory than the device has.
    """
    try:
        built = kernel.warmup(*arguments.values(), **constants)
        built.run  # noqa: B018  loads it, which is when the driver counts
        return getattr(built, "n_spills", None)  # missing where loading failed before
    except Exception:  # a compiler can fail in any way; where every configuration does, the launch says how
        return None


def copy_table(table: np.ndarray, device: torch.device, shared: bool = False) -> Tensor:
    """Copy a table of integers that kernels read to the device, int64.

    A table of one batch is copied behind what the current stream does, from pinned memory, so that the host does not
    wait. One that later calls share (`shared`) is there before this returns: other streams may read it. While a CUDA
    graph is captured nothing is copied: its replays would copy from memory that is gone.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    host = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64))
    if device.type != "cuda":
        return host.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a table of chunks would be copied inside the capture of a CUDA graph; run the same call "
                           "once before the capture, with the same CuSeqlens where documents are packed")
    return host.to(device) if shared else host.pin_memory().to(device, non_blocking=True)


_READ_BY_GRAPHS: dict[int, Any] = {}


def keep_for_graphs(tables: Kept) -> Kept:
    """The same tables, kept for good where a CUDA graph is being captured, whose replays read them."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _READ_BY_GRAPHS[id(tables)] = tables
    return tables


def as_rows(x: Tensor) -> Tensor:
    """View of x as [M, D] with contiguous rows, `stride(0)` apart; copied only where its strides demand it."""
    x_MD = x.reshape(-1, x.shape[-1])
    return x_MD if x_MD.stride(1) == 1 else x_MD.contiguous()


_tiles_as_for: list[torch.dtype] = []


@contextmanager
def tiles_as_for(dtype: torch.dtype) -> Iterator[None]:
    """Context in which operations size their tiles as for tensors of another dtype, to count their work in float32."""
    _tiles_as_for.append(dtype)
    try:
        yield
    finally:
        _tiles_as_for.pop()


def dtype_of_tiles(dtype: torch.dtype) -> torch.dtype:
    """The dtype by which an operation sizes the tiles of tensors: their own, outside of `tiles_as_for`."""
    return _tiles_as_for[-1] if _tiles_as_for else dtype


def programs(device: torch.device) -> int:
    """Number of programs that fill the device, for kernels whose programs compute many tiles each."""
    return 2 if INTERPRETED else 4 * torch.cuda.get_device_properties(device).multi_processor_count


def fill_device(programs: int, device: torch.device) -> int:
    """1 where so many programs occupy at least three of four multiprocessors, else 0; 1 where there is no device.

    Tuned kernels take it as `full`, a part of their key: the fastest configuration of a few programs is one of low
    latency, that of many asks for little from the caches.
    """
    if device.type != "cuda":
        return 1
    return int(full_of(programs, torch.cuda.get_device_properties(device).multi_processor_count))


def full_of(programs: int, multiprocessors: int) -> bool:
    """Whether so many programs occupy at least three of four multiprocessors."""
    return 4 * programs >= 3 * multiprocessors


def parallel_programs(device: torch.device, kernel: Any, dtypes: Mapping[str, torch.dtype],
                      constants: Mapping[str, Any]) -> int:
    """Number of programs of a kernel that the device runs side by side; 0 where there is no device.

    The kernel is built in its first configuration with these constants, so that the number does not depend on what
    tuning finds. Where that cannot be launched, a multiprocessor is taken to hold one program.

    Args:
        device: where it will run.
        kernel: a Triton kernel, tuned or not.
        dtypes: of its tensors, by parameter; others are None.
        constants: its constants, by parameter.
    """
    if device.type != "cuda":
        return 0
    key = (kernel, device.index, tuple(dtypes.items()), tuple(constants.items()))
    if key not in _parallel_programs:
        with torch.cuda.device(device):
            built = _build_first_configuration(kernel, dtypes, constants)
        about = torch.cuda.get_device_properties(device)
        blocks = 1
        if built is not None:
            registers = getattr(about, "regs_per_multiprocessor", REGISTERS)
            warps = about.max_threads_per_multi_processor // 32
            blocks = resident_blocks(built.n_regs, built.metadata.shared, built.metadata.num_warps, registers,
                                     about.shared_memory_per_multiprocessor, warps)
        _parallel_programs[key] = blocks * about.multi_processor_count
    return _parallel_programs[key]


_parallel_programs: dict[Any, int] = {}


def _build_first_configuration(kernel: Any, dtypes: Mapping[str, torch.dtype], constants: Mapping[str, Any]) -> Any:
    """The kernel in its first configuration, built for the current device and loaded, or None; arguments as above."""
    configs = [config.all_kwargs() for config in getattr(kernel, "configs", ())] or [{}]
    first = next((config for config in configs
                  if all(constants.get(name, value) == value for name, value in config.items())), configs[0])
    plain = kernel.fn if hasattr(kernel, "configs") else kernel
    given = {**dtypes, **constants}
    numbers = {name: ORDINARY_NUMBER for name in plain.arg_names if name.isidentifier() and not name.endswith("_ptr")}
    named = {name: value for name, value in first.items() if name not in plain.arg_names}  # warps and stages
    arguments = dict.fromkeys(plain.arg_names) | numbers | first | given
    try:
        built = plain.warmup(*(arguments[name] for name in plain.arg_names), grid=(1,), **named)
        built.run  # noqa: B018  loads it, which is when the driver counts registers
        return built
    except Exception:  # a compiler can fail in any way; the launch says how
        return None


def resident_blocks(registers: int, shared: int, num_warps: int, all_registers: int, all_shared: int, all_warps: int
                    ) -> int:
    """Blocks that a multiprocessor holds at once, by the registers and shared memory that they take.

    Registers are given out 256 to a warp at a time, and each block takes 1 KiB of shared memory for itself.

    >>> resident_blocks(255, 24 * 1024, 4, 65536, 228 * 1024, 64)
    2
    """
    per_warp = -(-registers * 32 // 256) * 256
    return max(1, min(all_registers // (per_warp * num_warps), all_shared // (shared + 1024), all_warps // num_warps))


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of types and constants, for the compile check to build for a GPU that is not there.

    A Triton module lists its own in `COMPILE_CASES`. `types` gives every parameter that is not a constant, pointers as
    "*bf16" (taken to be 16-byte aligned, as torch's are) and numbers as "i32" or "fp32"; names in `divisible` are
    multiples of 16, as strides of whole heads are. Constants of the first tuned configuration are added. `head_dim` is
    0 where a kernel has none, or none that matters.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    head_dim: int = 0
