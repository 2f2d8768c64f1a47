"""The programs in examples/ run, and do what they say."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations(capsys):
    assert load("operations").main() < 1e-5
    assert "delta_rule: torch" in capsys.readouterr().out


def test_train_and_generate(tmp_path, capsys):
    text = load("train_and_generate").main(4, str(tmp_path / "run"))
    assert text
    assert "validation loss" in capsys.readouterr().out


def test_compare_mixers(capsys):
    found = load("compare_mixers").main(3, "gdn", "full")
    assert set(found) == {"gdn", "full"}
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert "parameters" in capsys.readouterr().out
