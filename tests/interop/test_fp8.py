"""fp8 weights become bf16 exactly as their scales say; what has another form is refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm.errors import CheckpointError
from hybridlm.interop import export_checkpoint, import_checkpoint, import_hf
from tests.support.hf_zoo import build

BLOCK = 8


def widen(scale, shape):
    """The scale of every value, from one scale per block."""
    if scale.numel() == 1:
        return scale.float()
    return scale.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., : shape[-2], : shape[-1]]


def quantise(weight, form):
    """fp8 values and scales of a weight [..., rows, columns]."""
    *lead, rows, columns = weight.shape
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    padded = torch.zeros(*lead, grid[0] * BLOCK, grid[1] * BLOCK)
    padded[..., :rows, :columns] = weight
    scale = padded.view(*lead, grid[0], BLOCK, grid[1], BLOCK).abs().amax((-3, -1)).clamp_min(1e-6) / 448
    if form == "per tensor":
        scale = scale.max()
    if form == "powers of two":
        scale = torch.exp2(scale.log2().ceil()).to(torch.float8_e8m0fnu)
    return (weight / widen(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def save_quantised(folder, case, form, config):
    """A folder whose projections are in fp8, and the same folder with the values that these stand for."""
    model, fp8, plain = build(case), folder / "fp8", folder / "plain"
    model.save_pretrained(fp8, save_original_format=form != "fused experts")
    model.save_pretrained(plain, save_original_format=form != "fused experts")
    tensors, expected = load_file(fp8 / "model.safetensors"), {}
    for name in [n for n in tensors if re.search(r"_proj(\.weight)?$", n)]:
        values, scale = quantise(tensors[name].float(), form)
        tensors[name], tensors[name + "_scale_inv"] = values, scale
        expected[name] = (values.float() * widen(scale, values.shape)).bfloat16()
    assert any(t.dim() == 3 for t in expected.values()) == (form == "fused experts")
    save_file({n: t.contiguous() for n, t in tensors.items()}, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_file(load_file(plain / "model.safetensors") | expected, plain / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((fp8 / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | config
    (fp8 / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    return fp8, plain


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_5_moe"])
@pytest.mark.parametrize("form", ["blocks", "fused experts", "per tensor", "powers of two"])
def test_weights_are_those_that_the_scales_give(case, form, tmp_path):
    config = {} if form == "per tensor" else {"weight_block_size": [BLOCK, BLOCK]}
    fp8, plain = save_quantised(tmp_path, case, form, config)
    import_checkpoint(fp8, tmp_path / "ours")
    got = load_file(tmp_path / "ours" / "model.safetensors")
    expected = import_hf(plain, dtype=torch.bfloat16).state_dict()
    projections = [n for n in got if "_proj" in n or ".experts." in n]
    assert projections
    for name in projections:
        assert torch.equal(got[name].bfloat16(), expected[name]), name
    export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_scales_of_another_form_are_named(tmp_path):
    fp8, _ = save_quantised(tmp_path, "deepseek_v3", "blocks", {"weight_block_size": [BLOCK, BLOCK]})
    file = fp8 / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    scale = tensors.pop(name + "_scale_inv")
    for changed, message in (
        ({}, f"'{name}' is in fp8 without '{name}_scale_inv' beside it: convert"),
        ({name + "_scale": scale}, f"'{name}_scale' is there, in a form that is not known"),
        ({name + "_scale_inv": torch.ones(9, 9)}, r"kv_b_proj.weight_scale_inv' is \[9, 9\].*need \[11, 2\]"),
    ):
        save_file(tensors | changed, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(fp8, tmp_path / "ours")
    raw = json.loads((fp8 / "config.json").read_text())
    raw["quantization_config"]["weight_block_size"] = None
    (fp8 / "config.json").write_text(json.dumps(raw))
    save_file(tensors | {name + "_scale_inv": scale}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expected one number, because the config names no weight_block_size"):
        import_checkpoint(fp8, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
