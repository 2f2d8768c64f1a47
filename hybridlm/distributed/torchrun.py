"""torchrun whose failures are one line: `python -m hybridlm.distributed.torchrun ARGUMENTS`, those of torchrun itself.

torchrun ends in a traceback whenever a rank fails, and waits for a first machine that it cannot reach for a quarter of
an hour, printing frames of C++. Here a machine checks the way to the first one before torchrun starts, waits as long as
`engine.timeout` says, and what a rank has said already is not said again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from hybridlm.distributed.engine_config import EngineConfig
from hybridlm.distributed.rendezvous import check_master
from hybridlm.errors import ConfigError, UserError

TIMEOUT_KEY = "engine.timeout="
USER_MISTAKE = ConfigError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments; returns the exit code of the first rank that failed, or 0."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    args = run.parse_args(list(sys.argv[1:] if argv is None else argv))
    seconds = _timeout(args.training_script_args)
    several = str(args.nnodes) != "1"
    where = f"{args.master_addr}:{args.master_port}"
    try:
        if several:
            check_master(args.master_addr, str(args.master_port), seconds, is_first=args.node_rank == 0)
            args.rdzv_conf = args.rdzv_conf or f"timeout={max(1, int(seconds))}"
        run.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ChildFailedError as error:  # the rank has said why, unless something ended it
        first = error.get_first_failure()[1]
        if first.exitcode < 0:
            print(f"error: rank {error.get_first_failure()[0]} was ended by {first.signal_name()}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as signalled:
        return 128 + signalled.sigval
    except (DistError, RendezvousError) as error:
        reason = " ".join(str(error).splitlines()[0].split()) if str(error) else type(error).__name__
        print(f"error: engine: the {args.nnodes} machines of this run did not meet at {where}, or one of them has gone "
              f"({reason}); is every machine up, with the same MASTER_ADDR and MASTER_PORT?", file=sys.stderr)
        return USER_MISTAKE
    return 0


def _timeout(words: Sequence[str]) -> float:
    """The seconds that ranks wait for each other, from the words of `hybridlm train`."""
    asked = [word.removeprefix(TIMEOUT_KEY) for word in words if word.startswith(TIMEOUT_KEY)]
    try:
        return float(asked[-1]) if asked else EngineConfig.timeout
    except ValueError:  # `hybridlm train` says what is wrong with it
        return EngineConfig.timeout


if __name__ == "__main__":
    sys.exit(main())
