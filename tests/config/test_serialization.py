"""Plain data to typed configs: types, defaults, round trips, and the one-line errors."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hybridlm.config.schema import Config, DataConfig, StageConfig, TrackingConfig, TrainingConfig
from hybridlm.config.serialization import describe, from_dict, hint_at, known_paths, load_yaml, to_dict, to_yaml
from hybridlm.errors import ConfigError
from hybridlm.kind_registry import KindError, KindRegistry, registry_of, registry_with
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.feed_forward import FEED_FORWARDS, DenseConfig, MoEConfig
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.mixers import MIXERS, AttentionConfig, DeltaRuleConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.optimizers import AdamWConfig, LionConfig, OptimizerConfig


@dataclass(kw_only=True)
class Inner:
    size: int = 1


@dataclass(kw_only=True)
class Sample:
    count: int
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    mode: Literal["off", "fast", "slow"] = "off"
    maybe: int | None = None
    either: int | str = 1
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    items: list[Inner] = field(default_factory=list)
    table: dict[int, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    anything: dict[str, Any] = field(default_factory=dict)


def model_data(**changes: Any) -> dict[str, Any]:
    data = {
        "vocab_size": 512, "hidden_size": 32, "num_layers": 4,
        "schedule": {"linear": "kda", "full": "full", "ratio": 3},
        "mixers": {"kda": {"kind": "delta_rule", "num_heads": 2, "head_dim": 16},
                   "full": {"kind": "attention", "num_heads": 2, "head_dim": 16}},
        "feed_forward": {"kind": "dense", "intermediate_size": 64},
    }
    return data | changes


def error(cls: type, data: Any, path: str = "") -> str:
    """The message of the ConfigError, which is one line."""
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, data, path)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_values_take_the_types_of_the_hints():
    sample = from_dict(Sample, {
        "count": 3, "rate": 2, "mode": "fast", "maybe": 4, "either": "x", "pair": [5, 6], "many": [1, 2, 3],
        "items": [{"size": 2}, {}], "table": {"-1": "a", 2: "b"}, "inner": {"size": 9}, "anything": {"k": [1, {}]}})
    assert sample == Sample(count=3, rate=2.0, mode="fast", maybe=4, either="x", pair=(5, 6.0), many=(1, 2, 3),
                            items=[Inner(size=2), Inner()], table={-1: "a", 2: "b"}, inner=Inner(size=9),
                            anything={"k": [1, {}]})
    assert type(sample.rate) is float
    assert type(sample.pair[1]) is float


def test_a_whole_float_is_a_whole_number():
    sample = from_dict(Sample, {"count": 1e9})
    assert sample.count == 1_000_000_000
    assert type(sample.count) is int


@pytest.mark.parametrize(("data", "message"), [
    ({"count": "abc"}, "count: has the wrong type; got 'abc'; expected a whole number"),
    ({"count": 1.5}, "count: has the wrong type; got 1.5; expected a whole number"),
    ({"count": True}, "count: has the wrong type; got True; expected a whole number"),
    ({"count": "3"}, "count: has the wrong type; got '3'; expected a whole number"),
    ({"count": None}, "count: must not be null; expected a whole number"),
    ({"count": "???"}, "count: is missing; expected a whole number"),
    ({}, "count: is missing; expected a whole number"),
    ({"count": 1, "rate": True}, "rate: has the wrong type; got True; expected a number"),
    ({"count": 1, "rate": "fast"}, "rate: has the wrong type; got 'fast'; expected a number"),
    ({"count": 1, "rate": math.nan}, "rate: is not a number; got nan; expected a number"),
    ({"count": math.nan}, "count: is not a number; got nan; expected a whole number"),
    ({"count": 1, "flag": 1}, "flag: has the wrong type; got 1; expected true or false"),
    ({"count": 1, "flag": "true"}, "flag: has the wrong type; got 'true'; expected true or false"),
    ({"count": 1, "name": 7},
     "name: has the wrong type; got 7; expected text; quote it to make it text, on a command line name=\"'7'\""),
    ({"count": 1, "mode": "fst"},
     "mode: unknown value; got 'fst'; expected one of off, fast, slow; did you mean 'fast'?"),
    ({"count": 1, "maybe": "x"}, "maybe: has the wrong type; got 'x'; expected a whole number"),
    ({"count": 1, "either": 1.5}, "either: has the wrong type; got 1.5; expected a whole number or text"),
    ({"count": 1, "pair": [1]}, "pair: has the wrong length; got [1]; expected a list [a whole number, a number]"),
    ({"count": 1, "pair": 3}, "pair: has the wrong type; got 3; expected a list [a whole number, a number]"),
    ({"count": 1, "many": [1, "x"]}, "many.1: has the wrong type; got 'x'; expected a whole number"),
    ({"count": 1, "items": {}}, "items: has the wrong type; got {}; expected a list of a mapping"),
    ({"count": 1, "items": [{}, {"sise": 1}]}, "items.1.sise: unknown key; did you mean 'size'?"),
    ({"count": 1, "table": {"x": "a"}}, "table: has the wrong type; got 'x'; expected a whole number"),
    ({"count": 1, "table": [1]},
     "table: has the wrong type; got [1]; expected a mapping of a whole number to text"),
    ({"count": 1, "inner": 3}, "inner: has the wrong type; got 3; expected a mapping with keys among size"),
    ({"count": 1, "inner": {"size": "a"}}, "inner.size: has the wrong type; got 'a'; expected a whole number"),
    ({"count": 1, "zzz": 1}, "zzz: unknown key; expected one of count, rate, name, flag, mode, maybe, either, pair, "
                             "many, items, table, inner, anything"),
])
def test_a_wrong_value_is_one_clear_line(data, message):
    assert error(Sample, data) == message


def test_a_word_that_yaml_reads_as_a_boolean():
    assert from_dict(TrackingConfig, {"wandb": False}).wandb == "off"
    assert "unknown value; got True" in error(TrackingConfig, {"wandb": True})


def test_infinity_in_its_spellings():
    for spelling in ("inf", ".inf", math.inf):
        schedule = from_dict(ScheduleConfig, {"linear": "kda", "ratio": spelling})
        assert math.isinf(schedule.ratio)
    assert from_dict(Sample, {"count": 1, "rate": "-inf"}).rate == -math.inf


def test_a_key_in_the_wrong_place_is_pointed_to_the_right_one():
    assert error(Config, {"lr": 1}) == "lr: unknown key; did you mean 'optimizer.lr'?"
    assert error(Config, {"training": {"lr": 1}}) == "training.lr: unknown key; did you mean 'optimizer.lr'?"
    assert error(Config, {"training": {"stps": 1}}) == "training.stps: unknown key; did you mean 'steps'?"


def test_errors_of_a_dataclass_carry_the_whole_path():
    text = error(Config, {"model": model_data(), "optimizer": {"lr": -1}})
    assert text == "optimizer.lr: must be positive and finite; got -1.0"
    text = error(Config, {"model": model_data(), "data": {"mixture": [{"weight": 1}, {"weight": -2}]}})
    assert text == "data.mixture.1.weight: must be positive and finite; got -2.0"


def test_the_kind_picks_the_class():
    model = from_dict(ModelConfig, model_data())
    assert type(model.mixers["kda"]) is DeltaRuleConfig
    assert type(model.mixers["full"]) is AttentionConfig
    assert type(model.feed_forward) is DenseConfig
    moe = from_dict(FeedForwardConfig, {"kind": "moe", "num_experts": 4, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 8})
    assert type(moe) is MoEConfig


@pytest.mark.parametrize(("cls", "data", "message"), [
    (MixerConfig, {"kind": "delta_rul"},
     "m.kind: unknown kind; got 'delta_rul'; expected one of " + ", ".join(sorted(MIXERS)) + "; "
     "did you mean 'delta_rule'? A mixer of your own is registered with --import FILE"),
    (MixerConfig, {"num_heads": 2}, "m.kind: is missing; expected one of " + ", ".join(sorted(MIXERS))),
    (FeedForwardConfig, {"kind": "os.system"},
     "m.kind: unknown kind; got 'os.system'; expected one of " + ", ".join(sorted(FEED_FORWARDS)) + "; "
     "a feed-forward of your own is registered with --import FILE"),
    (FeedForwardConfig, {"kind": ["moe"]},
     "m.kind: unknown kind; got ['moe']; expected one of " + ", ".join(sorted(FEED_FORWARDS)) + "; "
     "did you mean 'moe'? A feed-forward of your own is registered with --import FILE"),
    (FeedForwardConfig, {"kind": "dense"}, "m.intermediate_size: is missing; expected a whole number"),
    (FeedForwardConfig, {"kind": "dense", "intermediate_size": 8, "num_experts": 4},
     "m.num_experts: unknown key; it is an option of kind 'moe'"),
    (MixerConfig, {"kind": "attention", "num_heads": 3, "num_kv_heads": 2, "head_dim": 4},
     "m.num_kv_heads: must divide num_heads; got 2; expected a divisor of 3"),
    (FeedForwardConfig, {"kind": "moe", "num_experts": 4, "num_experts_per_tok": 5, "moe_intermediate_size": 8},
     "m.num_experts_per_tok: is more than there are experts; got 5; expected at most num_experts = 4"),
])
def test_a_wrong_mixer_or_feed_forward(cls, data, message, project_kinds):
    assert error(cls, data, "m") == message


@dataclass(kw_only=True)
class ShapeConfig:
    form: str
    colour: str = "red"


@dataclass(kw_only=True)
class CircleConfig(ShapeConfig):
    radius: float = 1.0
    points: int = 0


@dataclass(kw_only=True)
class SquareConfig(ShapeConfig):
    width: int
    points: str = "four"


@dataclass(kw_only=True)
class Drawing:
    shape: ShapeConfig = field(default_factory=lambda: CircleConfig(form="circle"))
    shapes: dict[str, ShapeConfig] = field(default_factory=dict)


@pytest.fixture(scope="module")
def shapes() -> KindRegistry:
    registry = KindRegistry("shape", ShapeConfig, key="form", default="circle")
    registry.register("circle", CircleConfig, "draws a circle")
    registry.register("square", SquareConfig, "draws a square")
    return registry


def test_a_registry_reads_any_section_by_its_kind(shapes):
    assert registry_of(ShapeConfig) is shapes
    assert registry_of(CircleConfig) is None
    assert registry_with(CircleConfig) is shapes
    assert shapes.implementation("square") == "draws a square"
    drawing = from_dict(Drawing, {"shape": {"radius": 2}, "shapes": {"a": {"form": "square", "width": 3}}})
    assert drawing == Drawing(shape=CircleConfig(form="circle", radius=2.0),
                              shapes={"a": SquareConfig(form="square", width=3)})
    assert from_dict(Drawing, to_dict(drawing)) == drawing
    assert error(Drawing, {"shape": {"width": 3}}) == ("shape.width: unknown key; it is an option of form 'square'")
    assert error(Drawing, {"shape": {"form": "xyz"}}) == (
        "shape.form: unknown form; got 'xyz'; expected one of circle, square; "
        "a shape of your own is registered with --import FILE")
    assert error(Drawing, {"radius": 1}) == "radius: unknown key; did you mean 'shape.radius'?"
    assert hint_at(Drawing, "shapes.a.width") is int
    assert hint_at(Drawing, "shape.points") is Any, "kinds differ"
    with pytest.raises(KindError, match="shape kind 'inner': Inner does not derive from ShapeConfig"):
        shapes.register("inner", Inner, None)


def test_an_unknown_mixer_in_the_schedule():
    text = error(ModelConfig, model_data(schedule={"pattern": ["kda", "ful"]}), "model")
    assert text == ("model.schedule: layer 1 names an unknown mixer; got 'ful'; expected one of ['full', 'kda']; "
                    "did you mean 'full'?")


@pytest.mark.parametrize("data", [
    {"model": {"_target_": "os.system"}},
    {"kernels": {"a": [{"_target_": "os.system"}]}},
    {"data": {"mixture": [{"_target_": "os.system"}]}},
])
def test_a_target_is_refused_wherever_it_stands(data):
    text = error(Config, data)
    assert text.endswith("_target_: is refused: a config cannot name code to run; got 'os.system'; "
                         "expected a registered 'kind'")


def test_dict_round_trip():
    config = from_dict(Config, {"model": model_data(), "optimizer": {"betas": [0.8, 0.9]},
                                "data": {"mixture": [{"path": "a"}]}})
    assert from_dict(Config, to_dict(config)) == config
    assert to_dict(config)["optimizer"]["betas"] == [0.8, 0.9]


def test_yaml_round_trip_is_plain(tmp_path):
    config = from_dict(Config, {
        "model": model_data(schedule={"linear": "kda", "full": "full", "ratio": math.inf, "override": {-1: "full"}},
                            name="1e-3"),
        "run_dir": "off", "data": {"path": "2024-01-01", "text_field": "null"}, "optimizer": {"lr": 1e-5}})
    text = to_yaml(config)
    assert "!" not in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert from_dict(Config, load_yaml(path)) == config


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("1.0e-06", 1e-6), ("1e9", 1e9), ("3", 3), (".5", 0.5), (".inf", math.inf), ("-.inf", -math.inf),
    ("1_000", 1000), ("'1e-3'", "1e-3"), ("2024-01-01", "2024-01-01"), ("inf", "inf"),
])
def test_numbers_in_yaml(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"x: {text}\n")
    read = load_yaml(path)["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1,\nb: 2\n", "line 3, column 1 is not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("a: 1\na: 2\n", "line 2, column 1 is not valid YAML: the key 'a' stands twice"),
    ("a: !!python/object/apply:os.system ['true']\n", "line 1, column 4 is not valid YAML: could not determine a "
     "constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
])
def test_broken_yaml_says_where(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value) == f"{path} {message}"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.yaml; got 'No such file or directory'"):
        load_yaml(tmp_path / "nothing.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_yaml(path)


def test_every_default_is_valid():
    for cls in (DataConfig, AdamWConfig, LionConfig, TrainingConfig):
        assert from_dict(cls, {}) == cls()
    assert from_dict(StageConfig, {"name": "a"}) == StageConfig(name="a")


@pytest.mark.parametrize(("cls", "data", "key"), [
    (OptimizerConfig, {"betas": [0.9, 1.0]}, "betas"),
    (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
    (OptimizerConfig, {"schedule": {"min_ratio": 2}}, "schedule.min_ratio"),
    (OptimizerConfig, {"schedule": {"warmup": -1}}, "schedule.warmup"),
    (StageConfig, {"name": "a", "steps": 1, "tokens": 2}, "tokens"),
    (StageConfig, {"name": "a", "trainable": []}, "trainable"),
    (TrainingConfig, {"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size"),
    (TrainingConfig, {"steps": 0}, "steps"),
    (DataConfig, {"validation_fraction": 1.5}, "validation_fraction"),
])
def test_values_out_of_range(cls, data, key):
    assert error(cls, data).startswith(f"{key}: ")


def test_known_paths_reach_every_part_of_a_run():
    paths = known_paths(Config)
    assert {"model.schedule.ratio", "data.path", "run_dir", "training.steps", "training.seed", "training.resume",
            "training.checkpoint_every", "init_from", "optimizer.lr"} <= set(paths)


def test_the_hint_at_a_path():
    assert hint_at(Config, "optimizer.lr") is float
    assert hint_at(Config, "recipe.stages.0.name") is str
    assert hint_at(Config, "data.mixture.3.text_field") is str
    assert hint_at(Config, "model.published.total") is float
    assert hint_at(Config, "model.schedule.override.3") is str
    assert hint_at(Config, "model.mixers.kda.head_dim") is int, "the same in every kind that has it"
    assert hint_at(Config, "model.mixers.kda.decay") is not str
    for nothing in ("nowhere", "optimizer.lr.x", "model.mixers.kda.nothing"):
        assert hint_at(Config, nothing) is None


def test_hints_in_words():
    assert describe(dict[int, str]) == "a mapping of a whole number to text"
    assert describe(int | None) == "a whole number or null"
    assert describe(tuple[int, ...]) == "a list [a whole number, ...]"
