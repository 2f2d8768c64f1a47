"""Turning an attention model into a hybrid: what trains, what is compared, what goes on, what is refused."""

import hashlib
import itertools
import re
import shutil

import pytest
import torch

from hybridlm import checkpoint
from hybridlm.config.schema import RecipeConfig, StageConfig
from hybridlm.config.serialization import to_yaml
from hybridlm.distributed.engines import make_engine
from hybridlm.distributed.engines.single import SingleConfig
from hybridlm.errors import ConfigError
from hybridlm.model import generate
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.model import build_model
from hybridlm.model.sequence import SequenceInfo
from hybridlm.optimizers import build_optimizer
from hybridlm.report.read import read_run
from hybridlm.report.run_figures import run_figures
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm.training.distillation import LayerTarget, TeacherGuide, load_teacher
from hybridlm.training.stages import plan_stages
from tests.support import tiny_lm, tiny_run
from tests.support.tiny_run import weights

STEPS = (3, 3, 2)  # of the three stages
ATTENTION = {"num_layers": 3, "mixers": {"full": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16,
                                                                 qk_norm="head")},
             "schedule": ScheduleConfig(pattern=["full"])}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of three attention layers, with experts and multi-token prediction; its data is prepared."""
    folder = tmp_path_factory.mktemp("teacher")
    return train(tiny_run.config(folder, model_options=ATTENTION, steps=2, eval_every=0)).run_dir


def settings(teacher, run_dir, *more):
    return load_config("train", [
        "recipe=linearize_tiny", f"teacher={teacher}", f"run_dir={run_dir}", f"data.path={teacher.parent}/text.py",
        f"data.cache_dir={teacher.parent}/cache", "data.validation_fraction=0.1", "recipe.convert.keep=[1]",
        *(f"recipe.stages.{i}.{key}={value}" for i in range(3) for key, value in {
            "steps": STEPS[i], "sequence_length": 32, "batch_size": 4, "lr": "2e-3",
            "schedule": "{kind: constant, warmup: 0}"}.items()),
        "training.eval_batches=1", "training.eval_every=0", "training.checkpoint_every=100",
        "training.keep_checkpoints=10", *more])


@pytest.fixture(scope="module")
def done(teacher, tmp_path_factory):
    """A whole conversion; tests leave it as it is."""
    return train(settings(teacher, tmp_path_factory.mktemp("student") / "run"))


def digest(folder):
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*"))
            if file.is_file()}


NEW = ("layers.0.mixer.", "layers.2.mixer.")


def test_alignment_trains_the_new_mixers_and_changes_no_other_bit(teacher, done):
    start, after = weights(done.run_dir / "converted"), weights(done.run_dir / "checkpoints" / "step-3")
    original = weights(teacher)
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed == {name for name in start if name.startswith(NEW)}
    assert all(torch.equal(after[name], original[name]) for name in original if not name.startswith(NEW))
    names = {key.split("/", 1)[1] for key in weights(done.run_dir / "checkpoints" / "step-3", "optimizer")}
    assert names == {name for name in after if name.startswith(NEW)}
    assert f"stage align: 3 steps, {len(names)} of " in (done.run_dir / "log.txt").read_text()


def test_the_other_stages_train_everything(done):
    for first, second in ((3, 6), (6, 8)):
        before, after = (weights(done.run_dir / "checkpoints" / f"step-{step}") for step in (first, second))
        assert {name for name in before if torch.equal(before[name], after[name])} == set()


def test_the_teacher_is_only_read(teacher, done, tmp_path):
    before = digest(teacher)
    config = settings(teacher, tmp_path / "run", *(f"recipe.stages.{i}.steps=1" for i in range(3)))
    assert train(config).status == "finished"
    assert digest(teacher) == before


def test_records_tell_what_is_learned(done):
    rows = tiny_run.records(done.run_dir)
    assert [row["stage"] for row in rows] == ["align"] * 3 + ["distill"] * 3 + ["long"] * 2
    for row in rows[:3]:
        assert row["total_loss"] == pytest.approx(row["loss/layer_output"])
        assert row["loss"] is row["perplexity"] is row["bits_per_byte"] is None  # no logits are computed
        assert row["align/error"] == pytest.approx((row["align/error/0"] + row["align/error/2"]) / 2)
        assert "align/error/1" not in row
        assert -1 <= row["align/cosine/0"] <= 1
    assert rows[2]["loss/layer_output"] < rows[0]["loss/layer_output"]
    assert rows[2]["align/cosine"] > rows[0]["align/cosine"]
    for row in rows[3:6]:
        assert row["total_loss"] == pytest.approx(
            row["loss/teacher_kl"] + 0.3 * row["loss/mtp"] + 0.01 * row["loss/balance"], rel=1e-4)
        assert 0 <= row["distill/agreement"] <= 1
        assert "align/error" not in row
    for row in rows[6:]:
        assert "loss/teacher_kl" not in row
    for last, aligned in ((rows[2], True), (rows[5], False), (rows[7], False)):
        assert last["validation_gap/ce"] == pytest.approx(
            last["validation_loss"] - last["validation_gap/teacher_loss"], abs=1e-5)
        assert last["validation_loss/teacher_kl"] > 0
        assert ("validation_align/error/0" in last) == aligned
        assert {f"validation_hidden/error/{layer}" for layer in range(3)} <= set(last)
        for name in ("gap/window_loss", "ablation/linear_branch_cut", "recall/repeat_nll", "recall/repeat_teacher",
                     "recall/repeat_window"):
            assert last[f"validation_{name}"] > 0
    text = (done.run_dir / "log.txt").read_text()
    assert re.search(r"loss +teacher \d\.\d+, window of 64 and first token \d\.\d+, student \d\.\d+", text)


def test_kda_and_sparse_attention_come_from_one_command(teacher, tmp_path):
    config = settings(teacher, tmp_path / "run", "recipe=linearize_dsa_tiny", "recipe.indexer.topk=6",
                      *(f"recipe.stages.3.{key}={value}" for key, value in {
                          "steps": 1, "sequence_length": 32, "batch_size": 4, "schedule":
                          "{kind: constant, warmup: 0}"}.items()), *(f"recipe.stages.{i}.steps=1" for i in range(3)))
    assert config.model.layers() == ["kda", "full_dsa", "kda"]
    result = train(config)
    names = ("align", "distill", "indexer_warmup", "sparse")
    rows = dict(zip(names, tiny_run.records(result.run_dir), strict=True))
    assert [row["stage"] for row in rows.values()] == list(names)
    after = {name: weights(result.run_dir / "checkpoints" / f"step-{step}") for step, name in enumerate(names, 1)}
    changed = [{name for name in now if not torch.equal(now[name], before[name])}
               for before, now in itertools.pairwise(after.values())]
    assert not any(".indexer." in name for name in changed[0])
    assert changed[1] == {name for name in after["sparse"] if ".indexer." in name}
    assert changed[2] >= changed[1]
    log = (result.run_dir / "log.txt").read_text()
    said = dict(re.findall(r"stage (\w+): 1 step, (\d+ of \d+) parameters train", log))
    total = int(said["sparse"].split()[-1])
    assert said["indexer_warmup"] == f"{len(changed[1])} of {total}"
    assert said["distill"] == f"{total - len(changed[1])} of {total}", "the indexers wait for their loss"
    assert "not trained: layers.1.mixer.indexer." in log
    assert rows["align"]["total_loss"] == pytest.approx(rows["align"]["loss/layer_output"])
    assert "loss/indexer_kl" not in rows["distill"]
    assert rows["indexer_warmup"]["total_loss"] == pytest.approx(rows["indexer_warmup"]["loss/indexer_kl"])
    assert 0 < rows["sparse"]["validation_dsa/indexer_recall/1"] < 1
    full = load_config("train", ["recipe=linearize_dsa", f"teacher={teacher}", "recipe.stages.1.sequence_length=64",
                                 *(f"recipe.stages.{i}.sequence_length=64" for i in (0, 2, 3))])
    assert [stage.name for stage in full.recipe.stages] == list(names)


def test_validation_runs_the_student_by_itself(done):
    """In the stage that passes the teacher's outputs on, the validation loss is still that of the saved student."""
    row = tiny_run.records(done.run_dir)[2]
    student = checkpoint.load_checkpoint(done.run_dir / "checkpoints" / "step-3")
    assert student.layers[0].mixer_stand_in is None
    other = tiny_run.records(done.run_dir)[5]
    assert row["validation_loss"] != other["validation_loss"]
    assert row["validation_gap/teacher_loss"] == other["validation_gap/teacher_loss"]
    assert row["validation_gap/window_loss"] == other["validation_gap/window_loss"]
    # A window of 64 sees all of 32 tokens.
    assert row["validation_gap/window_loss"] == pytest.approx(row["validation_gap/teacher_loss"], abs=1e-5)


