"""The example mixer of `examples/my_mixer.py`, imported as `--import` does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from hybridlm.model.mixers import MIXERS
from hybridlm.user_code import import_user_code

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_mixer.py"


def load_example() -> ModuleType:
    """The module of the example, which registers the kind `my_mixer`."""
    import_user_code([str(EXAMPLE)])
    return sys.modules[MIXERS["my_mixer"][1].__module__]
