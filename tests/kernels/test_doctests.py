"""The examples in the docstrings of hybridlm_kernels run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import hybridlm_kernels

# Triton modules import triton, and adapters the packages they are made for.
OPTIONAL = ("triton", "fla_", "flash_attn_")
NAMES = [module.name for module in pkgutil.walk_packages(hybridlm_kernels.__path__, "hybridlm_kernels.")
         if not module.name.rsplit(".", 1)[1].startswith(OPTIONAL)]
WITH_EXAMPLES = ("hybridlm_kernels.ops.delta_rule", "hybridlm_kernels.ops.linear_attention",
                 "hybridlm_kernels.ops.short_conv")


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES
