"""Checks every backend against the reference, on the machine at hand: output, every gradient, causality.

Before that it says which backend each operation uses here.

Needs torch alone, so that it runs where the rest of the framework is not installed:
`python -m hybridlm_kernels.tools.doctor [operation ...]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels import registry
from hybridlm_kernels.tools.recurrence_inputs import recurrence_inputs
from hybridlm_kernels.triton_support import untuned

# RMS(difference) / RMS(reference) a backend may have against the fp64 reference, outputs and gradients.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.01, 0.02)}


@dataclass(frozen=True)
class Case:
    """One call to check. `inputs` makes fp64 tensors; floating ones get gradients unless named in `fixed`."""

    operation: str
    label: str
    run: Callable[..., Any]
    inputs: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    causal: bool = False  # time is dimension 1 of the inputs and of the first output


@dataclass(frozen=True)
class Result:
    """Outcome of one case on one backend. Errors are RMS ratios; None where there is nothing to compare.

    `skipped`: why the backend does not take the case here (an adapter whose package is not installed, say).
    """

    operation: str
    label: str
    backend: str
    dtype: str
    output_error: float | None
    gradient_error: float | None
    worst_gradient: str
    causal: bool | None
    ok: bool
    problem: str = ""
    skipped: str = ""


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _recurrence(decay: str, delta: bool) -> Callable[[], dict[str, Tensor]]:
    """A maker of inputs without initial states, two rows of two full chunks and three tokens."""
    return lambda: recurrence_inputs(decay, B=2, T=131, H=2, HV=2, K=32, V=48, documents=0, beta=delta, strength=3.0)


def cases() -> Iterator[Case]:
    """Every check there is, small enough for a few seconds on a CPU."""
    import hybridlm_kernels as ops

    borders = [0, 1, 65, 131, 140, 262]
    for decay in ("none", "scalar", "channel"):
        yield Case("delta_rule", f"{decay} decay", ops.delta_rule, _recurrence(decay, True), causal=True)
    yield Case("delta_rule", "channel decay, packed", ops.delta_rule, _recurrence("channel", True),
               {"cu_seqlens": borders})
    for decay in ("none", "constant", "scalar", "channel"):
        yield Case("linear_attention", f"{decay} decay", ops.linear_attention, _recurrence(decay, False),
                   fixed=("g",) if decay == "constant" else (), causal=True)
    yield Case("short_conv", "width 4, silu", ops.short_conv,
               lambda: {"x": _randn(2, 131, 24), "weight": _randn(24, 4)}, causal=True)
    yield Case("rms_norm", "zero-centred", ops.rms_norm, lambda: {"x": _randn(3, 40, 64), "weight": _randn(64)},
               {"eps": 1e-6, "zero_centered": True})
    yield Case("gated_rms_norm", "silu", ops.gated_rms_norm,
               lambda: {"x": _randn(3, 40, 64), "gate": _randn(3, 40, 64), "weight": _randn(64)}, {"eps": 1e-6})
    yield Case("l2_norm", "a row", ops.l2_norm, lambda: {"x": _randn(3, 40, 64)})
    yield Case("swiglu", "clamped", ops.swiglu, lambda: {"gate": _randn(50, 32), "up": _randn(50, 32)}, {"limit": 2.0})
    yield Case("rotary", "partial, interleaved", ops.rotary,
               lambda: {"x": _randn(2, 33, 4, 32), "cos": torch.cos(_randn(33, 8)), "sin": torch.sin(_randn(33, 8))},
               {"interleaved": True}, fixed=("cos", "sin"))
    yield Case("linear_cross_entropy", "vocabulary 101", ops.linear_cross_entropy,
               lambda: {"x": _randn(70, 32), "weight": _randn(101, 32), "labels": torch.randint(0, 101, (70,))})
    yield Case("moe_experts", "8 experts, top-2", ops.moe_experts,
               lambda: {"x": _randn(60, 32), "gate_up": _randn(8, 32, 32) * 0.2, "down": _randn(8, 32, 16) * 0.2,
                        "expert_ids": torch.stack([torch.randperm(8)[:2] for _ in range(60)]),
                        "weights": torch.rand(60, 2, dtype=torch.float64)})
    yield Case("attention", "grouped heads", ops.attention,
               lambda: {"q": _randn(2, 70, 4, 32), "k": _randn(2, 70, 2, 32), "v": _randn(2, 70, 2, 32)}, causal=True)
    yield Case("sparse_attention", "top-16 of 70", ops.sparse_attention, _sparse_inputs, causal=False)
    yield Case("indexer_kl", "all keys, packed", ops.indexer_kl, _index_inputs, {"cu_seqlens": [0, 1, 30, 70, 140]},
               fixed=("main_q", "main_k"))
    yield Case("indexer_kl", "16 of 70 keys", ops.indexer_kl, lambda: _index_inputs() | {"indices": _indices()},
               fixed=("main_q", "main_k"))
    yield Case("pooled_indexer_kl", "pools of 8", _pooled_kl, lambda: _index_inputs() | {"k": _randn(2, 8, 16)},
               fixed=("main_q", "main_k"))
    yield Case("attention_recall", "16 of 70 keys", ops.attention_recall,
               lambda: {"main_q": _randn(2, 70, 4, 32), "main_k": _randn(2, 70, 2, 32), "indices": _indices()},
               fixed=("main_q", "main_k"))


def _indices() -> Tensor:
    """16 random visible keys of each of 2 x 70 queries."""
    T = 70
    scores = torch.rand(2, T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -1.0)
    top = scores.topk(16, dim=-1)
    return top.indices.masked_fill(top.values < 0, -1).int()


def _sparse_inputs() -> dict[str, Tensor]:
    return {"q": _randn(2, 70, 4, 32), "k": _randn(2, 70, 2, 32), "v": _randn(2, 70, 2, 32), "indices": _indices()}


def _index_inputs() -> dict[str, Tensor]:
    return {"q": _randn(2, 70, 4, 16), "k": _randn(2, 70, 16), "w": _randn(2, 70, 4) * 0.2,
            "main_q": _randn(2, 70, 4, 32), "main_k": _randn(2, 70, 2, 32)}


def _pooled_kl(q: Tensor, k: Tensor, w: Tensor, main_q: Tensor, main_k: Tensor) -> Any:
    import hybridlm_kernels as ops

    return ops.pooled_indexer_kl(q, k, w, main_q, main_k, ops.Pools.of(2, 70, 70, 8, q.device))


def _first(outputs: Any) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]


def _evaluate(case: Case, backend: str | None, inputs: dict[str, Tensor], dtype: torch.dtype, device: str
              ) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a fixed random projection of them; without `backend` the registry chooses."""
    moved = {}
    for name, value in inputs.items():
        if value.is_floating_point():
            value = value.to(device, dtype).requires_grad_(name not in case.fixed)
        else:
            value = value.to(device)
        moved[name] = value
    registry.configure({case.operation: backend})
    try:
        outputs = _first(case.run(**by_parameter(case.run, moved), **case.options))
    finally:
        registry.configure({case.operation: None})
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum()
                for o in outputs if o.requires_grad)
    wanted = {n: v for n, v in moved.items() if v.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values())) if wanted else ()  # type: ignore[arg-type]
    return [o.detach() for o in outputs], dict(zip(wanted, grads, strict=True))


