"""A training run under random faults, and the same run left alone: losses, weights and samples must be the same.

`scripts/dev/chaos.sh` starts this with a small disk of its own. Both runs are `hybridlm train`. The faulty one is
killed, stopped, starved of disk and handed damaged checkpoints; the same command is given again until it has finished.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these are read when torch is imported, here and in no other process
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # forks and ranks without number: on the CPU alone

import torch
from chaos_run import Broken, Run, adopt_orphans, children, kill, records

BATCH_SIZE = 4
CHECKPOINT_EVERY = 3  # steps
MEAN_STEPS_BETWEEN_FAULTS = 6
MODEL = ["model=kimi_linear_tiny", "model.num_layers=2", "model.schedule.ratio=1", "model.hidden_size=32",
         "model.vocab_size=257", "data.tokenizer=bytes"]
TRAINING = [f"training.batch_size={BATCH_SIZE}", "training.sequence_length=32", "training.eval_every=25",
            "training.eval_batches=1", "training.log_every=1000", f"training.checkpoint_every={CHECKPOINT_EVERY}",
            "training.keep_checkpoints=3", "training.record_samples=true"]
MEASURED_KEYS = {"tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes", "seconds"}  # differ by time


@dataclass
class FaultRecord:
    """A fault and its effect: the last step before it, seconds until all processes had ended and until a step began
    again, the checkpoint the run went on from, and the number of saves it cut short."""

    fault: str
    step: int
    stopped_s: float | None = None
    back_s: float | None = None
    resumed_at: int | None = None
    drafts: int = 0
    detail: str = ""


def wait_for_end(run: Run, pids: list[int], row: FaultRecord) -> None:
    row.stopped_s = run.wait_until_gone(pids)
    row.step = run.step()
    row.drafts = len(list(run.checkpoints.glob(".tmp-step-*")))


def kill_rank(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Kill one rank; the launcher ends the others and starts all again by itself."""
    ranks = run.ranks()
    kill([chance.choice(ranks)])
    wait_for_end(run, ranks, row)


