"""Checkpoint folders: what transformers saves is read, what we write transformers loads, and all of it comes back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hybridlm
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.interop import export_checkpoint, export_hf, import_checkpoint, import_hf
from hybridlm.model import generate
from hybridlm.tensor_storage import unique_tensors
from tests.support.hf_zoo import CASES, build, tokens

# one case of every family, those with the most in them
EACH = ["qwen3_next-irregular", "qwen3_5_moe", "kimi_linear-irregular", "minimax", "minimax_m2", "deepseek_v3",
        "deepseek_v32", "glm_moe_dsa-shared", "bailing_hybrid-softplus", "olmo_hybrid-nope", "llama", "qwen3-yarn",
        "qwen3_moe-sparse-step"]


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("case", EACH)
def test_saved_by_transformers_comes_in_and_goes_out_and_is_loaded_by_transformers(case, tmp_path):
    theirs = build(case)
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert done["family"] == CASES[case][0]
    ours = hybridlm.load_checkpoint(tmp_path / "ours")
    direct = import_hf(theirs)
    expected = unique_tensors(direct)
    assert all(torch.equal(t, expected[name]) for name, t in unique_tensors(ours).items())

    export_checkpoint(tmp_path / "ours", tmp_path / "out")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(back) is type(theirs)
    state = back.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in theirs.state_dict().items())

    ids = tokens(1, 30)
    with torch.no_grad():
        assert (back(ids, use_cache=False).logits - ours(ids).logits).abs().max() < 2e-5
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    first, again = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in first.items())


@pytest.mark.parametrize("case", ["kimi_linear", "qwen3_next", "minimax", "glm_moe_dsa", "bailing_hybrid",
                                  "olmo_hybrid"])
def test_runtime_layout_with_fused_experts_is_read(case, tmp_path):
    theirs = build(case)
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    ours, direct = import_hf(tmp_path / "fused"), import_hf(theirs)
    expected = unique_tensors(direct)
    assert all(torch.equal(t, expected[name]) for name, t in unique_tensors(ours).items())


def test_shards_are_read_and_written_with_an_index(tmp_path):
    theirs = build("qwen3_moe")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    done = export_checkpoint(tmp_path / "ours", tmp_path / "out", shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert done["files"] == len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in theirs.state_dict().items())


def test_keys_are_those_of_the_released_models(tmp_path):
    def names(case):
        export_hf(import_hf(build(case)), tmp_path / case)
        return set(tensors_of(tmp_path / case))

    kimi = names("kimi_linear")
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.1.block_sparse_moe.experts.6.w2.weight",
            "model.layers.0.self_attn.A_log", "model.layers.0.self_attn.q_conv1d.weight"} <= kimi
    assert not any("block_sparse_moe.gate_proj" in name or "forget_gate" in name for name in kimi)
    assert {"model.word_embeddings.weight", "model.layers.0.attention.dense.weight",
            "model.layers.1.mlp.gate.expert_bias"} <= names("bailing_hybrid")
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in names("deepseek_v3")
    olmo = tmp_path / "olmo_hybrid-nope"
    names("olmo_hybrid-nope")
    widths = [tensors_of(olmo)[f"model.layers.0.linear_attn.{n}_conv1d.weight"].shape[0] for n in "qkv"]
    assert widths == [16, 16, 48]  # not thirds


def test_config_json_says_the_layers_and_transformers_reads_the_same(tmp_path):
    theirs = build("kimi_linear-irregular")
    export_hf(import_hf(theirs), tmp_path / "kimi")
    raw = json.loads((tmp_path / "kimi" / "config.json").read_text())
    assert raw["linear_attn_config"]["full_attn_layers"] == [2, 3]  # counted from 1
    assert raw["linear_attn_config"]["kda_layers"] == [1, 4, 5]
    assert raw["architectures"] == ["KimiLinearForCausalLM"]
    assert raw["dtype"] == "float32"
    read = AutoConfig.from_pretrained(tmp_path / "kimi")
    assert read.layer_types == theirs.config.layer_types
    assert read.mlp_layer_types == theirs.config.mlp_layer_types
    bailing = build("bailing_hybrid-softplus")
    export_hf(import_hf(bailing), tmp_path / "bailing")
    assert AutoConfig.from_pretrained(tmp_path / "bailing").linear_head_dim == 12


@pytest.mark.parametrize("case", ["qwen3-yarn", "qwen3_next-irregular", "minimax_m2-full-rope", "kimi_linear"])
def test_a_head_that_is_not_the_embedding_is_kept_whatever_the_flag_says(case, tmp_path, caplog):
    """Fine-tuned apart, `tie_word_embeddings` left as it was: transformers computes with the head of the file."""
    build(case, tie_word_embeddings=True).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    ids = tokens(1, 12)
    for head, tied in ((embedding.clone(), True), (embedding + torch.randn_like(embedding), False)):
        save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        ours = import_hf(tmp_path / "theirs")
        assert ours.config.tie_embeddings == tied
        assert ("'lm_head.weight' is not the embedding" in caplog.text) != tied
        with torch.no_grad():
            assert (ours(ids).logits - theirs(ids, use_cache=False).logits).abs().max() < 1e-4
    export_hf(ours, tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, head)


def test_a_single_file_beside_an_index_of_shards_is_the_one_that_is_read(tmp_path, caplog):
    old, new = build("llama"), build("llama")
    with torch.no_grad():
        new.model.norm.weight.add_(1)
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    save_file({name: t.contiguous() for name, t in new.state_dict().items()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    assert torch.equal(theirs, new.model.norm.weight)
    assert torch.equal(import_hf(tmp_path).norm.weight, theirs)
    assert "delete the one that is out of date" in caplog.text


@pytest.mark.parametrize("case", ["qwen3-yarn", "qwen3_next-irregular", "minimax_m2", "deepseek_v32-yarn",
                                  "bailing_hybrid-softplus", "olmo_hybrid", "llama", "minimax"])
def test_readers_of_transformers_4_find_the_positions(case, tmp_path):
    """They read fields at the top of config.json, and take defaults where these are missing."""
    model = build(case)
    export_hf(import_hf(model), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    params = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert raw["rope_theta"] == params["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert raw["torch_dtype"] == raw["dtype"] == "float32"
    if params["rope_type"] == "yarn":
        assert {"type": "yarn", "factor": params["factor"]}.items() <= raw["rope_scaling"].items()
    else:
        assert raw["rope_scaling"] is None
    if "qwen3_next" in case:
        assert raw["partial_rotary_factor"] == params["partial_rotary_factor"] == 0.5


def test_dtype_keeps_what_must_be_fp32(tmp_path):
    theirs = build("deepseek_v32")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert tensors_of(tmp_path / "ours")["layers.0.mixer.kv_b_proj.weight"].dtype == torch.bfloat16
    export_checkpoint(tmp_path / "ours", tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "bfloat16"
    import_checkpoint(tmp_path / "theirs", tmp_path / "wide", dtype="fp32")
    export_checkpoint(tmp_path / "wide", tmp_path / "narrow", dtype="bf16")
    narrow = tensors_of(tmp_path / "narrow")
    assert narrow["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert narrow["model.layers.1.self_attn.kv_b_proj.weight"].dtype == torch.bfloat16
    same = tensors_of(tmp_path / "same")
    assert all(torch.equal(t.float(), same[name].float()) for name, t in narrow.items())
    with pytest.raises(ConfigError, match=r"dtype.*fp8.*fp32, bf16, fp16"):
        export_checkpoint(tmp_path / "wide", tmp_path / "no", dtype="fp8")


def test_tokenizer_and_generation_settings_travel(tmp_path):
    source = tmp_path / "theirs"
    model = build("llama", vocab_size=300, eos_token_id=256, bos_token_id=2)
    model.save_pretrained(source)
    load_tokenizer("bytes").save(source)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [256, 3]}))
    import_checkpoint(source, tmp_path / "ours")
    loaded = hybridlm.load_checkpoint(tmp_path / "ours")
    assert loaded.tokenizer.eos_id == 256
    export_checkpoint(tmp_path / "ours", tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (2, 256, None)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("import os")["input_ids"] == list(b"import os")
    export_hf(loaded, tmp_path / "memory")
    assert json.loads((tmp_path / "memory" / "config.json").read_text())["eos_token_id"] == 256


def test_a_trained_hybrid_speaks_alike_in_transformers(tmp_path):
    """Greedy text of a model made here, exported and loaded by transformers with its tokenizer."""
    config = hybridlm.load_config("train", ["model=kimi_linear_tiny"])
    model = hybridlm.build_model(config).eval()
    model.tokenizer = load_tokenizer("bytes")
    export_hf(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer("def read(self", return_tensors="pt")
    expected = theirs.generate(**batch, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, -32:]
    got = torch.cat(list(generate(model, model.tokenizer.encode("def read(self"), 32, temperature=0)))
    assert torch.equal(got, expected)


def test_dest_is_never_overwritten_and_nothing_is_left_behind(tmp_path):
    build("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "used")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not a folder"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    import_checkpoint(tmp_path / "theirs", tmp_path / "empty")
    shutil.rmtree(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="does not exist"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "used"]
