"""Compiled layers over several ranks."""

import pytest


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_compiled_layers_train_as_uncompiled_ones(kind, two_ranks):
    if kind != "ddp":
        pytest.importorskip("deepspeed")
    two_ranks.run("tests.support.compiled_over_ranks:check", kind)
