import json
import math

import pytest
import torch

from hybridlm.training.metrics import (
    MetricsFile,
    PeakRate,
    bits_per_byte,
    layer_loads,
    peak_flops,
    peak_measurement,
    perplexity,
    router_panel,
)


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


def test_utilisation_above_one_measures_the_peak_again_or_is_left_out():
    measured = iter([80.0, 120.0])
    peak = PeakRate(100.0, "measured", lambda: next(measured))
    assert peak.utilisation(50.0) == 0.5
    assert peak.utilisation(110.0) == 110 / 120, "measured twice: the first was slower still"
    assert peak.flops == 120.0
    never = PeakRate(100.0, "measured", lambda: 90.0)
    assert [never.utilisation(150.0) for _ in range(3)] == [None] * 3
    assert never.tries == 0
    assert never.utilisation(150.0, processes=2) == 0.75
    assert PeakRate(100.0, "data sheet").utilisation(150.0) is None
    assert peak_measurement(torch.device("cpu"), "fp32")() > 1e8


def test_peak_is_measured_where_no_data_sheet_is_known():
    flops, source = peak_flops(torch.device("cpu"), "fp32")
    assert flops > 1e8
    assert "measured" in source


def test_bits_and_perplexity():
    assert bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3)
    assert bits_per_byte(1.0, 0) is None
    assert perplexity(0.0) == 1
    assert perplexity(1e6) == math.inf
