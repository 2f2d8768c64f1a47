"""The example of a mixer of one's own, used by every command as a reader would use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridlm.cli import main, train
from hybridlm.model.contract_check import CHECKS, Subject, small_context
from hybridlm.model.mixers import MIXERS, build_mixer
from hybridlm.model.sequence import SequenceInfo
from tests.support.example_mixer import EXAMPLE, load_example

IMPORT = ["--import", str(EXAMPLE)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A model of the example and attention, and a small text."""
    folder = tmp_path_factory.mktemp("my_mixer")
    (folder / "text").mkdir()
    for name in "ab":
        (folder / "text" / f"{name}.txt").write_text(f"a small text {name}, to learn a little from. " * 150)
    words = ["model=hybrid_tiny", "model.schedule.linear=my_mixer",
             f"data.path={folder}/text", f"data.cache_dir={folder}/cache", "data.validation_fraction=0.5",
             "training.batch_size=2", "training.sequence_length=32", "training.eval_batches=1", "training.steps=2"]
    return folder, words


@pytest.fixture(scope="module")
def run(settings):
    folder, words = settings
    assert main(["train", *words, f"run_dir={folder}/run", *IMPORT]) == 0
    return folder / "run"


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_it_passes_every_check(capsys):
    assert main(["check", "my_mixer", *IMPORT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["check"]: row["verdict"] for row in report["checks"]} == dict.fromkeys(CHECKS, "passed")
    assert main(["check", "my_mixer", "width=10", *IMPORT]) == 0
    assert "all that is claimed holds" in capsys.readouterr().out


def test_it_computes_the_equation_of_its_docstring():
    example = load_example()
    config = example.GatedAverageConfig(width=6)
    mixer = Subject(config, small_context(config)).build()
    x_TD = Subject(config, small_context(config)).inputs(1, 9)[0]
    h_W, expected = torch.zeros(6, dtype=torch.float64), []
    for x_D in x_TD:
        a_W = (mixer.keep_proj(x_D) + mixer.keep_bias).sigmoid()
        h_W = a_W * h_W + (1 - a_W) * mixer.value_proj(x_D)
        expected.append(mixer.out_proj(h_W * torch.nn.functional.silu(mixer.gate_proj(x_D))))
    found, _ = mixer(x_TD[None], SequenceInfo.make(1, 9, CPU))
    torch.testing.assert_close(found[0], torch.stack(expected))
    assert type(build_mixer(config, small_context(config))) is example.GatedAverage


def test_commands_read_its_checkpoint(run, capsys):
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "a small", "--max-new-tokens", "3", "--json", *IMPORT]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] >= 1
    assert main(["eval", str(run), "--contexts", "16", "--decode-tokens", "1", "--json", *IMPORT]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["perplexity"]["loss"] > 0
    assert main(["inspect", str(run), "--json", *IMPORT]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["kind"] == "my_mixer"
    assert main(["report", str(run), "--json", *IMPORT]) == 0
    assert "my_mixer" in Path(json.loads(capsys.readouterr().out)["page"]).read_text()
    assert main(["export", str(run), str(run.parent / "exported"), "--json", *IMPORT]) == 0
    assert json.loads((run.parent / "exported" / "config.json").read_text())["model_type"] == "hybridlm"


def test_probes_train_it(settings, capsys):
    _, words = settings
    assert main(["eval", "--probe", "copy", *words[:3], "--steps", "1", "--examples", "2", "--lengths", "64", "--json",
                 *IMPORT]) == 0
    assert "my_mixer" in json.loads(capsys.readouterr().out)["layers"]


@pytest.mark.parametrize("argv", [["generate", "RUN", "--prompt", "a"], ["inspect", "RUN"], ["eval", "RUN"],
                                  ["export", "RUN", "OUT"], ["train", "WORDS"], ["check", "my_mixer"]],
                         ids=lambda argv: argv[0])
def test_without_the_import_the_kind_and_the_option_are_named(settings, run, argv, monkeypatch, capsys):
    monkeypatch.delitem(MIXERS, "my_mixer")
    folder, words = settings
    replaced = {"RUN": [str(run)], "OUT": [str(folder / "out")], "WORDS": words}
    capsys.readouterr()
    assert main([word for name in argv for word in replaced.get(name, [name])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "got 'my_mixer'" in error
    assert "--import FILE" in error


def test_all_ranks_get_the_import(settings, monkeypatch):
    folder, words = settings
    started = []
    monkeypatch.setattr("hybridlm.distributed.launch.launch", lambda argv, *_: started.append(argv) or 0)
    argv = [*words, f"run_dir={folder}/ranks", "engine=ddp", "engine.num_processes=2", *IMPORT]
    assert train.run(argv) == 0
    assert started == [["train", *argv]]


def test_a_sweep_shows_it_beside_kda_and_matches_its_parameters(settings, capsys):
    folder, words = settings
    argv = ["sweep", *words, "model.schedule.linear=kda,my_mixer", "sweep.match=params", f"sweep.dir={folder}/dry",
            "--dry-run", "--json", *IMPORT]
    assert main(argv) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["point"] for point in points] == ["linear-kda", "linear-my_mixer"]


@pytest.mark.slow
def test_a_sweep_trains_it_beside_kda_and_the_report_draws_both(settings, capsys):
    folder, words = settings
    argv = ["sweep", *words, "model.schedule.linear=kda,my_mixer", f"sweep.dir={folder}/sweep", "--jobs", "2", "--json"]
    assert main([*argv, *IMPORT]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(point["point"], point["status"]) for point in results["points"]] == [
        ("linear-kda", "finished"), ("linear-my_mixer", "finished")]
    command = (folder / "sweep" / "points" / "linear-my_mixer" / "output.txt").read_text().splitlines()[0]
    assert command.endswith(" ".join(IMPORT))
    assert main(["report", f"{folder}/sweep", "--json", *IMPORT]) == 0
    page = Path(json.loads(capsys.readouterr().out)["page"]).read_text()
    assert "my_mixer" in page
    assert "kda" in page


def test_a_mistake_in_its_options_is_one_line(capsys):
    assert main(["check", "my_mixer", "widht=3", *IMPORT]) == 2
    assert "my_mixer.widht: unknown key; did you mean 'width'?" in capsys.readouterr().err
