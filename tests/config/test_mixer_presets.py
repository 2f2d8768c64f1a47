"""Every preset of configs/mixer stands in any model by its name alone; sizes follow the model's."""

import dataclasses

import pytest

from hybridlm.config import from_dict, load_yaml, to_yaml
from hybridlm.config.compose import compose_option
from hybridlm.config.paths import options
from hybridlm.config.schema import Config
from hybridlm.errors import ConfigError
from hybridlm.model.cost import count_parameters
from hybridlm.model.mixers import MIXERS, AttentionConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.run_config import load_config
from tests.support.mixer_forms import PRESET_SOURCES


def mixers(*overrides: str, folder=None) -> dict[str, MixerConfig]:
    return load_config("train", overrides, folder).model.mixers


@pytest.mark.parametrize("name", options("mixer"))
def test_every_preset_is_named_in_a_model_that_lacks_it(name):
    pattern = [*PRESET_SOURCES.get(name, []), name, "full"]
    config = load_config("train", ["model=kimi_linear_tiny", f"model.schedule.pattern={pattern}"])
    assert config.model.layers()[: len(pattern)] == pattern
    assert count_parameters(config.model).total > 0
    heads = config.model.mixers[name].head_sizes()
    assert heads is None or (heads.num_heads == 4 and heads.head_dim in (8, 16)), "those of kda and full, or half keys"


def test_the_added_mixer_is_written_out_and_runs_again(tmp_path):
    config = load_config("train", ["model=kimi_linear_tiny", "model.schedule.linear=gdn"])
    assert config.model.layers() == ["gdn", "gdn", "gdn", "full", "gdn", "gdn", "full"]
    assert set(config.model.mixers) == {"kda", "full", "gdn"}
    gdn = config.model.mixers["gdn"]
    assert (gdn.kind, gdn.decay, gdn.num_heads, gdn.head_dim, gdn.conv_size) == ("delta_rule", "scalar", 4, 16, 4)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_yaml(file)["model"]["mixers"]["gdn"]["num_heads"] == 4
    assert from_dict(Config, load_yaml(file)) == config == load_config(str(file))


def test_own_options_win_over_the_preset_and_over_the_model_s_sizes(tmp_path):
    gdn = mixers("model=kimi_linear_tiny", "model.schedule.linear=gdn", "model.mixers.gdn.num_heads=2",
                 "model.mixers.gdn.conv_size=0")["gdn"]
    assert (gdn.num_heads, gdn.head_dim, gdn.conv_size, gdn.a_init) == (2, 16, 0, (0.01, 16.0))
    dsa = mixers("model.schedule.full=dsa", "model.mixers.dsa.indexer.topk=16")["dsa"]
    assert (dsa.kind, dsa.indexer.topk, dsa.indexer.norm_eps) == ("mla", 16, 1e-6)
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - quickstart\n  - _self_\nmixers: {gla: {head_dim: 8}}\nschedule: {linear: gla}\n")
    gla = mixers(f"model={file}")["gla"]
    assert (gla.kind, gla.num_heads, gla.head_dim) == ("linear_attention", 4, 8)


def test_pattern_override_and_multi_token_prediction_name_presets_too():
    found = mixers("model.schedule.pattern=[retnet, full]", "model.schedule.override={0: swa}",
                   "model.mtp={depth: 1, mixer: mamba2}")
    assert set(found) == {"kda", "full", "swa", "retnet", "mamba2"}
    assert set(mixers("model.schedule.ratio=0", "model.schedule.linear=gdn")) == {"kda", "full"}, "in no layer"


@pytest.mark.parametrize("option", ["indexer=[1, 2]", "rope=[1]", "residual=[1]"])
def test_a_list_in_place_of_a_mapping_is_one_line(option):
    key = option.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^model\.mixers\.csa\.{key}: ") as error:
        mixers("model.schedule.full=csa", f"model.mixers.csa.{option}")
    assert "\n" not in str(error.value)


PLACE = ModelSizes(64, max_position=1024, mixers=[AttentionConfig(num_heads=4, head_dim=16)])
PRESET_OF_KIND = {compose_option("mixer", name)["kind"]: name for name in options("mixer")[::-1]}


def fitted(preset, **own):
    """The config of a preset with a person's own options in a model like `PLACE`."""
    given = compose_option("mixer", preset, own)
    return from_dict(MixerConfig, MIXERS.config_class(given["kind"]).fill_sizes(given, PLACE), preset)


@pytest.mark.parametrize("preset", sorted({*PRESET_OF_KIND.values(), "csa", "dsa", "dsa_pooled", "moba"}))
def test_a_wrong_option_of_any_preset_is_no_error_of_the_program(preset):
    given = compose_option("mixer", preset)
    config_class = MIXERS.config_class(given["kind"])
    names = {field.name for field in dataclasses.fields(config_class)} - {"kind"}
    changes = [{name: value} for name in sorted(names) for value in ("x", 0, -2, [1], True)]
    if "indexer" in given:
        changes += [{"indexer": {name: value}} for name in ("num_heads", "head_dim", "topk", "pool", "rope_dim")
                    for value in ("x", 0, -2, [1])]
    refused = 0
    for change in changes:
        try:
            from_dict(MixerConfig, config_class.fill_sizes({**given, **change}, PLACE))
        except ConfigError:
            refused += 1
    assert refused >= len(changes) / 3


