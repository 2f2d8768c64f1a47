#!/usr/bin/env python
"""Compares five architectures on three rungs of bytes, at a size that two CPU cores finish in hours.

    python scripts/experiments/ladder.py --out runs/ladder_bytes                  # goes on where it was stopped
    python scripts/experiments/ladder.py --out runs/ladder_bytes --only pilot     # one part of it
    python scripts/experiments/ladder.py --out runs/ladder_bytes --list           # what is left of every part
    python scripts/experiments/ladder.py --out runs/smoke --smoke                 # minutes: does it run?

Parts, run one after the other:

    pilot         the learning rate of each architecture at r0
    check         half and twice the rate of `full` and `kda` at r1: has it been carried?
    transfer      five rates at widths 32, 64 and 128, under the standard parametrization and under mup
    ladder        five architectures on r0, r1 and r2, with the rates of the pilot, three seeds; probes at r2
    coordinates   the coordinate check of all architectures

Beside the folders of the parts it writes summary.json, learning_rates.md, transfer.md, transfer.png and, of the
ladder, losses.md, scores.md, the page and its figures. docs/experiments/ladder.md reports what it found.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_tables import tabulate_losses, tabulate_scores
from ladder_transfer import draw_transfer, tabulate_transfer
from sweep_tables import unfinished

from hybridlm.cli import main as hybridlm
from hybridlm.files import write_json, write_text
from hybridlm.ladder.pilot import PILOT_FOLDER
from hybridlm.ladder.pilot_report import PilotReport, RateResult, TunedArchitecture, read_pilot
from hybridlm.report.build import write_report

TWO = "ladder.architectures={full: {ratio: 0}, kda: {linear: kda, ratio: 3}}"
PARAMETRIZATIONS = ("standard", "mup")
CHECKED = (0.5, 1.0, 2.0)  # times the best rate, on the next rung
PROBES = (  # those of configs/sweep/hybrid_ratio_probes.yaml
    "[{name: mqar, label: recall, parameters: {num_pairs: 8, key_vocab: 8, value_vocab: 8}, length: 24, "
    "lengths: [24, 96], steps: 450, lr: 5e-3, examples: 128}, "
    "{name: key_value_updates, label: updates, parameters: {num_keys: 3, num_writes: 6, key_vocab: 4, "
    "value_vocab: 8}, length: 18, lengths: [18, 72], steps: 600, lr: 4e-3, batch_size: 64, examples: 128}, "
    "{name: variable_tracking, label: tracking, parameters: {hops: 1, num_chains: 2, variable_vocab: 8, "
    "value_vocab: 8, noise_vocab: 1}, length: 16, lengths: [16, 64], steps: 800, lr: 4e-3, batch_size: 64, "
    "examples: 128}]")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    Args:
        name: the ladder, `ladder=NAME`.
        words: of all its parts.
        rungs: its first rung, and the list of the one at which the rates are checked, as words.
        factors: of the pilot, over the ladder's `optimizer.lr`.
        widths: of the experiment of transfer, all of `transfer_layers` layers.
        transfer_layers: see there.
        transfer_factors: over the ladder's `optimizer.lr`.
        transfer_tokens: tokens of every run of it, so that the width is all that changes.
        transfer_validation: held-out tokens of every run of it.
        coordinate_widths: of the coordinate check.
        probes: tasks at the largest rung.
    """

    name: str = "bytes"
    words: tuple[str, ...] = ()
    rungs: tuple[str, str] = ("r0", "[r1]")
    factors: str = "0.5,1,2,4"
    widths: tuple[int, ...] = (32, 64, 128)
    transfer_layers: int = 4
    transfer_factors: str = "0.25,0.5,1,2,4"
    transfer_tokens: int = 600_000
    transfer_validation: int = 131_072
    coordinate_widths: str = "64,128,256"
    probes: str = PROBES


SMOKE_RUNGS = ("{name: r0, hidden_size: 32, num_layers: 4, sequence_length: 64, batch_size: 4, tokens: 1024}",
               "{name: r1, hidden_size: 48, num_layers: 4, sequence_length: 64, batch_size: 4, tokens: 2048}")
