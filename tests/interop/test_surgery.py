"""Dense attention into DSA, softmax layers into linear ones."""

import pytest
import torch

from hybridlm import load_checkpoint
from hybridlm.errors import ConfigError
from hybridlm.interop import export_hf, import_checkpoint, import_hf, save_checkpoint
from hybridlm.interop.checkpoint_folders import summarize
from hybridlm.interop.surgery import add_indexer, replace_mixers
from hybridlm.model import build_model
from hybridlm.model.config import MTPConfig
from hybridlm.model.mixers import DeltaRuleConfig
from hybridlm.tensor_storage import unique_tensors
from tests.support.hf_zoo import build, tokens

INDEXER = {"num_heads": 16, "head_dim": 16, "topk": 8}


@pytest.mark.parametrize("case", ["deepseek_v3", "llama", "qwen3_next"])
def test_an_indexer_changes_nothing_until_it_selects(case, tmp_path):
    model = import_hf(build(case))
    softmax = [i for i, name in enumerate(model.config.layers()) if name == "full"]
    changed, transfer = add_indexer(model, INDEXER)
    ids = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(changed(ids).logits, model(ids).logits)
        for i in softmax:
            changed.layers[i].mixer.attention_mode = "sparse"
        assert (changed(ids).logits - model(ids).logits).abs().max() > 1e-3
    assert {int(name.split(".")[1]) for name in transfer.fresh} == set(softmax)
    assert all(".indexer." in name for name in transfer.fresh)
    assert set(unique_tensors(model)) == set(unique_tensors(changed)) - set(transfer.fresh)
    save_checkpoint(changed, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "ours")(ids).logits, model(ids).logits)


def test_a_v3_checkpoint_with_a_trained_indexer_is_a_v32_one(tmp_path):
    model = import_hf(build("deepseek_v3"))
    changed, _ = add_indexer(model, INDEXER | {"mode": "sparse", "topk": 64})
    done = export_hf(changed, tmp_path / "out")
    assert done["family"] == "deepseek_v32"
    ids = tokens(1, 40)  # no more than topk: every key is selected
    back = import_hf(tmp_path / "out")
    with torch.no_grad():
        assert (back(ids).logits - model(ids).logits).abs().max() < 2e-5


def test_an_indexer_in_chosen_layers_only():
    model = import_hf(build("llama"))
    changed, transfer = add_indexer(model, INDEXER, [1, -1])
    assert changed.config.layers() == ["full", "full_dsa", "full", "full_dsa"]
    assert {name.split(".")[1] for name in transfer.fresh} == {"1", "3"}
    with pytest.raises(ConfigError, match="layer 1: cannot take an indexer; got 'full_dsa'"):
        add_indexer(changed, INDEXER, [1])
    with pytest.raises(ConfigError, match="layer 0: cannot take an indexer; got 'kda'"):
        add_indexer(import_hf(build("kimi_linear")), INDEXER, [0])
    with pytest.raises(ConfigError, match="num_headz"):
        add_indexer(model, {"num_headz": 2})


@pytest.mark.parametrize("preset", ["gdn", "kda", "lightning", "deltanet", "retnet", "gla", "ssd"])
def test_linear_layers_start_from_q_k_v_and_o(preset):
    model = import_hf(build("llama"))  # 4 query heads, 2 key and value heads
    changed, transfer = replace_mixers(model, [0, 2], preset)
    assert changed.config.layers() == [preset, "full", preset, "full"]
    old, new = unique_tensors(model), unique_tensors(changed)
    for layer in (0, 2):
        base = f"layers.{layer}.mixer."
        assert {f"{base}{n}_proj.weight" for n in "qkvo"} <= set(transfer.kept)
        assert torch.equal(new[base + "q_proj.weight"], old[base + "q_proj.weight"])
        assert torch.equal(new[base + "o_proj.weight"], old[base + "o_proj.weight"])
        for n in "kv":
            heads = old[f"{base}{n}_proj.weight"].unflatten(0, (2, 8))
            assert torch.equal(new[f"{base}{n}_proj.weight"].unflatten(0, (4, 8)), heads[[0, 0, 1, 1]])
    untouched = [name for name in old if ".mixer." not in name or ".1." in name or ".3." in name]
    assert all(torch.equal(old[name], new[name]) for name in untouched)
    assert changed(tokens(1, 20)).logits.isfinite().all()


