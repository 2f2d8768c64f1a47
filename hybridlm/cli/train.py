"""`hybridlm train`: pretrain, or go on with a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.cli.parser import Parser, load_run_config, planned_memory
from hybridlm.errors import ConfigError, counted

if TYPE_CHECKING:
    from hybridlm.config.schema import Config


def run(argv: Sequence[str]) -> int:
    """Train, or start the processes that do; returns the exit code."""
    parser = Parser("train", "Pretrain a model, or go on with a run that was stopped: everything is in run_dir.", """\
  hybridlm train experiment=quickstart
  hybridlm train model=kimi_linear_tiny optimizer=muon optimizer.lr=2e-3 run_dir=runs/muon
  hybridlm train model=hybrid_1b data.path=texts/ training.micro_batch_size=4 --dry-run""")
    parser.add_overrides()
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan, build nothing")
    parser.add_argument("--restarts", type=int, default=0, metavar="N",
                        help="start again from the last checkpoint, up to N times, when a process fails")
    parser.add_device_memory()
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    config = load_run_config(args)
    if args.dry_run:
        return _show_plan(config, args, argv)
    if args.restarts < 0:
        raise ConfigError("--restarts", "must not be negative", got=args.restarts)
    from hybridlm.distributed.rank_environment import RankEnvironment
    from hybridlm.planning.process_count import processes_to_start

    processes = processes_to_start(config)
    if processes > 1 or (args.restarts and not RankEnvironment.from_launcher().launched):
        from hybridlm.distributed.launch import launch

        return launch(["train", *argv], processes, args.restarts)
    from hybridlm.training import train

    result = train(config, command=list(argv), to_stderr=args.json)
    if args.json and RankEnvironment.from_launcher().rank == 0:
        print(json.dumps(result.to_dict()))
    return 0


def _show_plan(config: Config, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check the run as far as that needs no building, and print its model and stages; returns the exit code.

    A plan that the machine certainly has no memory for ends with 1, as starting it would be refused.
    """
    from hybridlm.cli.inspect import show_report
    from hybridlm.config.serialization import to_dict
    from hybridlm.data import check_sources
    from hybridlm.files import step_folders, step_of
    from hybridlm.inspect import inspect
    from hybridlm.planning.machine_memory import planned_precision
    from hybridlm.planning.process_count import processes_to_start
    from hybridlm.planning.rank_memory import micro_batch, rank_report
    from hybridlm.training.run_folder import check_folder
    from hybridlm.training.stages import check_steps_left, plan_stages

    training = config.training
    stages = plan_stages(config)
    processes = processes_to_start(config)
    check_sources(config.data)
    folder = Path(config.run_dir).expanduser()
    saved = step_folders(folder / "checkpoints")  # newest first
    if saved:  # without a checkpoint, an earlier attempt there binds nobody
        check_folder(folder, config, [word for word in argv if word != "--dry-run"])
        check_steps_left(config, stages, step_of(saved[0]) or 0)
    fit = planned_memory(args, config, processes)
    exit_code = 1 if fit is not None and fit.certain else 0
    rows, length = micro_batch(config, processes)
    report = inspect(config.model, batch_size=rows, sequence_length=length * config.engine.context_parallel,
                     precision=planned_precision(config, other_machine=args.device_memory is not None),
                     optimizer=config.optimizer,
                     activation_checkpointing=training.activation_checkpointing)
    if config.engine.max_processes != 1:
        report["rank_memory"] = rank_report(config, processes)
    if args.json:
        plan = [{**to_dict(stage), "tokens": stage.steps * stage.tokens_per_step} for stage in stages]
        print(json.dumps({"config": to_dict(config), "stages": plan, "model": report,
                          "memory": fit.to_dict() if fit is not None else None}))
        return exit_code
    show_report(report)
    for stage in stages:
        print(f"stage {stage.name}: {counted(stage.steps, 'step')} of {stage.batch_size} x {stage.sequence_length} "
              f"tokens ({stage.steps * stage.tokens_per_step:,} in all), lr {stage.lr:g}, "
              f"trains {' '.join(stage.trainable)}")
    sources = " and ".join(source.path for source in config.data.sources())
    print(f"data {sources}, tokenizer {config.data.tokenizer}")
    print(f"run folder {config.run_dir}; nothing was built or written")
    if fit is not None and fit.exceeded:
        verdict = "error: this does not fit" if fit.certain else "warning: this may run out of memory"
        print(f"{verdict}: {fit.describe()}", file=sys.stderr)
    return exit_code
