"""The command `hybridlm`, thin: each subcommand reads its arguments and calls one function.

Exit codes: 0 done, 2 the user's mistake (one line on standard error), 1 anything else. Imports are lazy, so that
`--help` and a mistyped command answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hybridlm.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
    from hybridlm.config.schema import Config

OVERVIEW = """\
usage: hybridlm COMMAND [arguments]

Design and pretrain hybrid language models.

commands:
  train      pretrain from a config; the same command goes on with a run that was stopped
  inspect    layers, parameters, FLOPs and memory of a model, from its config alone
  generate   text from a checkpoint
  prepare    tokens of a data source, before a run needs them
  doctor     versions, device, and every kernel against its reference

examples:
  hybridlm train experiment=quickstart
  hybridlm train model=qwen3_next_tiny data.path=texts/ training.steps=500 run_dir=runs/first
  hybridlm inspect model=kimi_linear_48b
  hybridlm generate runs/first --prompt "def main(" --max-new-tokens 100

`hybridlm COMMAND --help` says more. `hybridlm --version` prints the version.
"""


class Parser(argparse.ArgumentParser):
    """argparse with this program's way of saying what is wrong."""

    def __init__(self, name: str, description: str, examples: str):
        super().__init__(prog=f"hybridlm {name}", description=description, epilog=f"examples:\n{examples}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        close = nearest(unknown, self._option_string_actions) if message.startswith("unrecognized") else None
        hint = f"did you mean '{close}'? " if close else ""
        raise UserError(f"{message}; {hint}see `{self.prog} --help`")

    def overrides(self, what: str = "a run") -> None:
        self.add_argument("overrides", nargs="*", metavar="key=value",
                          help=f"settings of {what}: model=NAME, training.steps=100, ...; the name or YAML file of "
                               "a whole config may stand first")
        self.add_argument("--config-dir", metavar="FOLDER",
                          help="a folder of your own configs (model/, experiment/, ...), searched first")

    def json(self) -> None:
        self.add_argument("--json", action="store_true", help="print JSON instead of text")


def load(args: argparse.Namespace) -> Config:
    """The config that positional arguments name: [config] key=value ..."""
    from hybridlm.config.compose import load_config

    words = list(args.overrides)
    name = "train"
    if words and ("=" not in words[0] or os.path.isfile(words[0])) and not words[0].startswith("~"):
        name = words.pop(0)
    return load_config(name, words, config_dir=args.config_dir)


def train_command(argv: Sequence[str]) -> int:
    parser = Parser("train", "Pretrain a model, or go on with a run that was stopped: everything is in run_dir.", """\
  hybridlm train experiment=quickstart
  hybridlm train model=kimi_linear_tiny optimizer=muon optimizer.lr=2e-3 run_dir=runs/muon
  hybridlm train model=hybrid_1b data.path=texts/ training.micro_batch_size=4 --dry-run""")
    parser.overrides()
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan, build nothing")
    parser.json()
    args = parser.parse_intermixed_args(argv)
    config = load(args)
    if args.dry_run:
        return _dry_run(config, args.json)
    from hybridlm.training import train

    result = train(config, command=list(argv), to_stderr=args.json)
    if args.json:
        print(json.dumps(result.to_dict()))
    return 0


def _dry_run(config: Config, as_json: bool) -> int:
    from hybridlm.config.convert import to_dict
    from hybridlm.inspect import inspect
    from hybridlm.training.stages import plan

    training = config.training
    stages = plan(config)
    report = inspect(config.model, batch_size=training.micro_batch_size or training.batch_size,
                     sequence_length=max(stage.sequence_length for stage in stages),
                     precision="fp32" if training.precision == "fp32" else "bf16", optimizer=config.optimizer.kind,
                     activation_checkpointing=training.activation_checkpointing)
    if as_json:
        rows = [{**vars(stage), "tokens": stage.steps * stage.tokens_per_step} for stage in stages]
        print(json.dumps({"config": to_dict(config), "stages": rows, "model": report}))
        return 0
    _render(report)
    for stage in stages:
        print(f"stage {stage.name}: {stage.steps} steps of {stage.batch_size} x {stage.sequence_length} tokens "
              f"({stage.steps * stage.tokens_per_step:,} in all), lr {stage.lr:g}, trains {' '.join(stage.trainable)}")
    print(f"run folder {config.run_dir}; nothing was built or written")
    return 0


def _render(report: dict[str, Any]) -> None:
    from rich.console import Console

    from hybridlm.inspect import render

    render(report, Console())


def inspect_command(argv: Sequence[str]) -> int:
    parser = Parser("inspect", "What a model is and costs, from its config alone: nothing is allocated.", """\
  hybridlm inspect model=deepseek_v32_671b
  hybridlm inspect model=hybrid_1b model.schedule.ratio=7 --context 32768 --json
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

        model, optimizer = read_model_config(resolve(args.overrides[0])), "adamw"
    else:
        config = load(args)
        model, optimizer = config.model, config.optimizer.kind
    report = inspect(model, batch_size=args.batch_size, sequence_length=args.context,
                     optimizer=optimizer)  # type: ignore[arg-type]
    if args.json:
        print(json.dumps(report))
    else:
        _render(report)
    return 0


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


def prepare_command(argv: Sequence[str]) -> int:
    parser = Parser("prepare", "Read a data source into token shards, as a run would; it then starts at once.", """\
  hybridlm prepare data.path=texts/ data.tokenizer=bpe data.tokenizer_vocab_size=8192
  hybridlm prepare data.path=corpus.jsonl data.text_field=body --json""")
    parser.overrides()
    parser.json()
    args = parser.parse_intermixed_args(argv)
    config = load(args)
    from hybridlm.data import check_vocab, prepare

    data = prepare(config.data)
    check_vocab(data.tokenizer, config.model.vocab_size)
    report = data.report()
    if args.json:
        print(json.dumps(report))
        return 0
    tokenizer = report["tokenizer"]
    print(f"tokenizer {tokenizer['name']}: {tokenizer['vocab_size']} ids, {tokenizer['eos']} ends a text")
    for source in report["sources"]:
        for part in ("train", "validation"):
            counts = source[part]
            print(f"{source['path']}  {part:<10}  {counts['documents']:,} documents  {counts['tokens']:,} tokens  "
                  f"{counts['bytes']:,} bytes  longest {counts['longest_document']:,} tokens")
        print(f"{source['path']}  in {source['folder']}")
    return 0


def doctor_command(argv: Sequence[str]) -> int:
    parser = Parser("doctor", "Can this machine train? Versions, device, and every kernel against its reference.",
                    "  hybridlm doctor\n  hybridlm doctor --json")
    parser.json()
    args = parser.parse_args(argv)
    from hybridlm.doctor import run_doctor

    return run_doctor(args.json)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command, "inspect": inspect_command, "generate": generate_command, "prepare": prepare_command,
    "doctor": doctor_command}


def run(argv: Sequence[str]) -> int:
    """The command line without what catches errors."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        from hybridlm import __version__

        print(f"hybridlm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        close = nearest(argv[0], COMMANDS)
        raise UserError(f"unknown command {argv[0]!r}; " + (f"did you mean '{close}'?" if close else
                                                            f"expected one of {', '.join(COMMANDS)}"))
    return COMMANDS[argv[0]](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hybridlm`; returns the exit code."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 1
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code


def exit_code(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for a run that could not go on, None for a fault of the program's own."""
    kernels = sys.modules.get("hybridlm_kernels.registry")
    if kernels is not None and isinstance(error, kernels.KernelUnavailable):
        return 2
    guards = sys.modules.get("hybridlm.training.guards")
    if isinstance(error, UserError) or (guards is not None and isinstance(error, guards.TrainingStopped)):
        return error.exit_code  # type: ignore[attr-defined]
    return None


if __name__ == "__main__":
    sys.exit(main())
