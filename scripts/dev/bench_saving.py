#!/usr/bin/env python
"""Measures what a checkpoint costs the training thread: written while it waits, and by a thread while it goes on.

    python scripts/dev/bench_saving.py [--saves 5] [--folder DISK] [--json] [WORDS]

WORDS are those of `hybridlm train`; the default is a model of 71 M parameters whose steps are short. One process takes
training steps on random tokens and saves in both ways in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybridlm import checkpoint, load_config
from hybridlm.config.schema import Config
from hybridlm.data.packing import Batch
from hybridlm.distributed.engines import make_engine
from hybridlm.model.model import build_model
from hybridlm.optimizers import build_optimizer
from hybridlm.optimizers.roles import fp32_names
from hybridlm.training.losses import step_loss
from hybridlm.training.saver import Saver
from hybridlm_kernels import CuSeqlens

WORDS = ["model=kimi_linear_tiny", "model.num_layers=2", "model.schedule.ratio=1", "model.hidden_size=512",
         "model.vocab_size=32768", "data.tokenizer=bytes"]
MEASURED = ("waiting_s", "copy_s", "copy_cpu_s", "rename_s", "writing_s", "writing_cpu_s", "quiet_step_s",
            "step_while_writing_s", "slower_s")
TOKENS_PER_STEP = 64
QUIET_STEPS = 2  # before and after each save, for comparison


def batch(config: Config) -> Batch:
    depth = config.model.mtp.depth
    ids = torch.randint(config.model.vocab_size, (1, TOKENS_PER_STEP + 1 + depth))
    targets = torch.stack([ids[:, 1 + d:1 + d + TOKENS_PER_STEP] for d in range(1 + depth)], dim=-1)
    borders = CuSeqlens([0, TOKENS_PER_STEP])
    return Batch(ids[:, :TOKENS_PER_STEP], targets, borders, TOKENS_PER_STEP, TOKENS_PER_STEP, (0,))


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def cpu_elsewhere() -> float:
    """Return the seconds of CPU time that threads other than this one have used."""
    return time.process_time() - time.thread_time()


def measure(config: Config, saves: int, disk: Path | None) -> dict[str, Any]:
    """Return medians over the saves of either kind: seconds, and bytes of a checkpoint."""
    engine = make_engine(config.engine, "fp32")
    model = build_model(config, device=engine.device).train()
    optimizers = build_optimizer(model, config.optimizer)
    engine.prepare(model, optimizers, fp32_names(model))

    def step() -> None:
        parts = [batch(config)]
        values = engine.compute_gradients(step_loss(parts, engine.all_sum), parts)
        engine.update(values, lr=1e-4, clip=1.0)

    def begin(saver: Saver, number: int, in_background: bool) -> None:
        tensors = {"model": engine.owned_tensors(checkpoint.unique_tensors(model), copied=in_background),
                   "optimizer": engine.owned_optimizer_state(copied=in_background)}
        saver.begin(number, {}, tensors, required=True)

    def save(saver: Saver, number: int) -> None:
        begin(saver, number, False)
        saver.finish()

    found: dict[str, list[float]] = {name: [] for name in MEASURED}
    step()
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        saver = Saver(Path(folder), 1, engine, lambda: None)
        for number in range(1, 2 * saves, 2):
            quiet = [seconds(step) for _ in range(QUIET_STEPS)]
            found["waiting_s"].append(seconds(partial(save, saver, number)))
            quiet += [seconds(step) for _ in range(QUIET_STEPS)]
            start, cpu, elsewhere = time.perf_counter(), time.thread_time(), cpu_elsewhere()
            found["copy_s"].append(seconds(partial(begin, saver, number + 1, True)))
            found["copy_cpu_s"].append(time.thread_time() - cpu)
            beside = []
            while saver.writing:
                beside.append(seconds(step))
            found["writing_s"].append(time.perf_counter() - start)
            found["writing_cpu_s"].append(cpu_elsewhere() - elsewhere)
            found["rename_s"].append(seconds(saver.finish))
            found["quiet_step_s"].append(statistics.median(quiet))
            found["step_while_writing_s"].append(statistics.median(beside))
            found["slower_s"].append(sum(beside) - len(beside) * statistics.median(quiet))
        assert saver.newest is not None
        size = sum(file.stat().st_size for file in saver.newest.iterdir())
    return {"bytes": size, "saves": saves} | {name: round(statistics.median(times), 3) for name, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=WORDS)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to write to")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(load_config("train", args.words), args.saves, args.folder)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['bytes'] / 2**20:,.0f} MiB, medians of {found['saves']} saves of either kind; torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads\n"
          f"training waits:           {found['waiting_s']:.2f} s\n"
          f"a thread writes:          {found['copy_s'] + found['rename_s']:.2f} s (copy {found['copy_s']:.2f}, rename "
          f"{found['rename_s']:.2f}), and {found['slower_s']:.2f} s by which steps are slower in the "
          f"{found['writing_s']:.2f} s of writing ({found['quiet_step_s']:.2f} s per step, "
          f"{found['step_while_writing_s']:.2f} s meanwhile)\n"
          f"CPU time:                 copy {found['copy_cpu_s']:.2f} s, writing thread {found['writing_cpu_s']:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
