"""`python -m hybridlm.cli`: the command where its script is not on the path."""

import sys

from hybridlm.cli import main

sys.exit(main())
