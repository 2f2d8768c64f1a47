"""`verify` tells equal models from different ones, and where they part."""

import pytest
import torch

from hybridlm.cli import main
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import CheckpointError
from hybridlm.interop import import_checkpoint, import_hf, save_checkpoint, verify
from hybridlm.interop.compare import describe, differs
from tests.support.hf_zoo import build


@pytest.mark.parametrize("case", ["kimi_linear", "qwen3_next", "minimax", "olmo_hybrid"])
def test_equal_models(case, tmp_path):
    build(case).save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    result = verify(tmp_path / "ours", tmp_path / "theirs", token_ids=[1, 2, 3], length=20)
    for found, count in (("random", 40), ("given", 3)):
        assert result[found]["tokens"] == count
        assert result[found]["max_logit_diff"] < 2e-5 < result[found]["max_logit"]
        assert abs(result[found]["kl"]) < 1e-9
        assert result[found]["top1"] == 1
        assert result[found]["first_different_layer"] is None
        assert len(result[found]["layers"]) == 4
    assert not differs(result)


def test_the_first_layer_that_differs_is_named():
    theirs = build("kimi_linear")
    ours = import_hf(theirs)
    with torch.no_grad():
        ours.layers[2].mixer.o_norm.weight.add_(0.5)
    found = verify(ours, theirs)["random"]
    assert (found["first_different_layer"], found["mixer"]) == (2, "kda")
    assert found["layers"][1] < 1e-5 < 1e-3 < found["layers"][2]
    assert "the first layer that differs is 2 (kda)" in describe({"random": found})
    assert found["kl"] > 1e-6
    assert found["max_logit_diff"] > 1e-3
    with torch.no_grad():
        ours.layers[0].feed_forward.down_proj.weight.fill_(torch.nan)
    assert verify(ours, theirs)["random"]["first_different_layer"] == 0


@pytest.mark.parametrize("module", ["layers.1.mixer.o_proj", "norm", "lm_head"])
def test_what_differs_ends_the_command_with_1(module, tmp_path, capsys):
    """Also where every layer is equal and the last norm or the head alone is another."""
    build("llama").save_pretrained(tmp_path / "theirs")
    model = import_hf(tmp_path / "theirs")
    save_checkpoint(model, tmp_path / "same")
    assert main(["verify", str(tmp_path / "same"), str(tmp_path / "theirs")]) == 0
    assert capsys.readouterr().out.endswith("no layer differs\n")
    with torch.no_grad():
        model.get_submodule(module).weight.mul_(1.1)
    save_checkpoint(model, tmp_path / "other")
    assert main(["verify", str(tmp_path / "other"), str(tmp_path / "theirs")]) == 1
    said = "the first layer that differs is 1" if module.startswith("layers") else "no layer differs, but the logits do"
    assert said in capsys.readouterr().out


def test_text_needs_a_tokenizer_and_ids_must_be_in_the_vocabulary():
    theirs = build("llama", vocab_size=300)
    ours = import_hf(theirs)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        verify(ours, theirs, text="hello")
    ours.tokenizer = load_tokenizer("bytes")
    assert verify(ours, theirs, text="hello")["given"]["tokens"] == 5
    with pytest.raises(CheckpointError, match="ids from 0 to 299"):
        verify(ours, theirs, token_ids=[300])
    with pytest.raises(CheckpointError, match="vocabularies differ: 300 ids here, 97 there"):
        verify(ours, build("llama"))


@pytest.mark.parametrize(("sizes", "said"), [
    ({"hidden_size": 48}, "here, 4 layers, 48 wide there"),
    ({"num_hidden_layers": 2}, "here, 2 layers, 32 wide there")])
def test_models_of_different_sizes_are_refused(sizes, said):
    with pytest.raises(CheckpointError, match=f"different sizes: .*{said}"):
        verify(import_hf(build("llama")), build("llama", **sizes))


def test_a_folder_that_transformers_cannot_load(tmp_path):
    ours = import_hf(build("llama"))
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(ours, tmp_path / "nothing")
    build("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*nonsense"):
        verify(ours, tmp_path / "theirs")
