"""The exported class keeps the contract of transformers' models: our versions of the mixin's tests that concern it.

`scripts/dev/hf_model_tests.py` runs the mixin itself, given transformers' source distribution.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hybridlm import build_model, load_config
from hybridlm.interop import import_hf, to_hf_config, to_hf_model
from hybridlm.interop.auto import HybridLMForCausalLM
from tests.support.hf_zoo import perturb, tokens

SYSTEMS = ["kimi_linear_tiny", "minimax_01_tiny", "qwen3_next_tiny", "deepseek_v32_tiny"]


def build(*overrides, system="hybrid_tiny"):
    ours = build_model(load_config("train", [f"model={system}", *overrides]))
    perturb(ours)
    return to_hf_model(ours.eval(), family="hybridlm")


@pytest.fixture(scope="module")
def model():
    return build("model.schedule.pattern=[kda, full]", "model.num_layers=2")


@pytest.mark.parametrize("system", SYSTEMS)
def test_weights_that_no_file_holds_are_those_of_a_new_model(system):
    config = to_hf_config(load_config("train", [f"model={system}", "model.mtp.depth=0"]).model, "hybridlm")
    expected = HybridLMForCausalLM(config).state_dict()
    loaded = HybridLMForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert all(not load.any() for load in loaded.model.router_loads().values())


@pytest.mark.parametrize("system", ["kimi_linear_tiny", "qwen3_next_tiny"])
def test_a_file_that_lacks_some_weights_keeps_the_others(system, tmp_path):
    """Tensors of every kind are left out: of a mixer, of the router, of all experts, a norm, the head."""
    saved = build("model.mtp.depth=0", system=system)
    saved.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    lacking = {name for name in held if name.endswith((
        "layers.1.mixer.q_proj.weight", "layers.1.mixer.A_log", "layers.1.feed_forward.router.weight",
        "layers.2.feed_forward.experts.down", "layers.1.mixer_norm.weight", "lm_head.weight"))}
    assert len(lacking) == 6
    save_file({name: t for name, t in held.items() if name not in lacking}, file, metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lacking
    fresh = HybridLMForCausalLM(saved.config).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, (fresh if name in lacking else held)[name]), name


def test_hidden_states_attentions_and_tuples(model):
    ids = tokens(2, 6)
    out = model(ids, labels=ids, output_hidden_states=True)
    assert [tuple(x.shape) for x in out.hidden_states] == [(2, 6, 64)] * 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert (model.model.logits(out.hidden_states[-1]) - out.logits).abs().max() < 2e-5
    out.hidden_states[0].retain_grad()
    out.loss.backward()
    assert out.hidden_states[0].grad is not None
    loss, logits, states = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert torch.equal(states[1], out.hidden_states[1])
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)


def test_embeddings_may_be_given_set_and_checked(model):
    ids = tokens(2, 6)
    expected = model(ids, labels=ids)
    embeds = model.get_input_embeddings()(ids)
    got = model(inputs_embeds=embeds, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    for options, message in (({}, "pass input_ids or inputs_embeds"),
                             ({"input_ids": ids, "inputs_embeds": embeds}, "and not both"),
                             ({"inputs_embeds": embeds[..., :5]}, r"\[batch, time, 64\]")):
        with pytest.raises(ValueError, match=message):
            model(**options)
    head = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Linear(64, 512, bias=False))
    assert not torch.equal(model(ids).logits, expected.logits)
    model.set_output_embeddings(head)
    assert torch.equal(model(ids).logits, expected.logits)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabulary_is_saved_loaded_imported_and_trained(tied, tmp_path):
    theirs = build("model.schedule.pattern=[kda, full]", "model.num_layers=2", f"model.tie_embeddings={tied}")
    ids = tokens(1, 8)
    with torch.no_grad():
        before = theirs(ids).logits
    theirs.resize_token_embeddings(520, mean_resizing=not tied)
    new = torch.cat([ids, torch.tensor([[519]])], 1)
    with torch.no_grad():
        after = theirs(new).logits
    assert (after[:, :8, :512] - before).abs().max() < 1e-5
    assert after.shape == (1, 9, 520)
    theirs.train()(new, labels=new).loss.backward()
    assert theirs.get_input_embeddings().weight.grad[519].abs().sum() > 0
    theirs.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 520
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(new).logits, after)
    assert torch.equal(import_hf(tmp_path)(new).logits, after)
    theirs.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="from 0 to 299"):
        theirs(new)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient checkpointing
def test_gradient_checkpointing_is_switched_and_reported():
    theirs = build("model.schedule.pattern=[kda, full]", "model.num_layers=2").train()
    ids = tokens(1, 8)
    expected = theirs(ids, labels=ids, output_hidden_states=True)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in theirs.named_parameters()}
    for options in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        theirs.zero_grad()
        theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        assert theirs.is_gradient_checkpointing
        out = theirs(ids, labels=ids, output_hidden_states=True)
        out.loss.backward()
        assert all(torch.equal(p.grad, gradients[name]) for name, p in theirs.named_parameters())
        assert all(torch.equal(x, y) for x, y in zip(out.hidden_states, expected.hidden_states, strict=True))
        theirs.gradient_checkpointing_disable()
        assert not theirs.is_gradient_checkpointing


def test_shifted_labels_and_positions_to_keep(model):
    ids = tokens(2, 8)
    expected = model(ids, labels=ids)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(model(ids, shift_labels=shifted).loss, expected.loss)
    for keep in (3, torch.tensor([5, 6, 7])):
        assert (model(ids, logits_to_keep=keep).logits - expected.logits[:, -3:]).abs().max() < 2e-5
        assert (model(ids, logits_to_keep=keep, use_cache=True).logits - expected.logits[:, -3:]).abs().max() < 2e-5


def test_a_trainer_evaluates_the_loss(model, tmp_path):
    """Trainer reads the labels that a batch must have from the names of the arguments; one too many hides the loss."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=4, disable_tqdm=True)
    with torch.no_grad():
        expected = model.eval()(tokens(4, 8), labels=tokens(4, 8)).loss
    found = Trainer(model=model, args=args).evaluate(rows)
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_trainer_that_reads_logits_in_training(tmp_path):
    """What supervised fine-tuning does: padded rows, labels of the answer alone, the accuracy of every step."""
    class Accuracy(Trainer):
        seen: list[float] = []  # noqa: RUF012

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, out = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            right = out.logits[..., :-1, :].argmax(-1) == inputs["labels"][..., 1:]
            self.seen.append(float(right.float().mean()))
            return (loss, out) if return_outputs else loss

    rows = [{"input_ids": [0, 0, 7, 7, 7, 7], "attention_mask": [0, 0, 1, 1, 1, 1],
             "labels": [-100, -100, -100, 7, 7, 7]}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
                                  report_to=[], learning_rate=1e-3, gradient_accumulation_steps=2,
                                  disable_tqdm=True, logging_steps=1)
    trainer = Accuracy(model=build("model.schedule.pattern=[kda, full]", "model.num_layers=2"), args=arguments,
                       train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    assert len(trainer.seen) == 6


def test_config_of_an_earlier_version_is_read(tmp_path):
    """Old keys of the model section, and old names of parameters, as exports of the first version have them."""
    theirs = build("model.schedule.pattern=[kda, lightning]", "model.num_layers=2")
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["model"]["mixers"]["lightning"]["kind"] = "decay"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    file = tmp_path / "model.safetensors"
    old = {}
    for name, tensor in load_file(file).items():
        for branch in ("mixer", "feed_forward"):
            name = name.replace(f".{branch}.", f".{branch}.f.").replace(f".{branch}_norm.", f".{branch}.norm.")
        old[name] = tensor
    save_file(old, file, metadata={"format": "pt"})
    ids = tokens(1, 8)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(theirs.state_dict())
    assert AutoConfig.from_pretrained(tmp_path / "again").model_config() == theirs.config.model_config()
