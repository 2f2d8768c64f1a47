"""`hybridlm inspect`: what a model is and costs."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.cli.parser import Parser, load_run_config, planned_memory
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.config.schema import Config
    from hybridlm.model.config import ModelConfig


RUN_GROUPS = ("experiment", "training", "recipe", "engine")  # settings that are those of a run, not of a model alone


def run(argv: Sequence[str]) -> int:
    """Print the layers and costs of a model; returns the exit code."""
    parser = Parser("inspect", "What a model is and costs, from its config alone: nothing is allocated.\n\n"
                    "Of a run (experiment=..., training...., a run folder) the lengths, micro batch and precision are "
                    "the run's own.", """\
  hybridlm inspect model=deepseek_v32_671b
  hybridlm inspect model=hybrid_1b model.schedule.ratio=7 --context 32768 --json
  hybridlm inspect model=ladder_bytes --rung r2
  hybridlm inspect experiment=quickstart
  hybridlm inspect model=hybrid_1b engine=zero3 engine.num_processes=8 training.batch_size=8 --device-memory 80
  hybridlm inspect runs/first""")
    parser.add_overrides("the model or run")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="sequence length of FLOPs and training memory")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="sequences at a time, for training memory (default 1, or the micro batch of the run)")
    parser.add_argument("--rung", metavar="NAME", help="the same architecture at the width and depth of a rung of "
                        "`hybridlm ladder`: r0 to r7, or HIDDENxLAYERS such as 96x8")
    parser.add_device_memory()
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    from hybridlm.checkpoint import describe_lineage, read_lineage, resolve

    for option, value in (("--context", args.context), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(option, "must be positive", got=value)
    folder = Path(args.overrides[0]) if len(args.overrides) == 1 and os.path.isdir(args.overrides[0]) else None
    if folder is not None and args.rung is not None:
        raise ConfigError("--rung", "resizes a model, and a folder holds one of its own size", got=args.rung,
                          expected="model=NAME")
    report = _report_folder(args, folder) if folder is not None else _report_config(args)
    if folder is not None and (lineage := read_lineage(resolve(folder, hashes=False))):
        report["lineage"] = lineage
    if args.json:
        print(json.dumps(report))
    else:
        show_report(report)
        for line in describe_lineage(report.get("lineage")):
            print(line)
    return 0


def _report_folder(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Report on the newest checkpoint of a folder, with the sizes of its run where its config is there."""
    from hybridlm.checkpoint import read_model_config, resolve
    from hybridlm.inspect import inspect

    checkpoint = resolve(folder)
    model = read_model_config(checkpoint)
    saved = checkpoint / "config.yaml"
    if not saved.is_file():
        return inspect(model, batch_size=args.batch_size or 1, sequence_length=args.context)
    args.overrides = [str(saved)]
    return _report_run(args, replace(load_run_config(args), model=model))


def _report_config(args: argparse.Namespace) -> dict[str, Any]:
    """Report on the model or run that the settings name."""
    from hybridlm.inspect import inspect

    config = load_run_config(args)
    if args.rung is not None:
        config = replace(config, model=_resize(config.model, args.rung))
    if _names_run(args.overrides, config):
        return _report_run(args, config)
    report = inspect(config.model, batch_size=args.batch_size or 1, sequence_length=args.context,
                     optimizer=config.optimizer)
    memory = report["training_memory"]
    training = replace(config.training, batch_size=memory["batch_size"], micro_batch_size=None,
                       sequence_length=memory["sequence_length"], precision=memory["precision"])
    return report | {"memory": _fit(args, replace(config, training=training), 1)}


def _resize(model: ModelConfig, name: str) -> ModelConfig:
    """The model at the width and depth of a rung."""
    from hybridlm.ladder.rungs import find_rung

    rung = find_rung(name, "--rung")
    resized = model.resize(rung.hidden_size, rung.num_layers)
    return replace(resized, name=f"{model.name} {rung.name}", published=None)


def _report_run(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Report on a run: its model at the run's own lengths, micro batch and precision, per process and in all."""
    from hybridlm.inspect import inspect
    from hybridlm.planning.layout_checks import check_layout
    from hybridlm.planning.machine_memory import planned_precision
    from hybridlm.planning.rank_memory import micro_batch, rank_report

    ranks = (config.engine.num_processes or 1) if config.engine.max_processes != 1 else 1
    check_layout(config, ranks)
    rows, length = micro_batch(config, ranks)
    rows, length = args.batch_size or rows, args.context or length * config.engine.context_parallel
    precision = planned_precision(config, other_machine=args.device_memory is not None)
    report = inspect(config.model, batch_size=rows, sequence_length=length, precision=precision,
                     optimizer=config.optimizer, activation_checkpointing=config.training.activation_checkpointing)
    if args.batch_size or args.context:  # the sizes asked for, in place of those of every stage
        training = replace(config.training, batch_size=rows * ranks // config.engine.context_parallel or 1,
                           micro_batch_size=None, sequence_length=length)
        stages = [replace(stage, sequence_length=None, batch_size=None) for stage in config.recipe.stages]
        config = replace(config, training=training, recipe=replace(config.recipe, stages=stages))
    if config.engine.max_processes != 1:
        report["rank_memory"] = rank_report(config, ranks)
    return report | {"memory": _fit(args, config, ranks)}


def _names_run(words: Sequence[str], config: Config) -> bool:
    """Whether settings name a whole run: one of RUN_GROUPS among them, or a config that is no model stands first."""
    if words and "=" not in words[0] and words[0] != config.model.name:
        return True
    return any(re.split(r"[.=]", word.lstrip("+~"))[0] in RUN_GROUPS for word in words)


def _fit(args: argparse.Namespace, config: Config, ranks: int) -> dict[str, Any] | None:
    fit = planned_memory(args, config, ranks)
    return None if fit is None else fit.to_dict()


def show_report(report: dict[str, Any]) -> None:
    """Print the report of `inspect` as tables."""
    from rich.console import Console

    from hybridlm.inspect import render

    render(report, Console())