SMOKE = Sizes(
    words=(f"ladder.rungs=[{SMOKE_RUNGS[0]}, {SMOKE_RUNGS[1]}]", TWO,
           "ladder.validation_tokens=2048", "ladder.gate.project=[]", "ladder.decode_context=64"),
    rungs=(SMOKE_RUNGS[0], f"[{SMOKE_RUNGS[1]}]"),
    factors="1,2", widths=(32, 64), transfer_factors="1,2", transfer_tokens=1024, transfer_validation=2048,
    coordinate_widths="32,64",
    probes="[{name: mqar, label: recall, length: 24, lengths: [24], steps: 2, examples: 8, "
           "parameters: {num_pairs: 2, key_vocab: 8, value_vocab: 8}}]")


@dataclass(frozen=True)
class Part:
    """One command of the experiment.

    Args:
        name: of the ladder.
        words: of the command.
        folder: of the points that it runs.
    """

    name: str
    words: list[str]
    folder: Path


def _part(out: Path, name: str, sizes: Sizes, *words: str) -> Part:
    return Part(name, [f"ladder={sizes.name}", *sizes.words, *words, f"ladder.name={name}", f"ladder.dir={out / name}"],
                out / name / PILOT_FOLDER if "--pilot" in words else out / name)


def pilot_parts(out: Path, sizes: Sizes) -> list[Part]:
    """The pilot in the folder of the ladder."""
    return [_part(out, "ladder", sizes, f"ladder.pilot.factors={sizes.factors}", "--pilot")]


def check_parts(out: Path, sizes: Sizes) -> list[Part]:
    """Ladders at the second rung with half and twice the rates that were best at the first, and those themselves.

    Raises:
        SystemExit: the pilot has not finished.
    """
    rates = choose_rates(out, ("full", "kda"))
    parts = []
    for factor in CHECKED:
        own = [f"ladder.architectures.{name}.optimizer.lr={rate * factor:g}" for name, rate in rates.items()]
        parts.append(_part(out, f"check-{factor:g}", sizes, TWO, *own, f"ladder.base={sizes.rungs[0]}",
                           "ladder.seeds=0", "ladder.gate.project=[]", "ladder.decode_context=null",
                           f"ladder.rungs={sizes.rungs[1]}"))
    return parts


def transfer_parts(out: Path, sizes: Sizes) -> list[Part]:
    """A pilot per width and parametrization, batch and tokens being equal; the narrowest is the base of all."""
    def rung(width: int) -> str:
        return (f"{{name: w{width}, hidden_size: {width}, num_layers: {sizes.transfer_layers}, sequence_length: 256, "
                f"batch_size: 8, tokens: {sizes.transfer_tokens}}}")

    return [_part(out, f"transfer-{kind}-{width}", sizes, TWO, f"ladder.parametrization={kind}",
                  f"ladder.rungs=[{rung(width)}]", f"ladder.base={rung(sizes.widths[0])}", "ladder.seeds=0",
                  "ladder.gate.project=[]", f"ladder.validation_tokens={sizes.transfer_validation}",
                  f"ladder.pilot.factors={sizes.transfer_factors}", "--pilot")
            for kind in PARAMETRIZATIONS for width in sizes.widths]


def ladder_parts(out: Path, sizes: Sizes, seeds: str) -> list[Part]:
    """The ladder itself, which takes the rates of the pilot in its folder.

    Raises:
        SystemExit: the pilot has not finished.
    """
    choose_rates(out, ("full", "kda"))
    return [_part(out, "ladder", sizes, f"ladder.seeds={seeds}", f"ladder.probes={sizes.probes}")]


def choose_rates(out: Path, names: tuple[str, ...]) -> dict[str, float]:
    """The best rates of some architectures by the pilot.

    Raises:
        SystemExit: the pilot has not finished, or an architecture diverged at every rate.
    """
    pilot = read_pilot(out / "ladder")
    if pilot is None or pilot.missing:
        raise SystemExit("the pilot has not finished: --only pilot")
    rates = {name: found.best for name, found in pilot.architectures.items() if found.best is not None}
    for name in names:
        if name not in rates:
            raise SystemExit(f"the pilot has no learning rate at which {name} trains")
    return {name: rates[name] for name in names}