@pytest.mark.parametrize(("preset", "option", "message"), [
    ("csa", "ratio=x", r"csa\.ratio: .*got 'x'"), ("csa", "indexer=3", r"csa\.indexer: has the wrong type; got 3"),
    ("csa", "indexer=true", r"csa\.indexer: has the wrong type; got True"),
    ("csa", "num_heads=x", r"csa\.num_heads: .*got 'x'"), ("csa", "num_heads=-2", r"csa\.num_heads: .*got -2"),
    ("dsa", "indexer=3", r"dsa\.indexer: has the wrong type; got 3"),
    ("dsa", "num_heads=x", r"dsa\.num_heads: .*got 'x'"),
    ("moba", "block=x", r"moba\.block: .*got 'x'"), ("moba", "block=0", r"moba\.block: must be positive; got 0")])
def test_a_size_that_others_follow_is_blamed_itself(preset, option, message):
    with pytest.raises(ConfigError, match=message):
        mixers("model=kimi_linear_tiny", f"model.schedule.full={preset}", f"model.mixers.{preset}.{option}")


def test_sizes_that_are_given_leave_the_others_as_they_would_be():
    """A preset with heads and dims of its own has the blocks, entries and indexers of the model's context."""
    alone = {name: fitted(name) for name in ("hca", "csa", "moba", "nsa", "dsa")}
    for name, config in alone.items():
        required = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
                    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
        assert required
        assert not type(config).missing_sizes({"kind": config.kind, **required})
        assert fitted(name, **required) == config
    assert alone["hca"].ratio == 32
    assert fitted("hca", ratio=None).ratio is None
    assert fitted("hca", ratio=8).ratio == 8
    assert (alone["csa"].indexer.num_heads, alone["csa"].indexer.head_dim, alone["csa"].indexer.topk) == (4, 16, 32)
    assert fitted("csa", indexer={"topk": 5}).indexer.topk == 5
    assert (alone["moba"].block, alone["moba"].topk, alone["dsa"].indexer.topk) == (16, 8, 128)


def test_a_mixer_that_the_model_defines_stays_its_own():
    assert mixers("model=minimax_01_tiny")["full"] == mixers("model=minimax_01_tiny", "model.schedule.ratio=0")["full"]
    assert mixers("model=minimax_01_tiny")["full"].rope.partial_rotary_factor == 0.5


def test_an_added_mixer_joins_the_residual_as_the_model_s_do():
    found = mixers("model=minimax_01_tiny", "model.schedule.linear=gdn")
    assert found["gdn"].residual == found["lightning"].residual
    assert found["gdn"].residual.form == "normed"


def test_a_preset_of_ones_own_folder(tmp_path):
    (tmp_path / "mixer").mkdir()
    (tmp_path / "mixer" / "mine.yaml").write_text("defaults: [kda, _self_]\nconv_size: 2\n")
    mine = mixers("model.schedule.linear=mine", folder=tmp_path)["mine"]
    assert (mine.decay, mine.conv_size, mine.num_heads) == ("channel", 2, 4)
    with pytest.raises(ConfigError, match=r"unknown mixer; got 'mine'; expected one of full, kda of the model"):
        load_config("train", ["model.schedule.linear=mine"])


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.schedule.linear=gdn", "model.mixers.gdn.num_head=2"],
     "model.mixers.gdn.num_head: unknown key; did you mean 'num_heads'?"),
    (["model.schedule.linear=gdn", "model.mixers.gdn.head_dim=x"],
     "model.mixers.gdn.head_dim: has the wrong type; got 'x'; expected a whole number"),
    (["model.schedule.linear=gdn", "model.hidden_size=abc"],
     "model.hidden_size: has the wrong type; got 'abc'; expected a whole number"),
    (["model.schedule.linear=gdn", "model.num_layers=abc"],
     "model.num_layers: has the wrong type; got 'abc'; expected a whole number"),
    (["model.schedule.linear=gdn", "model.mixers=3"], "model.mixers: has the wrong type; got 3; expected a mapping "
     "of text to a mapping"),
    (["model.schedule.linear=gdn", "model.mixers.gdn=3"], "model.mixers.gdn: has the wrong type; got 3; expected a "
     "mapping with keys among kind, residual"),
])
def test_a_mistake_beside_a_preset_is_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("train", overrides)
    assert str(caught.value) == message


def test_a_registered_kind_without_a_preset_is_named_likewise():
    named = mixers("model=kimi_linear_tiny", "model.schedule.full=mla", "model.mixers.mla.v_head_dim=8")
    assert named["mla"].v_head_dim == 8
    plain = mixers("model=kimi_linear_tiny", "model.schedule.linear=linear_attention")["linear_attention"]
    assert (plain.kind, plain.num_heads, plain.head_dim) == ("linear_attention", 4, 16)


def test_a_name_that_is_nothing_says_how_a_kind_of_one_s_own_is_registered():
    with pytest.raises(ConfigError, match=r"got 'zzz'; expected .*a preset: .*registered with --import FILE"):
        mixers("model=kimi_linear_tiny", "model.schedule.linear=zzz")
