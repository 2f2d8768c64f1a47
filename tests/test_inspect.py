"""The report of `hybridlm inspect`: plain data, and its tables."""

import io
import json

import pytest
from rich.console import Console

from hybridlm.inspect import inspect, render
from hybridlm.model.cost import count_parameters, training_flops
from hybridlm.optimizers import MuonConfig
from hybridlm.run_config import load_model_config


def printed(report: dict) -> str:
    console = Console(width=120, file=io.StringIO())
    render(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["kimi_linear_48b", "minimax_01_456b", "qwen3_next_80b", "deepseek_v32_671b",
                                  "deepseek_v32_tiny", "quickstart"])
def test_the_report_is_json_and_prints(name):
    config = load_model_config(name)
    report = inspect(config)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [layer["mixer"] for layer in report["layers"]] == config.layers()
    assert report["parameters"]["total"] == count_parameters(config).total
    assert list(report["decode_state_bytes"]) == [str(1 << power) for power in range(10, 21, 2)]
    flops = report["flops_per_token"]
    assert flops["forward"] == sum(flops["forward_by_part"].values())
    assert flops["training"] == sum(flops["training_by_part"].values()) == training_flops(config, 4096)
    text = printed(report)
    for heading in ("Parameters", "FLOPs per token at a context of 4096", "Training memory", "Decode state", "1M"):
        assert heading in text


@pytest.mark.parametrize(("name", "counted_how", "within"), [
    ("kimi_linear_48b", "with head", False), ("minimax_01_456b", "without embedding and head", True),
    ("qwen3_next_80b", "without embedding and head", False), ("deepseek_v32_671b", "without embedding and head", True),
])
def test_published_counts_are_compared(name, counted_how, within):
    report = inspect(load_model_config(name))
    total, active = report["published"]["total"], report["published"]["active"]
    assert total["within_3_percent"]
    assert abs(total["difference"]) < 0.03
    assert active["counted_how"] == counted_how
    assert active["within_3_percent"] is within
    assert active["rounds_to_published"] or within
    text = printed(report)
    assert ("equal when rounded" in text) is not within


def test_a_count_that_differs_says_so():
    report = inspect(load_model_config("kimi_linear_48b", ["model.num_layers=20"]))
    assert not report["published"]["total"]["within_3_percent"]
    assert not report["published"]["total"]["rounds_to_published"]
    assert "differs" in printed(report)


def test_no_comparison_where_nothing_is_published():
    report = inspect(load_model_config("quickstart", ["model.tie_embeddings=true"]))
    assert report["published"] is None
    text = printed(report)
    assert "quickstart: 4 layers = 3 kda + 1 full" in text
    assert "tied" in text
    assert "0-2" in text, "layers that are alike share a row"


def test_sizes_of_the_batch_and_the_run():
    config = load_model_config("quickstart")
    small, large = (inspect(config, batch_size=b, sequence_length=512, precision="fp32", optimizer=MuonConfig(),
                            activation_checkpointing=True)["training_memory"] for b in (1, 4))
    assert large["activations"] == 4 * small["activations"]
    assert large["optimizer_state"] == small["optimizer_state"]
    assert (small["sequence_length"], small["precision"], small["optimizer"]) == (512, "fp32", "muon")
    assert "with activation checkpointing" in printed(inspect(config, activation_checkpointing=True))
    short = inspect(load_model_config("quickstart", ["model.max_position=1024"]))
    assert short["flops_per_token"]["context_length"] == 1024
