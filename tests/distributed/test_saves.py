"""Saves by threads of two ranks are those that training waits for, and a resume reads each byte once."""

import json
from collections import Counter

import pytest

from hybridlm import checkpoint
from tests.support.run_records import records

pytest.importorskip("deepspeed")
MEASURED = {"tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes", "seconds"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def ranks(base, two_ranks):
    return two_ranks.run("tests.support.saves_over_ranks:save_and_resume", str(base), json.__file__)


@pytest.mark.slow
def test_what_threads_write_is_what_training_waits_for(base, ranks):
    """Files written a step late are bit for bit those written at once: training changes weights in place."""
    assert all(found["held back"] for found in ranks)
    for step in (2, 4, 5):
        waiting, beside = ({file.name: file.read_bytes() for file in
                            (base / name / f"checkpoints/step-{step}").glob("*.safetensors")}
                           for name in ("waiting", "beside"))
        assert len(waiting) == 4
        assert waiting == beside
    rows = [[{key: row[key] for key in row.keys() - MEASURED} for row in records(base / name)[:5]]
            for name in ("waiting", "beside")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_resume_reads_each_element_and_hashes_each_file_once(base, ranks):
    stored = checkpoint.checkpoint_tensors(base / "waiting/checkpoints/step-5", "optimizer")
    read = sum((Counter(found["read"]) for found in ranks), Counter())
    for name, tensor in stored.items():
        if tensor.dim():  # the counts of steps are of all ranks
            assert read[name] == tensor.shape.numel(), name
    sizes = [sum(found["read"].values()) for found in ranks]
    assert max(sizes) < 0.55 * sum(sizes)
    assert {file.name for file in (base / "waiting/checkpoints/step-5").iterdir()} == {
        "manifest.json", *ranks[0]["hashed"], *ranks[1]["hashed"]}
    assert not {*ranks[0]["hashed"]} & {*ranks[1]["hashed"]}
    assert all(len({*found["hashed"]}) == len(found["hashed"]) for found in ranks)


@pytest.mark.slow
def test_a_copy_takes_the_memory_that_is_announced(ranks):
    for found in ranks:
        assert found["snapshot"] == pytest.approx(found["estimate"], rel=0.03)
