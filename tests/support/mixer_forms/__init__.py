"""Small forms of every mixer, one module per group of kinds; each has a dict FORMS of configs by name.

A module may say more of its kinds, by sets of names of parameters within the mixer: FP32, those that stay in fp32
beside norms; OTHER_STARTS, projections that do not start as normal(0, std), those of one form as "FORM/NAME";
NO_MATRICES, those of two dims that are vectors or convolutions to an optimizer. UNDIVIDED names the forms whose
rows cannot be divided between processes. SIGNS names forms that read signs: their work per key is on whole numbers,
and rounding makes their outputs jump. READERS holds forms that read from an earlier layer, with that layer's mixer.
"""

import importlib
import pkgutil

from hybridlm.model.mixers.contract import MixerConfig

# Presets that read from an earlier layer, with a preset that they can read from.
PRESET_SOURCES = {"gmu": ["mamba"], "shared_attention": ["swa"], "hysparse": ["hysparse_full"],
                  "hysparse2": ["hysparse2_full"], "clsa": ["hysparse_full"],
                  "clsa_shared": ["hysparse_full", "clsa"], "csa2_reindex": ["csa2_candidates"],
                  "csa2_reuse": ["csa2_candidates"], "phi4_flash_shared": ["phi4_flash_full"]}


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


def collect_names(kind: str) -> set[str]:
    """The names that the modules list under `kind`, such as FP32."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return set().union(*(getattr(module, kind, set()) for module in modules))


def collect_readers() -> dict[str, tuple[MixerConfig, MixerConfig]]:
    """The readers of all modules with the mixers they read from."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {name: pair for module in modules for name, pair in getattr(module, "READERS", {}).items()}


def own_name(name: str) -> str:
    """The name of a parameter within its mixer, also where that is a branch of several.

    >>> own_name("branches.ssm.conv.weight"), own_name("conv.weight")
    ('conv.weight', 'conv.weight')
    """
    return name.split(".", 2)[2] if name.startswith("branches.") else name
