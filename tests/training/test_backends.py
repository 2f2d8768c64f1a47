"""The table of kernel backends: layers, operations, and what was rejected."""

import json

import torch

from hybridlm.model.model import build_model
from hybridlm.run_config import load_config
from hybridlm.training.backends import (
    BACKENDS_FILE,
    BackendUse,
    format_layer_ranges,
    recording_backends,
    report_backends,
)
from hybridlm_kernels import registry
from hybridlm_kernels.registry import Backend, Call, Operation


def test_ranges():
    assert format_layer_ranges(["0", "1", "2", "4", "10", "11", "mtp", "model"]) == "0-2, 4, 10-11, mtp, model"


def test_each_operation_is_noted_under_its_layers(tmp_path, caplog):
    config = load_config("train", ["model=hybrid_tiny", "model.num_layers=4", "model.schedule.linear=gdn",
                                   "model.schedule.ratio=1", "model.mtp.depth=1"])
    model = build_model(config.model).train()
    ids = torch.arange(24)[None] % 7
    with recording_backends(model) as rows:
        model(ids, labels=ids).loss.backward()
        table = {(row.operation, row.layers): row for row in rows()}
    assert ("delta_rule", "0, 2") in table
    assert ("attention", "1, 3, mtp") in table
    assert ("linear_cross_entropy", "model") in table
    assert table["delta_rule", "0, 2"].backend == "torch"
    assert table["delta_rule", "0, 2"].why == registry.PREFERRED
    model(ids)
    assert len(rows()) == len(table)  # nothing is noted any more
    with caplog.at_level("INFO", logger="hybridlm"):
        report_backends(rows(), tmp_path)
    assert [BackendUse(**row | {"rejected": tuple(row["rejected"])})
            for row in json.loads((tmp_path / BACKENDS_FILE).read_text())] == rows()
    operations = {row.operation for row in rows()}
    assert caplog.messages == [f"kernels: torch for all {len(operations)} operations"]


def test_only_rows_that_differ_are_listed(tmp_path, caplog):
    rows = [BackendUse("0-2", "delta_rule", "triton", registry.PREFERRED, ()),
            BackendUse("0-3", "swiglu", "triton", registry.PREFERRED, ()),
            BackendUse("3", "attention", "torch", "asked for by configure", ())]
    with caplog.at_level("INFO", logger="hybridlm"):
        report_backends(rows, tmp_path)
    assert caplog.messages == ["kernels: triton for delta_rule, swiglu",
                               "kernels: 3  attention  torch  asked for by configure"]


def test_a_fall_back_says_what_was_rejected_and_why(tmp_path, caplog):
    operation = Operation("noted", (Backend("fast", abs, lambda call: (False, "head dim 999"), ("cpu",)),
                                    Backend("other", abs, devices=("cuda",)), Backend("slow", abs)))
    seen = []
    with registry.watching(seen.append):
        registry.choose(operation, Call("cpu", torch.float32, False))
    choice, = seen
    assert choice.why == "first that accepts the call"
    with caplog.at_level("INFO", logger="hybridlm"):
        report_backends([BackendUse("0", "noted", choice.backend, choice.why, choice.rejected)], tmp_path)
    assert caplog.messages[-1].endswith("first that accepts the call; fast: head dim 999; other: made for cuda, the "
                                        "tensors are on cpu")
