"""Whole runs of a tiny model in this process."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from hybridlm import checkpoint
from hybridlm.checkpoint import saving
from hybridlm.config.schema import DataSourceConfig
from hybridlm.data import DATA_RULES, load_tokenizer
from hybridlm.distributed.communicator import Communicator
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.model.model import build_model
from hybridlm.training import TrainingStopped, run, start, train
from hybridlm.training import trainer as trainer_module
from hybridlm.training.run_folder import RunFolder
from tests.support import tiny_run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of eight steps; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("done")
    config = tiny_run.config(folder)
    return config, train(config, command=["model=tiny"]), folder


def poison(monkeypatch, layer, steps, value=float("nan")):
    """Make the output of `layer` not finite in the given steps, which count the forwards of training."""

    def build(*args, **kwargs):
        model = build_model(*args, **kwargs)
        calls = []

        def hook(module, inputs, output):
            calls.append(module.training)
            return output * value if module.training and sum(calls) in steps else output

        model.get_submodule(layer).register_forward_hook(hook)
        return model

    monkeypatch.setattr(start, "build_model", build)


def test_metrics_hold_one_object_a_step_with_all_that_is_measured(done):
    _, result, _ = done
    rows = tiny_run.records(result.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert row.keys() >= {
            "loss", "total_loss", "loss/lm", "loss/mtp", "loss/balance", "perplexity", "bits_per_byte", "grad_norm",
            "lr", "tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes", "tokens", "samples", "stage",
            "moe/max_violation", "moe/dead_experts", "moe/router_entropy", "skipped_steps"}
        assert row["total_loss"] == pytest.approx(
            row["loss/lm"] + 0.3 * row["loss/mtp"] + 0.01 * row["loss/balance"], rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / 0.6931472, rel=1e-5)  # a token is a byte
        assert 0 < row["mfu"] < 1
    assert rows[-1]["tokens"] == 8 * 4 * 32
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8]
    for row in rows:  # layer 0 is dense; 4 x 32 tokens, 2 experts each
        loads = {key: sum(load) for key, load in row.items() if key.startswith("moe/load/")}
        assert loads == ({"moe/load/1": 256, "moe/load/mtp1": 256} if "validation_loss" in row else {})


def test_result_and_run_folder_say_where_things_are(done):
    _, result, _ = done
    assert result.status == "finished"
    assert result.checkpoint == result.run_dir / "checkpoints" / "step-8"
    assert result.resume_command == "hybridlm train model=tiny"
    assert result.validation["validation_loss"] == tiny_run.records(result.run_dir)[-1]["validation_loss"]
    assert result.bigram_bits_per_byte > 1
    session = json.loads((result.run_dir / "run.json").read_text())["sessions"][0]
    assert session["command"] == "hybridlm train model=tiny"
    assert session["versions"]["torch"] == torch.__version__
    assert "step 8/8" in (result.run_dir / "log.txt").read_text()
    assert json.dumps(result.to_dict())


def test_checkpoint_loads_with_its_tokenizer_and_gives_the_validation_loss(done):
    config, result, _ = done
    model = checkpoint.load_checkpoint(result.run_dir)
    assert not model.training
    assert model.tokenizer.decode(model.tokenizer.encode("def f():")) == "def f():"
    assert model.config == config.model
    data = run.prepare(config.data)
    dataset = trainer_module.PackedDataset([data.validation], 32, 1, seed=0)
    batch = dataset.batch(range(8))
    with torch.no_grad():
        loss = model(batch.input_ids, targets=batch.targets, cu_seqlens=batch.cu_seqlens).losses["lm"]
    assert float(loss) == pytest.approx(result.validation["validation_loss"], rel=1e-5)


def test_a_finished_run_is_left_alone_and_can_be_made_longer(tmp_path):
    config = tiny_run.config(tmp_path, steps=2)
    train(config)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = train(config)
    assert again.status == "finished"
    assert again.validation["validation_loss"] > 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    config.training.steps = 4
    assert train(config).step == 4
    assert [row["step"] for row in tiny_run.records(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_torn_checkpoint_is_passed_over_loudly(tmp_path, caplog):
    config = tiny_run.config(tmp_path, steps=6)
    train(config)
    expected = tiny_run.losses(tmp_path / "run")
    os.truncate(tmp_path / "run/checkpoints/step-6/optimizer.safetensors", 100)
    train(config)
    assert "optimizer.safetensors has 100 bytes" in caplog.text
    assert "step-3" in (tmp_path / "run/log.txt").read_text()
    assert tiny_run.losses(tmp_path / "run") == expected
    checkpoint.verify(tmp_path / "run/checkpoints/step-6")
    for folder in checkpoint.step_folders(tmp_path / "run/checkpoints"):
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        train(config)


def test_a_changed_architecture_is_refused_with_a_diff(done):
    _, _, folder = done
    options = {"num_layers": 3, "schedule": tiny_run.ScheduleConfig(pattern=["linear", "full", "full"])}
    changed = tiny_run.config(folder, model_options=options)
    with pytest.raises(CheckpointError, match=r"has changed: 2 layers saved, 3 asked for\. Take another run_dir"):
        train(changed)
    with pytest.raises(CheckpointError, match=r"has changed: model\.hidden_size .*; and [1-9]\d* more\. Take another"):
        train(tiny_run.config(folder, model_options={
            "hidden_size": 64, "max_position": 99, "logit_soft_cap": 5.0, "tie_embeddings": True, "vocab_size": 999}))
    swapped = tiny_run.config(folder, model_options={"schedule": tiny_run.ScheduleConfig(pattern=["full", "full"])})
    with pytest.raises(CheckpointError, match=r"layer 0: mixer linear -> full, kind delta_rule -> attention"):
        train(swapped)


def test_a_folder_with_another_run_is_refused(done):
    _, _, folder = done
    with pytest.raises(ConfigError, match=r"holds a different run: training\.seed 0 -> 1"):
        train(tiny_run.config(folder, seed=1))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny_run.config(folder, resume="never"))


def test_resume_require_needs_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"training\.resume=require"):
        train(tiny_run.config(tmp_path, resume="require"))


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    first = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training here"):
        train(tiny_run.config(tmp_path))
    first.close()
    RunFolder(tmp_path / "run").close()


def test_changed_data_is_refused(tmp_path):
    train(tiny_run.config(tmp_path, steps=2))
    (tmp_path / "text.py").write_text("x = 1\n" * 4000)
    with pytest.raises(CheckpointError, match="data has changed"):
        train(tiny_run.config(tmp_path, steps=4))


def test_data_that_has_moved_is_resumed(tmp_path):
    """The content of the text and of the tokenizer identify a run, not where they stand."""
    def config(place, steps):
        return tiny_run.config(tmp_path, steps=steps, data={
            "path": str(place / "text.py"), "tokenizer": str(place / "tokenizer.json")})

    first, second = tmp_path / "here", tmp_path / "there"
    first.mkdir()
    (first / "text.py").write_text(Path(tiny_run.TEXT).read_text())
    load_tokenizer("bytes").save(first)
    train(config(first, 2))
    first.rename(second)
    os.utime(second / "text.py", ns=(1, 1))
    assert train(config(second, 4)).step == 4
    (second / "text.py").write_text("x = 1\n" * 4000)
    with pytest.raises(CheckpointError, match="data has changed"):
        train(config(second, 6))


def test_a_run_of_an_earlier_version_keeps_its_split_and_order(tmp_path, monkeypatch):
    mixture = [DataSourceConfig(path=tiny_run.TEXT),
               DataSourceConfig(path=str(tmp_path / "other.txt"), weight=0.01234)]
    (tmp_path / "other.txt").write_text("".join(f"line {i} of another text\n" for i in range(200)))
    data = {"mixture": mixture, "validation_fraction": 0.1}
    with monkeypatch.context() as earlier:
        earlier.setattr(run, "DATA_RULES", 1)
        train(tiny_run.config(tmp_path, steps=6, data=data))
    whole = tiny_run.losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-6")  # as if killed after step 3
    train(tiny_run.config(tmp_path, steps=6, data=data))
    assert tiny_run.losses(tmp_path / "run") == whole
    state = json.loads((tmp_path / "run/checkpoints/step-6/trainer.json").read_text())
    assert state["data_rules"] == 1
    assert checkpoint.data_rules(tmp_path / "run/checkpoints/step-6") == 1
    (tmp_path / "trainer.json").write_text("{}")  # of a version that named none
    assert (checkpoint.data_rules(tmp_path), checkpoint.data_rules(tmp_path / "run")) == (1, DATA_RULES)


def test_the_samples_of_each_step_are_recorded_once(tmp_path):
    train(tiny_run.config(tmp_path, steps=4, record_samples=True))
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")  # as if killed after step 4: it is computed again
    train(tiny_run.config(tmp_path, steps=5, record_samples=True))
    rows = [json.loads(line) for line in (tmp_path / "run/samples-0.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "samples": list(range(4 * step - 4, 4 * step))} for step in range(1, 6)]


def test_a_bad_step_is_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, "layers.1.mixer.o_proj", steps={3})
    result = train(tiny_run.config(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=9))
    rows = tiny_run.records(result.run_dir)
    assert [row["skipped"] for row in rows] == [False, False, True, False, False]
    assert rows[2]["loss"] is None
    assert rows[-1]["skipped_steps"] == 1
    assert rows[3]["samples"] == 16  # the data goes on
    steps = {checkpoint.step_of(f): f for f in checkpoint.step_folders(result.run_dir / "checkpoints")}
    assert sorted(steps) == [1, 2, 4, 5]  # nothing is saved in the middle of trouble


def test_bad_steps_in_a_row_stop_the_run_and_name_the_layer(tmp_path, monkeypatch):
    poison(monkeypatch, "layers.1.mixer.o_proj", steps=set(range(4, 99)))
    with pytest.raises(TrainingStopped, match=r"3 steps in a row.*first bad: layer 'layers\.1\.mixer\.o_proj'; "
                                              r"the newest checkpoint is .*step-3"):
        train(tiny_run.config(tmp_path, max_bad_steps=3))
    checkpoint.verify(tmp_path / "run/checkpoints/step-3")
    assert [r["step"] for r in tiny_run.records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    step = trainer_module.Trainer._step

    def overflow(self, *args):
        step(self, *args)
        if self.progress.step == 6:
            self.model.lm_head.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(trainer_module.Trainer, "_step", overflow)
    with pytest.raises(TrainingStopped, match=r"'lm_head.weight' is not finite after step 6.*step-3"):
        train(tiny_run.config(tmp_path))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-3"]


def test_a_run_that_ends_diverged_does_not_say_finished(tmp_path):
    with pytest.raises(TrainingStopped, match=r"diverged: its validation loss after step 3 is .*lower optimizer\.lr"):
        train(tiny_run.config(tmp_path, steps=3, optimizer={"lr": 1e36}))


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_costs_checkpoints_first_and_the_run_later(tmp_path, monkeypatch, caplog, in_background):
    write = saving._write_tensors

    def full(file, tensors):
        if file.parent.name.split("-")[2] in "2456":
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(saving, "_write_tensors", full)
    with pytest.raises(TrainingStopped, match=r"step-6 could not be saved 3 times in a row.*newest checkpoint is "
                                              r".*step-3"):
        train(tiny_run.config(tmp_path, checkpoint_every=1, async_checkpoint=in_background))
    assert "step-2 could not be saved" in caplog.text
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-1", "step-3"}


def test_stages_hand_over_through_a_checkpoint(tmp_path, monkeypatch):
    recipe = tiny_run.stages({"name": "warm", "steps": 3, "trainable": ["layers.1.mixer.*"], "lr": 1e-3},
                             {"name": "all", "steps": 3, "sequence_length": 48, "batch_size": 2})
    config = tiny_run.config(tmp_path / "whole", recipe=recipe, keep_checkpoints=9)
    train(config)
    fresh = build_model(config)
    after = checkpoint.load_checkpoint(tmp_path / "whole/run/checkpoints/step-3")
    changed = {name for (name, a), b in zip(fresh.named_parameters(), after.parameters(), strict=True)
               if not torch.equal(a, b)}
    assert changed
    assert all(name.startswith("layers.1.mixer.") for name in changed)
    assert all(torch.equal(a, b) for a, b in zip(fresh.buffers(), after.buffers(), strict=True))
    optimizer = dict(checkpoint.read_tensors(tmp_path / "whole/run/checkpoints/step-3", "optimizer"))
    assert {name.split("/", 1)[1] for name in optimizer} == changed
    rows = tiny_run.records(tmp_path / "whole/run")
    assert [(r["stage"], r["samples"]) for r in rows] == [("warm", 4), ("warm", 8), ("warm", 12), ("all", 14),
                                                          ("all", 16), ("all", 18)]
    killed = tiny_run.config(tmp_path / "killed", recipe=recipe, keep_checkpoints=9)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_begin_stage", fail_in_stage("all", trainer_module.Trainer._begin_stage))
        with pytest.raises(RuntimeError, match="killed"):
            train(killed)
    train(killed)
    assert tiny_run.losses(tmp_path / "killed/run") == tiny_run.losses(tmp_path / "whole/run")


def fail_in_stage(name, original):
    def fail(trainer, stage):
        if stage.name == name:
            raise RuntimeError("killed")
        original(trainer, stage)

    return fail


def test_init_from_takes_weights_and_nothing_else(done, tmp_path):
    config, result, _ = done
    new = tiny_run.config(tmp_path, steps=1, optimizer={"lr": 1e-12})
    new.init_from = str(result.run_dir)
    train(new)
    rows = tiny_run.records(tmp_path / "run")
    assert [row["step"] for row in rows] == [1]
    assert rows[0]["validation_loss"] == pytest.approx(result.validation["validation_loss"], rel=2e-3)
    other = tiny_run.config(tmp_path / "other", model_options={
        "schedule": tiny_run.ScheduleConfig(pattern=["full", "full"])})
    other.init_from = str(result.run_dir)
    with pytest.raises(CheckpointError, match=r"another architecture: layer 0: mixer linear -> full"):
        train(other)
    assert config.init_from is None


def test_accumulation_and_activation_checkpointing_do_not_change_the_numbers(done, tmp_path):
    _, result, _ = done
    train(tiny_run.config(tmp_path, steps=8, micro_batch_size=1, activation_checkpointing=True))
    expected = {row["step"]: row["loss"] for row in tiny_run.records(result.run_dir)}
    for row in tiny_run.records(tmp_path / "run"):
        assert row["loss"] == pytest.approx(expected[row["step"]], rel=2e-3)
    assert tiny_run.records(tmp_path / "run")[0]["loss"] == pytest.approx(expected[1], rel=1e-6)


def test_no_held_out_text_means_no_validation(tmp_path):
    result = train(tiny_run.config(tmp_path, steps=2, data={"validation_fraction": 0.0}))
    assert result.validation == {}
    assert "validation_loss" not in tiny_run.records(tmp_path / "run")[-1]


def test_sigterm_while_data_is_prepared_leaves_with_the_resume_command(tmp_path, monkeypatch, capsys):
    def interrupted(config, progress, rules):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(run, "prepare", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    result = train(tiny_run.config(tmp_path))
    assert (result.status, result.step) == ("interrupted", 0)
    assert f"hybridlm train {tmp_path}/run/config.yaml" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_while_ranks_ask_each_other_stops_the_next_step(tmp_path, monkeypatch):
    largest, asked = Communicator.all_max, []

    def signalled(ranks, numbers):
        answer = largest(ranks, numbers)
        asked.append(answer)
        if len(asked) == 3:  # before the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setattr(Communicator, "all_max", signalled)
    result = train(tiny_run.config(tmp_path, steps=6))
    assert (result.status, result.step) == ("interrupted", 3)


def test_the_resume_command_goes_on_even_where_resuming_was_forbidden(tmp_path):
    assert run.resume_command(["model=a b", "training.resume=never"], tmp_path) == "hybridlm train 'model=a b'"


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="run_dir: cannot be written"):
        train(tiny_run.config(tmp_path))
