"""Locks between processes, on file systems that have them and on those that do not."""

import errno
import fcntl
import json
import logging

import pytest

from hybridlm import files
from hybridlm.config.schema import DataConfig
from hybridlm.data import prepare
from hybridlm.files import is_locked, try_lock, wait_for_lock
from hybridlm.training.run_folder import RunFolder


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def without_locks(request, monkeypatch):
    """A file system whose every lock call fails, as on Lustre mounted without them and on some NFS."""
    def flock(descriptor, how):
        raise OSError(getattr(errno, request.param), "refused")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_warned_folders", set())


def test_a_lock_excludes_until_it_is_released(tmp_path):
    lock = wait_for_lock(tmp_path / "lock")
    assert is_locked(tmp_path / "lock")
    assert try_lock(tmp_path / "lock") is None
    lock.release()
    assert not is_locked(tmp_path / "lock")
    try_lock(tmp_path / "lock").release()
    assert not is_locked(tmp_path / "none")


def test_a_file_system_without_locks_is_named_once_per_folder(tmp_path, without_locks, caplog, recwarn):
    with caplog.at_level(logging.WARNING, "hybridlm"):
        first, second = try_lock(tmp_path / "lock"), wait_for_lock(tmp_path / "lock")
        assert not is_locked(tmp_path / "lock")
        first.release()
        second.release()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"{tmp_path}: this file system has no file locks"]
    assert list(tmp_path.iterdir()) == [tmp_path / "lock"]
    assert not recwarn.list


def test_preparing_and_run_folders_work_without_locks(tmp_path, without_locks, caplog):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    with caplog.at_level(logging.WARNING, "hybridlm"):
        data = prepare(DataConfig(path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache")), progress=False)
        for _ in range(2):  # nothing is left behind that would keep the second out
            RunFolder(tmp_path / "run").close()
    assert data.documents == 1
    assert sum("this file system has no file locks" in record.getMessage() for record in caplog.records) == 2


def test_other_errors_of_the_file_system_are_not_taken_for_it(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"):
        try_lock(tmp_path / "lock")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    files.write_json(target, {"step": 1})
    monkeypatch.setattr("hybridlm.files.os.replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        files.write_json(target, {"step": 2}, flush=True)
    assert json.loads(target.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [target]
