"""Runs checks, and turns what they raise into verdicts: passed, failed or skipped."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridlm.model.contract_check.subject import Subject

Check = Callable[[Subject], str]  # returns the reason why it passed, or raises one of the two errors below


class ContractViolation(Exception):
    """A module does not keep the contract; the message says what was found and what was expected."""


class NotClaimed(Exception):
    """The contract does not ask this of the module; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check."""

    check: str
    verdict: Literal["passed", "failed", "skipped"]
    reason: str
    seconds: float


def run_checks(subject: Subject, checks: Mapping[str, Check]) -> Iterator[Verdict]:
    """Run each check in turn. An error that the module itself raises makes its check fail."""
    for name, check in checks.items():
        start = time.perf_counter()
        verdict: Literal["passed", "failed", "skipped"]
        try:
            verdict = "passed"
            reason = check(subject)
        except NotClaimed as error:
            verdict = "skipped"
            reason = str(error)
        except ContractViolation as error:
            verdict = "failed"
            reason = str(error)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = " ".join(str(error).split())
            verdict = "failed"
            reason = f"{type(error).__name__}: {message} ({frame.filename}, line {frame.lineno})"
        yield Verdict(name, verdict, reason, time.perf_counter() - start)


def require(condition: bool, message: str) -> None:
    """Raise ContractViolation with `message` unless `condition` holds."""
    if not condition:
        raise ContractViolation(message)


def require_close(found: Tensor, expected: Tensor, what: str, *, rtol: float, atol: float) -> None:
    """Raise ContractViolation where |found - expected| > atol + rtol * |expected|, or shapes or dtypes differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ContractViolation(f"{what}: got {found.dtype} {list(found.shape)}, "
                                f"expected {expected.dtype} {list(expected.shape)}")
    found, expected = found.detach(), expected.detach()
    if not torch.allclose(found, expected, rtol=rtol, atol=atol, equal_nan=False):
        raise ContractViolation(f"{what}: differ by up to {largest_difference(found, expected):.1e}, where values "
                                f"reach {expected.abs().max():.1e} and {atol + rtol * float(expected.abs().max()):.0e} "
                                "is allowed")


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Compute the largest |a - b|; nan where one of them is not finite."""
    return float((a - b).abs().max()) if a.numel() else 0.0
