"""The records of runs, and whether two runs are the same within rounding."""

import json

import pytest


def records(folder):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, wanted, absolute=0.0):
    """Losses, gradient norms and loads of experts at the same steps, within rounding; `absolute`: of small losses.

    A loss that was not computed is None in both.
    """
    assert [r["step"] for r in records(found)] == [r["step"] for r in records(wanted)]
    for a, b in zip(records(found), records(wanted), strict=True):
        for key, value in b.items():
            if key in ("total_loss", "grad_norm") or key.startswith(("loss", "validation_loss", "moe/load")):
                close = None if value is None else pytest.approx(value, rel=1e-5, abs=absolute)
                assert a[key] == close, (found, key, a["step"])