def tabulate_rates(out: Path) -> str:
    """Losses of the pilot, and those at the next rung with half and twice the best rates."""
    pilot = read_pilot(out / "ladder")
    lines = ["| rung | architecture | learning rate | bits per byte | |", "|---" * 5 + "|"]
    if pilot is not None:
        lines += [f"| {pilot.rung.name} | {name} | {row.lr:g} | {_loss(row.loss)} | {_mark(row, found)} |"
                  for name, found in pilot.architectures.items() for row in found.rates]
    for factor in CHECKED:
        file = out / f"check-{factor:g}" / "ladder.json"
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": []}
        lines += [f"| {cell['rung']} | {cell['architecture']} | {factor:g} x best | {_loss(cell['mean'])} | |"
                  for cell in report["cells"]]
    return "\n".join(lines) + "\n"


def _mark(row: RateResult, found: TunedArchitecture) -> str:
    if row.diverged:
        return "diverged"
    if row.lr != found.best:
        return ""
    return "best, at the edge" if found.at_edge else "best"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_transfer(out: Path, sizes: Sizes) -> dict[tuple[str, int], PilotReport]:
    """The pilots of the experiment of transfer that have begun, by parametrization and width."""
    found = {(kind, width): read_pilot(out / f"transfer-{kind}-{width}")
             for kind in PARAMETRIZATIONS for width in sizes.widths}
    return {at: pilot for at, pilot in found.items() if pilot is not None}


def run(part: Part, jobs: int) -> None:
    """Run one part, or go on with it.

    Raises:
        SystemExit: a point of it failed, or it was stopped.
    """
    print(f"== {part.name}", flush=True)
    code = hybridlm(["ladder", *part.words, "--no-measure", "--jobs", str(jobs)])
    if code != 0 or unfinished(json.loads((part.folder / "results.json").read_text(encoding="utf-8"))):
        raise SystemExit(f"{part.name} did not finish; the same command goes on")


PARTS = ("pilot", "check", "transfer", "ladder", "coordinates")


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for, then write the tables and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2, help="points at a time; one core each (default 2)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the ladder (default 0,1,2)")
    parser.add_argument("--list", action="store_true", help="show what every part still needs, and run nothing")
    parser.add_argument("--smoke", action="store_true", help="everything at sizes that say nothing")
    args = parser.parse_args(argv)
    out: Path = args.out
    sizes = SMOKE if args.smoke else Sizes()
    for name in PARTS if args.only is None else (args.only,):
        if name == "coordinates":
            if not args.list:
                hybridlm(["ladder", f"ladder={sizes.name}", *sizes.words, f"ladder.dir={out / 'ladder'}",
                          "--check-coordinates", "--widths", sizes.coordinate_widths])
            continue
        makers = {"pilot": lambda: pilot_parts(out, sizes), "check": lambda: check_parts(out, sizes),
                  "transfer": lambda: transfer_parts(out, sizes),
                  "ladder": lambda: ladder_parts(out, sizes, "0,1" if args.smoke else args.seeds)}
        for part in makers[name]():
            if args.list:
                hybridlm(["ladder", *part.words, "--no-measure", "--dry-run"])
            else:
                run(part, args.jobs)
    if args.list:
        return 0
    write_results(out, sizes)
    return 0


def write_results(out: Path, sizes: Sizes) -> None:
    """Write the tables, and of the ladder the page, its figures and a summary."""
    write_text(out / "learning_rates.md", tabulate_rates(out))
    if pilots := read_transfer(out, sizes):
        write_text(out / "transfer.md", tabulate_transfer(pilots))
        draw_transfer(pilots, out / "transfer.png")
    file = out / "ladder" / "ladder.json"
    if file.is_file():
        write_report(out / "ladder", png=out / "figures")
        report = json.loads(file.read_text(encoding="utf-8"))
        write_text(out / "losses.md", tabulate_losses(report))
        write_text(out / "scores.md", tabulate_scores(report))
        write_json(out / "summary.json", {key: report[key] for key in ("law", "gains", "comparisons", "verdicts")})


if __name__ == "__main__":
    sys.exit(main())