def by_parameter(operation: Callable[..., Any], moved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs under the parameter names of the operation, which carry shape suffixes (`q` is `q_BTHK`)."""
    parameters = inspect.signature(operation).parameters
    return {next((p for p in parameters if p == name or p.rsplit("_", 1)[0] == name), name): value
            for name, value in moved.items()}


def rms_ratio(value: Tensor, reference: Tensor) -> float:
    """RMS(value - reference) / RMS(reference); inf when the value is not finite."""
    value, reference = value.double().cpu(), reference.double().cpu()
    if not torch.isfinite(value).all():
        return float("inf")
    return float((value - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt().clamp_min(1e-30))


def _is_causal(case: Case, backend: str, inputs: dict[str, Tensor], dtype: torch.dtype, device: str) -> bool:
    """Changing the last third of the tokens leaves the outputs before it bitwise as they were."""
    T = inputs[next(iter(inputs))].shape[1]
    cut = T * 2 // 3
    changed = {name: value.clone() for name, value in inputs.items()}
    for value in changed.values():
        if value.dim() >= 3 and value.shape[1] == T:
            value[:, cut:] *= 0.5
    before = _evaluate(case, backend, inputs, dtype, device)[0][0][:, :cut]
    after = _evaluate(case, backend, changed, dtype, device)[0][0][:, :cut]
    return torch.equal(before, after)


def check(case: Case, backend: str, dtype: torch.dtype, device: str) -> Result:
    """Checks one case on one backend. Never raises: an error is part of the result."""
    name = str(dtype).removeprefix("torch.")
    try:
        torch.manual_seed(0)
        # Both sides see the same rounded numbers: what is measured is the arithmetic, not the rounding of inputs.
        inputs = {n: v.to(dtype).double() if v.is_floating_point() else v for n, v in case.inputs().items()}
        outputs, grads = _evaluate(case, backend, inputs, dtype, device)
        want_outputs, want_grads = _evaluate(case, "reference", inputs, torch.float64, "cpu")
        output_error = max(rms_ratio(a, b) for a, b in zip(outputs, want_outputs, strict=True))
        errors = {n: rms_ratio(g, want_grads[n]) for n, g in grads.items()}
        worst = max(errors, key=errors.__getitem__) if errors else ""
        causal = _is_causal(case, backend, inputs, dtype, device) if case.causal else None
        limit_out, limit_grad = TOLERANCES[dtype]
        ok = output_error <= limit_out and all(e <= limit_grad for e in errors.values()) and causal is not False
        return Result(case.operation, case.label, backend, name, output_error, errors.get(worst), worst, causal, ok)
    except registry.KernelUnavailable as refusal:
        return Result(case.operation, case.label, backend, name, None, None, "", None, True, skipped=str(refusal))
    except Exception as error:
        return Result(case.operation, case.label, backend, name, None, None, "", None, False,
                      f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def chosen(device: str | None = None, operations: Sequence[str] = ()) -> list[registry.Choice]:
    """The backend of each operation in a step of training on `device`, by its first case.

    `device` is the GPU by default where there is one. An operation that refuses has no backend, and the reason.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    calls = {case.operation: case for case in reversed(list(cases()))}
    return [_chosen(op, calls.get(op.name), device) for op in registry.operations()
            if not operations or op.name in operations]


def _chosen(op: registry.Operation, case: Case | None, device: str) -> registry.Choice:
    if case is None:  # nothing of it is compared with the reference
        name = next((b.name for b in op.backends if not b.devices or device in b.devices), "")
        return registry.Choice(op.name, name, f"the first made for {device}")
    seen: list[registry.Choice] = []
    try:
        with registry.watching(seen.append):
            _evaluate(case, None, case.inputs(), torch.bfloat16 if device == "cuda" else torch.float32, device)
    except Exception as error:  # the checks below say it, too
        if not seen:
            return registry.Choice(op.name, "", str(error))
    return next(choice for choice in seen if choice.operation == op.name)


def run(device: str | None = None, operations: Sequence[str] = ()) -> Iterator[Result]:
    """Checks every backend that can run on `device` at every case, of some operations or all.

    `device` is the GPU by default where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]  # what trains comes first
    matmul_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # tf32 is the classic false alarm of such a check
    known = {op.name: op for op in registry.operations()}
    try:
        for dtype, case in itertools.product(dtypes, cases()):
            for backend in known[case.operation].backends:
                wanted = backend.name != "reference" and (not operations or case.operation in operations)
                if wanted and (not backend.devices or device in backend.devices):
                    yield check(case, backend.name, dtype, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul_tf32


@untuned()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what each operation uses, one line per check and a verdict; exit code 0 when all passed."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm_kernels.tools.doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="operation", help="all by default",
                        choices=[op.name for op in registry.operations()] + [[]])
    operations = parser.parse_args(arguments).operations
    for choice in chosen(operations=operations):
        print(f"uses {choice.operation}: {choice.backend or 'none'} ({choice.why})", flush=True)
    results = []
    for result in run(operations=operations):
        results.append(result)
        print(describe(result), flush=True)
    bad, skipped = [r for r in results if not r.ok], [r for r in results if r.skipped]
    print(f"{len(results) - len(bad) - len(skipped)} checks passed, {len(bad)} failed, {len(skipped)} skipped")
    return 1 if bad else 0


def describe(result: Result) -> str:
    """One line for a result."""
    word = "skip" if result.skipped else "ok  " if result.ok else "FAIL"
    head = f"{word} {result.operation} ({result.label}) {result.backend} {result.dtype}: "
    if result.problem or result.skipped:
        return head + (result.problem or result.skipped)
    parts = [f"output {result.output_error:.1e}"]
    if result.gradient_error is not None:
        parts.append(f"gradients {result.gradient_error:.1e} (worst: {result.worst_gradient})")
    if result.causal is not None:
        parts.append("causal" if result.causal else "NOT CAUSAL")
    return head + ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
