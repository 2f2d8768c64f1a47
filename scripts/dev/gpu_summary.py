#!/usr/bin/env python
"""Summarises the results of `gpu_check.sh` in one page, summary.md, and for programs in summary.json.

NAME.code files of the folder have the exit codes of checks, NAME.txt their output, kernels.json the times. The exit
code is 0, 1 (something is wrong) or 3 (time ran out).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hybridlm_kernels.tools.bench import Machine, Timing, table

PACKAGES = ("torch", "triton", "numpy", "transformers", "flash-linear-attention", "flash-attn")
TIMEOUT_EXIT_CODES = (124, 130, 137)  # of `timeout`, and of a process that it interrupts or kills
OUTCOMES = {0: "passed", 5: "nothing to run here",  # 5: of pytest
            **dict.fromkeys(TIMEOUT_EXIT_CODES, "not finished in time")}
LEFT_OUT_PREFIX = "left out"  # the benchmark's problem starts so where time ran out


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the working tree, with a note where files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git repository here"


def checks(folder: Path) -> list[dict[str, Any]]:
    """One row per check: its exit code, the meaning of that, and the last line that it printed."""
    rows = []
    for file in sorted(folder.glob("*.code")):
        code = int(file.read_text())
        printed = file.with_suffix(".txt").read_text(errors="replace").strip().splitlines()
        rows.append({"check": file.stem, "code": code, "outcome": OUTCOMES.get(code, "FAILED"),
                     "last_line": printed[-1] if printed else ""})
    return rows


def summarise(folder: Path, command: str, seconds: int) -> tuple[dict[str, Any], str, int]:
    """The findings of a folder, the same as Markdown, and the exit code."""
    rows = checks(folder)
    try:
        kernels = json.loads((folder / "kernels.json").read_text())
    except (OSError, ValueError):
        kernels = {"machine": None, "rows": []}
    timings = [Timing(**row) for row in kernels["rows"]]
    wrong = [r["check"] for r in rows if r["outcome"] == "FAILED"] + (
        [f"bench: {t.operation}, {t.label}, {t.shape}, {t.backend}" for t in timings if t.failed])
    if not timings:
        wrong.append("bench: no times, see kernels.txt")
    unfinished = [r["check"] for r in rows if r["code"] in TIMEOUT_EXIT_CODES] + (
        [f"bench: {t.operation}, {t.label}, {t.shape}" for t in timings if t.problem.startswith(LEFT_OUT_PREFIX)])
    verdict = f"wrong: {'; '.join(wrong)}" if wrong else (
        f"nothing wrong, but {len(unfinished)} checks had no time" if unfinished else "all well")
    found = {"commit": commit(), "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"),
             "seconds": seconds, "versions": versions(), "verdict": verdict, "unfinished": unfinished, "checks": rows,
             **kernels}
    lines = [f"# GPU check: {verdict}", "", f"`{command}`, {seconds} s, {found['date']}, commit {found['commit']}.",
             ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".", "",
             "| check | outcome | last line |", "|---|---|---|",
             *("| {check} | {outcome} | {last_line} |".format(**{k: str(v).replace("|", "/") for k, v in r.items()})
               for r in rows)]
    if timings:
        lines += ["", "## Kernels, timed", "", "```", table(timings, Machine(**kernels["machine"])), "```"]
    return found, "\n".join(lines) + "\n", 1 if wrong else 3 if unfinished else 0


def main() -> int:
    """Writes the summaries; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True, help="what was run")
    parser.add_argument("--seconds", type=int, required=True, help="how long it took")
    chosen = parser.parse_args()
    found, page, code = summarise(chosen.folder, chosen.command, chosen.seconds)
    (chosen.folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.folder / "summary.md").write_text(page)
    print(page + f"\nresults in {chosen.folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
