"""The models that ship: the published ones, their tiny siblings with every feature, and the research sizes."""

import pytest

from hybridlm.model.config import ModelConfig
from hybridlm.run_config import load_model_config

FULL = {"kimi_linear": "kimi_linear_48b", "minimax_01": "minimax_01_456b", "qwen3_next": "qwen3_next_80b",
        "deepseek_v32": "deepseek_v32_671b"}


@pytest.mark.parametrize(("system", "layers"), [
    ("kimi_linear", (["kda"] * 3 + ["full"]) * 6 + ["kda", "kda", "full"]),
    ("minimax_01", (["lightning"] * 7 + ["full"]) * 10),
    ("qwen3_next", (["gdn"] * 3 + ["full"]) * 12),
    ("deepseek_v32", ["dsa"] * 61),
])
def test_layers_of_the_published_models(system, layers):
    assert load_model_config(FULL[system]).layers() == layers


def features(config: ModelConfig) -> dict[str, object]:
    """What makes a system: everything but sizes."""
    def plain(part: object) -> dict[str, object]:
        options = dict(vars(part))  # type: ignore[call-overload]
        return {key: plain(value) if hasattr(value, "__dict__") else value for key, value in options.items()
                if isinstance(value, str | bool) or value is None or hasattr(value, "__dict__")}

    mixers = {name: plain(config.mixers[name]) for name in set(config.layers())}
    moe = plain(config.feed_forward)
    moe.pop("bias_update_rate", None)  # published for long runs; null, for runs of any length, in the tiny ones
    moe["groups"] = config.feed_forward.topk_groups < config.feed_forward.num_groups
    moe["shared"] = config.feed_forward.num_shared_experts
    moe["dense first"] = config.feed_forward.dense_layers[:1]
    moe["scaled"] = config.feed_forward.routed_scaling_factor
    return {"mixers": mixers, "moe": moe, "mtp": config.mtp.depth, "norm": vars(config.norm),
            "irregular end": config.schedule.override}


@pytest.mark.parametrize("system", FULL)
def test_a_tiny_sibling_keeps_every_feature(system):
    full, tiny = load_model_config(FULL[system]), load_model_config(f"{system}_tiny")
    assert features(tiny) == features(full)
    assert 64 <= tiny.hidden_size <= 128
    assert 4 <= tiny.num_layers <= 8
    assert tiny.vocab_size == 512
    assert tiny.published is None
    assert set(tiny.layers()) == set(full.layers())


def test_grouped_heads_and_partial_rotation_stay_in_the_tiny_ones():
    minimax, qwen = load_model_config("minimax_01_tiny"), load_model_config("qwen3_next_tiny")
    assert minimax.mixers["full"].kv_heads < minimax.mixers["full"].num_heads
    assert minimax.mixers["full"].rope.partial_rotary_factor == 0.5
    assert minimax.mixers["lightning"].residual.alpha == 3.5565588200778455
    assert minimax.feed_forward.residual == minimax.mixers["full"].residual
    assert qwen.mixers["full"].rope.partial_rotary_factor == 0.25
    assert qwen.mixers["gdn"].value_heads > qwen.mixers["gdn"].num_heads
    deepseek = load_model_config("deepseek_v32_tiny").mixers["dsa"]
    assert deepseek.indexer.topk == 64
    assert deepseek.rope.scaling.factor > 1
    kimi = load_model_config("kimi_linear_tiny")
    assert kimi.mixers["full"].rope.kind == "none"
    assert kimi.layers()[-3:] == ["kda", "kda", "full"]


@pytest.mark.parametrize("model", ["hybrid_1b", "hybrid_tiny"])
def test_the_research_sizes_take_any_mixer_in_any_slot(model):
    config = load_model_config(model)
    assert set(config.mixers) == {"kda", "gdn", "deltanet", "lightning", "full", "swa", "mla", "dsa"}
    for linear, full in (("gdn", "mla"), ("lightning", "dsa"), ("swa", "full"), ("deltanet", "swa")):
        changed = load_model_config(model, [f"model.schedule.linear={linear}", f"model.schedule.full={full}",
                                            "model.schedule.ratio=1"])
        assert changed.layers()[:2] == [linear, full]
