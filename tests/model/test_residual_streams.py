"""Residuals with several streams and reads over depth: transformers' modules and formulas written out as oracles."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.glm5_next import modeling_glm5_next as glm5_next
from transformers.models.hy_v4 import modeling_hy_v4 as hy_v4
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig, MTPConfig, ScheduleConfig
from hybridlm.model.contract_check.costs import kept_bytes
from hybridlm.model.cost import count_parameters, forward_flops
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.memory import activation_bytes_per_token
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.residual import (
    BRANCH_NAMES,
    RESIDUALS,
    AttentionResidualConfig,
    BranchConfig,
    GatedReadConfig,
    HyperConfig,
    IHCConfig,
    MHCConfig,
    SinglePassMHCConfig,
    build_branch_norm,
    build_residual,
    build_residual_branch,
)
from hybridlm.optimizers import OptimizerConfig, build_optimizer
from hybridlm.optimizers.contract import MatrixOptimizer
from tests.support.tiny_lm import BORDERS, VOCABULARY, config, model, moe

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
FORMS = {
    "hyper": HyperConfig(), "hyper, static": HyperConfig(num_streams=2, dynamic=False), "mhc": MHCConfig(),
    "mhc, mean": MHCConfig(num_streams=3, end="mean", initial_scale=1.0), "single pass": SinglePassMHCConfig(),
    "ihc": IHCConfig(), "ihc, sum": IHCConfig(end="sum"), "gated": GatedReadConfig(num_streams=3),
    "attention": AttentionResidualConfig(block_layers=2), "attention, every layer": AttentionResidualConfig(
        block_layers=1)}
D, M = 32, 4


def context(index=0):
    return LayerContext(hidden_size=D, layer_index=index, num_layers=3, norm=NormConfig(eps=1e-6), max_position=64)


def noisy(module, dtype=torch.float64, seed=0):
    """The module with random values in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.to(dtype).parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


def branch(residual, index=0, name="mixer", dtype=torch.float64):
    """A branch with random parameters, and its norm."""
    norm = noisy(build_branch_norm(residual, context(index)), dtype, 5)
    norm.weight.data.add_(1.0)
    return noisy(build_residual_branch(residual, BranchConfig(), context(index), name), dtype), norm


