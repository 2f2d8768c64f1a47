import logging

import pytest

from hybridlm.training.display import Display, Pace, format_count, format_duration, format_record

RECORD = {"step": 4, "loss": 2.0, "bits_per_byte": 2.885, "tokens_per_second": 12345.0, "skipped": False}


def test_plain_lines_every_n_steps_and_the_last(capsys, tmp_path):
    with Display(tmp_path / "log.txt", log_every=2) as display:
        display.begin(3, 7)
        for step in range(4, 8):
            display.step({**RECORD, "step": step}, final=step == 7)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 5/7", "step 7/7"]
    assert "loss 2.0000  2.885 bits/byte  12.3k tokens/s" in lines[0]
    assert lines[1].endswith("12.3k tokens/s  0:00:00 left")
    assert "INFO    step 5/7" in (tmp_path / "log.txt").read_text()


def test_warnings_from_anywhere_are_shown_and_kept(capsys, tmp_path):
    with Display(tmp_path / "log.txt"):
        logging.getLogger("hybridlm").warning("disk %s [full]", 1)
    logging.getLogger("hybridlm").info("after")
    assert capsys.readouterr().out == "warning: disk 1 [full]\n"
    assert "WARNING disk 1 [full]" in (tmp_path / "log.txt").read_text()


def test_standard_output_can_be_left_alone(capsys):
    with Display(None, to_stderr=True):
        logging.getLogger("hybridlm").info("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Display(tmp_path / "log.txt", log_every=1) as display:
        display.begin(0, 10)
        display.step({**RECORD, "step": 4})
        display.stop()
    out = capsys.readouterr().out
    assert "4/10" in out
    assert "12.3k tokens/s" in out
    assert "left" in out
    assert "step 4/10" not in out
    assert "step 4/10" in (tmp_path / "log.txt").read_text()


def test_a_narrow_terminal_keeps_the_steps(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Display(None) as display:
        display.begin(0, 1000)
        display.step({**RECORD, "step": 123, "validation_loss": 2.5, "validation_bits_per_byte": 3.6,
                      "grad_norm": 1.5, "moe/max_violation": 0.5})
        display.stop()
    assert "123/1000" in capsys.readouterr().out


def test_a_reader_that_has_gone_does_not_stop_the_run(tmp_path):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def isatty(self):
            return False

    with Display(tmp_path / "log.txt", log_every=1) as display:
        display.console.file = Gone()
        display.begin(0, 5)
        display.step(RECORD)
    assert "step 4/5" in (tmp_path / "log.txt").read_text()


def test_skipped_steps_say_so():
    assert format_record({"step": 1, "skipped": True, "loss": None}) == "not finite: step skipped"


def test_a_line_shows_what_matters():
    record = RECORD | {"lr": 3e-4, "grad_norm": 1.234, "epochs": 0.5, "moe/max_violation_worst": 2.9,
                       "moe/dead_experts": 5.0, "moe/max_violation": 1.0, "validation_loss": 2.25}
    assert format_record(record, "0:01:00 left") == (
        "loss 2.0000  2.885 bits/byte  12.3k tokens/s  0:01:00 left  lr 3.00e-04  gradient norm 1.23  epoch 0.50  "
        "worst violation 2.90  validation 2.2500  5 dead experts")
    assert "dead" not in format_record(record | {"moe/dead_experts": 0.0})


def test_pace_forgets_the_first_step(monkeypatch):
    clock = iter([0.0, 30.0, 31.0, 32.0])
    monkeypatch.setattr("hybridlm.training.display.time.perf_counter", lambda: next(clock))
    pace = Pace()
    seen = []
    for _ in range(3):
        pace.tick()
        seen.append(pace.seconds_per_step())
    assert seen == [30.0, 1.0, pytest.approx(1.0)]


def test_numbers_for_people():
    assert [format_count(n) for n in (12, 1234, 5.6e6, 48e9)] == ["12", "1.23k", "5.6M", "48G"]
    assert [format_duration(n) for n in (5, 3661, 90061)] == ["0:00:05", "1:01:01", "1d 1:01:01"]
