"""`engine.communication_dtype`: which tensors travel in bf16, and that it changes nothing else."""

import pytest
import torch

from hybridlm import load_config
from hybridlm.cli import main
from hybridlm.model.model import build_model

SYSTEMS = ("kimi_linear_tiny", "qwen3_next_tiny", "minimax_01_tiny", "hybrid_tiny", "kda_dsa_tiny", "deepseek_v32_tiny")


@pytest.mark.slow
@pytest.mark.parametrize(("system", "engine"), [("deepseek_v32_tiny", "zero3"), ("qwen3_next_tiny", "zero1")])
def test_the_loss_is_the_same_and_checkpoints_keep_every_digit(two_ranks, system, engine):
    pytest.importorskip("deepspeed")
    two_ranks.run("tests.support.communication_over_ranks:check_bf16_communication", system, engine)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_must_stay_fp32_travels_in_fp32(system):
    model = build_model(load_config("train", [f"model={system}", "data.tokenizer=bytes"]).model, device="meta")
    matrices = model.autocast_parameters()
    assert not matrices.keys() & model.fp32_parameter_names()
    others = {name for name, _ in model.named_parameters()} - matrices.keys()
    assert all(p.dim() > 1 for p in matrices.values())
    assert {"embed.weight", "norm.weight"} <= others
    assert any(name.endswith("experts.down") for name in matrices)
    assert all(matrices[name] is p for name, p in model.named_parameters() if name in matrices)


@pytest.mark.parametrize("system", SYSTEMS)
def test_autocast_rounds_these_weights_in_any_case(system):
    config = load_config("train", [f"model={system}", "data.tokenizer=bytes"])
    model = build_model(config.model).train()
    ids_BT = torch.randint(257, (1, 96), generator=torch.Generator().manual_seed(0))

    def loss_and_gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids_BT, labels=ids_BT)
        output.loss.backward()
        return [output.loss.detach(), *(p.grad for p in model.parameters())]

    exact = loss_and_gradients()
    for weight in model.autocast_parameters().values():
        assert not torch.equal(weight, weight.bfloat16().float())
        weight.data = weight.data.bfloat16().float()
    for a, b in zip(exact, loss_and_gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("words", "message"), [
    (["engine=zero1", "engine.communication_dtype=bf16"],
     "engine.communication_dtype: rounds what was computed in more digits; got 'bf16'; "
     "expected fp32, or training.precision=bf16"),
    (["engine=ddp", "training.precision=bf16", "+engine.communication_dtype=bf16"],
     "engine.communication_dtype: unknown key; it is an option of kind 'zero1' and 'zero2' and 'zero3'"),
])
def test_refused_before_anything_starts(words, message, tmp_path, capsys):
    assert main(["train", "model=kimi_linear_tiny", "engine.num_processes=2", f"run_dir={tmp_path / 'run'}",
                 *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_tied_embeddings_travel_in_fp32():
    config = load_config("train", ["model=hybrid_tiny", "data.tokenizer=bytes", "model.tie_embeddings=true"])
    model = build_model(config.model, device="meta")
    assert model.head_weight is model.embed.weight
    assert not any(p is model.embed.weight for p in model.autocast_parameters().values())
    assert model.embed.weight.dtype == torch.float32
