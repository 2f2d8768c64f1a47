"""The page in a real browser: every figure is drawn, nothing is wrong in the console, nothing is wider than a phone."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest
from plotly.offline import get_plotlyjs

from hybridlm.report.document import document
from hybridlm.report.page import html
from hybridlm.report.plotly_figures import plots
from hybridlm.report.read import read
from tests.support import report_folders as folders

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome: none is on the path")]
FRAME = """<!doctype html><body style="margin:0"><iframe id="frame" srcdoc="{page}"
style="border:0;width:{width}px;height:12000px"></iframe><script>
addEventListener("load", () => setTimeout(() => {{
  const page = document.getElementById("frame").contentDocument, root = page.documentElement;
  const plots = [...page.querySelectorAll(".plot")];
  document.body.dataset.seen = JSON.stringify({{
    plots: plots.length, drawn: plots.filter((plot) => plot.querySelector("svg.main-svg .xy, svg.main-svg .hm")).length,
    wide: root.scrollWidth, shown: root.clientWidth, ground: getComputedStyle(page.body).backgroundColor,
    alerted: Boolean(document.getElementById("frame").contentWindow.alerted)}});
}}, 6000));</script></body>"""


def look(folder, page, width, theme):
    """What a browser made of a page in a frame of this width, and the lines of its console."""
    file = folder / "frame.html"
    file.write_text(FRAME.format(page=escape(page), width=width), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
         "--window-size=1400,12100", "--virtual-time-budget=12000", "--dump-dom", f"file://{file}"],
        capture_output=True, text=True, timeout=500)
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr[-2000:]
    return json.loads(unescape(seen[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(("kind", "width", "theme", "ground"), [("run", 390, "light", "rgb(255, 255, 255)"),
                                                                ("sweep", 1280, "dark", "rgb(20, 23, 28)")])
def test_all_figures_are_drawn_on_a_phone_and_a_desk(tmp_path, sweep, kind, width, theme, ground):
    attack = "<script>window.alerted = true</script>"
    page = document(read(sweep if kind == "sweep" else folders.run_folder(tmp_path / "run", dsa=True, command=attack)))
    seen, console = look(tmp_path, html(page, get_plotlyjs()), width, theme)
    expected = sum(len(plots(figure)) for figure in page.figures)
    assert expected > 5
    assert seen == {"plots": expected, "drawn": expected, "wide": width, "shown": width, "ground": ground,
                    "alerted": False}
    assert console == []


def test_a_broken_page_is_noticed(tmp_path):
    page = html(document(read(folders.run_folder(tmp_path / "run"))), "throw new Error('no plotly')")
    seen, console = look(tmp_path, page, 390, "light")
    assert seen["plots"] > seen["drawn"] == 0
    assert any("no plotly" in line for line in console)
