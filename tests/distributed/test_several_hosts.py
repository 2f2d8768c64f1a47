"""Two hosts (network namespaces) under scripts/launch/torchrun.sh: a cable that is pulled, names, ports and folders."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.local_cluster import (
    HOSTS,
    PATIENCE_S,
    ROOT,
    TINY,
    data_words,
    environment,
    hosts,  # noqa: F401  a fixture
    processes_with,
    steps_done,
    wait_for,
)

PORT = 29555  # each test has networks of its own


@dataclass
class Ended:
    """How the launcher of one host ended: its exit code, the lines of its errors, and all it said."""

    code: int
    errors: list
    text: str


@pytest.fixture
def pair(hosts, tmp_path):  # noqa: F811
    """Starts a run on both hosts, and returns how each launcher ended."""
    words = [*TINY, *data_words(tmp_path), "engine=ddp", f"run_dir={tmp_path / 'run'}"]

    def run(*more, during=None, master=hosts[0], hidden=None):
        started = []
        for node, host in enumerate(hosts):
            variables = {"NODES": "2", "NODE": str(node), "PROCESSES": "1", "MASTER_ADDR": master,
                         "MASTER_PORT": str(PORT)}
            if node == 1 and hidden is not None:
                variables["HIDE"] = str(hidden)
            with (tmp_path / f"{host}.txt").open("wb") as output:
                started.append(subprocess.Popen(
                    [HOSTS, "run", host, ROOT / "scripts" / "launch" / "torchrun.sh", *words, *more], stdout=output,
                    stderr=output, env=environment(**variables), start_new_session=True))
        try:
            if during is not None:
                during()
            codes = [process.wait(PATIENCE_S) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
        assert not processes_with(str(tmp_path / "run"))
        texts = [(tmp_path / f"{host}.txt").read_text() for host in hosts]
        assert not [text for text in texts if "Traceback" in text or "frame #" in text], "\n".join(texts)
        return [Ended(code, [line for line in text.splitlines() if line.startswith(("error: ", "rank "))], text)
                for code, text in zip(codes, texts, strict=True)]

    return run


def test_a_cable_that_is_pulled_ends_both_hosts_and_the_same_command_goes_on(pair, hosts, tmp_path):  # noqa: F811
    run = tmp_path / "run"

    def pull():
        wait_for(lambda: steps_done(run) >= 3, "some steps")
        subprocess.run([HOSTS, "link", hosts[1], "down"], check=True)

    for ended in pair("training.steps=100000", "training.checkpoint_every=2", "engine.timeout=15", during=pull):
        assert ended.code == 1, ended.text
        assert len(ended.errors) <= 2, ended.text
        assert any("has stood still for" in line or "lost another process" in line for line in ended.errors)
    saved = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    assert saved >= 2
    subprocess.run([HOSTS, "link", hosts[1], "up"], check=True)
    first, second = pair(f"training.steps={saved + 3}", "training.checkpoint_every=2", "engine.timeout=60")
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert f"going on from {run / 'checkpoints' / f'step-{saved}'}" in first.text
    assert steps_done(run) == saved + 3


def only_line(ended, *words, code=2):
    assert ended.code == code, ended.text
    line, = ended.text.splitlines()
    assert all(word in line for word in words), line


def test_a_name_that_does_not_resolve(pair):
    for ended in pair("engine.timeout=3", master="no-such-host"):
        only_line(ended, "error: MASTER_ADDR: ", "cannot find a host of this name; got 'no-such-host'")


def test_a_first_host_whose_port_is_blocked(pair, hosts):  # noqa: F811
    subprocess.run([HOSTS, "block", hosts[0], str(PORT)], check=True)
    first, second = pair("engine.timeout=20")
    only_line(first, f"did not meet at {hosts[0]}:{PORT}", "1/2 clients joined")
    only_line(second, f"error: MASTER_ADDR: no answer within 20 s (engine.timeout); got '{hosts[0]}:{PORT}'")


def test_hosts_whose_other_ports_are_blocked(pair, hosts):  # noqa: F811
    for host in hosts:
        subprocess.run([HOSTS, "block", host, "30000-65535"], check=True)
    for ended in pair("engine.timeout=20"):
        line, = ended.errors
        assert ended.code == 2, ended.text
        assert f"{hosts[0]}:{PORT} answers, but the processes did not meet within 20 s" in line
        assert "GLOO_SOCKET_IFNAME" in line


@pytest.mark.parametrize(("what", "says"), [
    ("run", "error: run_dir: is on {second} not the folder that it is on {first}"),
    ("texts", "coder.txt: no such file or folder; relative paths")])
def test_a_host_without_a_folder(pair, hosts, tmp_path, what, says):  # noqa: F811
    (tmp_path / what).mkdir()
    words = ["training.steps=2", "engine.timeout=60"]
    if what == "texts":
        for name in ("decoder", "encoder"):
            Path(tmp_path / f"{name}.txt").rename(tmp_path / "texts" / f"{name}.txt")
        words += [f"data.path={tmp_path / 'texts' / 'decoder.txt'}", f"data.cache_dir={tmp_path / 'texts' / 'cache'}",
                  f"data.validation_path={tmp_path / 'texts' / 'encoder.txt'}"]
    ended = pair(*words, hidden=tmp_path / what)
    assert all(end.code for end in ended)
    lines = [line for end in ended for line in end.errors]
    assert any(says.format(first=hosts[0], second=hosts[1]) in line for line in lines), lines
    assert all(len(end.errors) <= 1 for end in ended), lines
