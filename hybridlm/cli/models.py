"""`hybridlm inspect` and `hybridlm generate`: what looks at one model."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser, load
from hybridlm.errors import ConfigError


def inspect_command(argv: Sequence[str]) -> int:
    parser = Parser("inspect", "What a model is and costs, from its config alone: nothing is allocated.", """\
  hybridlm inspect model=deepseek_v32_671b
  hybridlm inspect model=hybrid_1b model.schedule.ratio=7 --context 32768 --json
  hybridlm inspect model=hybrid_1b engine=zero3 engine.num_processes=8 training.batch_size=8
  hybridlm inspect runs/first""")
    parser.overrides("the model")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="sequence length of FLOPs and training memory")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences, for training memory")
    parser.json()
    args = parser.parse_intermixed_args(argv)
    from hybridlm.inspect import inspect

    for option, value in (("--context", args.context), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(option, "must be positive", got=value)
    if len(args.overrides) == 1 and os.path.isdir(args.overrides[0]):
        from hybridlm.checkpoint import read_model_config, resolve

        config, model, optimizer = None, read_model_config(resolve(args.overrides[0])), "adamw"
    else:
        config = load(args)
        model, optimizer = config.model, config.optimizer.kind
    report = inspect(model, batch_size=args.batch_size, sequence_length=args.context,
                     optimizer=optimizer)  # type: ignore[arg-type]
    if config is not None and config.engine.kind != "single":
        from hybridlm.distributed.memory import rank_report
        from hybridlm.distributed.rank_environment import check_layout

        ranks = config.engine.num_processes or 1
        check_layout(config, ranks)
        report["rank_memory"] = rank_report(config, ranks)
    if args.json:
        print(json.dumps(report))
    else:
        show_report(report)
    return 0


def show_report(report: dict[str, Any]) -> None:
    """The report of `inspect` as tables on the terminal."""
    from rich.console import Console

    from hybridlm.inspect import render

    render(report, Console())


def generate_command(argv: Sequence[str]) -> int:
    parser = Parser("generate", "Go on with a text. CHECKPOINT is a checkpoint, or a run folder (its newest).", """\
  hybridlm generate runs/first --prompt "import " --max-new-tokens 200
  hybridlm generate runs/first/checkpoints/step-300 --prompt "def main(" --temperature 0""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--prompt", required=True, help="the text to go on with; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest tokens that together "
                                                                  "have this probability (default 0.95)")
    parser.add_argument("--seed", type=int, help="of the sampling; by default every call differs")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.json()
    args = parser.parse_args(argv)
    import torch

    from hybridlm.checkpoint import load_checkpoint
    from hybridlm.errors import CheckpointError
    from hybridlm.model.generation import generate

    prompt = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "torch sees no GPU", got="cuda", expected="cpu")
    model = load_checkpoint(args.checkpoint, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"checkpoint {args.checkpoint} holds no tokenizer, so it cannot read a prompt")
    try:
        ids = tokenizer.encode(prompt)
    except UnicodeDecodeError:
        raise ConfigError("--prompt", "is not UTF-8", got=prompt[:40]) from None
    if not len(ids):
        raise ConfigError("--prompt", "holds no token", expected="at least one character")
    stream, shown, start, made = tokenizer.stream(), [], time.perf_counter(), 0
    show = (lambda text: shown.append(text)) if args.json else write_text
    tokens = generate(model, ids, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                      seed=args.seed, eos=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    show(prompt.decode("utf-8", "replace"))
    for token in tokens:
        made += 1
        show(stream.push(int(token[0])))
    show(stream.finish())
    if args.json:
        print(json.dumps({"prompt": shown[0], "text": "".join(shown[1:]), "tokens": made,
                          "seconds": time.perf_counter() - start}))
    else:
        write_text("\n")
    return 0


def write_text(text: str) -> None:
    """To standard output at once, in whatever encoding it has. On a terminal, control characters are shown as
    U+FFFD: a model must not be able to move the cursor or rename the window."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
