import builtins
import importlib.util
import time

import pytest
import wandb

from hybridlm.config.schema import TrackingConfig
from hybridlm.errors import ConfigError
from hybridlm.training import train
from hybridlm.training.tracking import Tracker, WandbTracker, check_tracking, make_tracker
from tests.support import tiny_run


@pytest.mark.slow
def test_a_run_is_tracked_offline_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_run.config(tmp_path, steps=2)
    config.tracking = TrackingConfig(wandb="online", project="test")
    train(config)
    files = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    # wandb's own process writes the file, and on a busy machine is still at it when `finish` has returned.
    deadline = time.monotonic() + 60
    while b"validation_loss" not in files[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"validation_loss" in files[0].read_bytes()


class FakeRun:
    def __init__(self, mode):
        self.mode, self.records = mode, []

    def log(self, record, step):
        self.records.append((step, record))

    def finish(self):
        raise OSError("no network")


@pytest.fixture
def fake(monkeypatch):
    """wandb.init without wandb: fails in the modes given, and keeps what it was called with."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    calls, failing = [], set()

    def init(**options):
        calls.append(options)
        if options["mode"] in failing:
            raise wandb.errors.CommError("network is unreachable\ndetails")
        return FakeRun(options["mode"])

    monkeypatch.setattr(wandb, "init", init)
    return calls, failing


def test_online_without_a_network_becomes_offline_with_a_warning(fake, tmp_path, caplog):
    calls, failing = fake
    failing.add("online")
    tracker = make_tracker(TrackingConfig(wandb="online"), tmp_path, {}, "abc")
    assert isinstance(tracker, WandbTracker)
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert all(call["settings"].init_timeout <= 10 for call in calls)
    assert "network is unreachable" in caplog.text
    assert "wandb sync" in caplog.text


def test_wandb_never_stops_a_run(fake, tmp_path, caplog):
    _, failing = fake
    failing |= {"online", "offline"}
    tracker = make_tracker(TrackingConfig(wandb="online"), tmp_path, {})
    assert type(tracker) is Tracker
    tracker.log({"loss": 1.0}, 1)
    failing.clear()
    tracker = make_tracker(TrackingConfig(wandb="offline"), tmp_path, {})
    tracker.log({"loss": 1.0, "grad_norm": None}, 3)
    assert tracker.run.records == [(3, {"loss": 1.0})]
    tracker.close()
    assert "did not finish" in caplog.text


def test_off_does_not_import_wandb(monkeypatch, tmp_path):
    original = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name != "wandb"
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert type(make_tracker(TrackingConfig(), tmp_path, {})) is Tracker


def test_missing_wandb_is_the_users_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tracking(TrackingConfig(wandb="off"))
    with pytest.raises(ConfigError, match=r"tracking\.wandb.*pip install 'hybridlm\[wandb\]'"):
        check_tracking(TrackingConfig(wandb="offline"))
