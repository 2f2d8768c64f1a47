"""Several runs beside one another: curves, final numbers, and the settings in which they differ."""

import copy
import json
import math

import pytest

from hybridlm.cli import main
from hybridlm.config.schema import DataSourceConfig
from hybridlm.config.serialization import to_yaml
from hybridlm.report.build import write_report
from hybridlm.report.comparison import config_differences, final_numbers, read_comparison, tables
from hybridlm.report.document import document
from tests.support import report_folders as folders


@pytest.fixture
def runs(tmp_path):
    """Two runs: the second longer, with another learning rate and seed, and without a record of tokens at first."""
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    folders.run_folder(first, steps=20)
    folders.run_folder(second, steps=40, shift=0.5)
    config = copy.deepcopy(folders.kimi())
    config.optimizer.lr, config.training.seed, config.run_dir = 0.25, 7, "elsewhere"
    (second / "config.yaml").write_text(to_yaml(config))
    return [first, second]


def test_curves_over_steps_and_tokens_have_the_numbers_of_each_run(runs):
    page = document(read_comparison(runs))
    figures = {figure.id: figure for figure in page.figures}
    assert set(figures) == {"loss-steps", "loss-tokens", "validation_loss-steps", "validation_loss-tokens", "lr-steps",
                            "grad_norm-steps", "tokens_per_second-steps"}
    by_step, by_token = ({each.name: each for each in figures[id].panels[0].series}
                         for id in ("loss-steps", "loss-tokens"))
    assert list(by_step) == ["a/run", "b/run"]
    assert by_step["b/run"].y == [6.5 - math.log(step) for step in range(1, 41)]
    assert by_token["b/run"].x == [1000.0 * step for step in range(1, 41)]
    assert by_step["a/run"].style != by_step["b/run"].style
    assert page.notes == []


def test_final_numbers_and_differences(runs):
    comparison = read_comparison(runs)
    first, second = final_numbers(comparison)
    assert (first["steps"], second["steps"], second["tokens"]) == (20, 40, 40000.0)
    assert second["loss"] == pytest.approx(sum(6.5 - math.log(step) for step in range(21, 41)) / 20)
    assert second["tokens_per_second"] == 2020.5
    assert second["peak_memory_bytes"] == 440 << 20
    lr = folders.kimi().optimizer.lr
    assert config_differences(comparison) == {"training.seed": [0, 7], "optimizer.lr": [lr, 0.25]}


def test_a_mixer_that_one_run_lacks_is_one_row(runs):
    config = copy.deepcopy(folders.kimi())
    config.model.mixers["gdn"] = folders.load_config("train", ["model=qwen3_next_tiny"]).model.mixers["gdn"]
    del config.model.mixers["kda"]
    config.model.schedule.linear = "gdn"
    (runs[1] / "config.yaml").write_text(to_yaml(config))
    (name, made), = tables(final_numbers(read_comparison(runs)), config_differences(read_comparison(runs)))[1:]
    rows = {row[0]: row[1:] for row in made.rows}
    assert name == "Differences of the configs"
    assert rows["model.mixers.kda"][0].startswith("kind=")
    assert " more" in rows["model.mixers.kda"][0]
    assert rows["model.mixers.kda"][1] == rows["model.mixers.gdn"][0] == "-"
    assert not [key for key in rows if key.startswith("model.mixers.kda.")]


def test_a_mixer_in_which_runs_differ_is_not_one_row(runs, tmp_path):
    third = tmp_path / "c" / "run"
    folders.run_folder(third, steps=20)
    for run, rank in ((runs[1], 4), (third, None)):
        config = copy.deepcopy(folders.kimi())
        if rank is None:
            config.model.mixers["gdn"] = folders.load_config("train", ["model=qwen3_next_tiny"]).model.mixers["gdn"]
            del config.model.mixers["kda"]
            config.model.schedule.linear = "gdn"
        else:
            config.model.mixers["kda"].gate_rank = rank
        (run / "config.yaml").write_text(to_yaml(config))
    comparison = read_comparison([*runs, third])
    (_, made), = tables(final_numbers(comparison), config_differences(comparison))[1:]
    rows = {row[0]: row[1:] for row in made.rows}
    assert rows["model.mixers.kda.gate_rank"] == [str(folders.kimi().model.mixers["kda"].gate_rank), "4", "-"]
    assert rows["model.mixers.gdn"][:2] == ["-", "-"]
    assert not {"model.mixers", "model.mixers.kda"} & set(rows)


def test_a_mixture_is_one_difference(runs):
    config = folders.kimi()
    config.data.mixture = [DataSourceConfig(path="a/", weight=3.0), DataSourceConfig(path="b.jsonl", text_field="body")]
    (runs[1] / "config.yaml").write_text(to_yaml(config))
    found = config_differences(read_comparison(runs))
    assert found == {"data.mixture": ["-", "path=a/ weight=3.0; path=b.jsonl text_field=body"]}


def test_the_command_prints_tables_or_json_and_writes_one_page(runs, capsys, tmp_path):
    words = ["report", *map(str, runs)]
    assert main([*words, "--metric", "perplexity"]) == 2
    assert "no run has this metric" in capsys.readouterr().err
    assert main([*words, "--png", str(tmp_path / "png")]) == 0
    out = capsys.readouterr().out
    assert f"7 figures: {runs[0]}/comparison.html" in out
    assert any(line.split() == ["optimizer.lr", str(folders.kimi().optimizer.lr), "0.25"] for line in out.splitlines())
    assert (tmp_path / "png" / "loss-tokens.png").stat().st_size > 1000
    assert not (runs[0] / "report.html").exists()
    assert main([*words, "--json", "--output", str(tmp_path / "page.html")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["final"]] == ["a/run", "b/run"]
    assert told["differences"]["training.seed"] == [0, 7]


def test_a_damaged_config_or_an_old_run_costs_its_own_column_alone(runs):
    (runs[1] / "config.yaml").write_text("model: [")
    records = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    folders.write_records(runs[0], [{key: value for key, value in row.items() if key != "tokens"} for row in records])
    page = document(read_comparison(runs))
    figures = {figure.id: figure for figure in page.figures}
    assert len(figures["loss-steps"].panels[0].series) == 2
    assert [series.name for series in figures["loss-tokens"].panels[0].series] == ["b/run"]
    assert "Differences of the configs" not in dict(page.tables)
    assert any(note.startswith("b/run: config.yaml cannot be used") for note in page.notes)


def test_only_different_runs_are_compared(runs, sweep, capsys):
    assert main(["report", str(runs[0]), str(sweep)]) == 2
    assert "is a sweep, which is not compared with others" in capsys.readouterr().err
    assert main(["report", str(runs[0]), str(runs[0])]) == 2
    assert "stands there twice" in capsys.readouterr().err


def test_commands_stand_in_a_full_width_line(sweep, tmp_path):
    write_report(sweep, output=tmp_path / "sweep.html")
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "<h2>Command</h2>" in page
    assert "<td class=command>hybridlm sweep model=hybrid_tiny</td>" in page
    rule, = [line for line in page.splitlines() if line.startswith("td.command")]
    assert "white-space: pre" in rule, "a command is one line, never wrapped"
    run = folders.run_folder(tmp_path / "run")
    write_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<td class=command>hybridlm train model=tiny</td>" in text
