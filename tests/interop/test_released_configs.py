"""config.json as the released models have it, against the presets, and the traps in it. No weights are made."""

import logging

import pytest
import torch

from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.interop.family_registry import families, find_family, read_model_config, write_hf_config
from hybridlm.interop.import_export import ImportPlan, import_hf, list_our_tensors, to_hf_config
from hybridlm.interop.tensor_source import StateDictSource
from hybridlm.model.canonical import canonical, differences
from hybridlm.run_config import load_model_config
from tests.support.hf_zoo import build

FULL = [4, 8, 12, 16, 20, 24, 27]
ALPHA = 3.5565588200778455
# preset -> model type, fields beyond transformers' defaults, names of MTP weights
RELEASED = {
    "kimi_linear_48b": ("kimi_linear", {"linear_attn_config": {
        "full_attn_layers": FULL, "kda_layers": [i for i in range(1, 28) if i not in FULL], "head_dim": 128,
        "num_heads": 32, "short_conv_kernel_size": 4}}, []),
    "qwen3_next_80b": ("qwen3_next", {"rope_theta": 1e7, "max_position_embeddings": 262144}, ["mtp.fc.weight"]),
    "deepseek_v32_671b": ("deepseek_v32", {"rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}}, ["model.layers.61.eh_proj.weight"]),
    "minimax_01_456b": ("minimax", {
        "hidden_size": 6144, "num_hidden_layers": 80, "num_attention_heads": 64, "head_dim": 128, "rotary_dim": 64,
        "intermediate_size": 9216, "num_local_experts": 32, "vocab_size": 200064, "rope_theta": 1e7,
        "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
        **{f"{branch}_alpha_factor": ALPHA for branch in ("full_attn", "linear_attn", "mlp")}}, []),
}


@pytest.mark.parametrize("preset", RELEASED)
def test_released_config_is_our_preset_and_every_tensor_has_a_place(preset):
    name, raw, keys = RELEASED[preset]
    family = families()[name]
    config, wanted = read_model_config(family, raw, frozenset(keys)), load_model_config(preset)
    assert differences(canonical(config), canonical(wanted)) == []
    back = read_model_config(family, family.write_config(wanted), frozenset(keys))
    assert differences(canonical(back), canonical(wanted)) == []
    specs = list_our_tensors(wanted)
    rules = family.rules(wanted)
    ours = [n for r in rules for n in r.ours]
    assert sorted(ours) == sorted(specs)
    theirs = [n for r in rules for n in r.layouts[0].names]
    assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize("preset", ["kimi_linear_tiny", "qwen3_next_tiny", "deepseek_v32_tiny"])
def test_tiny_presets_are_written_in_their_own_format(preset):
    family, raw = write_hf_config(load_model_config(preset))
    assert family.name == preset.removesuffix("_tiny") == raw["model_type"]
    assert to_hf_config(load_model_config(preset)).model_type == family.name


def test_minimax_with_partial_rope_is_not_given_to_a_class_that_ignores_it(caplog):
    config = load_model_config("minimax_01_tiny")
    assert write_hf_config(config)[0].name == "hybridlm"
    with caplog.at_level(logging.WARNING, "hybridlm"):
        family, raw = write_hf_config(config, "minimax")
    assert (family.name, raw["rotary_dim"]) == ("minimax", 8)
    assert "transformers ignores rotary_dim" in caplog.text
    whole = load_model_config("minimax_01_tiny", ["model.mixers.full.rope.partial_rotary_factor=1.0"])
    assert write_hf_config(whole)[0].name == "minimax"


def test_mixes_that_no_class_holds_say_why():
    config = load_model_config("hybrid_tiny", ["model.schedule.linear=gdn", "model.schedule.full=dsa"])
    assert write_hf_config(config)[0].name == "hybridlm"
    with pytest.raises(ConfigError, match="a mixer with kind=attention"):
        write_hf_config(config, "qwen3_next")
    with pytest.raises(ConfigError, match=r"decay: cannot be said in kimi_linear; got 'scalar'; expected 'channel'"):
        write_hf_config(config, "kimi_linear")
    dense = load_model_config("deepseek_v32_tiny", ["model.mixers.dsa.indexer.mode=dense"])
    with pytest.raises(ConfigError, match=r"indexer.mode: cannot be said in deepseek_v32; got 'dense'"):
        write_hf_config(dense, "deepseek_v32")


def test_glm_patterns_of_shared_indexers():
    glm = families()["glm_moe_dsa"]
    base = {"num_hidden_layers": 8, "first_k_dense_replace": 1}
    by_frequency = read_model_config(glm, base | {"index_topk_freq": 4, "index_skip_topk_offset": 2})
    by_pattern = read_model_config(glm, base | {"index_topk_pattern": "FFSSSFSS"})
    assert by_frequency.layers() == by_pattern.layers()
    assert by_pattern.layers() == ["dsa", "dsa", *["dsa_shared"] * 3, "dsa", *["dsa_shared"] * 2]
    assert families()["glm_moe_dsa"].write_config(by_pattern)["indexer_types"][2] == "shared"


def test_minimax_m2_rotary_dim_is_a_share_of_the_head():
    m2 = read_model_config(families()["minimax_m2"], {"rotary_dim": 64, "head_dim": 128, "num_hidden_layers": 2})
    assert m2.mixers["full"].rope.partial_rotary_factor == 0.5


def test_bailing_head_dim_is_that_of_kda():
    """Released: head_dim. Saved by transformers: head_dim is overwritten, linear_head_dim is right."""
    base = {"num_hidden_layers": 6, "qk_rope_head_dim": 64}
    released = read_model_config(families()["bailing_hybrid"], base | {"head_dim": 128})
    saved = read_model_config(families()["bailing_hybrid"], base | {"head_dim": 64, "linear_head_dim": 128})
    assert released.mixers["kda"].head_dim == saved.mixers["kda"].head_dim == 128


def test_text_model_of_a_vision_language_checkpoint():
    theirs = build("qwen3_5_moe")
    text = theirs.config.to_dict()
    raw = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": False, "image_token_id": 1}
    assert find_family(raw, "x")[0].name == "qwen3_5_moe_text"
    state = {name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: t
             for name, t in theirs.state_dict().items()}
    plan = ImportPlan(raw, StateDictSource(state | {"model.visual.patch_embed.weight": torch.zeros(2)}))
    expected = dict(import_hf(theirs).state_dict().items())
    assert all(torch.equal(t, expected[name]) for name, t in plan.tensors())


def test_kimi_k2_is_deepseek_v3_under_another_name():
    theirs = build("deepseek_v3")
    raw = theirs.config.to_dict() | {"model_type": "kimi_k2"}
    assert ImportPlan(raw, StateDictSource(theirs.state_dict())).family.name == "deepseek_v3"
    inside = {f"language_model.{name}": t for name, t in theirs.state_dict().items()}
    vision = {"vision_tower.blocks.0.weight": torch.zeros(1), "mm_projector.weight": torch.zeros(1)}
    whole = {"model_type": "kimi_k25", "text_config": raw, "tie_word_embeddings": False}
    plan = ImportPlan(whole, StateDictSource(inside | vision))
    assert len(dict(plan.tensors())) == len(dict(ImportPlan(raw, StateDictSource(theirs.state_dict())).tensors()))
    with pytest.raises(CheckpointError, match="'kimi_k25'"):
        find_family({"model_type": "kimi_k25"}, "x")


def test_decay_tables_of_minimax_are_ignored_and_written_as_transformers_makes_them():
    theirs = build("minimax", block_size=256)
    derived = families()["minimax"].derived_tensors(import_hf(theirs).config)
    exported = {tensor.name: tensor.compute() for tensor in derived}
    state = theirs.state_dict()
    assert len(exported) == 12
    assert all(torch.equal(state[name], value) for name, value in exported.items())
    without = {name: t for name, t in state.items() if name not in exported}
    assert ImportPlan(theirs.config.to_dict(), StateDictSource(without)).config == import_hf(theirs).config
