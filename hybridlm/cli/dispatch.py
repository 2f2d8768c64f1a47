"""From the words of the command line to one command, and from what goes wrong to one line and an exit code.

Exit codes: 0 done, 2 the user's mistake (one line on standard error), 1 anything else. Each command is a module of
this package with a function `run(argv)`. Modules are imported when their command is asked for, so that `--help` and a
mistyped command answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from hybridlm.errors import UserError, nearest, out_of_memory

# Each command and what it does, in the order of the overview. Its module has the same name.
COMMANDS = {
    "train": "pretrain from a config; the same command goes on with a run that was stopped",
    "sweep": "many runs that differ in what is compared: mixers, ratios, seeds",
    "ladder": "architectures compared over sizes: carried hyperparameters, laws, verdicts",
    "inspect": "layers, parameters, FLOPs and memory of a model, from its config alone",
    "generate": "text from a checkpoint",
    "eval": "perplexity by position, bits per byte and decode speed of a checkpoint; probes of an architecture",
    "select": "which attention layers to keep when the others get another mixer",
    "report": "figures and tables of a run or a sweep, in one HTML page",
    "prepare": "tokens of a data source, before a run needs them",
    "tokenizer": "train a tokenizer on a data source, or show what one makes of a text",
    "import": "turn a checkpoint of transformers into one of ours",
    "export": "turn a checkpoint of ours into one that transformers loads",
    "verify": "compare the two: logits, tokens, the first layer that differs",
    "configs": "list what can be chosen, and show one config with its comments",
    "check": "test a mixer or a feed-forward, ours or yours, against what every one of them must do",
    "doctor": "versions, device, and every kernel against its reference",
    "bench": "every kernel backend timed against what this machine can do",
}

TAKES_SETTINGS = ("train", "inspect", "prepare")  # commands whose words key=value are settings of a run

OVERVIEW = f"""\
usage: hybridlm COMMAND [arguments]

Design and pretrain hybrid language models.

commands:
{chr(10).join(f"  {name:<9}  {purpose}" for name, purpose in COMMANDS.items())}

examples:
  hybridlm train experiment=quickstart
  hybridlm train model=qwen3_next_tiny data.path=texts/ training.steps=500 run_dir=runs/first
  hybridlm inspect model=kimi_linear_48b
  hybridlm generate runs/first --prompt "def main(" --max-new-tokens 100
  hybridlm check my_mixer --import my_mixer.py

`hybridlm COMMAND --help` says more. `hybridlm --version` prints the version.
"""

LESS_MEMORY = ("take a smaller batch (--batch-size, training.micro_batch_size), shorter sequences or a smaller model; "
               "training.activation_checkpointing=true where it trains")  # of any command
RANK0_HEAD_START_S = 3.0  # seconds that the other ranks wait before they print an error that rank 0 may print first


def run(argv: Sequence[str]) -> int:
    """Run one command without catching its errors; returns the exit code.

    Raises:
        UserError: there is no such command, or what the command raises.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        from hybridlm.version import __version__

        print(f"hybridlm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        close = nearest(argv[0], COMMANDS)
        hint = f"did you mean '{close}'?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {argv[0]!r}; {hint}")
    if argv[0] in TAKES_SETTINGS:
        from hybridlm.cli.key_check import check_keys

        check_keys(argv[1:])
    name = "import_" if argv[0] == "import" else argv[0]  # `import` is a word of Python
    return import_module(f"hybridlm.cli.{name}").run(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process); prints errors and returns the exit code.

    >>> from hybridlm.cli import main
    >>> main(["--version"])
    hybridlm 0.2.0
    0
    """
    # Threads that wait should sleep: spinning ones (the default of libgomp) slow a shared machine down several times.
    # The variable is read when torch is first imported; a value that the user has set stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("WORLD_SIZE"):  # what torch warns of comes with a stack of C++ frames; errors say it in a line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
        said = None if isinstance(error, UserError) else out_of_memory(error)
        _print_error(error if said is None else f"{said}; {LESS_MEMORY}")
        return code


def _print_error(error: Exception | str) -> None:
    """Print the error in one line.

    Ranks above 0 print nothing where all ranks raise the same error. Otherwise they wait for a moment: rank 0 may have
    met the error too, and its launcher then ends them before they repeat it.
    """
    rank, speaker = os.environ.get("RANK", "0"), ""
    if rank not in ("", "0") and os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        if getattr(error, "shared", False):
            return
        time.sleep(RANK0_HEAD_START_S)
        speaker = f"rank {rank}: "
    print(f"error: {speaker}{' '.join(str(error).split())}", file=sys.stderr)


def exit_code(error: Exception) -> int | None:
    """The exit code for an error: 2 for what the user can mend, 1 for a run that could not go on, None for a bug.

    Memory that has run out is 1.
    """
    kernels = sys.modules.get("hybridlm_kernels.registry")
    if kernels is not None and isinstance(error, kernels.KernelUnavailable):
        return 2
    guards = sys.modules.get("hybridlm.training.guards")
    if isinstance(error, UserError) or (guards is not None and isinstance(error, guards.TrainingStopped)):
        return error.exit_code  # type: ignore[attr-defined]
    return 1 if out_of_memory(error) is not None else None
