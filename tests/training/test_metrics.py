import json
import math

import pytest
import torch

from hybridlm.training.metrics import MetricsFile, bits_per_byte, layer_loads, peak_flops, perplexity, router_panel


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_truncate_forgets_later_steps_and_a_torn_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate(3)
    for step in range(1, 6):
        file.write({"step": step, "loss": 1.0})
    with file.path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    file.truncate(3)
    assert steps(file.path) == [1, 2, 3]
    file.write({"step": 4, "loss": 1.0})
    assert steps(file.path) == [1, 2, 3, 4]


def test_records_are_strict_json(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert file.path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_a_disk_that_refuses_costs_one_warning_not_the_run(tmp_path, caplog):
    file = MetricsFile(tmp_path / "missing" / "metrics.jsonl")
    file.write({"step": 1})
    file.write({"step": 2})
    assert caplog.text.count("records are lost") == 1
    file.path.parent.mkdir()
    file.write({"step": 3})
    assert steps(file.path) == [3]


def test_router_panel_by_hand():
    loads = {"layers.1.feed_forward": torch.tensor([4, 4, 4, 4]),
             "mtp.0.block.feed_forward": torch.tensor([8, 8, 0, 0])}
    panel = router_panel(layer_loads(loads))
    assert panel["moe/max_violation"] == pytest.approx(0.5)
    assert panel["moe/max_violation_worst"] == pytest.approx(1.0)
    assert panel["moe/dead_experts"] == 2
    assert panel["moe/max_violation/1"] == 0
    assert panel["moe/max_violation/mtp1"] == pytest.approx(1.0)
    assert router_panel({}) == {}


def test_peak_is_measured_where_no_data_sheet_is_known():
    flops, source = peak_flops(torch.device("cpu"), "fp32")
    assert flops > 1e8
    assert "measured" in source


def test_bits_and_perplexity():
    assert bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3)
    assert bits_per_byte(1.0, 0) is None
    assert perplexity(0.0) == 1
    assert perplexity(1e6) == math.inf
