"""The page: everything in it, nothing in it that a file could have put there, the same bytes for the same files."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from hybridlm.cli import main
from hybridlm.report.build import write_report
from hybridlm.report.document import document
from hybridlm.report.page import html
from hybridlm.report.plotly_figures import plots
from hybridlm.report.png import write_png
from hybridlm.report.read import read
from tests.support import report_folders as folders

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'%{x}$\\frac{$"


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts by their order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def run(tmp_path):
    return folders.run_folder(tmp_path / "run", dsa=True)


def page_of(folder, **options):
    return html(document(read(folder)), "/* plotly */", **options)


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(run):
    write_report(run)
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert not page.attributes("link")
    assert all(attrs["href"].startswith("#") for attrs in page.attributes("a"))
    policy = next(attrs["content"] for attrs in page.attributes("meta") if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    data, *scripts = page.scripts
    assert allowed == [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert scripts[0].count("plotly.js v") == 1
    assert json.loads(data).keys() == {figure.id for figure in document(read(run)).figures}
    viewport = next(attrs["content"] for attrs in page.attributes("meta") if attrs.get("name") == "viewport")
    assert "width=device-width" in viewport


def test_every_figure_has_its_place_its_table_and_a_link(run):
    page = Page(page_of(run))
    figures = [attrs["id"] for attrs in page.attributes("figure")]
    assert figures == [figure.id for figure in document(read(run)).figures]
    assert {f"#{name}" for name in figures} <= {attrs["href"] for attrs in page.attributes("a")}
    places = [(attrs["data-figure"], attrs["data-panel"]) for attrs in page.attributes("div") if "data-figure" in attrs]
    assert places == [(figure.id, str(index)) for figure in document(read(run)).figures
                      for index in range(len(plots(figure)))]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_sweep_page_says_what_was_compared_and_what_it_cost(sweep):
    text = page_of(sweep)
    for expected in ("kda, gdn", "5 finished", "1 waiting", "hybridlm sweep model=hybrid_tiny",
                     "linear-gdn_ratio-inf_seed-1", "config.yaml of linear-kda_ratio-0_seed-0"):
        assert expected in text


def test_the_same_files_give_the_same_bytes(run, sweep, tmp_path):
    for folder in (run, sweep):
        pages = [tmp_path / f"{index}.html" for index in range(2)]
        for page in pages:
            write_report(folder, output=page)
        assert pages[0].read_bytes() == pages[1].read_bytes()


def test_the_same_figure_gives_the_same_picture(run, tmp_path):
    chosen = [figure for figure in document(read(run)).figures if figure.id in ("loss", "experts")]
    for figure in chosen:
        for name in ("a", "b"):
            write_png(figure, tmp_path / f"{name}.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_page_does_not_depend_on_where_the_folder_is(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    assert page_of(run) == page_of(moved)


def test_what_files_say_is_text(tmp_path):
    name = HOSTILE.replace("/", "")
    folder = folders.run_folder(tmp_path / name, steps=5, command=HOSTILE)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {HOSTILE: 1.0, "stage": f"{HOSTILE}{index % 2}", f"moe/load/{HOSTILE}": [1, 2]}
            for index, line in enumerate(lines)]
    folders.write_records(folder, rows)
    with (folder / "config.yaml").open("a") as file:
        file.write(f"# {HOSTILE}\n")
    result = write_report(folder, metrics=[HOSTILE], png=tmp_path / "png")
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 3
    assert not page.attributes("img")
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "alert(1)" in text
    drawn = json.loads(page.scripts[0])  # plotly reads markup in texts
    texts = [note["text"] for plot in drawn["loss"] for note in plot["layout"]["annotations"]]
    assert len(texts) == 5
    assert not any("<" in said for said in texts)
    assert [path.split("/")[-1] for path in result["png"]] == [f"{figure['id']}.png" for figure in result["figures"]]


def test_figures_are_what_plotly_knows(run, sweep):
    go = pytest.importorskip("plotly.graph_objects")

    def light(value):
        if isinstance(value, dict):
            return value["$"][0] if "$" in value else {key: light(inner) for key, inner in value.items()}
        return [light(inner) for inner in value] if isinstance(value, list) else value

    for folder in (run, sweep):
        for figure in document(read(folder)).figures:
            for plot in plots(figure):
                shown = light(plot)
                figure_of = go.Figure(data=shown["data"], layout=shown["layout"])  # refuses properties it does not know
                assert len(figure_of.data) == len(shown["data"]) > 0


def test_png_files_are_pictures(sweep, tmp_path):
    figures = {figure.id: figure for figure in document(read(sweep)).figures}
    for name in ("pareto", "probe-mqar-length", "curves-loss", "expert-overload"):
        write_png(figures[name], tmp_path / f"{name}.png")
        head = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(head[16:20], "big") > 600


def test_only_a_page_that_is_watched_loads_itself_again(run):
    assert Page(page_of(run, refresh=7)).attributes("body") == [{"data-refresh": "7"}]
    assert Page(page_of(run)).attributes("body") == [{}]


def test_the_command_prints_what_it_drew(run, sweep, tmp_path, capsys):
    assert main(["report", str(run), "--json", "--metric", "grad_norm"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == [{"name": "run", "steps": 20, "metrics": told["runs"][0]["metrics"], "corrupt_lines": 0,
                             "probes": []}]
    assert told["page"] == str(run / "report.html")
    assert {"id": "loss", "title": "Loss", "panels": 1, "series": ["training", "validation"],
            "points": 24} in told["figures"]
    assert told["figures"][-1]["series"] == ["grad_norm"]
    assert main(["report", str(sweep), "--output", str(tmp_path / "sweep.html")]) == 0
    assert f"figures: {tmp_path}/sweep.html" in capsys.readouterr().out
    assert not (sweep / "report.html").exists()
