"""Forms of a mixture of experts: scores of DeepSeek-V4, tables of token ids, experts in a latent."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4

from hybridlm.errors import ConfigError
from hybridlm.model.config import MTPConfig
from hybridlm.model.cost import count_parameters, forward_flops
from hybridlm.model.feed_forward import MoEConfig, build_feed_forward
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.sequence import SequenceInfo
from tests.support.tiny_lm import BORDERS, VOCABULARY, model, moe

HIDDEN, EXPERTS, ACTIVE = 16, 8, 3
IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
LATENT = {"latent_size": 12, "latent_norm": True}


def build(layer=1, **options):
    config = MoEConfig(num_experts=EXPERTS, num_experts_per_tok=ACTIVE, moe_intermediate_size=12, **options)
    context = LayerContext(hidden_size=HIDDEN, layer_index=layer, num_layers=4, norm=NormConfig(), max_position=64,
                           vocab_size=VOCABULARY)
    torch.manual_seed(0)
    module = build_feed_forward(config, context)
    with torch.no_grad():
        module.init_weights(0.5)
    return module


def tokens(x):
    seq = SequenceInfo.make(*x.shape[:2], x.device)
    seq.token_ids_BT = IDS[: x.shape[0], : x.shape[1]]
    return seq


@pytest.mark.parametrize("hashed", [False, True])
def test_scores_and_tables_are_those_of_deepseek_v4(hashed):
    settings = deepseek_v4.DeepseekV4Config(
        hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE, scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5, vocab_size=VOCABULARY)
    ours = build(router="sqrt_softplus", routed_scaling_factor=1.5, correction_bias=True,
                 hash_layers=[1] if hashed else []).router
    x = torch.randn(2, 7, HIDDEN)
    if hashed:
        theirs = deepseek_v4.DeepseekV4HashRouter(settings)
        theirs.tid2eid.copy_(ours.table)
        assert ours.bias is None
    else:
        theirs = deepseek_v4.DeepseekV4TopKRouter(settings)
        theirs.e_score_correction_bias.copy_(ours.bias.copy_(torch.linspace(-0.5, 0.5, EXPERTS)))
    theirs.weight.data = ours.weight.data
    ids, weights, _ = ours(x, tokens(x))
    _, expected_weights, expected_ids = theirs(x, *([IDS[:2, :7]] if hashed else []))
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


def test_a_table_gives_each_token_distinct_experts_and_loads_all_of_them():
    table = build(hash_layers=[1]).router.table
    assert table.shape == (VOCABULARY, ACTIVE)
    assert all(len(set(row)) == ACTIVE for row in table.tolist())
    assert torch.bincount(table.flatten(), minlength=EXPERTS).min() > VOCABULARY * ACTIVE / EXPERTS / 2
    assert build(layer=2, hash_layers=[1]).router.table is None


def test_experts_in_a_latent_are_a_loop_over_tokens_and_experts():
    module = build(num_shared_experts=1, **LATENT).double()
    module.latent_norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    y, _ = module(x, tokens(x))
    for token, out in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        scores = (module.router.weight @ token).softmax(0)
        best = scores.topk(ACTIVE)
        z, total = module.latent_down.weight @ token, 0.0
        for e, score in zip(best.indices, best.values, strict=True):
            gate, up = (module.experts.gate_up[e] @ z).chunk(2)
            total = total + score / best.values.sum() * (module.experts.down[e] @ (F.silu(gate) * up))
        expected = module.latent_up.weight @ F.rms_norm(total, (12,), module.latent_norm.weight, module.latent_norm.eps)
        expected = expected + module.shared(token[None, None], None)[0][0, 0]
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def situ(gate, up):
    return 4 * (gate / 4).tanh() * gate.sigmoid() * 25 * (up / 25).tanh()


def test_situ_is_the_activation_of_all_experts_and_of_dense_layers():
    module = build(num_shared_experts=1, activation="situ").double()
    dense = build(layer=0, activation="situ", dense_layers=[0], intermediate_size=12).double()
    x = 5 * torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    for feed_forward in (module, dense):
        with torch.no_grad():
            y, step = feed_forward(x, tokens(x))[0], feed_forward.prepare_step()
            steps = torch.stack([step(token[None, None], None, None)[0, 0] for token in x.flatten(0, 1)])
            torch.testing.assert_close(steps, y.flatten(0, 1), rtol=1e-9, atol=1e-9)
    plain = module.shared
    for token, out in zip(x.flatten(0, 1), module(x, tokens(x))[0].flatten(0, 1), strict=True):
        best = (module.router.weight @ token).softmax(0).topk(ACTIVE)
        total = plain.down_proj.weight @ situ(plain.gate_proj.weight @ token, plain.up_proj.weight @ token)
        for e, score in zip(best.indices, best.values, strict=True):
            gate, up = (module.experts.gate_up[e] @ token).chunk(2)
            total = total + score / best.values.sum() * (module.experts.down[e] @ situ(gate, up))
        torch.testing.assert_close(out, total, rtol=1e-9, atol=1e-9)


def test_quantiles_give_each_expert_its_share_of_the_tokens_they_were_taken_from():
    module = build(router="sigmoid", bias_update="quantile").train()
    router, x = module.router, torch.randn(1, 256, HIDDEN) + 1.0
    seq = SequenceInfo.make(1, 256, x.device)
    violations = []
    for _ in range(12):
        scores = torch.sigmoid(router.logits(x))
        before, aux = router.bias.clone(), router(x, seq)[2]
        module.record(aux)
        module.record(aux)
        assert torch.equal(router.step_sums()[1][-1], torch.tensor(2.0))
        module.post_optimizer_step()
        threshold = (scores + before).sort(-1).values[:, -ACTIVE - 1, None]
        above, share = scores + router.bias - threshold, 256 * ACTIVE // EXPERTS
        assert (above > 1e-6).sum(0).max() <= share, "others are at the threshold"
        assert (above > -1e-6).sum(0).min() >= share
        violations.append(float(aux["stat/max_violation"]))
    assert violations[0] > 0.5 > 0.1 > violations[-1]
    kept = router.bias.clone()
    module.record(aux)
    module.post_optimizer_step(update=False)
    assert torch.equal(router.bias, kept)
    assert not router.quantiles.any()
    module.post_optimizer_step()
    assert torch.equal(router.bias, kept), "a step without tokens moves nothing"


FORMS = {"latent": LATENT, "hash": {"hash_layers": [1], "router": "sqrt_softplus", "num_groups": 1, "topk_groups": 1},
         "kimi_k3": {"activation": "situ", "bias_update": "quantile", "bias_update_rate": 0.0, "num_groups": 1,
                     "topk_groups": 1}}


@pytest.mark.parametrize("name", FORMS)
def test_a_model_is_packed_decoded_counted_and_trained(name):
    lm = model(feed_forward=moe(**FORMS[name]), mtp=MTPConfig(depth=1))
    assert count_parameters(lm.config).total_with_mtp == lm.num_params()
    assert forward_flops(lm.config, 20, mtp=False).get("feed_forward.latents", 0.0) == (
        2 * 4.0 * 32 * 12 if name == "latent" else 0.0)
    lm.train()(IDS, labels=IDS, cu_seqlens=BORDERS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lm.parameters())
    lm.zero_grad()
    lm.double().eval()
    with torch.no_grad():
        flat = IDS.flatten()
        packed = lm(IDS, cu_seqlens=BORDERS).logits.flatten(0, 1)
        separate = torch.cat([lm(flat[None, a:b]).logits[0] for a, b in itertools.pairwise(BORDERS)])
        torch.testing.assert_close(packed, separate)
        state = lm.new_state(2, 20)
        parts = [lm(ids, state=state).logits for ids in IDS.split([7, 1, 11, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), lm(IDS).logits, rtol=1e-7, atol=1e-9)


def test_a_table_of_token_ids_needs_them():
    lm = model(feed_forward=moe(**FORMS["hash"]))
    with pytest.raises(ValueError, match="hash_layers choose experts by token ids: run the model with input_ids"):
        lm(None, inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize(("options", "message"), [
    ({"latent_size": 0}, "latent_size: must be positive"), ({"latent_norm": True}, "latent_norm: needs latent_size"),
    ({"hash_layers": [1], "dense_layers": [1], "intermediate_size": 8}, "hash_layers: are dense layers too"),
    ({"hash_layers": [9]}, "hash_layers: names a layer the model does not have"),
    ({"bias_update": "quantile", "bias_update_rate": 0.1}, "bias_update_rate: is not used by bias_update=quantile"),
    ({"bias_update": "quantile", "num_groups": 2}, "topk_groups: cannot limit experts beside bias_update=quantile"),
    ({"activation": "situ", "swiglu_limit": 7.0}, "swiglu_limit: is not used by situ"),
    ({"situ_caps": [4.0]}, "situ_caps: must be a cap of the gate and one of the up projection"),
    ({"situ_caps": [float("inf"), 25.0]}, r"situ_caps: must be .*; got \[inf, 25.0\]; expected finite numbers"),
    ({"situ_caps": [4.0, float("inf")]}, r"situ_caps: must be .*; got \[4.0, inf\]; expected finite numbers"),
    ({"situ_caps": [1.0, 1.0]}, "situ_caps: are not used by swiglu"),
    ({"bias_update": "quantile", "correction_bias": False},
     "correction_bias: is off, but bias_update=quantile would move it.*or bias_update=load"),
    ({"bias_update_rate": None, "correction_bias": False},
     "correction_bias: is off, but bias_update_rate would move it.*or bias_update_rate=0")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options).config.num_params(LayerContext(
            hidden_size=HIDDEN, layer_index=0, num_layers=4, norm=NormConfig(), max_position=64))