def kill_ranks(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Kill all ranks at once."""
    ranks = run.ranks()
    kill(ranks)
    wait_for_end(run, ranks, row)


def kill_launcher(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Kill the launcher; the ranks must end by themselves."""
    pids = run.pids()
    kill(pids[-1:])
    wait_for_end(run, pids, row)


def kill_while_starting(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Kill all, and after the restart a rank at any moment around its start and first steps."""
    kill_launcher(run, chance, row)
    begin = time.monotonic()
    limit = begin + row.stopped_s + chance.uniform(0.0, 5.0)  # type: ignore[operator]
    run.start()
    run.wait("ranks to start", lambda: len(run.ranks()) > 1)
    run.wait("a moment", lambda: time.monotonic() > limit or run.step() > row.step)
    ranks = run.ranks()
    run.mark()  # output of the session that is killed now must not be taken for that of the next one
    kill([chance.choice(ranks)])
    row.detail = f"{time.monotonic() - begin:.1f} s after the start"
    run.wait_until_gone(ranks)


def terminate(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Send SIGTERM to any process: all save once and exit with 0."""
    pids = run.pids()
    kill([chance.choice(pids)], signal.SIGTERM)
    wait_for_end(run, pids, row)
    said, folder = run.output_since_mark(), run.checkpoints / f"step-{row.step}"
    expected = f"SIGTERM: stopped after step {row.step}, saved {folder}. Go on with: hybridlm train"
    if not run.ended() or run.launcher.returncode != 0 or said.count(expected) != 1:  # type: ignore[union-attr]
        code = run.launcher.returncode  # type: ignore[union-attr]
        raise run.broken(f"SIGTERM after step {row.step}, exit code {code}, and this was said since:\n{said}\nin all")


def damage_checkpoint(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Kill all, and cut a file of the newest checkpoint short, alter one bit of it, or delete it."""
    kill_launcher(run, chance, row)
    newest = max(run.checkpoints.glob("step-*"), key=lambda folder: int(folder.name[5:]))
    file = chance.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    harm = chance.choice(["cut short", "altered", "lost"])
    if harm == "lost":
        file.unlink()
    elif harm == "cut short":
        os.truncate(file, chance.randrange(len(data)))
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    row.detail = f"{newest.name}/{file.name} {harm}"
    run.start()
    run.wait("the damage to be named", lambda: f"{newest.name} is damaged (" in run.output_since_mark())


def fill_disk(run: Run, chance: random.Random, row: FaultRecord) -> None:
    """Fill the disk for one save or two, or until the run gives up at the third."""
    times = chance.choice([1, 2, 3])
    with full_disk(run):
        run.wait("saves to fail", lambda: run.output_since_mark().count("could not be saved") >= times)
        row.step = run.step()
    if times == 3 and "could not be saved 3 times in a row" not in run.output_since_mark():
        raise run.broken("three saves failed and the run went on")
    row.detail = f"{times} x not saved"


@contextlib.contextmanager
def full_disk(run: Run) -> Iterator[None]:
    if run.disk is None:
        for pid in run.ranks():
            limit_files(pid, max(f.stat().st_size for f in run.checkpoints.glob("step-*/model*.safetensors")) - 1)
        yield
        for pid in run.ranks():
            limit_files(pid, resource.RLIM_INFINITY)
        return
    ballast = run.disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    yield
    ballast.unlink()


def limit_files(pid: int, size: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


FAULTS: dict[str, Callable[[Run, random.Random, FaultRecord], None]] = {
    "SIGKILL of one rank": kill_rank, "damaged checkpoint": damage_checkpoint, "full disk": fill_disk,
    "SIGTERM": terminate, "SIGKILL of the launcher": kill_launcher, "SIGKILL while starting": kill_while_starting,
    "SIGKILL of all ranks": kill_ranks}


def plan(number: int, chance: random.Random) -> list[tuple[str, int]]:
    """Choose kinds of faults, each as often as the others, and the steps after which they strike."""
    kinds = (list(FAULTS) * (number // len(FAULTS) + 1))[:number]
    chance.shuffle(kinds)
    steps = [3 * CHECKPOINT_EVERY]  # two checkpoints are there then
    while len(steps) < number:
        steps.append(steps[-1] + chance.randint(MEAN_STEPS_BETWEEN_FAULTS // 2, MEAN_STEPS_BETWEEN_FAULTS * 3 // 2))
    return list(zip(kinds, steps, strict=True))


def run_under_faults(run: Run, faults: list[tuple[str, int]], chance: random.Random,
                     note: Callable[[FaultRecord], None]) -> list[FaultRecord]:
    """Cause each fault when the run has come to its step, then let the run end."""
    rows: list[FaultRecord] = []
    for kind, step in faults:
        run.wait(f"step {step}", lambda step=step: not run.ended() and run.step() >= step,  # type: ignore[misc]
                 restart=True)
        time.sleep(chance.uniform(0.0, 0.3))
        row, begin = FaultRecord(kind, run.step()), time.monotonic()
        run.mark()
        FAULTS[kind](run, chance, row)
        if row.stopped_s is not None or "3 times in a row" in run.output_since_mark():
            run.wait("the next step", lambda: run.resumed() is not None, restart=True)
            row.resumed_at, row.back_s = run.resumed(), time.monotonic() - begin
        rows.append(row)
        note(row)
    run.wait("the end", lambda: run.launcher is not None and run.launcher.poll() == 0, restart=True)
    return rows


def differences(quiet: Run, faulty: Run, steps: int, ranks: int) -> list[str]:
    """Describe in what the two runs differ; an empty list if all is well."""
    wanted, found = set(range(1, steps + 1)), []
    for run in (quiet, faulty):
        if odd := wanted ^ set(records(run.folder / "metrics.jsonl")):
            found.append(f"{run.folder.name}: steps {sorted(odd)[:8]} missing or too many")
        seen = [records(run.folder / f"samples-{rank}.jsonl") for rank in range(ranks)]
        for step in sorted(wanted):
            samples = sorted(i for rows in seen for i in rows.get(step, {"samples": []})["samples"])
            if samples != list(range((step - 1) * BATCH_SIZE, step * BATCH_SIZE)):
                found.append(f"{run.folder.name}: step {step} saw the samples {samples}")
    a, b = (records(run.folder / "metrics.jsonl") for run in (quiet, faulty))
    for step in sorted(set(a) & set(b)):
        keys = sorted((a[step].keys() | b[step].keys()) - MEASURED_KEYS)
        found += [f"step {step}: {key} is {a[step].get(key)!r} in the quiet run and {b[step].get(key)!r} in the other"
                  for key in keys if a[step].get(key) != b[step].get(key)]
    last = [run.checkpoints / f"step-{steps}" for run in (quiet, faulty)]
    tensors = [{file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*.safetensors")}
               for folder in last]
    if not tensors[0] or tensors[0] != tensors[1]:
        found.append(f"the last checkpoints differ: {sorted(set(tensors[0].items()) ^ set(tensors[1].items()))[:2]}")
    return found


def table(rows: list[FaultRecord]) -> list[dict]:
    """Summarise the faults, one line per kind."""
    lines = []
    for kind in FAULTS:
        mine = [row for row in rows if row.fault == kind]
        stopped = [row.stopped_s for row in mine if row.stopped_s is not None]
        back = [row.back_s for row in mine if row.back_s is not None]
        again = [row.step - row.resumed_at for row in mine if row.resumed_at is not None]
        if mine:
            lines.append({"fault": kind, "times": len(mine), "ended (s, max)": rounded(stopped, max),
                          "back (s, median)": rounded(back, statistics.median),
                          "steps again (mean)": rounded(again, statistics.mean),
                          "cut saves": sum(row.drafts for row in mine)})
    return lines


def rounded(values: list, how: Callable[[list], float]) -> float | None:
    return round(how(values), 1) if values else None


def show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(*result["kinds"][0])
    for line in result["kinds"]:
        grid.add_row(*("" if value is None else str(value) for value in line.values()))
    console = Console()
    console.print(grid)
    console.print("ended: until no process was left; back: until the run was stepping again; cut saves: checkpoints "
                  "that were being written")
    console.print(f"{result['faults']} faults on {result['ranks']} ranks of {result['engine']}, {result['steps']} "
                  f"steps, seed {result['seed']}: {result['seconds']:.0f} s, without faults "
                  f"{result['quiet_seconds']:.0f} s; Python {result['python']}, torch {result['torch']}, "
                  f"full disk by {result['full_disk']}")
    for line in result["differences"] or ["losses, weights and optimizer state are those of the quiet run, bit by bit; "
                                          "no sample lost, none seen twice; no process left"]:
        console.print(line, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="scripts/dev/chaos.sh")  # type: ignore[union-attr]
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="a small disk for the checkpoints (chaos.sh makes one)")
    parser.add_argument("--json", action="store_true", help="every fault, as JSON on standard output")
    args = parser.parse_args()
    if args.faults < 1 or args.ranks < 2 or BATCH_SIZE % args.ranks:
        parser.error(f"at least one fault, and 2 or 4 ranks for batches of {BATCH_SIZE}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # clean up on the way out
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="hybridlm-chaos-"))
    main_process = os.getpid()
    try:
        result = trial(args, folder)
    except Broken as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if os.getpid() == main_process:
            while left := children(main_process):
                kill(left)
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 1 if result["differences"] else 0


def trial(args: argparse.Namespace, folder: Path) -> dict:
    """Make the quiet run and the faulty one, and compare them."""
    if args.engine.startswith("zero"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says on standard output what it has found
        import deepspeed  # noqa: F401  (once, for all forks)
    chance = random.Random(args.seed)
    faults = plan(args.faults, chance)
    steps = faults[-1][1] + 2 * MEAN_STEPS_BETWEEN_FAULTS
    words = [*MODEL, *TRAINING, f"engine={args.engine}", f"engine.num_processes={args.ranks}",
             f"training.steps={steps}", f"training.seed={args.seed}", f"data.path={argparse.__file__}",
             f"data.cache_dir={folder / 'cache'}"]
    quiet, faulty = Run(folder / "quiet", words), Run(folder / "faulty", words, args.disk)
    begin = time.monotonic()
    quiet.start()
    quiet.wait("its end", lambda: quiet.launcher.poll() == 0)  # type: ignore[union-attr]
    between = time.monotonic()

    def note(row: FaultRecord) -> None:
        print(f"{time.monotonic() - between:5.0f} s  step {row.step:4}  {row.fault}"
              + (f" ({row.detail})" if row.detail else "")
              + (f", went on from {row.resumed_at}" if row.resumed_at is not None else ""), file=sys.stderr, flush=True)

    rows = run_under_faults(faulty, faults, chance, note)
    wrong = differences(quiet, faulty, steps, args.ranks)
    if left := children(os.getpid()):
        wrong.append(f"processes left: {left}")
    return {"engine": args.engine, "ranks": args.ranks, "seed": args.seed, "steps": steps, "faults": len(rows),
            "seconds": time.monotonic() - between, "quiet_seconds": between - begin,
            "python": platform.python_version(), "torch": torch.__version__,
            "full_disk": "a file-size limit" if args.disk is None else "a small tmpfs",
            "differences": wrong, "kinds": table(rows), "rows": [asdict(row) for row in rows]}


if __name__ == "__main__":
    sys.exit(main())