def random(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f(x):
    """What the branch computes; it changes channels and sizes."""
    return 0.5 * x.roll(1, -1) + x.square()


@pytest.mark.parametrize("residual", [HyperConfig(), MHCConfig(), SinglePassMHCConfig(), IHCConfig(), GatedReadConfig(),
                                      AttentionResidualConfig()])
def test_a_factor_of_a_branch_scales_its_output(residual):
    ours, norm = branch(residual, 1)
    scaled = build_residual_branch(residual, BranchConfig(beta=0.25), context(1), "mixer").double()
    scaled.load_state_dict(ours.state_dict())
    stream = build_residual(residual, context()).start(random(2, 5, D))
    stream = through(*branch(residual, 0, "feed_forward"), through(*branch(residual), stream))
    x, kept = ours.read(stream, norm)
    for found, expected in zip(tensors(scaled.write(scaled.read(stream, norm)[1], f(x), norm)),
                               tensors(ours.write(kept, 0.25 * f(x), norm)), strict=True):
        assert torch.equal(found, expected)


def tensors(stream):
    """All tensors of a stream."""
    return [stream] if isinstance(stream, torch.Tensor) else [x for part in stream for x in tensors(part)]


def through(residual_branch, norm, stream):
    x, kept = residual_branch.read(stream, norm)
    return residual_branch.write(kept, f(x), norm)


def perturbed(residual, **options):
    """A model in which every parameter of the residual is away from its special first value."""
    lm = model(residual=residual, mtp=MTPConfig(depth=1), **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "residual" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return lm


def copy_map(ours, theirs, prefix=""):
    for name, parameter in (("weight", "fn"), ("base", "base"), ("scale", "scale")):
        getattr(theirs, prefix + parameter).data = getattr(ours, name).data.clone()


def test_mhc_is_that_of_deepseek_v4_and_glm_5_3_with_its_gradients():
    settings = deepseek_v4.DeepseekV4Config(hidden_size=D, hc_mult=M, rms_norm_eps=1e-6, hc_eps=1e-5)
    ours, norm = branch(MHCConfig(eps=1e-5), dtype=torch.float32)
    theirs = deepseek_v4.DeepseekV4HyperConnection(settings)
    copy_map(ours.coefficients, theirs)
    end, head = noisy(build_residual(MHCConfig(eps=1e-5), context()), torch.float32), deepseek_v4.DeepseekV4HyperHead(
        settings)
    copy_map(end.end_coefficients, head, "hc_")
    x = random(2, 5, M, D).float().requires_grad_()
    post, comb, collapsed = theirs(x)
    stream = post[..., None] * f(norm(collapsed))[..., None, :] + comb.mT @ x
    written = through(ours, norm, x)
    torch.testing.assert_close(written, stream)
    torch.testing.assert_close(end.end(written), head(stream))
    ours_of = torch.autograd.grad(written.square().sum(), [x, *ours.parameters()])
    theirs_of = torch.autograd.grad(stream.square().sum(), [x, theirs.fn, theirs.base, theirs.scale])
    for a, b in zip(ours_of, theirs_of, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    mean = build_residual(MHCConfig(end="mean"), context()).end(x)
    torch.testing.assert_close(mean, glm5_next.Glm5NextTextHyperHead()(x))


def test_single_pass_reads_with_the_weights_of_the_branch_before():
    residual = SinglePassMHCConfig()
    (first, norm), (second, other_norm) = branch(residual), branch(residual, 0, "feed_forward")
    noisy(second, seed=9)
    embedding, ends = random(2, 5, D), build_residual(residual, context())
    torch.testing.assert_close(ends.end(ends.start(embedding)), embedding)
    x = embedding[:, :, None].expand(-1, -1, M, -1)
    read_1, write_1, carry_1 = first.weights(x)
    after = torch.einsum("btij,btid->btjd", carry_1, x) + write_1[..., None] * f(norm(embedding))[:, :, None]
    read_2, write_2, carry_2 = second.weights(after)
    inner = f(other_norm(torch.einsum("btm,btmd->btd", read_1, after)))
    last = torch.einsum("btij,btid->btjd", carry_2, after) + write_2[..., None] * inner[:, :, None]
    found = through(second, other_norm, through(first, norm, ends.start(embedding)))
    torch.testing.assert_close(found[0], last)
    torch.testing.assert_close(ends.end(found), torch.einsum("btm,btmd->btd", read_2, last))


def test_ihc_is_that_of_hy4():
    settings = hy_v4.HYV4Config(hidden_size=D, hc_mult=M, rms_norm_eps=1e-6, hc_eps=1e-5)
    ours, norm = branch(IHCConfig(eps=1e-5), dtype=torch.float32)
    end = noisy(build_residual(IHCConfig(eps=1e-5), context()), torch.float32)
    theirs, head = hy_v4.HYV4HyperConnection(settings), hy_v4.HYV4HyperHead(settings)
    copy_map(ours.coefficients, theirs)
    copy_map(end.end_coefficients, head, "hc_")
    x = random(2, 5, M, D).float()
    post, collapsed = theirs(x)
    stream = post[..., None] * f(norm(collapsed))[..., None, :] + x
    torch.testing.assert_close(through(ours, norm, x), stream)
    torch.testing.assert_close(end.end(x), head(x))
    fresh = build_residual_branch(IHCConfig(), BranchConfig(), context(), "mixer")
    with torch.no_grad():
        fresh.init_weights(0.0)
    torch.testing.assert_close(fresh.weights(x)[0], torch.full((2, 5, M), 1 / M), rtol=0, atol=1e-5)


def test_gated_read_is_that_of_qwen4():
    residual = GatedReadConfig(num_streams=M, rank=5)
    settings = qwen4_exp.Qwen4ExpTextConfig(hidden_size=D, hc_count=M, hc_lowrank=5, rms_norm_eps=1e-6)
    ours, norm = branch(residual, dtype=torch.float32)
    end = noisy(build_residual(residual, context()), torch.float32)
    x = random(2, 5, M, D).float()

    def theirs(norm_weight, gates, write=None):
        module = qwen4_exp.Qwen4ExpTextGatedResidual(settings, use_combine=write is not None)
        module.hc_norm.weight.data = norm_weight.data - 1.0
        module.input_mix_weight_down.weight.data = gates.down_proj.weight.data
        module.input_mix_weight_up.weight.data = gates.up_proj.weight.data
        if write is not None:
            module.block_inject_weight.weight.data = write.weight.data
        return module(x.flatten(-2))

    mixed, _, injection = theirs(norm.weight, ours.gates, ours.write_gates)
    torch.testing.assert_close(through(ours, norm, x), x + injection[..., None] * f(mixed)[:, :, None])
    torch.testing.assert_close(end.end(x), theirs(end.end_norm.weight, end.end_gates))


def test_hyper_connections_are_the_formula_of_the_paper():
    ours, norm = branch(HyperConfig(num_streams=3), 1, "feed_forward")
    c, x = ours.coefficients, random(2, 5, 3, D)
    expected = torch.zeros_like(x)
    for b, t in itertools.product(range(2), range(5)):
        h = x[b, t]
        normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        dynamic = (normed @ c.weight.T).tanh()
        static = c.static.view(3, 5)
        beta = static[:, 0] + c.scale[0] * dynamic[:, 0]
        alpha = static[:, 1:] + c.scale[1] * dynamic[:, 1:]
        mixed = alpha.T @ h  # the input of the branch, then the streams that are carried on
        expected[b, t] = torch.outer(beta, f(norm(mixed[0]))) + mixed[1:]
    torch.testing.assert_close(through(ours, norm, x), expected)


def test_fresh_hyper_connections_are_one_stream():
    single = model()
    for residual in (HyperConfig(num_streams=3), HyperConfig(num_streams=1, dynamic=False)):
        several = model(residual=residual)
        several.load_state_dict(single.state_dict(), strict=False)
        torch.testing.assert_close(several(IDS).logits, single(IDS).logits, rtol=1e-4, atol=1e-5)


def test_attention_residual_is_softmax_over_the_embedding_and_the_sums_of_blocks():
    residual = AttentionResidualConfig(block_layers=2)
    end, embedding = noisy(build_residual(residual, context())), random(2, 5, D)
    stream, blocks, running = end.start(embedding), [], embedding

    def mix(query, sources):
        values = torch.stack(sources)
        scores = (F.rms_norm(values, (D,), query, 1e-6)).sum(-1)
        return torch.einsum("sbt,sbtd->btd", scores.softmax(0), values)

    for index, name in itertools.product(range(5), ("mixer", "feed_forward")):
        ours, norm = branch(residual, index, name)
        x = mix(ours.depth_attention.query, [*blocks, running]) if (index, name) != (0, "mixer") else running
        assert ours.depth_attention is not None or (index, name) == (0, "mixer")
        if name == "mixer" and index % 2 == 0:
            blocks.append(running)
            running = torch.zeros_like(running)
        running = running + f(norm(x))
        stream = through(ours, norm, stream)
    assert len(blocks) == 3
    torch.testing.assert_close(end.end(stream), mix(end.depth_attention.query, [*blocks, running]))


@pytest.mark.parametrize("name", FORMS)
def test_costs_roles_and_first_values(name):
    residual = FORMS[name]
    lm = model(residual=residual, mtp=MTPConfig(depth=2), feed_forward=moe())
    count = count_parameters(lm.config)
    assert count.total_with_mtp == lm.num_params()
    assert count.residual == sum(p.numel() for p in lm.residual.parameters())
    for layer, block in zip(count.layers, lm.layers, strict=True):
        assert layer.params == sum(p.numel() for p in block.parameters())
    assert forward_flops(lm.config, 20)["residual"] > 0
    again = from_dict(ModelConfig, to_dict(lm.config))
    assert again.residual == residual
    assert residual.form in RESIDUALS
    optimizers = build_optimizer(lm, from_dict(OptimizerConfig, {"kind": "muon"}))
    muon = {id(p) for member in optimizers.members if isinstance(member, MatrixOptimizer)
            for group in member.param_groups for p in group["params"]}
    assert muon
    fp32, roles = lm.fp32_parameter_names(), lm.parameter_roles()
    for key, parameter in lm.named_parameters():
        if "residual" in key and not key.endswith("_proj.weight"):
            assert key in fp32
            assert roles[key].kind in ("stream_mixing", "vector")
            assert id(parameter) not in muon


@pytest.mark.parametrize("name", FORMS)
def test_everything_learns_and_checkpointing_changes_no_bit(name):
    lm = perturbed(FORMS[name], feed_forward=moe()).train()
    results = []
    for lm.activation_checkpointing in (False, True):
        lm.zero_grad()
        loss = lm(IDS, labels=IDS, cu_seqlens=BORDERS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in lm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    still = [key for key, p in lm.named_parameters() if "residual" in key and not p.grad.abs().max() > 0]
    assert still == []


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_packed_and_decoded_as_any_model(name):
    lm, flat = perturbed(FORMS[name]).double().eval(), IDS.flatten()
    packed = lm(IDS, cu_seqlens=BORDERS, return_hidden_states=True)
    separate = torch.cat([lm(flat[None, a:b]).logits[0] for a, b in itertools.pairwise(BORDERS)])
    torch.testing.assert_close(packed.logits.flatten(0, 1), separate)
    assert len(packed.hidden_states) == 4
    state = lm.new_state(2, 20)
    parts = [lm(ids, state=state).logits for ids in IDS.split([7, 1, 11, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), lm(IDS).logits, rtol=1e-7, atol=1e-9)
    changed = IDS.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    assert torch.equal(lm(changed).logits[:, :12], lm(IDS).logits[:, :12])


@pytest.mark.parametrize("name", ["hyper", "mhc", "single pass", "ihc", "attention"])
@torch.no_grad()
def test_autocast_rounds_what_branches_compute_and_no_mixing(name):
    """Around a branch in fp32 the stream is bit for bit what it is without autocast."""
    ours, norm = branch(FORMS[name], 1, "feed_forward", dtype=torch.float32)
    ends = noisy(build_residual(FORMS[name], context()), torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stream = through(ours, norm, through(ours, norm, ends.start(random(2, 5, D).float())))
            results.append(ends.end(stream))
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


def test_checkpointing_keeps_every_stream_and_each_block_once():
    def kept(residual):
        return activation_bytes_per_token(config(residual=residual), 2, checkpointing=True)

    single = kept(RESIDUALS.default_config())
    assert kept(MHCConfig()) - kept(MHCConfig(num_streams=3)) == 4 * D * (3 + 2)  # 3 layers, and one complete layer
    assert single < kept(AttentionResidualConfig()) < kept(HyperConfig(num_streams=2))


@pytest.mark.parametrize("residual", [MHCConfig(), AttentionResidualConfig()])
def test_only_branches_with_a_norm_before_them_can_be_joined(residual):
    mixers = {"full": AttentionConfig(num_heads=2, head_dim=16, residual=BranchConfig(form="post"))}
    with pytest.raises(ConfigError, match=r"residual: is for model\.residual\.form=single, not for"):
        config(mixers=mixers, schedule=ScheduleConfig(pattern=["full"]), residual=residual)


@pytest.mark.parametrize(("options", "message"), [
    ({"form": "mhc", "num_streams": 0}, "num_streams: must be positive"),
    ({"form": "mhc", "sinkhorn_iterations": 0}, "sinkhorn_iterations: must be positive"),
    ({"form": "mhc", "end": "median"}, "end"), ({"form": "ihc", "initial_scale": 0.0}, "initial_scale"),
    ({"form": "gated", "rank": 0}, "rank: must be positive"),
    ({"form": "attention", "block_layers": 0}, "block_layers: must be positive"),
    ({"form": "single", "num_streams": 4}, "num_streams")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, to_dict(config()) | {"residual": options})


@pytest.mark.parametrize("name", FORMS)
def test_bytes_kept_for_the_backward_are_those_of_autograd(name):
    """Around branches that keep their input alone, as a projection does."""
    residual, layers, tokens, width = FORMS[name], 6, 8, 256
    facts = LayerContext(hidden_size=width, layer_index=0, num_layers=layers, norm=NormConfig(), max_position=64)
    ends, branches, said = build_residual(residual, facts), torch.nn.ModuleList(), 0.0
    for index, which in itertools.product(range(layers), BRANCH_NAMES):
        at = replace(facts, layer_index=index)
        norm = build_branch_norm(residual, at)
        branches.append(torch.nn.ModuleList([build_residual_branch(residual, BranchConfig(), at, which), norm]))
        with torch.no_grad():
            branches[-1][0].init_weights(0.02)
        said += residual.activation_bytes(at, 4, which)
    x, weight = torch.randn(1, tokens, width, requires_grad=True), torch.nn.Parameter(torch.ones(width))
    branches.register_parameter("weight", weight)

    def run():
        stream = ends.start(x)
        for joined, norm in branches:
            inner, kept = joined.read(stream, norm)
            stream = joined.write(kept, inner * weight, norm)
        return stream

    measured = kept_bytes(branches, x, run) / tokens
    assert 0.8 * measured < said < 1.25 * measured, (measured, said)
