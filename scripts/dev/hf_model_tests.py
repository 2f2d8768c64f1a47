#!/usr/bin/env python
"""Runs transformers' own model tests against the exported class `HybridLMForCausalLM`, on four tiny systems.

    pip download transformers==5.24.0 --no-binary transformers --no-deps && tar xzf transformers-5.24.0.tar.gz
    python scripts/dev/hf_model_tests.py transformers-5.24.0 [--systems kimi_linear_tiny] [PYTEST ARGUMENTS]

The wheel of transformers has no tests; its source distribution has `tests/test_modeling_common.py`. Parts of the mixin
that the source distribution lacks (generation, exporters) are replaced by empty classes, so their tests do not run
here; tests/interop/test_hf_generation.py holds ours of the same kinds. The package `parameterized` must be installed.
docs/interop.md says which tests do not apply and why.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SYSTEMS = ("kimi_linear_tiny", "minimax_01_tiny", "qwen3_next_tiny", "deepseek_v32_tiny")
SOURCE_VARIABLE = "TRANSFORMERS_SOURCE"  # how pytest, which imports this file as a test module, learns the folder
SYSTEMS_VARIABLE = "HYBRIDLM_SYSTEMS"
PACKAGE = "transformers_tests"  # our own tests are the package `tests`
PARTS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def load_mixin(source: Path) -> type:
    """The class `ModelTesterMixin` of a source distribution.

    Args:
        source: the unpacked folder, with `tests/` in it.

    Raises:
        SystemExit: the folder has no such tests.
    """
    folder = source / "tests"
    if not (folder / "test_modeling_common.py").is_file():
        raise SystemExit(f"{source} has no tests/test_modeling_common.py: give the unpacked source distribution")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for part, mixin in PARTS.items():
        if not (folder / f"{part.replace('.', '/')}.py").is_file():
            parent = types.ModuleType(f"{PACKAGE}.{part.split('.')[0]}")
            parent.__path__ = []
            module = types.ModuleType(f"{PACKAGE}.{part}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules[parent.__name__] = parent
            sys.modules[module.__name__] = module
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.test_modeling_common", folder / "test_modeling_common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.ModelTesterMixin


class Tester:
    """Answers what the mixin asks of a model's test: a small config and inputs that fit it."""

    __test__ = False  # pytest looks at every class called Test*
    batch_size = 2
    seq_length = 7
    is_training = True

    def __init__(self, parent: Any, system: str):
        self.parent = parent
        self.system = system

    def get_config(self) -> Any:
        """The config of the system with two layers, one of each mixer, as the model type `hybridlm`."""
        from hybridlm.interop import to_hf_config
        from hybridlm.model.config import MTPConfig, ScheduleConfig
        from hybridlm.run_config import load_model_config

        full = load_model_config(self.system)
        names = list(dict.fromkeys(full.layers()))
        config = replace(full, num_layers=2, schedule=ScheduleConfig(pattern=[names[0], names[-1]]), mtp=MTPConfig(),
                         vocab_size=self.vocab_size)
        return to_hf_config(config, "hybridlm")

    @property
    def vocab_size(self) -> int:
        return 99

    @property
    def hidden_size(self) -> int:
        return self.get_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return 2

    @property
    def num_attention_heads(self) -> int:
        return self.get_config().num_attention_heads

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """A config, and arguments of forward."""
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_test(mixin: type, system: str) -> type:
    """The test class of one system."""
    import unittest

    from hybridlm.interop.auto import HybridLMConfig, HybridLMForCausalLM

    def setUp(self: Any) -> None:
        self.model_tester = Tester(self, system)

    def _prepare_for_class(self: Any, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        inputs = mixin._prepare_for_class(self, inputs, model_class)  # it knows labels for transformers' classes alone
        return inputs | {"labels": inputs["input_ids"].clone()} if return_labels else inputs

    members = {"setUp": setUp, "_prepare_for_class": _prepare_for_class, "all_model_classes": (HybridLMForCausalLM,),
               "config_class": HybridLMConfig, "has_attentions": False, "__module__": __name__,
               "test_all_params_have_gradient": False}  # experts without a token have none
    return type(f"Test_{system}", (mixin, unittest.TestCase), members)


def main() -> int:
    """Run pytest on this file, which then holds one test class per system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="unpacked source distribution of transformers")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    args, pytest_arguments = parser.parse_known_args()
    os.environ[SOURCE_VARIABLE] = str(args.source.resolve())
    os.environ[SYSTEMS_VARIABLE] = " ".join(args.systems)
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    return int(pytest.main([__file__, *options, *pytest_arguments]))


if __name__ == "__main__":
    raise SystemExit(main())
if SOURCE_VARIABLE in os.environ:  # pytest imports this file
    _mixin = load_mixin(Path(os.environ[SOURCE_VARIABLE]))
    for _system in os.environ[SYSTEMS_VARIABLE].split():
        globals()[f"Test_{_system}"] = make_test(_mixin, _system)
