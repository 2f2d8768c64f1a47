"""What cannot be reported on is said in one line; what is damaged is left out and counted."""

import json
import shutil

import pytest

from hybridlm.cli import main
from hybridlm.report.document import document
from hybridlm.report.read import read
from tests.support import report_folders as folders


def refused(words, capsys):
    """The one line of an error that the user can mend."""
    assert main(["report", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def test_folders_that_are_neither_run_nor_sweep(tmp_path, capsys):
    assert "no such folder" in refused([tmp_path / "nowhere"], capsys)
    (tmp_path / "file").write_text("text")
    assert "is not a folder" in refused([tmp_path / "file"], capsys)
    assert "is neither a run nor a sweep" in refused([tmp_path], capsys)
    folders.run_folder(tmp_path / "first", steps=2)
    assert f"did you mean '{tmp_path}/first'?" in refused([tmp_path], capsys)


def test_a_run_without_a_step(tmp_path, capsys):
    folder = folders.run_folder(tmp_path / "run", steps=0)
    assert "this run has no steps yet" in refused([folder], capsys)
    (folder / "metrics.jsonl").write_text("not json\n[]\n{\"loss\": 1}\n")
    assert "only 3 corrupt lines" in refused([folder], capsys)
    assert not (folder / "report.html").exists()


def test_a_metric_no_run_has(tmp_path, sweep, capsys):
    run = folders.run_folder(tmp_path / "run", steps=2)
    assert "no run has this metric; got 'grad_nrm'; did you mean 'grad_norm'?" in refused(
        [run, "--metric", "grad_nrm"], capsys)
    assert "no run has this metric; got 'zzz'; expected among" in refused([sweep, "--metric", "zzz"], capsys)


def test_corrupt_lines_are_skipped_counted_and_said(tmp_path, capsys):
    run = folders.run_folder(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    lines[7:9] = ["\x00\x01", '{"step": "eight"}']
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 21, "lo')
    assert main(["report", str(run)]) == 0
    assert "4 corrupt lines of run/metrics.jsonl were skipped" in capsys.readouterr().out
    assert len(read(run).curves["loss"][0]) == 17


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    strange = {"loss": None, "validation_loss": float("nan"), "lr": "fast", "tokens_per_second": True, "stage": ["a"],
               "grad_norm": {"a": 1}, "moe/load/1": ["many"], "moe/load/2": []}
    folders.write_records(tmp_path / "run", [{"step": 1, "loss": 1.5}, {"step": 2, **strange}, {"step": 2, "mfu": 0.5}])
    run = read(tmp_path / "run")
    assert run.curves == {"step": ([1, 2], [1.0, 2.0]), "loss": ([1], [1.5]), "mfu": ([2], [0.5])}
    assert run.loads == {}
    assert [figure.id for figure in document(run).figures] == ["loss"]


def test_a_config_that_cannot_be_used_costs_its_facts_alone(tmp_path):
    run = folders.run_folder(tmp_path / "run")
    (run / "config.yaml").write_text("model: {layers: 3\n")
    (run / "run.json").write_text("{}")
    page = document(read(run))
    assert page.notes[0].startswith("config.yaml cannot be used: ")
    assert page.layers == []
    assert page.texts == [("config.yaml", "model: {layers: 3\n")]
    assert len(page.figures) == 7


@pytest.mark.parametrize("damage", ["{", "[]", '{"points": []}', '{"points": [{"point": "a", "settings": {}}]}'])
def test_a_sweep_that_cannot_be_read(sweep, tmp_path, capsys, damage):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.json").write_text(damage)
    assert "sweep" in refused([folder], capsys)


def test_a_sweep_before_its_first_step(sweep, tmp_path, capsys):
    folder = tmp_path / "sweep"
    folder.mkdir()
    shutil.copy(sweep / "sweep.json", folder)
    assert "no point of this sweep has a step yet" in refused([folder], capsys)


def test_a_failed_point_is_reported_with_its_reason(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    point = folder / "points" / "linear-gdn_ratio-inf_seed-1"
    (point / "outcome.json").write_text(json.dumps({"status": "failed", "reason": "the disk is full"}))
    table = dict(document(read(folder)).tables)["Points"]
    assert [row[-1] for row in table.rows if row[0] == point.name] == ["failed: the disk is full"]


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    run = folders.run_folder(tmp_path / "run", steps=2)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused([run, "--output", tmp_path / "file" / "page.html"], capsys)
    assert "cannot be written" in refused([run, "--png", tmp_path / "file"], capsys)


def test_without_the_extra_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    run = folders.run_folder(tmp_path / "run", steps=2)
    for package in ("plotly", "matplotlib"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=package: None if name == package else True)
        assert f"a report needs the package {package}; pip install 'hybridlm[report]'" in refused(
            [run, "--png", tmp_path / "png"], capsys)


def test_a_pause_between_looks_is_at_least_a_second(tmp_path, capsys):
    assert "--watch: is too short" in refused([tmp_path, "--watch", "0.1"], capsys)
