"""A page that follows a run while it trains."""

import json
import signal
import time

from hybridlm.cli import main
from hybridlm.report.build import write_report
from hybridlm.report.watch import watch
from tests.support import report_folders as folders


def test_the_page_is_written_again_when_the_run_goes_on_and_once_at_the_end(tmp_path):
    run = folders.run_folder(tmp_path / "run", steps=5)
    written = []

    def write(again):
        result = write_report(run, refresh=3 if again else None)
        text = (run / "report.html").read_text(encoding="utf-8")
        written.append((result["runs"][0]["steps"], 'data-refresh="3"' in text))
        return result

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(folders.record(6)) + "\n")
        if len(looks) == 4:
            raise KeyboardInterrupt

    looks, told = [], []
    assert watch([run], write, every=3, say=told.append, sleep=sleep)["runs"][0]["steps"] == 6
    assert looks == [3] * 4
    assert written == [(5, True), (6, True), (6, False)]
    assert "Ctrl-C ends" in told[0]


def test_a_reader_never_sees_half_a_page(tmp_path):
    run = folders.run_folder(tmp_path / "run", steps=5)
    write_report(run)
    with (run / "report.html").open("rb") as page:  # the file as it is now, whatever is written later
        write_report(run, refresh=5)
        assert page.read().endswith(b"</html>\n")
    assert not list(run.glob(".*.tmp"))


def test_ctrl_c_ends_the_command_with_0(tmp_path, monkeypatch, capsys):
    run = folders.run_folder(tmp_path / "run", steps=5)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without
    monkeypatch.setattr(time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    try:
        assert main(["report", str(run), "--watch", "1"]) == 0
    finally:
        signal.signal(signal.SIGINT, handler)
    out, err = capsys.readouterr()
    assert err == ""
    assert "Ctrl-C ends" in out.splitlines()[0]
    assert "7 figures" in out
    assert "data-refresh" not in (run / "report.html").read_text(encoding="utf-8").split("<script>")[0]
