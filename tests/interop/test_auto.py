"""The model type `hybridlm`: models that no class of transformers can hold, inside transformers."""

import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hybridlm.interop.auto  # noqa: F401  (registers the model type)
from hybridlm import load_config
from hybridlm.interop import export_hf, import_hf, to_hf_model
from hybridlm.interop.auto import HybridLMForCausalLM
from hybridlm.model import build_model, generate
from tests.support.hf_zoo import perturb, tokens

MIXES = {  # linear, full, ratio
    "kda with lightning": ["model.schedule.pattern=[kda, lightning, full]"],
    "gated deltanet with dsa": ["model.schedule.linear=gdn", "model.schedule.full=dsa",
                                "model.mixers.dsa.indexer.topk=8"],
    "window and deltanet": ["model.schedule.pattern=[swa, deltanet]", "model.mixers.swa.window=6"],
}


def build(mix):
    model = build_model(load_config("train", ["model=hybrid_tiny", *MIXES[mix]]))
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("mix", MIXES)
def test_export_load_generate(mix, tmp_path, caplog):
    model = build(mix)
    with caplog.at_level(logging.WARNING, "hybridlm"):
        assert export_hf(model, tmp_path / "out")["family"] == "hybridlm"
    assert "import hybridlm.interop.auto" in caplog.text
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(theirs, HybridLMForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)
    expected = torch.stack(list(generate(model, ids, 32, temperature=0)), 1)
    assert torch.equal(theirs.generate(ids, max_new_tokens=32, do_sample=False)[:, 20:], expected)

    back = import_hf(tmp_path / "out")
    assert back.config == model.config
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


def test_other_ways_to_generate_use_the_cache_rightly(tmp_path):
    theirs = to_hf_model(build("gated deltanet with dsa"), family="hybridlm")
    ids = tokens(2, 12)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cached = theirs.generate(ids, max_new_tokens=10, do_sample=False, **options)
        assert torch.equal(cached, theirs.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False, **options))
    torch.manual_seed(0)
    sampled = theirs.generate(ids, max_new_tokens=5, do_sample=True, top_p=0.9, num_return_sequences=3)
    assert sampled.shape == (6, 17)
    out = theirs(ids, use_cache=True)
    assert out.past_key_values.get_seq_length() == 12
    step = theirs(ids[:, :1], past_key_values=out.past_key_values).logits
    full = theirs(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert (step - full).abs().max() < 2e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient checkpointing
def test_training_interface():
    theirs = to_hf_model(build("kda with lightning"), family="hybridlm").train()
    ids = tokens(2, 16)
    out = theirs(ids, labels=ids)
    out.loss.backward()
    assert (out.logits - theirs.eval()(ids).logits).abs().max() < 2e-5  # as transformers' models do
    assert all(p.grad is not None for p in theirs.parameters())
    theirs.train()
    assert theirs(ids, labels=ids, skip_logits=True).logits is None
    theirs.config.logits_in_training = False
    assert theirs(ids, labels=ids).logits is None
    halves = [theirs(ids[i : i + 1], labels=ids[i : i + 1], num_items_in_batch=30).loss for i in (0, 1)]
    assert abs(sum(halves) - out.loss) < 1e-5
    theirs.gradient_checkpointing_enable()
    assert theirs.model.activation_checkpointing
    again = theirs(ids, labels=ids).loss
    assert torch.equal(again, out.loss)
    with torch.no_grad():
        assert theirs.eval()(ids, labels=ids).logits.shape == (2, 16, 512)


def test_borders_of_documents_padded_to_a_fixed_size():
    theirs = to_hf_model(build("kda with lightning"), family="hybridlm").train()
    ids = tokens(1, 12)
    expected = theirs(ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 12])).loss
    padded = torch.tensor([[0, 5, 5, 12, 12, 12]], dtype=torch.int32)  # the row is the collator's
    assert torch.equal(theirs(ids, labels=ids, cu_seqlens=padded).loss, expected)
    with pytest.raises(ValueError, match=r"cu_seqlens: .*one table \[documents \+ 1\].*got shape \[2, 3\]"):
        theirs(ids, cu_seqlens=torch.tensor([[0, 5, 12], [0, 5, 12]]))


def test_saved_again_by_transformers_and_in_bf16(tmp_path):
    theirs = to_hf_model(build("kda with lightning"), family="hybridlm")
    theirs.save_pretrained(tmp_path / "again")
    assert "model" in json.loads((tmp_path / "again" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = tokens(1, 20)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert dtypes["model.layers.0.mixer.A_log"] == torch.float32
    assert dtypes["model.layers.0.mixer.q_proj.weight"] == torch.bfloat16
    assert half(ids).logits.isfinite().all()
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "again"))
    assert fresh(ids).logits.isfinite().all()
