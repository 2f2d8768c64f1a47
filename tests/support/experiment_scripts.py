"""Scripts of experiments, loaded as modules with the files beside them."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "scripts" / "experiments"


def load_experiment(name, monkeypatch):
    """The module of scripts/experiments/NAME.py, under a name of its own until the test ends."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"{name}_experiment", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module
