"""Entry point of `python -m hybridlm.cli`, for where the `hybridlm` script is not on the path: ranks of a run too."""

import atexit
import os
import sys

from hybridlm.cli import main

code = main()
if os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
    # A rank leaves without taking down its process group. That would wait for ranks that never come where one has
    # failed, and abort now and then where all are done: threads of the group meet an interpreter that has ended.
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
