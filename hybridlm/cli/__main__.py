"""Entry point of `python -m hybridlm.cli`, for where the `hybridlm` script is not on the path."""

import sys

from hybridlm.cli import main

sys.exit(main())
