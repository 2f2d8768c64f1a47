"""Which attention layers to keep: a model whose recall sits in one layer keeps it if that layer is chosen."""

import argparse
import json

import pytest
import torch

from hybridlm.checkpoint import read_model_config
from hybridlm.cli import main
from hybridlm.config.schema import ConvertConfig
from hybridlm.errors import ConfigError
from hybridlm.evaluation.layer_selection import select_layers
from hybridlm.interop import save_checkpoint
from hybridlm.interop.linearization import plan_conversion
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.feed_forward import DenseConfig
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.model import build_model
from hybridlm.model.rope import RopeConfig

CODE = 32  # dims of a token's code; the stream holds that of the token, of the one before it, and of the prediction
TOKEN, BEFORE, PREDICTION, CONSTANT = 0, CODE, 2 * CODE, 3 * CODE
OWN_LAYER, RECALL_LAYER = 0, 2  # of four


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model that repeats what followed a token before, set by hand: layer 0 notes each token's predecessor, layer 2
    looks for the place where the current token was the predecessor. Its other layers do nothing.
    """
    near = AttentionConfig(num_heads=1, head_dim=CODE, rope=RopeConfig(theta=10.0))
    far = AttentionConfig(num_heads=1, head_dim=CODE, rope=RopeConfig(kind="none"))
    config = ModelConfig(
        vocab_size=257, hidden_size=4 * CODE, num_layers=4, max_position=512, name="repeats",
        schedule=ScheduleConfig(pattern=["near", "far", "far", "far"]), mixers={"near": near, "far": far},
        feed_forward=DenseConfig(intermediate_size=8))
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(257, CODE, generator=generator), dim=1)
    identity = torch.eye(CODE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.embed.weight[:, TOKEN : TOKEN + CODE] = codes
        model.embed.weight[:, CONSTANT] = 1.0
        model.lm_head.weight[:, PREDICTION : PREDICTION + CODE] = 20 * codes
        mixer = model.layers[OWN_LAYER].mixer
        frequency = 10.0 ** (-torch.arange(CODE // 2) / (CODE // 2))
        mixer.k_proj.weight[: CODE // 2, CONSTANT] = 1.0  # a score that is largest one token back
        mixer.q_proj.weight[:, CONSTANT] = torch.cat([frequency.cos(), -frequency.sin()])
        mixer.v_proj.weight[:, TOKEN : TOKEN + CODE] = identity
        mixer.o_proj.weight[BEFORE : BEFORE + CODE] = 0.2 * identity
        mixer = model.layers[RECALL_LAYER].mixer
        mixer.q_proj.weight[:, TOKEN : TOKEN + CODE] = identity
        mixer.k_proj.weight[:, BEFORE : BEFORE + CODE] = 4.0 * identity
        mixer.v_proj.weight[:, TOKEN : TOKEN + CODE] = identity
        mixer.o_proj.weight[PREDICTION : PREDICTION + CODE] = identity
    folder = tmp_path_factory.mktemp("teacher") / "repeats"
    save_checkpoint(model, folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return [f"data.path={argparse.__file__}", f"data.cache_dir={tmp_path}/cache"]


@pytest.mark.parametrize("method", ["window", "greedy"])
def test_the_layer_that_recalls_is_found_and_an_even_spread_loses_it(teacher, data, method):
    report = select_layers(teacher, data, method=method, keep=1, window=8, windows=1, sequence_length=64)
    assert report["keep"] == [RECALL_LAYER]
    measured = report["measured"]
    assert measured["uniform"]["layers"] == [3]
    assert measured["teacher"]["repeat_nll"] < 0.1
    assert measured["chosen"]["repeat_nll"] < 0.1
    assert measured["uniform"]["repeat_nll"] > 3
    assert measured["none kept"]["repeat_nll"] > 3
    damage = {row["layer"]: row["damage"] for row in report["layers"]}
    assert max(damage, key=damage.get) == RECALL_LAYER
    assert abs(damage[1]) < 1e-4 > abs(damage[3])  # they do nothing


def test_the_file_goes_into_the_recipe(teacher, data, tmp_path, capsys):
    out = tmp_path / "layers.json"
    words = ["select", f"teacher={teacher}", *data, "--keep", "1", "--window", "8", "--windows", "1",
             "--sequence-length", "64", "--out", str(out), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    plan = plan_conversion(ConvertConfig(keep=str(out)), read_model_config(teacher))
    assert (plan.keep, plan.converted) == ([2], [0, 1, 3])
    assert main(words[:-1]) == 0  # over its own file
    text = capsys.readouterr().out
    assert "chosen [2]" in text
    assert f"recipe.convert.keep={out}" in text


def test_what_cannot_be_chosen_is_said(teacher, data, tmp_path, capsys):
    for options, message in (({"method": "best"}, "method: is unknown; got 'best'"),
                             ({"keep": 4}, "keep: is not a number of layers that leaves others to convert; got 4"),
                             ({"window": 0}, "window: is too small; got 0"),
                             ({"method": "swap"}, "student: is missing"),
                             ({"method": "swap", "student": str(teacher)}, "has not converted every attention layer")):
        with pytest.raises(ConfigError, match=message):
            select_layers(teacher, data, **options)
    other = tmp_path / "notes.json"
    other.write_text("{}")
    assert main(["select", f"teacher={teacher}", "--out", str(other)]) == 2
    assert "--out: is there already, and is no selection" in capsys.readouterr().err
    assert other.read_text() == "{}"
    assert main(["select"]) == 2
    assert "teacher: is missing" in capsys.readouterr().err
