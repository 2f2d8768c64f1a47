"""`hybridlm inspect`: what a model is and costs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser, load_run_config
from hybridlm.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Print the layers and costs of a model; returns the exit code."""
    parser = Parser("inspect", "What a model is and costs, from its config alone: nothing is allocated.", """\
  hybridlm inspect model=deepseek_v32_671b
  hybridlm inspect model=hybrid_1b model.schedule.ratio=7 --context 32768 --json
  hybridlm inspect model=hybrid_1b engine=zero3 engine.num_processes=8 training.batch_size=8
  hybridlm inspect runs/first""")
    parser.add_overrides("the model")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="sequence length of FLOPs and training memory")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences, for training memory")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    from hybridlm.inspect import inspect

    for option, value in (("--context", args.context), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(option, "must be positive", got=value)
    if len(args.overrides) == 1 and os.path.isdir(args.overrides[0]):
        from hybridlm.checkpoint import read_model_config, resolve

        config, model, optimizer = None, read_model_config(resolve(args.overrides[0])), None
    else:
        config = load_run_config(args)
        model, optimizer = config.model, config.optimizer
    report = inspect(model, batch_size=args.batch_size, sequence_length=args.context, optimizer=optimizer)
    if config is not None and config.engine.max_processes != 1:
        from hybridlm.planning.layout_checks import check_layout
        from hybridlm.planning.rank_memory import rank_report

        ranks = config.engine.num_processes or 1
        check_layout(config, ranks)
        report["rank_memory"] = rank_report(config, ranks)
    if args.json:
        print(json.dumps(report))
    else:
        show_report(report)
    return 0


def show_report(report: dict[str, Any]) -> None:
    """Print the report of `inspect` as tables."""
    from rich.console import Console

    from hybridlm.inspect import render

    render(report, Console())
