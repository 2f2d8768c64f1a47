"""`hybridlm doctor`: checks of this machine for training: package versions, device, and every kernel backend."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from typing import Any

from hybridlm_kernels.optional_packages import version_numbers
from hybridlm_kernels.triton_support import untuned

# What pyproject.toml allows: (minimum, upper bound or None, what needs it).
REQUIRED = {"torch": ("2.11", None), "transformers": ("5.17", "6"), "datasets": ("4.0", None),
            "tokenizers": ("0.22", None), "safetensors": ("0.5", None), "accelerate": ("1.10", None),
            "hydra-core": ("1.3", "1.4"), "omegaconf": ("2.3", "2.4"), "numpy": ("2.0", None), "rich": ("13.7", None)}
OPTIONAL = {"triton": ("3.6", None, "GPU kernels"), "flash-linear-attention": ("0.6", None, "its kernels"),
            "flash-attn": ("2.6", None, "its kernels"), "deepspeed": ("0.19.8", "0.19.9", "ZeRO engines"),
            "wandb": ("0.19", None, "tracking")}


def _version_row(name: str, minimum: str, below: str | None, needed_for: str = "") -> dict[str, Any]:
    wanted = f">={minimum}" + (f",<{below}" if below else "")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install '{name}{wanted}'"
        return {"package": name, "version": None, "ok": bool(needed_for),
                "verdict": f"not installed; only for {needed_for}: {fix}" if needed_for else f"missing: {fix}"}
    release = version_numbers(found)
    ok = release >= version_numbers(minimum) and (below is None or release < version_numbers(below))
    return {"package": name, "version": found, "ok": ok,
            "verdict": "ok" if ok else f"outside {wanted}: pip install '{name}{wanted}'"}


def versions() -> list[dict[str, Any]]:
    """One row per package: the version found, whether it is supported, and the command that mends it."""
    return ([_version_row(name, *bounds) for name, bounds in REQUIRED.items()]
            + [_version_row(name, *bounds) for name, bounds in OPTIONAL.items()])


def device() -> dict[str, Any]:
    """The device on which training would run, with its name, memory and abilities."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {"type": "cuda", "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}", "bf16": torch.cuda.is_bf16_supported()}
    return {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


@untuned()
def run_doctor(as_json: bool = False) -> int:
    """Check versions, device and every kernel backend, and print the findings.

    Returns:
        The exit code: 0 where training can start, 1 where something has to be mended.
    """
    from hybridlm_kernels import registry
    from hybridlm_kernels.tools import doctor as kernels

    found_device = device()
    report: dict[str, Any] = {"python": platform.python_version(), "versions": versions(), "device": found_device}
    results = []
    for result in kernels.run():
        results.append(result)
        if not as_json and sys.stderr.isatty():
            print(f"\rchecking kernels: {len(results)}", end="", file=sys.stderr, flush=True)
    if not as_json and sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    report["kernels"] = [dataclasses.asdict(r) for r in results]
    report["backends"] = [
        {"operation": op.name, "uses": choice.backend, "why": choice.why, "backends": [b.name for b in op.backends]}
        for op, choice in zip(registry.operations(), kernels.chosen(), strict=True)]
    report["ok"] = all(r["ok"] for r in report["versions"]) and all(r.ok for r in results) and (
        all(row["uses"] for row in report["backends"]))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _render(report)
    return 0 if report["ok"] else 1


def _render(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("package", "version", "verdict", title=f"Python {report['python']}")
    for row in report["versions"]:
        table.add_row(row["package"], row["version"] or "-", row["verdict"], style=None if row["ok"] else "red")
    console.print(table)
    console.print("device: " + ", ".join(f"{k} {v}" for k, v in report["device"].items()))
    table = Table("operation", "uses here", "has", "checked against the reference")
    for row in report["backends"]:
        checks = [r for r in report["kernels"] if r["operation"] == row["operation"] and not r["skipped"]]
        errors = [max(r["output_error"] or 0, r["gradient_error"] or 0) for r in checks]
        failed = [f"{r['label']} on {r['backend']}: {r['problem'] or 'wrong'}" for r in checks if not r["ok"]]
        verdict = "; ".join(failed) if failed else (
            f"{len(checks)} passed, worst error {max(errors):.0e}" if checks else "no check of its own")
        table.add_row(row["operation"], row["uses"] or row["why"], ", ".join(row["backends"]), verdict,
                      style="red" if failed or not row["uses"] else None)
    console.print(table)
    console.print("[green]All well: training can start.[/green]" if report["ok"] else
                  "[red]Something is wrong: see the red rows above.[/red]")
