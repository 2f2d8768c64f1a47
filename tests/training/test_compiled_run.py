"""A run with `training.compile=true`: the losses of the same run without, and the same record of backends."""

import json
import logging

import pytest
import torch

from hybridlm.model import block
from hybridlm.training import train
from hybridlm_kernels.compiling.operation import fused_operations
from tests.support import tiny_run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_has_the_losses_of_an_eager_one(checkpointing, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(block, "COMPILER", "aot_eager")  # inductor's kernels take a minute; the model's tests have them
    torch._dynamo.reset()
    for name, compiled in (("eager", False), ("compiled", True)):
        config = tiny_run.config(tmp_path / name, steps=5, eval_every=5, compile=compiled,
                                 activation_checkpointing=checkpointing)
        with caplog.at_level(logging.INFO, "hybridlm"):
            train(config)
    eager, compiled = (tiny_run.losses(tmp_path / name / "run") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for step, values in eager.items():
        assert [x for x in compiled[step] if x is not None] == pytest.approx(
            [x for x in values if x is not None], rel=1e-4), step
    rows = [{(row["layers"], row["operation"]): row["backend"] for row in json.loads(
        (tmp_path / name / "run" / "backends.json").read_text())} for name in ("eager", "compiled")]
    fused = {"rms_norm", "gated_rms_norm", "swiglu", "rotary"}
    assert {key: backend for key, backend in rows[0].items() if key[1] not in fused} == {
        key: backend for key, backend in rows[1].items() if key[1] not in fused}
    assert f"torch.compile fuses {', '.join(fused_operations())} into the graphs" in caplog.text
    assert {"rms_norm", "rotary", "swiglu"} <= set(fused_operations())
    torch._dynamo.reset()