@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_run_stopped_in_any_stage_goes_on_there(teacher, done, step, tmp_path, monkeypatch):
    tiny_run.check_resume(monkeypatch, lambda: settings(teacher, tmp_path / "run"), step, done.run_dir)


def test_the_same_command_is_the_same_run_again(teacher, done):
    """Naming the recipe puts it in place of the saved one, in which the layers are planned already."""
    again = settings(teacher, done.run_dir)
    assert again == load_config(str(done.run_dir / "config.yaml"))
    assert again.recipe.convert.converted == [0, 2]
    with pytest.raises(ConfigError, match=r"holds a different run: .*recipe\.convert\.keep\.0 1 -> 0.*; take another "):
        train(settings(teacher, done.run_dir, "recipe.convert.keep=[0]"))


def test_the_saved_config_is_the_same_run_again(done, teacher):
    again = load_config(str(done.run_dir / "config.yaml"))
    assert to_yaml(again) == (done.run_dir / "config.yaml").read_text()
    assert again.recipe.convert.converted == [0, 2]
    assert again.model.layers() == ["kda", "full", "kda"]
    assert again.model.name == "tiny_kda"
    assert again.init_from == str(teacher)


def test_the_student_decodes_what_it_computes_and_goes_on_generating(done):
    student = checkpoint.load_checkpoint(done.run_dir)
    ids = torch.randint(257, (1, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, state = student(ids).logits, student.new_state(1, 14)
        steps = torch.cat([student(ids[:, i : i + 1], state=state).logits for i in range(14)], 1)
    assert (steps - whole).abs().max() < 1e-4
    assert len(list(generate(student, ids[0], 3))) == 3


def begin(teacher, run_dir, index=0, *more):
    """The student, and the teacher of a run, at the start of a stage."""
    config = settings(teacher, run_dir, *more)
    engine = make_engine(SingleConfig(device="cpu"))
    distillation = load_teacher(config, engine)
    student = build_model(config.model)
    return distillation, student, plan_stages(config)[: index + 1]


def test_the_teacher_shares_memory_only_with_what_nothing_trains(teacher, tmp_path):
    distillation, student, stages = begin(teacher, tmp_path, 1)
    original = {name: value.clone() for name, value in distillation.teacher.named_parameters()}
    with torch.no_grad():  # as a run starts: equal but in the converted layers
        for name, value in student.named_parameters():
            if not name.startswith(NEW):
                value.copy_(original[name])
    distillation.begin_stage(student, stages[:1])
    mine, theirs = dict(distillation.teacher.named_parameters()), dict(student.named_parameters())
    shared = {name for name in mine if name in theirs and mine[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {name for name in mine if not name.startswith(NEW)}
    distillation.begin_stage(student, stages)
    assert not any(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine if name in theirs)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(1.0)
    assert all(torch.equal(value, original[name]) for name, value in mine.items())


def test_layers_align_side_by_side_as_they_would_alone(teacher, tmp_path):
    """One forward gives each layer the loss and gradient that it has on the teacher's own input and output."""
    distillation, student, stages = begin(teacher, tmp_path)
    original = dict(distillation.teacher.named_parameters())
    with torch.no_grad():
        for name, value in student.named_parameters():
            if not name.startswith(NEW):
                value.copy_(original[name])
    for name, value in student.named_parameters():
        value.requires_grad_(name.startswith(NEW))
    distillation.begin_stage(student, stages)
    student.loss_weights = dict(stages[0].loss_weights)
    ids = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(0))
    student.train()(ids, labels=ids).loss.backward()
    calls = {}
    for layer in (0, 2):
        hook = distillation.teacher.layers[layer].mixer.register_forward_hook(
            lambda module, args, output, layer=layer: calls.update({layer: (args[0], args[1], output[0])}))
        with torch.no_grad():
            distillation.teacher(ids)
        hook.remove()
        x, seq, y = calls[layer]
        mixer = student.layers[layer].mixer
        error = ((mixer(x, seq)[0] - y).square().flatten(1).sum(1) / y.square().flatten(1).sum(1)).mean()
        wanted = torch.autograd.grad(error / 2, list(mixer.parameters()))
        for parameter, gradient in zip(mixer.parameters(), wanted, strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert all(value.grad is None for name, value in student.named_parameters() if not name.startswith(NEW))


def test_converting_nothing_is_the_teacher():
    model = tiny_lm.model().eval()
    student = tiny_lm.model()
    student.guide = TeacherGuide(model, hidden=True, measures=True)
    student.loss_weights = {"lm": 0.0, "teacher_kl": 1.0, "hidden": 1.0}
    ids = torch.randint(tiny_lm.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    output = student(ids, labels=ids, return_logits=True)
    assert torch.equal(output.logits, model(ids).logits)
    assert output.losses["teacher_kl"].item() == 0.0
    assert output.losses["hidden"].item() == 0.0
    assert float(output.stats["distill_agreement"]) == 1.0
    assert float(output.stats["gap_ce"]) == 0.0
    [last] = student(ids, labels=ids, return_hidden_states="last").hidden_states  # though the guide reads all layers
    assert torch.equal(last, model(ids, return_hidden_states=True).hidden_states[-1])
    output.loss.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in student.parameters() if p.grad is not None)


def test_a_copied_attention_layer_has_no_error():
    model = tiny_lm.model(schedule=ScheduleConfig(pattern=["full"]))
    target = LayerTarget(model.layers[1].mixer, passes_teacher=True)
    x, seq = torch.randn(2, 9, 32), SequenceInfo.make(2, 9, torch.device("cpu"))
    y, aux = target(model.layers[1].mixer, x, seq)
    assert float(aux["loss/layer_output"].detach()) == 0.0
    assert float(aux["layer/align_cosine"]) == pytest.approx(1.0)
    assert not y.requires_grad  # the next layer gets the teacher's output


def test_rates_of_new_mixers_are_scaled(teacher, tmp_path):
    config = settings(teacher, tmp_path, "recipe.stages.1.lr_scale={@new: 10}")
    stage = plan_stages(config)[1]
    student = begin(teacher, tmp_path)[1]
    optimizers = build_optimizer(student, config.optimizer, lr=stage.lr)
    optimizers.scale_lr(stage.lr_factor_of)
    optimizers.set_lr(1e-3)
    found = {optimizers.names[id(p)]: group["lr"] for member in optimizers.members for group in member.param_groups
             for p in group["params"]}
    assert len(found) == len(list(student.parameters()))
    for name, lr in found.items():
        assert lr == pytest.approx(1e-2 if name.startswith(NEW) else 1e-3)


def test_last_stages_may_make_the_kept_attention_sparse(teacher, tmp_path):
    stages = ("[{name: align, inputs: teacher, trainable: ['@new'], attention_mode: dense, loss_weights: {lm: 0, "
              "mtp: 0, balance: 0, layer_output: 1, indexer_kl: 0}, steps: 1}, {name: indexer_warmup, "
              "attention_mode: dense, trainable: ['*.indexer.*'], loss_weights: {lm: 0, mtp: 0, balance: 0}, "
              "steps: 1}, {name: sparse, attention_mode: sparse, steps: 1}]")
    config = load_config("train", [
        "recipe=linearize_tiny", f"teacher={teacher}", f"run_dir={tmp_path}/run", f"data.path={teacher.parent}/text.py",
        f"data.cache_dir={teacher.parent}/cache", "data.validation_fraction=0.1", "recipe.convert.keep=[1]",
        f"recipe.stages={stages}", "recipe.indexer={topk: 6}", "training.sequence_length=32", "training.batch_size=4",
        "training.eval_batches=1"])
    assert train(config).status == "finished"
    student = checkpoint.load_checkpoint(tmp_path / "run")
    assert [layer.mixer.config.kind for layer in student.layers] == ["delta_rule", "attention", "delta_rule"]
    assert student.layers[1].mixer.attention_mode == "sparse"


@pytest.mark.parametrize(("overrides", "text"), [
    (["teacher=null"], "teacher: is missing; expected the run or checkpoint that recipe=linearize_tiny converts"),
    (["teacher=/nowhere"], "teacher: no such checkpoint; got '/nowhere'"),
    (["model=quickstart"], "model: comes from the checkpoint with recipe=linearize_tiny; got 'quickstart'; leave "
     "model=... out; teacher says which checkpoint is converted"),
    (["recipe.convert.keep=3"], "recipe.convert.keep: keeps all of the attention: there is nothing to convert; got 3"),
    (["recipe.convert.keep=4"], "recipe.convert.keep: is not a number of attention layers of the teacher; got 4"),
    (["recipe.convert.keep=[5]"],
     "recipe.convert.keep: names a layer that is not full attention of the teacher; got 5"),
    (["recipe.convert.keep=gone.json"], "recipe.convert.keep: cannot be read (No such file or directory)"),
    (["recipe.convert.mixer=mamba"],
     "recipe.convert.mixer: cannot start from the weights of attention; got 'mamba'; expected options of a kind"),
    (["recipe.convert.mixer=kad"], "recipe.convert.mixer: no such preset; got 'kad'"),
    (["recipe.convert.mixer={kind: kad}"], "recipe.convert.mixer.kind: unknown kind; got 'kad'"),
    (["recipe.convert.init=cpoy"], "recipe.convert.init: "),
    (["recipe.stages.0.sequence_length=65"],
     "recipe.stages.0.sequence_length: is longer than the model is meant for; got 65; expected at most "
     "model.max_position=64"),
    (["recipe.stages.1.temperature=0"], "recipe.stages.1.temperature: must be positive"),
    (["recipe.stages.1.lr_scale={embde*: 2}"], "recipe.stages.1.lr_scale.0: matches no parameter"),
])
def test_mistakes_are_one_line(teacher, tmp_path, overrides, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as error:
        settings(teacher, tmp_path, *overrides)
    assert "\n" not in str(error.value)


def test_a_run_whose_teacher_is_gone_says_so_and_goes_on_when_it_is_back(teacher, tmp_path):
    copy = tmp_path / "copy" / "step-2"
    shutil.copytree(checkpoint.resolve(teacher), copy)
    moved = copy.with_name("step-3")

    train(settings(teacher, tmp_path / "run", f"teacher={copy}", *(f"recipe.stages.{i}.steps=1" for i in range(3))))
    copy.rename(moved)
    with pytest.raises(ConfigError, match=rf"^teacher: no such checkpoint; got '{copy}'"):
        train(load_config("train", [f"run_dir={tmp_path}/run", "recipe.stages.2.steps=2"]))
    moved.rename(copy)
    assert train(load_config("train", [f"run_dir={tmp_path}/run", "recipe.stages.2.steps=2"])).step == 4


@pytest.mark.parametrize("recipe", ["linearize_tiny", "dsa_tiny"])
def test_a_run_cannot_be_converted_into_its_own_folder(teacher, recipe):
    source = "teacher" if recipe == "linearize_tiny" else "init_from"
    with pytest.raises(ConfigError, match=f"run_dir: holds a run that has not begun with recipe={recipe}; got .*"
                                          "expected a new folder for the converted model"):
        load_config("train", [f"recipe={recipe}", f"{source}={teacher}", f"run_dir={teacher}"])


def test_losses_against_a_teacher_need_one():
    stages = "recipe.stages=[{name: a, loss_weights: {teacher_kl: 1}}]"
    with pytest.raises(ConfigError, match=r"recipe.stages.0.loss_weights.teacher_kl: needs a teacher"):
        load_config("train", ["model=quickstart", stages])
    with pytest.raises(ConfigError, match=r"recipe.stages.0.trainable: names the mixers that recipe.convert puts in"):
        load_config("train", ["model=quickstart", "recipe.stages=[{name: a, trainable: ['@new']}]"])
    recipe = RecipeConfig(stages=[StageConfig(name="a")])
    assert recipe.parameter_patterns(["@new", "*"], tiny_run.model()) == ["*"]


def test_a_teacher_without_attention_is_refused(tmp_path):
    config = tiny_run.config(tmp_path, model_options={
        "schedule": ScheduleConfig(pattern=["linear", "linear"])}, steps=1, eval_every=0, eval_batches=0)
    run = train(config).run_dir
    with pytest.raises(ConfigError, match="teacher: holds a model without full attention: there is nothing to convert"):
        load_config("train", ["recipe=linearize_tiny", f"teacher={run}"])


def test_another_tokenizer_than_the_teachers_is_refused(teacher, tmp_path):
    config = settings(teacher, tmp_path, "data.tokenizer=bpe", "data.tokenizer_vocab_size=257")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: is not the teacher's: it differs in"):
        train(config)
    assert not (tmp_path / "converted").exists(), "nothing is converted and calibrated before it is refused"


def test_the_report_draws_what_was_compared(done):
    figures = {figure.id: figure for figure in run_figures(read_run(done.run_dir))[0]}
    assert [line.name for line in figures["teacher-loss"].panels[0].series] == ["student", "teacher", "window"]
    assert [line.name for line in figures["teacher-repeat"].panels[0].series] == ["student", "teacher", "window"]
    assert list(figures["alignment"].panels[0].series[0].x) == ["0", "2"]
    assert list(figures["hidden-error"].panels[0].series[0].x) == ["0", "1", "2"]


def test_streams_of_other_sizes_cannot_be_compared(teacher, tmp_path):
    recipe = tiny_run.stages({"name": "only", "steps": 1, "loss_weights": {"hidden": 1.0}})
    config = tiny_run.config(tmp_path, recipe=recipe)  # two layers; the teacher has three
    config.teacher = str(teacher)
    with pytest.raises(ConfigError, match=r"teacher: has other layers .* got '3 layers, 32 wide'; expected 2 layers"):
        train(config)
