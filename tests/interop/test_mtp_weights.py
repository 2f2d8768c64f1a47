"""Multi-token prediction weights are kept on the way in and written on the way out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hybridlm
from hybridlm.errors import CheckpointError
from hybridlm.interop import export_hf, import_checkpoint, import_hf
from hybridlm.model import build_model
from hybridlm.model.config import MTPConfig
from hybridlm.tensor_storage import unique_tensors
from tests.support.hf_zoo import build, perturb, tokens

# case, depth, a tensor that the released models have, layer behind the last
CASES = [("deepseek_v3", 2, "model.layers.5.eh_proj.weight"),
         ("deepseek_v32", 1, "model.layers.4.shared_head.head.weight"),
         ("glm_moe_dsa", 1, "model.layers.4.self_attn.indexer.wk.weight"),
         ("bailing_hybrid", 1, "model.layers.4.attention.kv_b_proj.weight"),
         ("qwen3_next", 1, "mtp.layers.0.mlp.experts.3.up_proj.weight"),
         ("qwen3_5_moe", 1, "mtp.pre_fc_norm_hidden.weight")]


def with_mtp(case, depth):
    config = import_hf(build(case)).config
    config.mtp = MTPConfig(depth=depth)
    model = build_model(config, seed=3)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize(("case", "depth", "name"), CASES)
def test_round_trip_with_mtp(case, depth, name, tmp_path):
    model = with_mtp(case, depth)
    assert export_hf(model, tmp_path / "out")["mtp"] == depth
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert name in written
    import_checkpoint(tmp_path / "out", tmp_path / "ours")
    back = hybridlm.load_checkpoint(tmp_path / "ours")
    assert back.config.mtp.depth == depth
    expected = unique_tensors(model)
    assert all(torch.equal(t, expected[key]) for key, t in unique_tensors(back).items())
    ids = tokens(2, 20)
    assert torch.equal(back(ids, labels=ids).losses["mtp"], model(ids, labels=ids).losses["mtp"])

    plain = import_hf(tmp_path / "out", mtp=False)
    assert plain.config.mtp.depth == 0
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def test_without_the_weights_there_is_no_mtp_whatever_the_config_says(tmp_path):
    theirs = build("deepseek_v3", num_nextn_predict_layers=1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert import_hf(tmp_path / "theirs").config.mtp.depth == 0


def test_left_out_on_export_transformers_finds_nothing_unexpected(tmp_path):
    model = with_mtp("deepseek_v3", 1)
    export_hf(model, tmp_path / "out", mtp=False)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    export_hf(with_mtp("qwen3_next", 1), tmp_path / "qwen")  # transformers drops mtp.* by itself
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_embedding_copies_of_mtp_layers_may_be_absent_but_not_differ(tmp_path):
    export_hf(with_mtp("deepseek_v3", 1), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    copied = "model.layers.4.embed_tokens.weight"
    assert torch.equal(tensors[copied], tensors["model.embed_tokens.weight"])
    save_file({k: v for k, v in tensors.items() if k != copied}, file, metadata={"format": "pt"})
    assert import_hf(tmp_path / "out").config.mtp.depth == 1
    save_file(tensors | {copied: tensors[copied] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens.*differ from each other"):
        import_hf(tmp_path / "out")
