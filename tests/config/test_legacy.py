"""Names of earlier versions: read in saved configs, refused with the new name wherever a person writes them."""

import copy
import shutil
from pathlib import Path

import pytest

from hybridlm.config import from_dict, load_yaml, to_dict
from hybridlm.config.legacy import (
    EARLIER_FIELDS,
    RENAMED_KEYS,
    RENAMED_VALUES,
    is_saved_config,
    load_saved_config,
    refuse_renamed,
    upgrade_config,
    upgrade_layers,
)
from hybridlm.config.schema import Config
from hybridlm.config.serialization import hint_at
from hybridlm.errors import ConfigError
from hybridlm.run_config import load_config

OLD = Path(__file__).parent / "saved" / "version_0_1.yaml"


def test_a_saved_config_of_version_0_1_is_read():
    config = from_dict(Config, load_saved_config(OLD))
    assert config.model.mixers["lightning"].kind == "linear_attention"
    assert config.model.layers() == ["kda", "lightning", "gqa", "mla", "dsa"]
    assert config.model.mixers["lightning"].residual.alpha == 1.2
    assert config.optimizer.muon_momentum == 0.95
    assert config.engine.context_parallel == 1
    assert config.model.mtp.depth == 1


def test_upgrading_twice_or_a_config_of_today_changes_nothing():
    data = load_yaml(OLD)
    before = copy.deepcopy(data)
    once = upgrade_config(data)
    assert data == before, "the argument is left alone"
    assert upgrade_config(once) == once != before
    now = to_dict(load_config("train", ["model=minimax_01_tiny"]))
    assert upgrade_config(now) == now
    refuse_renamed(now)


def test_keys_and_values_move_with_their_content():
    data = {"engine": {"sequence_parallel": 4}, "kernels": {"decay_attention": "torch"},
            "model": {"mixers": {"a": {"kind": "decay"}, "b": {"kind": "mla"}}},
            "recipe": {"stages": [{"trainable": ["*.mixer.f.*", "embed.*"]}]}}
    assert upgrade_config(data) == {
        "engine": {"context_parallel": 4}, "kernels": {"linear_attention": "torch"},
        "model": {"mixers": {"a": {"kind": "linear_attention"}, "b": {"kind": "mla"}}},
        "recipe": {"stages": [{"trainable": ["*.mixer.*", "embed.*"]}]}}
    assert upgrade_config(None) is None
    assert upgrade_config({"engine": None, "model": 3}) == {"engine": None, "model": 3}
    layers = [{"layer": 0, "mixer": "a", "kind": "decay"}, {"layer": 1, "mixer": "decay", "kind": "mla"}]
    assert [layer["kind"] for layer in upgrade_layers(layers)] == ["linear_attention", "mla"]


def test_a_kind_s_section_loses_the_options_of_other_kinds_alone():
    old = load_yaml(OLD)
    for kind in ("adamw", "muon"):
        data = copy.deepcopy(old) | {"optimizer": old["optimizer"] | {"kind": kind}}
        assert from_dict(Config, upgrade_config(data)).optimizer.kind == kind
    for kind in ("single", "ddp", "zero1", "zero2", "zero3"):
        data = copy.deepcopy(old) | {"engine": old["engine"] | {"kind": kind}}
        assert from_dict(Config, upgrade_config(data)).engine.kind == kind
    data = upgrade_config(old | {"optimizer": old["optimizer"] | {"momentun": 1}})
    with pytest.raises(ConfigError, match=r"optimizer\.momentun: unknown key"):
        from_dict(Config, data)
    missing = {"optimizer": {"kind": "not_registered", "lr": 1, "muon_lr": 2}}
    assert upgrade_config(missing) == missing


def test_every_new_name_is_one_of_today():
    for new in RENAMED_KEYS.values():
        assert hint_at(Config, new.replace("*", "0")) is not None or new.startswith("kernels."), new
    for section, fields in EARLIER_FIELDS.items():
        assert [key for key in fields if hint_at(Config, f"{section}.{key}") is None] == []
    assert [path for path in RENAMED_VALUES if hint_at(Config, path.replace("*", "0")) is None] == []


@pytest.mark.parametrize(("override", "message"), [
    ("engine.sequence_parallel=2", "engine.sequence_parallel: was renamed; expected engine.context_parallel"),
    ("kernels.decay_attention=torch", "kernels.decay_attention: was renamed; expected kernels.linear_attention"),
    ("model.mixers.full={kind: decay, num_heads: 2, head_dim: 8}",
     "model.mixers.full.kind: was renamed; got 'decay'; expected linear_attention"),
])
def test_an_old_name_that_a_person_writes_is_refused_with_the_new_one(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("train", [override])
    assert str(caught.value) == message


def test_an_old_name_in_a_person_s_own_file_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - quickstart\n  - _self_\nmixers: {kda: {kind: decay}}\n")
    with pytest.raises(ConfigError, match=r"model\.mixers\.kda\.kind: was renamed; got 'decay'; expected linear_att"):
        load_config("train", [f"model={file}"])


def test_the_config_of_an_old_checkpoint_runs_again(tmp_path):
    file = tmp_path / "config.yaml"
    shutil.copyfile(OLD, file)
    assert is_saved_config(load_yaml(file))
    config = load_config(str(file), ["run_dir=runs/again"])
    assert config.run_dir == "runs/again"
    as_model = load_config("train", [f"model={file}", "training.sequence_length=64"])
    assert as_model.model == config.model, "its model stands for a model"
    assert config.model.mixers["lightning"].kind == "linear_attention"
    only_model = {"model": to_dict(config.model)}
    assert is_saved_config(only_model), "an imported checkpoint"
    assert not is_saved_config({"model": {"hidden_size": 8}})
    assert not is_saved_config({"defaults": [], **to_dict(config)})