def test_import_with_surgery(tmp_path):
    theirs = build("llama")
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", indexer=INDEXER, replace={"gdn": [0, 1]})
    assert done["layers"] == ["gdn", "gdn", "full", "full"]
    assert "2 gdn, 2 full" in summarize(done)
    assert "start fresh" in summarize(done)
    assert "layers.0.mixer.q_proj.weight" in done["kept"]
    assert "layers.0.mixer.A_log" in done["fresh"]
    assert "layers.2.mixer.indexer.q_proj.weight" in done["fresh"]
    ours = load_checkpoint(tmp_path / "ours")
    assert ours.config.mixers["full"].indexer.mode == "dense"
    expected = unique_tensors(import_hf(theirs))
    kept = {name for name in unique_tensors(ours) if name in expected and ".0." not in name and ".1." not in name}
    assert len(kept) > 20
    assert all(torch.equal(unique_tensors(ours)[name], expected[name]) for name in kept)
    with pytest.raises(ConfigError, match="no such preset"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "no", replace={"gnd": [0]})
    assert not (tmp_path / "no").exists()


def test_shapes_that_do_not_fit_start_fresh():
    model = import_hf(build("deepseek_v3"))  # queries through a low rank, values of 10 dims
    changed, transfer = replace_mixers(model, [3], "kda")
    kept = {name.split(".mixer.")[1] for name in transfer.kept}
    assert kept == {"o_proj.weight"}
    assert changed(tokens(1, 20)).logits.isfinite().all()
    wide = DeltaRuleConfig(num_heads=2, head_dim=6)
    _, transfer = replace_mixers(import_hf(build("llama")), [1], wide, "odd")
    assert transfer.kept == []


def test_linear_layer_replaced_by_another_linear_one_starts_fresh():
    model = import_hf(build("qwen3_next"))
    mixer = DeltaRuleConfig(num_heads=2, head_dim=8, decay="none", output_gate="none", conv_size=0)
    changed, transfer = replace_mixers(model, [0], mixer, "plain")
    assert transfer.kept == []
    assert changed.config.layers() == ["plain", "gdn", "gdn", "full"]


def test_residual_form_and_mtp_mixer_stay(tmp_path):
    minimax = import_hf(build("minimax"))
    changed, _ = replace_mixers(minimax, [3], "lightning")
    assert changed.config.layers()[3] not in ("full", "lightning")  # its residual scales are those of the full layer
    assert changed.config.mixers[changed.config.layers()[3]].residual == minimax.config.mixers["full"].residual
    config = import_hf(build("deepseek_v3")).config
    config.mtp = MTPConfig(depth=1)
    model = build_model(config).eval()
    changed, _ = replace_mixers(model, [3], "gdn")
    assert changed.config.mtp.mixer == "full"
    ids = tokens(1, 12)
    assert changed(ids, labels=ids).losses["mtp"].isfinite()


@pytest.mark.parametrize(("layers", "mixer", "message"), [
    ([9], "gdn", "names a layer the model does not have; got 9"),
    ([], "gdn", "names no layer"),
    ([0], "gnd", "no such preset; got 'gnd'.*did you mean 'gdn'"),
])
def test_what_cannot_be_done_is_said(layers, mixer, message):
    with pytest.raises(ConfigError, match=message):
        replace_mixers(import_hf(build("llama")), layers, mixer)


def test_layers_of_different_residual_forms_are_replaced_apart():
    olmo = import_hf(build("olmo_hybrid"))
    with pytest.raises(ConfigError, match="different residual forms"):
        replace_mixers(olmo, [2, 3], DeltaRuleConfig(num_heads=4, head_dim=8))
    with pytest.raises(ConfigError, match="already have a linear mixer"):
        replace_mixers(olmo, [0], "kda")
