"""Checks every backend against the reference, on the machine at hand: output, every gradient, causality.

Before that it says which backend each operation uses here.

Needs torch alone, so that it runs where the rest of the framework is not installed:
`python -m hybridlm_kernels.tools.doctor [operation ...]`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels import registry
from hybridlm_kernels.cases import CheckCase, by_parameter
from hybridlm_kernels.tools.cases import check_cases
from hybridlm_kernels.triton_support import untuned

# RMS(difference) / RMS(reference) a backend may have against the fp64 reference, outputs and gradients.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.01, 0.02)}


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


def _first(outputs: Any) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]


def _evaluate(case: CheckCase, backend: str | None, inputs: dict[str, Tensor], dtype: torch.dtype, device: str
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


def rms_ratio(value: Tensor, reference: Tensor) -> float:
    """RMS(value - reference) / RMS(reference); inf when the value is not finite."""
    value, reference = value.double().cpu(), reference.double().cpu()
    if not torch.isfinite(value).all():
        return float("inf")
    return float((value - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt().clamp_min(1e-30))


def _is_causal(case: CheckCase, backend: str, inputs: dict[str, Tensor], dtype: torch.dtype, device: str) -> bool:
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


def check(case: CheckCase, backend: str, dtype: torch.dtype, device: str) -> Result:
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
    calls = {case.operation: case for case in reversed(list(check_cases()))}
    return [_chosen(op, calls.get(op.name), device) for op in registry.operations()
            if not operations or op.name in operations]


def _chosen(op: registry.Operation, case: CheckCase | None, device: str) -> registry.Choice:
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
        for dtype, case in itertools.product(dtypes, check_cases()):
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
    for line in registry.replacements():
        print(f"replaced in {line}", flush=True)
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
