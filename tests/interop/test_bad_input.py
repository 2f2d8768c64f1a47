"""Each thing that can be wrong with a checkpoint gives one clear line, and leaves nothing under DEST."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm.errors import CheckpointError, ConfigError, UserError
from hybridlm.interop import export_checkpoint, import_checkpoint, import_hf, safetensors_writer, save_checkpoint
from tests.support.hf_zoo import build

E_NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path):
    """A small llama as transformers saves it."""
    build("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def change_config(folder, **fields):
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(raw))


def change_tensors(folder, **tensors):
    file = folder / "model.safetensors"
    kept = {k: v for k, v in (load_file(file) | tensors).items() if v is not None}
    save_file(kept, file, metadata={"format": "pt"})


def refused(folder, match, error=CheckpointError):
    dest = folder.parent / "dest"
    with pytest.raises(error, match=match) as caught:
        import_checkpoint(folder, dest)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


def test_unknown_architecture_lists_the_known_ones(folder):
    change_config(folder, model_type="mamba3")
    refused(folder, r"model type 'mamba3'.*bailing_hybrid.*kimi_linear.*qwen3_next")


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_act": "gelu"}, "hidden_act: .*'gelu'.*'silu'"),
    ({"mlp_bias": True}, "mlp_bias: .*True.*False"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
     "rope_parameters.rope_type: .*'llama3'.*default or yarn"),
    ({"num_attention_heads": 5}, "not a llama config: .*hidden size"),
    ({"num_key_value_heads": 3}, "num_kv_heads: must divide"),
    ({"num_hidden_layers": "four"}, "not a llama config.*num_hidden_layers"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: .*'awq'.*DeepSeek-V3"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
     r"quantization_config: .*weight_block_size=\[128\]"),
])
def test_config_that_asks_for_what_we_do_not_have_names_the_field(folder, fields, message):
    change_config(folder, **fields)
    refused(folder, message, ConfigError)


@pytest.mark.parametrize(("tensors", "message"), [
    ({E_NORM: None}, f"'{E_NORM}' is missing"),
    ({"model.layers.1.surprise": torch.zeros(2)}, "'model.layers.1.surprise' is not part of the model"),
    ({E_NORM: torch.zeros(31)}, rf"'{E_NORM}' is \[31\], the config asks for \[32\]"),
    ({E_NORM: torch.zeros(32, dtype=torch.int8)}, f"'{E_NORM}' is quantised"),
])
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    change_tensors(folder, **tensors)
    refused(folder, message)


def test_truncated_and_corrupt_shards(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(folder, r"model.safetensors is truncated: \d+ bytes, its header describes \d+")
    file.write_bytes(whole + b"x")
    refused(folder, "model.safetensors is damaged")
    file.write_bytes(whole[:5])
    refused(folder, "not a whole safetensors file")
    file.write_bytes(struct.pack("<Q", 2**40) + whole[8:])
    refused(folder, "not a whole safetensors file")
    length = struct.unpack("<Q", whole[:8])[0]
    file.write_bytes(whole[:8] + b"#" * length + whole[8 + length:])
    refused(folder, "header of .* is corrupt")
    file.write_bytes(whole.replace(b'"F32"', b'"F33"', 1))
    refused(folder, "dtype F33")
    file.write_bytes(whole.replace(b'"shape":[32]', b'"shape":[33]', 1))
    refused(folder, r"takes 128 bytes, its shape \[33\] needs 132")


def test_index_that_names_a_missing_shard_or_is_broken(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(folder, "shard 'model-00001-of-00002.safetensors', which is not there")
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused(folder, "which is not there")
    index.write_text("{")
    refused(folder, "is not a safetensors index")


def test_pickles_are_refused_with_the_safe_way(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pickle files \(pytorch_model.bin\).*runs code.*safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no model.*safetensors")


def test_config_that_is_missing_or_not_json(folder):
    (folder / "config.json").write_text("[1]")
    refused(folder, "not a config")
    (folder / "config.json").write_text("{")
    refused(folder, "cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_no_space_is_seen_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "HEADROOM_BYTES", 10**18)
    refused(folder, "no space .*: it needs [1-9][0-9,]* MB, [0-9,]+ MB are free")


def test_a_disk_that_fills_up_leaves_nothing(folder, monkeypatch):
    def full(descriptor, data, start):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer, "_write_at", full)
    refused(folder, "disk of .* is full")


def test_an_interrupt_leaves_nothing(folder, monkeypatch):
    def stop(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_writer.SafetensorsWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(folder, folder.parent / "dest")
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


def test_export_names_the_family_and_what_does_not_fit(folder, tmp_path):
    save_checkpoint(import_hf(folder), tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"qk_norm: cannot be said in qwen3; got 'none'; expected 'head'"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", family="qwen3")
    with pytest.raises(ConfigError, match=r"family: unknown; got 'lama'.*did you mean 'llama'"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", family="lama")
    with pytest.raises(ConfigError, match="kind=mla"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", family="deepseek_v3")
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_fetched_without_pickles_and_a_missing_one_is_said(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "owner/llama":
            raise OSError("no such repository")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert import_checkpoint("owner/llama", tmp_path / "ours")["family"] == "llama"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked[0][1])
    with pytest.raises(CheckpointError, match=r"owner/lama does not exist.*no such repository; HF_HUB_OFFLINE is set"):
        import_hf("owner/lama")
    with pytest.raises(CheckpointError, match="does not exist"):
        import_hf("./no/such/folder")
    assert [name for name, _ in asked] == ["owner/llama", "owner/lama"]  # a path asks no network
