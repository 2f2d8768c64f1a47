"""Router biases under trainers that are not ours: the callback, the call for loops of one's own, and the warning."""

import logging

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

import hybridlm.interop.auto  # noqa: F401  (registers the model type)
from hybridlm import build_model, load_config
from hybridlm.interop import RouterBiasCallback, to_hf_model, update_router_biases

RATE = 0.05


@pytest.fixture
def hf_model():
    config = load_config("train", ["model=hybrid_tiny", f"model.feed_forward.bias_update_rate={RATE}",
                                   "model.num_layers=2"])
    model = to_hf_model(build_model(config), family="hybridlm").train()
    model.model.post_optimizer_step(update=False)
    return model


def biases(model):
    return torch.stack([b.clone() for name, b in model.named_buffers() if name.endswith("router.bias")])


def train(model, folder, steps=5, **options):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(200, (4, 16), generator=generator).tolist()]
    args = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                             use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    Trainer(model=model, args=args, train_dataset=rows, **options).train()


def test_the_callback_moves_the_biases_once_per_optimizer_step(hf_model, tmp_path, caplog):
    before = biases(hf_model)
    train(hf_model, tmp_path, steps=1, callbacks=[RouterBiasCallback()])
    moved = (biases(hf_model) - before).abs()
    assert moved.max() == pytest.approx(RATE)
    assert not any(load.any() for load in hf_model.model.router_loads().values())
    train(hf_model, tmp_path, callbacks=[RouterBiasCallback()])
    assert "router biases" not in caplog.text


def test_a_trainer_without_it_is_warned_of_once(hf_model, tmp_path, caplog):
    before = biases(hf_model)
    with caplog.at_level(logging.WARNING, "hybridlm"):
        train(hf_model, tmp_path, steps=6)
    assert torch.equal(biases(hf_model), before)
    assert caplog.text.count("hybridlm.interop.RouterBiasCallback") == 1


def test_frozen_routers_neither_move_nor_warn(hf_model, tmp_path, caplog):
    for name, parameter in hf_model.named_parameters():
        parameter.requires_grad_("router" not in name)
    before = biases(hf_model)
    train(hf_model, tmp_path)
    assert "router biases" not in caplog.text
    update_router_biases(hf_model)
    assert torch.equal(biases(hf_model), before)


def test_loads_are_summed_over_processes(hf_model, monkeypatch):
    """The other process saw the opposite, and more of it: its loads decide."""
    load = next(iter(hf_model.model.router_loads().values()))
    load.copy_(torch.tensor([8] + [0] * (len(load) - 1)))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_((tensor == 0) * 100))
    before = biases(hf_model)[0]
    assert update_router_biases(torch.nn.Sequential(hf_model))
    moved = biases(hf_model)[0] - before
    assert moved[0] > 0
    assert (moved[1:] < 0).all()
