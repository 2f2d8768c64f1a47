#!/usr/bin/env python
"""Compares five architectures on three rungs of bytes, at a size that two CPU cores finish in hours.

    python scripts/experiments/ladder.py --out runs/ladder_bytes                  # goes on where it was stopped
    python scripts/experiments/ladder.py --out runs/ladder_bytes --only pilot     # one part of it
    python scripts/experiments/ladder.py --out runs/ladder_bytes --list           # the parts, and what is left of each

Parts, each a ladder in a folder of --out, run one after the other:

    pilot-LR      learning rates of `full` and `kda` at r0, one seed
    check-LR      half and twice the better one at r1
    transfer-...  the same rates at widths 32, 64 and 128, under the standard parametrization and under mup
    ladder        five architectures on r0, r1 and r2; three seeds on the first two, two on r2; probes at r2
    coordinates   the coordinate check of all architectures

After the pilot every architecture has the learning rate that was best for `full` or `kda` at r0: its own for these two,
that of `kda` for the other hybrids. Beside the parts it writes summary.json, learning_rates.md, transfer.md and, of the
ladder, the page and its figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.cli import main as hybridlm
from hybridlm.files import write_json, write_text
from hybridlm.report.build import write_report

PILOT_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
TRANSFER_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
TRANSFER_WIDTHS = ("32x4", "64x4", "128x4")  # a factor of 4, at one depth
TRANSFER_TOKENS = 1_000_000  # of every run, so that width is all that changes
PARAMETRIZATIONS = ("standard", "mup")
FOLLOWS = {"full": "full", "kda": "kda", "gdn": "kda", "lightning": "kda", "kda_dsa": "kda"}  # whose rate each takes
PROBES = (  # those of configs/sweep/hybrid_ratio_probes.yaml
    "[{name: mqar, label: recall, parameters: {num_pairs: 8, key_vocab: 8, value_vocab: 8}, length: 24, "
    "lengths: [24, 96], steps: 450, lr: 5e-3, examples: 128}, "
    "{name: key_value_updates, label: updates, parameters: {num_keys: 3, num_writes: 6, key_vocab: 4, "
    "value_vocab: 8}, length: 18, lengths: [18, 72], steps: 600, lr: 4e-3, batch_size: 64, examples: 128}, "
    "{name: variable_tracking, label: tracking, parameters: {hops: 1, num_chains: 2, variable_vocab: 8, "
    "value_vocab: 8, noise_vocab: 1}, length: 16, lengths: [16, 64], steps: 800, lr: 4e-3, batch_size: 64, "
    "examples: 128}]")


@dataclass(frozen=True)
class Part:
    """One ladder of the experiment: its name, and the words of its command."""

    name: str
    words: list[str]


def pilot_parts(out: Path) -> list[Part]:
    """A ladder per learning rate at r0."""
    return [_part(out, f"pilot-{rate:g}", ["ladder=bytes", f"optimizer.lr={rate:g}", *_two_architectures(),
                                            "ladder.rungs=r0", "ladder.seeds=0"]) for rate in PILOT_RATES]


def check_parts(out: Path, best: float) -> list[Part]:
    """Ladders at r1 with half and twice the rate that was best at r0, and that rate itself."""
    return [_part(out, f"check-{rate:g}", ["ladder=bytes", f"optimizer.lr={rate:g}", *_two_architectures(),
                                            "ladder.rungs=r1", "ladder.base=r0", "ladder.seeds=0"])
            for rate in (best / 2, best, best * 2)]


def transfer_parts(out: Path) -> list[Part]:
    """A ladder per learning rate and parametrization, over widths, batch and tokens being equal."""
    rungs = ", ".join(f"{{hidden_size: {size.split('x')[0]}, num_layers: {size.split('x')[1]}, sequence_length: 256, "
                      f"batch_size: 8, tokens: {TRANSFER_TOKENS}}}" for size in TRANSFER_WIDTHS)
    return [_part(out, f"transfer-{kind}-{rate:g}",
                  ["ladder=bytes", f"optimizer.lr={rate:g}", f"ladder.parametrization={kind}",
                   "ladder.architectures={full: {ratio: 0}, kda: {linear: kda, ratio: 3}}", f"ladder.rungs=[{rungs}]",
                   "ladder.seeds=0", "ladder.gate.project=[]", "ladder.validation_tokens=131072"])
            for kind in PARAMETRIZATIONS for rate in TRANSFER_RATES]


def ladder_parts(out: Path, rates: dict[str, float], seeds: str) -> list[Part]:
    """The ladder itself, with the rate of each architecture."""
    own = [f"ladder.architectures.{name}.optimizer.lr={rates[source]:g}" for name, source in FOLLOWS.items()]
    return [_part(out, "ladder", ["ladder=bytes", *own, f"ladder.seeds={seeds}", f"ladder.probes={PROBES}"])]


def _two_architectures() -> list[str]:
    return ["ladder.architectures={full: {ratio: 0}, kda: {linear: kda, ratio: 3}}", "ladder.gate.project=[]"]


def _part(out: Path, name: str, words: list[str]) -> Part:
    return Part(name, [*words, f"ladder.name={name}", f"ladder.dir={out / name}"])


def read_losses(out: Path, part: Part) -> dict[tuple[str, str], float]:
    """Mean bits per byte of a finished part, by architecture and rung; empty before it has results."""
    try:
        report: dict[str, Any] = json.loads((out / part.name / "ladder.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    return {(cell["architecture"], cell["rung"]): cell["mean"] for cell in report["cells"] if cell["mean"] is not None}


def best_rate(losses: dict[float, float]) -> float:
    """The learning rate with the least loss."""
    return min(losses, key=lambda rate: losses[rate])


def choose_rates(out: Path) -> dict[str, float]:
    """The best rate at r0 of `full` and of `kda`.

    Raises:
        SystemExit: the pilot has not finished.
    """
    found: dict[str, dict[float, float]] = {"full": {}, "kda": {}}
    for rate, part in zip(PILOT_RATES, pilot_parts(out), strict=True):
        for (name, _), loss in read_losses(out, part).items():
            found[name][rate] = loss
    if any(len(losses) < len(PILOT_RATES) for losses in found.values()):
        raise SystemExit("the pilot has not finished: --only pilot")
    return {name: best_rate(losses) for name, losses in found.items()}


def tabulate_pilot(out: Path) -> str:
    """Loss over learning rates at r0 and r1, as a table; a best rate at an edge is marked."""
    lines = ["| architecture | rung | " + " | ".join(f"{rate:g}" for rate in PILOT_RATES) + " | best |",
             "|---" * (len(PILOT_RATES) + 3) + "|"]
    parts = pilot_parts(out)
    for name in ("full", "kda"):
        losses = {rate: read_losses(out, part).get((name, "r0")) for rate, part in zip(PILOT_RATES, parts, strict=True)}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        best = best_rate(known) if known else None
        edge = " (at the edge)" if best in (PILOT_RATES[0], PILOT_RATES[-1]) else ""
        cells = " | ".join("-" if loss is None else f"{loss:.4f}" for loss in losses.values())
        lines.append(f"| {name} | r0 | {cells} | {'-' if best is None else f'{best:g}'}{edge} |")
    return "\n".join(lines) + "\n"


def tabulate_transfer(out: Path) -> str:
    """Best learning rate at every width, by parametrization: it should stay under mup and move under standard."""
    lines = ["| parametrization | architecture | width | " + " | ".join(f"{rate:g}" for rate in TRANSFER_RATES)
             + " | best |", "|---" * (len(TRANSFER_RATES) + 4) + "|"]
    parts = {part.name: part for part in transfer_parts(out)}
    for kind in PARAMETRIZATIONS:
        for name in ("full", "kda"):
            for size in TRANSFER_WIDTHS:
                losses = {rate: read_losses(out, parts[f"transfer-{kind}-{rate:g}"]).get((name, size))
                          for rate in TRANSFER_RATES}
                known = {rate: loss for rate, loss in losses.items() if loss is not None}
                cells = " | ".join("-" if loss is None else f"{loss:.4f}" for loss in losses.values())
                best = f"{best_rate(known):g}" if known else "-"
                lines.append(f"| {kind} | {name} | {size.split('x')[0]} | {cells} | {best} |")
    return "\n".join(lines) + "\n"


def run(part: Part, jobs: int) -> None:
    """Run one part, or go on with it.

    Raises:
        SystemExit: a point of it failed.
    """
    print(f"== {part.name}", flush=True)
    if hybridlm(["ladder", *part.words, "--no-measure", "--jobs", str(jobs)]) != 0:
        raise SystemExit(f"{part.name} did not finish; the same command goes on")


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for, then write the tables and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--only", choices=("pilot", "check", "transfer", "ladder", "coordinates"))
    parser.add_argument("--jobs", type=int, default=2, help="points at a time; one core each (default 2)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the ladder (default 0,1,2)")
    parser.add_argument("--list", action="store_true", help="show what every part still needs, and run nothing")
    args = parser.parse_args(argv)
    out: Path = args.out
    stages: dict[str, Callable[[], list[Part]]] = {
        "pilot": lambda: pilot_parts(out),
        "check": lambda: check_parts(out, choose_rates(out)["full"]),
        "transfer": lambda: transfer_parts(out),
        "ladder": lambda: ladder_parts(out, choose_rates(out), args.seeds)}
    for name, parts in stages.items():
        if args.only not in (None, name):
            continue
        for part in parts():
            if args.list:
                hybridlm(["ladder", *part.words, "--no-measure", "--dry-run"])
            else:
                run(part, args.jobs)
    if args.list:
        return 0
    if args.only in (None, "coordinates"):
        hybridlm(["ladder", "ladder=bytes", f"ladder.dir={out / 'ladder'}", "--check-coordinates"])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "learning_rates.md", tabulate_pilot(out))
    write_text(out / "transfer.md", tabulate_transfer(out))
    if (out / "ladder" / "ladder.json").is_file():
        write_report(out / "ladder", png=out / "figures")
        report = json.loads((out / "ladder" / "ladder.json").read_text(encoding="utf-8"))
        write_json(out / "summary.json", {key: report[key] for key in ("law", "gains", "comparisons", "verdicts")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
