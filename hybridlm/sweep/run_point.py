"""The process of a point with more to do than text: `python -m hybridlm.sweep.run_point FOLDER [--import FILE ...]`.

It trains on text where the sweep asks for that, times decoding, then trains on one probe after the other. A result is
on the disk as soon as it is known, so a process that is killed loses at most one training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hybridlm.checkpoint import load_checkpoint
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, load_yaml
from hybridlm.distributed.engine import pick_device
from hybridlm.errors import CheckpointError, UserError
from hybridlm.evaluation.decode_speed import decode_speed
from hybridlm.evaluation.probe_training import train_on_probe
from hybridlm.run_config import load_config
from hybridlm.sweep.folder import POINT_FILE
from hybridlm.sweep.probe_tasks import (
    DECODE_FILE,
    WORK_FILE,
    PointWork,
    ProbeTask,
    decoding_is_done,
    read_probe_result,
    write_decoding,
    write_probe_result,
)
from hybridlm.training.guards import TrainingStopped
from hybridlm.training.run_folder import RunFolder
from hybridlm.user_code import import_user_code


def run_point(run_dir: Path) -> int:
    """Complete the trainings of the point in `run_dir`, and print the outcome as JSON.

    A probe that fails is reported and does not keep the others from running.

    Returns:
        The exit code: 1 where a probe has failed.

    Raises:
        ConfigError: another process works there.
    """
    config = load_config(str(run_dir / POINT_FILE))
    work = from_dict(PointWork, load_yaml(run_dir / WORK_FILE))
    ended: dict[str, Any] = {"status": "finished", "step": 0, "validation": None, "bigram_bits_per_byte": None,
                             "checkpoint": None}
    if work.language_model:
        from hybridlm.training import train  # takes seconds to import, and a point of probes alone does without

        ended = train(config, to_stderr=True).to_dict()
    failed = 0
    if ended["status"] == "finished":
        with closing(RunFolder(run_dir)):  # locked: other processes see that the point is busy
            if work.decode_context is not None:
                _time_decoding(run_dir, ended["checkpoint"], config, work.decode_context)
            failed = _train_on_probes(run_dir, config, work.probes)
    print(json.dumps(ended))
    return 1 if failed else 0


def _time_decoding(run_dir: Path, checkpoint: str | None, config: Config, context: int) -> None:
    """Time decoding with the trained weights, unless that is done; a failure is reported and costs nothing else."""
    if decoding_is_done(run_dir, context):
        return
    try:
        if checkpoint is None:
            raise CheckpointError("there is no checkpoint of the trained weights")
        model = load_checkpoint(checkpoint, device=pick_device(config.engine).type)
        [row] = decode_speed(model, [context])
    except (UserError, RuntimeError) as error:  # torch's own errors, such as a GPU without enough memory
        said = str(error).splitlines()[0]
        print(f"error: decoding: {said}; to measure again, delete {run_dir / DECODE_FILE} and give the same command",
              file=sys.stderr, flush=True)
        row = {"context": context, "error": said}
    write_decoding(run_dir, row)


def _train_on_probes(run_dir: Path, config: Config, tasks: list[ProbeTask]) -> int:
    """Train on each probe that has no result yet; returns how many have failed."""
    device = pick_device(config.engine).type
    failed = 0
    for task in tasks:
        if read_probe_result(run_dir, task) is not None:
            continue
        print(f"probe {task.label}: {task.steps} steps", file=sys.stderr, flush=True)
        try:
            result = train_on_probe(config.model, task.probe(), task.steps, task.lr, config.training.seed,
                                    length=task.length, eval_lengths=task.lengths, batch_size=task.batch_size,
                                    examples=task.examples, device=device)
        except (UserError, RuntimeError) as error:  # torch's own errors, such as a GPU without enough memory
            print(f"error: probe {task.label}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            failed += 1
            continue
        write_probe_result(run_dir, task, result.to_dict())
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the point that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm.sweep.run_point")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE")
    args = parser.parse_args(argv)
    try:
        import_user_code(args.imports)
        return run_point(args.folder)
    except (UserError, TrainingStopped) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
