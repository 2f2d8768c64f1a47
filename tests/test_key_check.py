"""A mistyped key is answered before anything heavy is imported, in the words of the config itself."""

import subprocess
import sys

import pytest

from hybridlm.cli import key_check, main
from hybridlm.config.schema import Config
from hybridlm.config.serialization import known_paths
from hybridlm.errors import ConfigError
from hybridlm.run_config import load_config
from hybridlm.unknown_keys import NAMES_ELSEWHERE

HEAVY = ("torch", "numpy", "hydra", "omegaconf", "transformers", "safetensors")


def error_of(words):
    with pytest.raises(ConfigError) as caught:
        key_check.check_keys(words)
    return str(caught.value)


@pytest.mark.parametrize(("word", "message"), [
    ("training.stepz=5", "training.stepz: unknown key; did you mean 'steps'?"),
    ("traning.steps=5", "traning: unknown key; did you mean 'training'?"),
    ("batch_size=4", "batch_size: unknown key; did you mean 'training.batch_size'?"),
    ("+lr=4", "lr: unknown key; did you mean 'optimizer.lr'?"),
    ("model.num_layer=4", "model.num_layer: unknown key; did you mean 'num_layers'?"),
    ("optimizer.schedule.warmpu=4", "optimizer.schedule.warmpu: unknown key; did you mean 'warmup'?"),
    ("data.pth=a", "data.pth: unknown key; did you mean 'path'?"),
    ("gradient_accumulation_steps=4", None), ("training.gradient_checkpointing=true", None), ("learning_rate=1", None),
    ("output_dir=a", None), ("training.colour=red", None)])
def test_a_mistyped_key_is_refused_as_the_config_refuses_it(word, message):
    with pytest.raises(ConfigError) as slow:
        load_config("train", [word])
    assert error_of([word]) == str(slow.value)
    assert message is None or str(slow.value) == message


def test_no_key_of_the_schema_is_refused():
    key_check.check_keys([f"{path}=1" for path in known_paths(Config)])
    key_check.check_keys(["model=quickstart", "mixer@model.mixers.a=kda", "schedule@model.schedule=ratio_3",
                          "kernels.attention=torch", "model.mixers.full.window=16", "recipe.stages.0.steps=5",
                          "recipe.indexer.topk=4", "~training.steps", "model.feed_forward.num_experts=4",
                          "engine.sequence_parallel=2", "--json", "texts/a=b.txt"])


def test_options_of_own_code_are_left_to_the_config():
    assert "unknown key" in error_of(["optimizer.momentum_of_mine=1"])
    key_check.check_keys(["optimizer.momentum_of_mine=1", "--import", "mine.py"])


def test_names_of_other_trainers_lead_to_keys_that_exist():
    paths = known_paths(Config)
    for name, key in NAMES_ELSEWHERE.items():
        first = key.partition("=")[0]
        assert first in paths or key == "engine=zero2", name
        assert name not in {path.split(".")[-1] for path in paths}, name


def test_the_answer_imports_nothing_heavy():
    code = ("import sys; from hybridlm.cli import main; "
            "code = main(['train', 'model=quickstart', 'training.stepz=5']); "
            f"print(code, [name for name in {HEAVY} if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2 []"
    assert result.stderr == "error: training.stepz: unknown key; did you mean 'steps'?\n"


@pytest.mark.parametrize(("words", "text"), [
    (["--steps", "100"], "settings are written without dashes: training.steps=100; see"),
    (["--learning-rate=1e-3"], "settings are written without dashes: optimizer.lr=1e-3; see"),
    (["--gradient-accumulation-steps", "4"], "settings are written without dashes: training.micro_batch_size=N"),
    (["--jsn"], "did you mean '--json'?"),
    (["data=/some/texts"], "data.path=/some/texts takes text of your own"),
    (["model=runs/first"], "init_from=runs/first takes the model and weights"),
    (["model=mine"], "model=FILE.yaml takes a file of your own, --config-dir FOLDER one in FOLDER/model/"),
])
def test_what_a_person_meant_is_said_in_one_line(words, text, capsys):
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
