"""Residual forms, and activation checkpointing that changes nothing but memory."""

import pytest
import torch
import torch.nn.functional as F

from hybridlm.model.block import Block
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.feed_forward import DenseConfig, build_feed_forward
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual import BranchConfig, SingleResidualConfig, build_residual_branch
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind
from hybridlm_kernels import CuSeqlens
from tests.support.tiny_lm import BORDERS, VOCABULARY, config, moe, with_mtp


def branch(form, alpha, beta):
    """A feed-forward, its norm and what joins it to the stream."""
    context = LayerContext(hidden_size=12, layer_index=0, num_layers=1, norm=NormConfig(eps=1e-5), max_position=8)
    torch.manual_seed(0)
    feed_forward, norm = build_feed_forward(DenseConfig(intermediate_size=20), context), RMSNorm(12, 1e-5)
    feed_forward.init_weights(0.3)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    options = BranchConfig(form=form, alpha=alpha, beta=beta)
    return feed_forward, norm, build_residual_branch(SingleResidualConfig(), options, context, "feed_forward")


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.5, 0.25)])
@pytest.mark.parametrize("form", ["pre", "post", "normed"])
def test_residual_forms(form, scales):
    alpha, beta = scales
    feed_forward, norm_module, residual = branch(form, alpha, beta)
    h = torch.randn(2, 5, 12)
    seq = SequenceInfo.make(2, 5, torch.device("cpu"))

    def norm(x):
        return F.rms_norm(x, (12,), norm_module.weight, 1e-5)

    def f(x):
        return feed_forward(x, seq)[0]

    expected = {"pre": lambda: alpha * h + beta * f(norm(h)),
                "post": lambda: alpha * h + beta * norm(f(h)),
                "normed": lambda: alpha * norm(h) + beta * f(norm(h))}[form]()
    x, kept = residual.read(h, norm_module)
    torch.testing.assert_close(residual.write(kept, f(x), norm_module), expected)


def test_feed_forward_follows_the_residual_form_of_its_mixer_unless_told():
    post, normed = BranchConfig(form="post"), BranchConfig(form="normed", alpha=2.0)
    mixers = {"full": AttentionConfig(num_heads=2, head_dim=16, residual=post)}
    model_config = config(mixers=mixers, schedule=ScheduleConfig(pattern=["full"]))
    block = Block(model_config, "full", 0)
    assert (block.mixer_residual.form, block.feed_forward_residual.form) == ("post", "post")
    model_config.feed_forward.residual = normed
    block = Block(model_config, "full", 0)
    assert (block.mixer_residual.form, block.feed_forward_residual.form) == ("post", "normed")
    assert block.feed_forward_residual.alpha == 2.0


def results(model, **inputs):
    model.train()
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    loads = {name: load.clone() for name, load in model.router_loads().items()}
    model.post_optimizer_step(update=False)
    return output, gradients, loads


def test_activation_checkpointing_changes_nothing_and_counts_loads_once():
    model = with_mtp(1, feed_forward=moe())
    ids = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids, "cu_seqlens": CuSeqlens(BORDERS)}
    plain, plain_gradients, plain_loads = results(model, **inputs)
    model.activation_checkpointing = True
    again, gradients, loads = results(model, **inputs)
    assert torch.equal(plain.loss, again.loss)
    assert plain.losses.keys() == again.losses.keys() >= {"lm", "mtp", "balance"}
    assert all(torch.equal(plain.losses[k], again.losses[k]) for k in plain.losses)
    assert all(torch.equal(plain.stats[k], again.stats[k]) for k in plain.stats)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, gradients[name]), name
    assert len(loads) == 3
    for name, load in loads.items():
        assert torch.equal(load, plain_loads[name])
        assert load.sum() == ids.numel() * 2, f"{name}: a token goes to two experts"


NOTE = SharedKind("a note", gradient=False)


def has_left(seq, layer):
    try:
        return seq.read(NOTE, layer) == layer
    except RuntimeError:
        return False


def test_checkpointed_layers_do_not_see_what_later_layers_leave():
    """A layer computed again in the backward must find what layers have left as it was when it first ran."""
    model = with_mtp(0)
    seen: dict[int, list] = {i: [] for i in range(len(model.layers))}

    def spy(i):
        def hook(module, args):
            seq = args[1]
            seen[i].append([earlier for earlier in range(len(seen)) if has_left(seq, earlier)])
            seq.leave(NOTE, i, i)
        return hook

    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(spy(i))
    model.activation_checkpointing = True
    ids = torch.randint(VOCABULARY, (1, 8))
    model.train()(ids, labels=ids).loss.backward()
    assert seen == {0: [[], []], 1: [[0], [0]], 2: [[0, 1], [0, 1]]}
