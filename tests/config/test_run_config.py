"""Loading a config: what a recipe takes from a checkpoint is tested with the recipes; here the entry points."""

import subprocess
import sys

import hybridlm
from hybridlm.run_config import load_config, load_model_config

HEAVY = ("torch._dynamo", "triton", "transformers", "accelerate", "datasets", "deepspeed")


def test_the_package_names_the_entry_point():
    assert hybridlm.load_config is load_config
    assert load_model_config("hybrid_tiny", ["model.num_layers=2"]).num_layers == 2


def test_reading_a_config_imports_nothing_that_only_training_needs():
    code = f"import sys, hybridlm.run_config, hybridlm.inspect; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
