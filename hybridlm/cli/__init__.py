"""The command `hybridlm`, thin: each subcommand reads its arguments and calls one function.

Exit codes: 0 done, 2 the user's mistake (one line on standard error), 1 anything else. Imports are lazy, so that
`--help` and a mistyped command answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from hybridlm.errors import UserError, nearest

OVERVIEW = """\
usage: hybridlm COMMAND [arguments]

Design and pretrain hybrid language models.

commands:
  train      pretrain from a config; the same command goes on with a run that was stopped
  sweep      many runs that differ in what is compared: mixers, ratios, seeds
  inspect    layers, parameters, FLOPs and memory of a model, from its config alone
  generate   text from a checkpoint
  eval       perplexity by position, bits per byte and decode speed of a checkpoint; probes of an architecture
  report     figures and tables of a run or a sweep, in one HTML page
  prepare    tokens of a data source, before a run needs them
  import     a checkpoint of transformers becomes one of ours
  export     a checkpoint of ours becomes one that transformers loads
  verify     the two side by side: logits, tokens, the first layer that differs
  doctor     versions, device, and every kernel against its reference
  bench      every kernel backend timed against what this machine can do

examples:
  hybridlm train experiment=quickstart
  hybridlm train model=qwen3_next_tiny data.path=texts/ training.steps=500 run_dir=runs/first
  hybridlm inspect model=kimi_linear_48b
  hybridlm generate runs/first --prompt "def main(" --max-new-tokens 100

`hybridlm COMMAND --help` says more. `hybridlm --version` prints the version.
"""

PATIENCE = 3.0  # seconds that a rank leaves to the first to say what is wrong

# Where each subcommand lives: `hybridlm X` calls `x_command` there.
COMMANDS = {"train": "runs", "prepare": "runs", "sweep": "sweep", "inspect": "models", "generate": "models",
            "import": "interop", "export": "interop", "verify": "interop", "doctor": "checks", "bench": "checks",
            "eval": "evaluate", "report": "report"}


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
    module = import_module(f"hybridlm.cli.{COMMANDS[argv[0]]}")
    return getattr(module, f"{argv[0]}_command")(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hybridlm`; returns the exit code."""
    # Threads that wait should sleep: spinning ones (the default of libgomp) slow a shared machine down several times.
    # Read when torch is first imported; a value of the user's own stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        _say(error)
        return code


def _say(error: Exception) -> None:
    """One line. A process that is not the first leaves it the word: it waits, and is ended meanwhile if the first has
    met the same error."""
    rank, speaker = os.environ.get("RANK", "0"), ""
    if rank != "0" and "WORLD_SIZE" in os.environ:
        if getattr(error, "shared", False):
            return
        time.sleep(PATIENCE)
        speaker = f"rank {rank}: "
    print(f"error: {speaker}{' '.join(str(error).split())}", file=sys.stderr)


def exit_code(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for a run that could not go on, None for a fault of the program's own."""
    kernels = sys.modules.get("hybridlm_kernels.registry")
    if kernels is not None and isinstance(error, kernels.KernelUnavailable):
        return 2
    guards = sys.modules.get("hybridlm.training.guards")
    if isinstance(error, UserError) or (guards is not None and isinstance(error, guards.TrainingStopped)):
        return error.exit_code  # type: ignore[attr-defined]
    return None
