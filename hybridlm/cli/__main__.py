"""Entry point of `python -m hybridlm.cli`, for where the `hybridlm` script is not on the path: ranks of a run too."""

import os
import sys

from hybridlm.cli import main

code = main()
if code and os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
    # A rank that has failed says so and is gone. Taking down the process group would wait for ranks that never come,
    # or abort where they have gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
