"""Small forms of every mixer, one module per group of kinds; each has a dict FORMS of configs by name."""

import importlib
import pkgutil

from hybridlm.model.mixers.contract import MixerConfig


def collect_forms() -> dict[str, MixerConfig]:
    """The forms of every module of this folder, in the order of the modules' names.

    Raises:
        ValueError: two modules use one name.
    """
    found: dict[str, MixerConfig] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        forms = importlib.import_module(f"{__name__}.{module}").FORMS
        if twice := found.keys() & forms.keys():
            raise ValueError(f"forms defined twice: {', '.join(sorted(twice))}")
        found |= forms
    return found
