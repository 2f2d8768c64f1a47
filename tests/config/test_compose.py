"""Composing a run from names, files and overrides; every mistake is one clear line."""

import logging
import math
import threading
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hybridlm.config import config_dir, from_dict, load_yaml, to_yaml
from hybridlm.config.paths import options
from hybridlm.config.schema import Config
from hybridlm.errors import ConfigError
from hybridlm.model.feed_forward import FEED_FORWARDS
from hybridlm.model.mixers import MIXERS
from hybridlm.run_config import load_config, load_model_config
from tests.support.mixer_forms import PRESET_SOURCES

pytestmark = pytest.mark.usefixtures("project_kinds")

MODELS = ", ".join(sorted(options("model")))


def error(*overrides: str, name: str = "train", folder: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides, folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


MINE = "defaults:\n  - quickstart\n  - _self_\n"


def test_a_run_without_overrides():
    config = load_config()
    assert config.model.layers() == ["kda", "kda", "kda", "full"]
    assert config.model.name == "quickstart"
    assert config.run_dir == "runs/quickstart"


def test_values_win_over_files_and_reach_keys_no_file_has():
    config = load_config("train", ["model=hybrid_tiny", "training.steps=7", "training.seed=3", "optimizer.lr=3e-4",
                                   "init_from=null", "model.mixers.full.window=16", "recipe.stages.0.name=first",
                                   "data.mixture=[{path: a, weight: 2}, {path: b}]", "kernels.strict=true"])
    assert (config.training.steps, config.training.seed, config.optimizer.lr) == (7, 3, 3e-4)
    assert config.model.mixers["full"].window == 16
    assert [source.weight for source in config.data.mixture] == [2.0, 1.0]
    assert config.recipe.stages[0].name == "first"
    assert config.kernels == {"strict": True}


def test_the_schedule_from_the_command_line():
    def layers(*overrides: str) -> list[str]:
        return load_config("train", ["model=hybrid_tiny", "model.num_layers=8", *overrides]).model.layers()

    assert layers("model.schedule.ratio=7", "model.schedule.linear=gdn") == ["gdn"] * 7 + ["full"]
    assert layers("model.schedule.ratio=0", "model.schedule.full=dsa") == ["dsa"] * 8
    assert layers("model.schedule.ratio=inf") == ["kda"] * 8
    assert layers("schedule@model.schedule=ratio_1") == ["kda", "full"] * 4
    assert layers("model.schedule.pattern=[gdn, swa]") == ["gdn", "swa"] * 4, "a pattern replaces the short form"
    assert layers("model.schedule.override={0: mla, -1: swa}") == ["mla", "kda", "kda", "full", *["kda"] * 3, "swa"]
    assert layers("model.schedule.override.1=full")[:3] == ["kda", "full", "kda"]
    text = error("model.schedule.pattern=[kda]", "model.schedule.ratio=1")
    assert text.startswith("model.schedule.linear: cannot stand beside 'pattern'")


def test_the_short_form_replaces_a_pattern(tmp_path):
    schedule = "schedule: {pattern: [kda, full], linear: null, full: null, ratio: null}\n"
    file = write(tmp_path / "mine.yaml", MINE + schedule)
    assert load_config("train", [f"model={file}"]).model.layers() == ["kda", "full"] * 2
    config = load_config("train", [f"model={file}", "model.schedule.ratio=inf", "model.schedule.linear=kda"])
    assert config.model.layers() == ["kda"] * 4


def test_a_mapping_with_a_kind_replaces_the_old_one():
    config = load_config("train", ["model.feed_forward={kind: dense, intermediate_size: 64}"])
    assert config.model.feed_forward.kind == "dense"
    merged = load_config("train", ["model.feed_forward={num_experts: 4}"])
    assert (merged.model.feed_forward.kind, merged.model.feed_forward.num_experts) == ("moe", 4)


def test_another_kind_leaves_the_options_of_the_old_one_behind():
    config = load_config("train", ["experiment=hybrid_1b", "optimizer.kind=adamw", "data.path=stdlib"])
    assert (config.optimizer.kind, config.optimizer.lr) == ("adamw", 6e-4)
    config = load_config("train", ["engine=zero3", "engine.kind=ddp", "engine.timeout=5"])
    assert (config.engine.kind, config.engine.timeout) == ("ddp", 5)
    assert error("optimizer=adamw", "optimizer.muon_lr=1") == (
        "optimizer.muon_lr: unknown key; it is an option of kind 'muon'")
    assert error("optimizer=muon", "optimizer.kind=adamw", "optimizer.muon_lr=1") == (
        "optimizer.muon_lr: unknown key; it is an option of kind 'muon'")
    assert error("engine=ddp", "engine.overlap=true").startswith("engine.overlap: unknown key; it is an option of kind")


def test_deleting_a_key_gives_its_default_back():
    assert load_config("train", ["~training.steps"]).training.steps == 1000
    config = load_config("train", ["optimizer.schedule.kind=wsd", "~optimizer.schedule"])
    assert config.optimizer.schedule.kind == "cosine"


def test_a_plus_before_an_override_is_allowed():
    assert load_config("train", ["+training.steps=3"]).training.steps == 3
    assert load_config("train", ["++training.steps=3"]).training.steps == 3
    assert load_config("train", ["+experiment=kimi_linear_tiny"]).model.name == "kimi_linear_tiny"


def test_a_config_is_named_by_experiment_or_model():
    assert load_config("kimi_linear_tiny").training.steps == 60, "an experiment, which sets sizes too"
    assert load_config("qwen3_next_80b").model.hidden_size == 2048
    assert load_config("kimi_linear_tiny", ["training.steps=2"]).training.steps == 2


def test_a_mixer_from_its_group():
    config = load_config("train", ["+mixer@model.mixers.gdn=gdn", "model.mixers.gdn.num_heads=4",
                                   "model.mixers.gdn.head_dim=32", "model.schedule.linear=gdn"])
    assert config.model.layers() == ["gdn", "gdn", "gdn", "full"]
    assert config.model.mixers["gdn"].decay == "scalar"


def test_a_yaml_file_in_place_of_a_model_name(tmp_path, monkeypatch):
    write(tmp_path / "quickstart.yaml", MINE + "hidden_size: 96\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("train", ["model=quickstart.yaml"])
    assert (config.model.hidden_size, config.model.num_layers) == (96, 4), "on top of the built-in of the same name"
    assert load_model_config("quickstart.yaml", ["model.num_layers=2"]).num_layers == 2
    other = write(tmp_path / "it's (mine).yaml", MINE.replace("quickstart", "hybrid_tiny") + "name: ''\n")
    assert load_model_config(other).name == "it_s__mine_"


def test_config_dir_is_searched_before_the_built_in_folder(tmp_path):
    write(tmp_path / "model" / "special.yaml", MINE + "name: special\n")
    write(tmp_path / "mixer" / "kda.yaml", "kind: delta_rule\ndecay: channel\nconv_size: 0\n")
    config = load_config("train", ["model=special"], tmp_path)
    assert config.model.name == "special"
    assert config.model.mixers["kda"].conv_size == 0, "mine hides the built-in one"
    assert "special" in options("model", tmp_path)
    assert "special" not in options("model")


def test_a_file_that_changes_is_read_again(tmp_path):
    for seed, text in ((None, ""), (5, "training: {seed: 5}\n"), (6, "training: {seed: 6}\n")):
        write(tmp_path / "experiment" / "mine.yaml", "# @package _global_\n" + text)
        config = load_config("train", ["experiment=mine"], tmp_path)
        assert config.training.seed == (seed or 0)
        config.training.seed = 100
    again = load_config("train", ["experiment=mine"], tmp_path)
    assert again.training.seed == 6, "what one caller changes is not what the next one gets"


def test_the_config_of_a_checkpoint_runs_again(tmp_path):
    config = load_config("train", ["model=qwen3_next_tiny", "training.steps=11", "model.schedule.ratio=inf"])
    file = write(tmp_path / "run" / "config.yaml", to_yaml(config))
    assert load_config(str(file)) == config
    assert load_config(str(file), ["training.steps=12"]).training.steps == 12
    assert load_model_config(file) == config.model, "its model part stands for the model"


def test_every_yaml_is_found_and_valid():
    for name in options("experiment"):
        assert isinstance(load_config("train", [f"experiment={name}"]), Config)
    for name in options("optimizer"):
        assert load_config("train", [f"optimizer={name}"]).optimizer.kind == name


@pytest.mark.parametrize("name", options("mixer"))
def test_every_mixer_of_the_group_stands_in_a_schedule(name):
    known = {"num_heads": 4, "head_dim": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
             "v_head_dim": 16, "rope_head_dim": 2, "q_lora_rank": 16, "output_groups": 2, "output_rank": 16,
             "embed_dim": 16}
    preset = load_yaml(config_dir() / "mixer" / f"{name}.yaml")
    kind = preset.get("kind", "mla")  # dsa starts from mla
    missing = MIXERS.config_class(kind).missing_sizes(preset)
    sizes = [size for key in missing for size in ([key] if key in known else [f"{key}.num_heads", f"{key}.head_dim"])]
    if preset.get("share_entries") and not preset["indexer"].get("share"):
        sizes.append("indexer.head_dim")  # that of the index keys of its source
    config = load_config("train", [f"+mixer@model.mixers.it={name}",
                                   f"model.schedule.pattern={[*PRESET_SOURCES.get(name, []), 'it']}",
                                   *(f"model.mixers.it.{size}={known[size.split('.')[-1]]}" for size in sizes)])
    assert "it" in config.model.layers()


@pytest.mark.parametrize("text", [
    "/tmp/x y/z", "a=b.txt", "~/texts", "/tmp/a[1](2)/b", "a,b", "*.txt", "2024_01_01", "17", "true", "C:\\dir\\",
    "it's", "<|end|>", "{a}", ""])
def test_text_values_need_no_quotes(text):
    assert load_config("train", [f"data.path={text}"]).data.path == text
    config = load_config("train", ["data.mixture=[{path: a}]", f"data.mixture.0.path={text}"])
    assert config.data.mixture[0].path == text


def test_text_in_quotes_null_and_references():
    config = load_config("train", ["data.path='a, b'", 'run_dir="runs/${model.name}-1"', "data.validation_path=null"])
    assert (config.data.path, config.run_dir, config.data.validation_path) == ("a, b", "runs/quickstart-1", None)
    assert load_config("train", ["run_dir=runs[${training.steps}]"]).run_dir == "runs[1000]"


OWN = "A kind of your own is registered with --import FILE"


@pytest.mark.parametrize(("overrides", "message"), [
    (["model=kimi_linaer_tiny"], f"model: no such option; got 'kimi_linaer_tiny'; expected one of {MODELS}; "
                                 "did you mean 'kimi_linear_tiny'?"),
    (["modle=quickstart"], "modle: unknown key; did you mean 'model'?"),
    (["model.hiden_size=64"], "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
    (["+training.stps=3"], "training.stps: unknown key; did you mean 'steps'?"),
    (["steps=3"], "steps: unknown key; did you mean 'training.steps'?"),
    (["training.lr=1"], "training.lr: unknown key; did you mean 'optimizer.lr'?"),
    (["model.hidden_size=abc"], "model.hidden_size: has the wrong type; got 'abc'; expected a whole number"),
    (["training.steps=true"], "training.steps: has the wrong type; got True; expected a whole number"),
    (["model.hidden_size.x=3"], "model.hidden_size: has the wrong type; got {'x': 3}; expected a whole number"),
    (["tracking.wandb=ofline"],
     "tracking.wandb: unknown value; got 'ofline'; expected one of off, offline, online; did you mean 'offline'?"),
    (["model.schedule.pattern=[kdda, full]"],
     "model.schedule: layer 0 names an unknown mixer; got 'kdda'; expected one of full, kda of the model, or a preset: "
     f"{', '.join(options('mixer'))}; did you mean 'kda'? {OWN}"),
    (["model.mtp={depth: 1, mixer: fulll}"],
     "model.mtp.mixer: names an unknown mixer; got 'fulll'; expected one of full, kda of the model, or a preset: "
     f"{', '.join(options('mixer'))}; did you mean 'full'? {OWN}"),
    (["model.schedule.pattern=[]"],
     "model.schedule.pattern: names no mixer; got []; expected a list of mixer names such as [kda, kda, kda, full]"),
    (["model.schedule.override={40: full}"],
     "model.schedule.override: names a layer the model does not have; got 40; expected a layer between -4 and 3"),
    (["model=hybrid_tiny", "model.mixers.full.num_kv_heads=3"],
     "model.mixers.full.num_kv_heads: must divide num_heads; got 3; expected a divisor of 4"),
    (["model.feed_forward.num_experts_per_tok=9"], "model.feed_forward.num_experts_per_tok: is more than there are "
     "experts; got 9; expected at most num_experts = 8"),
    (["model.feed_forward.kind=mo"],
     "model.feed_forward.kind: unknown kind; got 'mo'; expected one of " + ", ".join(sorted(FEED_FORWARDS))
     + "; did you mean 'moe'? A feed-forward of your own is registered with --import FILE"),
    (["model.mixers.full._target_=os.system"], "model.mixers.full._target_: is refused: a config cannot name code to "
     "run; got 'os.system'; expected a registered 'kind'"),
    (["data=files"], "data.path: is missing; expected text"),
    (["data=fils"], "data: no such option; got 'fils'; expected one of files, stdlib; did you mean 'files'?"),
    (["experiment=quikstart"], "experiment: no such option; got 'quikstart'; expected one of "
     f"{', '.join(options('experiment'))}; did you mean 'quickstart'?"),
    (["schedule@model.schedule=ratio_8"], "schedule: no such option; got 'ratio_8'; expected one of ratio_0, ratio_1, "
     "ratio_3, ratio_7, ratio_inf; did you mean 'ratio_7'?"),
    (["mixer=kda"], "Could not override 'mixer'. Did you mean to override one of mixer@model.mixers.full, "
     "mixer@model.mixers.kda?"),
    (["mixr@model.mixers.kda=gdn"], "mixr: unknown config group; expected one of data, engine, experiment, "
     "feed_forward, ladder, mixer, model, optimizer, recipe, schedule, sweep; did you mean 'mixer'?"),
    (["training.steps"], "training.steps: is not an override; expected key=value"),
    (["=3"], "cannot read the override '=3': no key; expected key=value"),
    (["training.steps=3)"], "cannot read the override 'training.steps=3)': extraneous input ')' expecting <EOF>; "
     "expected key=value; quote a value with special characters: 'key=\"value\"'"),
    (["data.path='a"], "cannot read the override \"data.path='a\": a special character; expected key=value; "
     "quote a value with special characters: 'key=\"value\"'"),
    (["training.steps=1,2"], "training.steps: has several values, a run takes one; got '1,2'; write a list as [a,b], "
     "or quote text that has a comma"),
    (["model=[quickstart]"], f"model: must name a config; got ['quickstart']; expected one of {MODELS}"),
    (["model=null"], f"model: must name a config; got 'null'; expected one of {MODELS}"),
    (["~model"], f"model: must name a config; got 'null'; expected one of {MODELS}"),
    (["~training.stps"], "training.stps: cannot be deleted: there is no such key; did you mean 'steps'?"),
    (["recipe.stages.3.steps=1"], "recipe.stages.3.steps: names an entry that recipe.stages does not have; got 3; "
     "expected 0 to 0"),
    (["hydra.verbose=true"], "hydra.verbose: Hydra's own settings are not used here"),
    (["run_dir=${nowhere.x}"], "run_dir: Interpolation key 'nowhere.x' not found"),
    (["run_dir=${oc.env:HYBRIDLM_NOT_SET}"], "run_dir: KeyError raised while resolving interpolation: "
     "\"Environment variable 'HYBRIDLM_NOT_SET' not found\""),
    (["model=nowhere.yaml"], "model: no such file; got 'nowhere.yaml'; expected a YAML file"),
])
def test_a_mistake_on_the_command_line_is_one_line(overrides, message):
    assert error(*overrides) == message


@pytest.mark.parametrize(("text", "message"), [
    ("hiden_size: 96\n", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
    ("mixers: {kda: {num_head: 2}}\n", "model.mixers.kda.num_head: unknown key; did you mean 'num_heads'?"),
    ("mixers: {full: {_target_: os.system}}\n", "model.mixers.full._target_: is refused: a config cannot name code to "
     "run; got 'os.system'; expected a registered 'kind'"),
    ("hidden_size: ${nowhere}\n", "model.hidden_size: Interpolation key 'nowhere' not found"),
    ("published:\n  total: ???\n  active: 1\n", "model.published.total: is missing; expected a number"),
    ("hidden_size: '96'\n", "model.hidden_size: has the wrong type; got '96'; expected a whole number"),
])
def test_a_mistake_in_a_file_is_one_line(tmp_path, text, message):
    file = write(tmp_path / "mine.yaml", MINE + text)
    assert error(f"model={file}") == message
    write(tmp_path / "folder" / "model" / "mine.yaml", MINE + text)
    assert error("model=mine", folder=tmp_path / "folder") == message


def test_a_misspelt_key_that_a_model_must_have(tmp_path):
    text = "vocab_size: 300\nhidden_size: 32\nnum_layer: 2\nmixers: {}\nschedule: {pattern: [kda, full]}\n"
    file = write(tmp_path / "mine.yaml", text)
    assert error(f"model={file}") == "model.num_layer: unknown key; did you mean 'num_layers'?"
    file = write(tmp_path / "mine.yaml", text.replace("num_layer: 2\n", ""))
    assert error(f"model={file}") == "model.num_layers: is missing; expected a whole number"


def test_broken_yaml_and_unknown_defaults(tmp_path):
    file = write(tmp_path / "mine.yaml", "a: [1,\nb: 2\n")
    where = "line 3, column 1 is not valid YAML: expected ',' or ']', but got '<stream end>'"
    assert error(f"model={file}") == f"{file} {where}"
    write(tmp_path / "folder" / "model" / "torn.yaml", "a: [1,\nb: 2\n")
    assert error("model=torn", folder=tmp_path / "folder").endswith(where)
    file = write(tmp_path / "mine.yaml", MINE.replace("quickstart", "quickstrt"))
    assert error(f"model={file}") == ("model: no such option (named in model/mine.yaml); got 'quickstrt'; "
                                      f"expected one of {MODELS}; did you mean 'quickstart'?")
    assert error(folder=tmp_path / "nowhere").startswith("config_dir: is not a folder; got ")


def test_unknown_config_names(tmp_path):
    assert error(name="kimi").startswith("no config of this name; got 'kimi'; expected one of character_ai_tiny, ")
    assert error(name="trian").endswith("did you mean 'train'?")
    file = write(tmp_path / "mine.yaml", MINE)
    assert error(name=str(file)).endswith("this file should be a whole run; a model's own file goes into model=FILE")


def test_composing_leaves_no_files_handlers_or_hydra_state(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    for _ in range(2):
        load_config()
    with pytest.raises(ConfigError):
        load_config("train", ["model=nothing"])
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger().handlers == handlers
    assert not GlobalHydra.instance().is_initialized()
    assert capfd.readouterr() == ("", "")


def test_composing_inside_another_hydra_application(tmp_path):
    write(tmp_path / "mine.yaml", "a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert load_config("train", ["training.steps=2"]).training.steps == 2
        assert compose("mine").a == 1


def test_composing_in_threads():
    results: list[int] = []

    def load(steps: int) -> None:
        results.append(load_config("train", [f"training.steps={steps}"]).training.steps)

    threads = [threading.Thread(target=load, args=(steps,)) for steps in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [1, 2, 3]


def test_the_built_in_folder():
    assert config_dir().is_absolute()
    assert (config_dir() / "model" / "quickstart.yaml").is_file()


def test_the_folder_inside_the_package_comes_first(tmp_path, monkeypatch):
    write(tmp_path / "configs" / "train.yaml", "{}")
    monkeypatch.setattr("hybridlm.config.paths.__file__", str(tmp_path / "hybridlm" / "config" / "paths.py"))
    assert config_dir() == tmp_path / "configs", "a checkout"
    write(tmp_path / "hybridlm" / "configs" / "train.yaml", "{}")
    assert config_dir() == tmp_path / "hybridlm" / "configs", "a wheel"
    monkeypatch.setattr("hybridlm.config.paths.__file__", str(tmp_path / "none" / "a" / "config" / "paths.py"))
    with pytest.raises(ConfigError, match="the built-in configs are missing"):
        config_dir()


def test_infinite_ratio_survives_yaml(tmp_path):
    config = load_config("train", ["model.schedule.ratio=inf"])
    assert math.isinf(config.model.schedule.ratio)
    file = write(tmp_path / "config.yaml", to_yaml(config))
    assert load_config(str(file)).model.layers() == ["kda"] * 4
    assert from_dict(Config, {"model": config.model}).model is config.model
