"""Probes: small tasks that tell mixers apart where the loss does not. See docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.evaluation.probes.base import IGNORE, Probe, ProbeBatch, Score
from hybridlm.evaluation.probes.copying import Copy, SelectiveCopy
from hybridlm.evaluation.probes.needle import Needle
from hybridlm.evaluation.probes.ngram import InContextNGram
from hybridlm.evaluation.probes.recall import MultiQueryRecall
from hybridlm.evaluation.probes.states import ModularArithmetic, Parity, Permutations
from hybridlm.evaluation.probes.tracking import VariableTracking
from hybridlm.evaluation.probes.updates import KeyValueUpdates

# A probe's name, its task, and the parameters that make it this probe.
PROBES: dict[str, tuple[type[Probe], dict[str, Any]]] = {
    "mqar": (MultiQueryRecall, {}),
    "needle_single": (Needle, {}),
    "needle_multi_key": (Needle, {"num_keys": 8}),
    "needle_multi_value": (Needle, {"num_keys": 2, "num_values": 4}),
    "variable_tracking": (VariableTracking, {}),
    "copy": (Copy, {}),
    "selective_copy": (SelectiveCopy, {}),
    "parity": (Parity, {}),
    "s3": (Permutations, {"degree": 3}),
    "s5": (Permutations, {"degree": 5}),
    "modular_arithmetic": (ModularArithmetic, {}),
    "ngram": (InContextNGram, {}),
    "key_value_updates": (KeyValueUpdates, {}),
}


def make_probe(name: str, parameters: Mapping[str, Any] | None = None) -> Probe:
    """The probe of this name, with some of its parameters replaced.

    Raises:
        ConfigError: no such probe or parameter, or a value that it cannot have.
    """
    from hybridlm.config.serialization import from_dict

    if name not in PROBES:
        raise ConfigError("probe", "no probe of this name", got=name, expected=f"one of {', '.join(PROBES)}",
                          hint=did_you_mean(name, PROBES))
    cls, preset = PROBES[name]
    return from_dict(cls, {**preset, **(parameters or {})}, f"probe.{name}")


__all__ = ["IGNORE", "PROBES", "Copy", "InContextNGram", "KeyValueUpdates", "ModularArithmetic", "MultiQueryRecall",
           "Needle", "Parity", "Permutations", "Probe", "ProbeBatch", "Score", "SelectiveCopy", "VariableTracking",
           "make_probe"]
