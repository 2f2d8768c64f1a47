"""What is said about memory: before a run that exceeds the machine, and after an allocation has failed."""

import json
import shlex

import pytest
import torch

from hybridlm.cli import dispatch, main
from hybridlm.errors import ConfigError, out_of_memory
from hybridlm.planning import machine_memory
from hybridlm.planning.machine_memory import check_memory, host_memory_bytes, memory_fit, out_of_memory_advice
from hybridlm.run_config import load_config
from hybridlm.training.trainer import Trainer

GIB = 2**30
TINY = ["model=hybrid_tiny", "training.sequence_length=64", "engine.device=cpu"]


def on_a_machine_of(monkeypatch, gib):
    monkeypatch.setattr(machine_memory, "host_memory_bytes", lambda: round(gib * GIB))


def memory_needed(*words):
    return memory_fit(load_config("train", [*TINY, *words]), 1, device_bytes=GIB).needed


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < host_memory_bytes() < 2**50


def test_the_estimate_of_a_run_counts_its_micro_batch_lengths_and_checkpointing():
    whole = memory_needed("training.batch_size=64")
    assert memory_needed("training.batch_size=64", "training.micro_batch_size=4") < whole / 3
    assert memory_needed("training.batch_size=64", "training.activation_checkpointing=true") < 0.8 * whole
    stages = ["recipe.stages=[{name: short, batch_size: 64}, {name: long, sequence_length: 256, batch_size: 16}]"]
    assert memory_needed(*stages) == pytest.approx(whole), "rows and length are of one stage"


@pytest.mark.parametrize("words", [[], ["training.micro_batch_size=128"]])
def test_advised_settings_fit_as_typed(words):
    config = load_config("train", [*TINY, "training.batch_size=256", *words])
    available = memory_fit(config, 1, device_bytes=GIB).needed / 3
    fit = memory_fit(config, 1, device_bytes=available)
    assert fit.exceeded
    assert fit.certain
    advised = [word for word in shlex.split(fit.advice) if word.startswith("training.")]
    assert any(word.startswith("training.micro_batch_size=") for word in advised)
    assert not memory_fit(load_config("train", [*TINY, "training.batch_size=256", *advised]), 1,
                          device_bytes=available).exceeded
    assert "no batch size helps" in memory_fit(config, 1, device_bytes=1000).advice


def test_a_start_is_refused_where_memory_certainly_lacks_and_warned_of_where_it_may(monkeypatch):
    config = load_config("train", [*TINY, "training.batch_size=256"])
    needed = memory_fit(config, 1, device_bytes=GIB).needed / GIB
    on_a_machine_of(monkeypatch, needed * 1.01)
    assert check_memory(config, 1) is None
    on_a_machine_of(monkeypatch, needed / 1.1)
    assert "this machine has" in check_memory(config, 1).describe()
    on_a_machine_of(monkeypatch, needed / 2)
    with pytest.raises(ConfigError, match=r"^training\.micro_batch_size: a step needs about"):
        check_memory(config, 1)
    on_a_machine_of(monkeypatch, 0.0001)
    with pytest.raises(ConfigError, match=r"^model: a step needs about .* optimizer state alone do not fit"):
        check_memory(config, 1)


def test_a_plan_that_does_not_fit_says_so_and_ends_with_1(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["train", *TINY, "training.batch_size=100000", "training.sequence_length=4096", "--dry-run"]
    on_a_machine_of(monkeypatch, 24)
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "run folder" in captured.out
    assert "error: this does not fit" in captured.err
    assert "training.micro_batch_size=" in captured.err
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["memory"]["exceeded"]
    assert main([*words, "--device-memory", "1e6"]) == 0
    assert main([*words, "--device-memory", "0"]) == 2
    assert "--device-memory: must be positive" in capsys.readouterr().err
    assert main(words[:-1]) == 2, "the start is refused before it writes anything"
    assert "a step needs about" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inspect_of_a_run_has_its_sizes_and_says_when_memory_lacks(monkeypatch, capsys):
    on_a_machine_of(monkeypatch, 24)

    def inspect(*words):
        assert main(["inspect", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    run = inspect("experiment=quickstart", "engine.device=cpu", "training.batch_size=6", "training.micro_batch_size=3")
    config = load_config("train", ["experiment=quickstart"])
    sizes = run["training_memory"]
    assert (sizes["batch_size"], sizes["sequence_length"]) == (3, config.training.sequence_length)
    assert sizes["precision"] == "fp32", "auto on a CPU"
    assert run["flops_per_token"]["context_length"] == config.training.sequence_length
    assert not run["memory"]["exceeded"]
    positional = inspect("quickstart", "training.sequence_length=96")
    assert positional["training_memory"]["sequence_length"] == 96
    asked = inspect("experiment=quickstart", "--context", "1024", "--batch-size", "2")["training_memory"]
    assert (asked["batch_size"], asked["sequence_length"]) == (2, 1024)
    model = inspect("model=deepseek_v32_671b")
    assert model["training_memory"]["batch_size"] == 1
    assert "this machine has 24 GiB" in model["memory"]["text"]
    assert main(["inspect", "model=deepseek_v32_671b"]) == 0
    assert "warning: a step needs about" in capsys.readouterr().out


def allocate():
    torch.empty(1 << 58, dtype=torch.uint8)


def raise_memory_error():
    raise MemoryError


def raise_gpu_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


FAILURES = {allocate: "out of memory: 274,877,906,944 MiB were asked for", raise_memory_error: "out of memory",
            raise_gpu_error: "out of GPU memory: 2.00 GiB were asked for"}


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("command", sorted(dispatch.COMMANDS))
def test_no_command_answers_a_failed_allocation_with_a_traceback(monkeypatch, capsys, command, fail):
    class Module:
        @staticmethod
        def run(argv):
            fail()

    monkeypatch.setattr(dispatch, "import_module", lambda name: Module)
    assert main([command]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {FAILURES[fail]}; take a smaller batch")
    assert line.count("\n") == 1


def test_other_errors_are_not_taken_for_it():
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)")) is None
    assert out_of_memory(OSError(28, "No space left on device")) is None


@pytest.mark.parametrize("fail", FAILURES)
def test_training_that_runs_out_of_memory_names_the_settings(monkeypatch, capsys, tmp_path, fail):
    (tmp_path / "a.txt").write_text("some text to train on. " * 200, encoding="utf-8")
    monkeypatch.setattr(Trainer, "fit", lambda self: fail())
    words = ["train", *TINY, f"data.path={tmp_path}/a.txt", f"data.cache_dir={tmp_path}/cache",
             f"run_dir={tmp_path}/run", "training.batch_size=6", "data.validation_fraction=0"]
    assert main(words) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {FAILURES[fail]}; lower training.micro_batch_size, for instance "
                           "training.micro_batch_size=3; now all 6 rows")
    assert "set training.activation_checkpointing=true" in line
    assert line.count("\n") == 1


def test_advice_ends_where_nothing_is_left_to_lower():
    config = load_config("train", [*TINY, "training.batch_size=4", "training.micro_batch_size=1",
                                   "training.activation_checkpointing=true"])
    assert out_of_memory_advice(config) == "take a shorter training.sequence_length or a smaller model"
