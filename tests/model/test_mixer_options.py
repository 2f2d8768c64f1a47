"""Options of single mixers, and what happens to those that cannot be used."""

from __future__ import annotations

import math

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import (
    AttentionConfig,
    DeltaRuleConfig,
    IndexerConfig,
    LinearAttentionConfig,
    MLAConfig,
    build_mixer,
)
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.linear_attention import compute_decay_slopes
from hybridlm.model.rope import RopeConfig, YarnConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_model_config
from hybridlm_kernels import CuSeqlens
from tests.support.mixer_cases import HIDDEN, INDEXER, MLA_DIMS, build, context_of, inputs, run

BAD = {
    "heads that do not divide": (AttentionConfig, {"num_heads": 6, "num_kv_heads": 4, "head_dim": 8}, "num_kv_heads"),
    "no heads": (AttentionConfig, {"num_heads": 0, "head_dim": 8}, "num_heads"),
    "no key heads": (AttentionConfig, {"num_heads": 4, "num_kv_heads": 0, "head_dim": 8}, "num_kv_heads"),
    "odd rotation": (AttentionConfig, {"num_heads": 2, "head_dim": 6, "rope": RopeConfig(partial_rotary_factor=0.5)},
                     "rope"),
    "empty window": (AttentionConfig, {"num_heads": 2, "head_dim": 8, "window": 0}, "window"),
    "window and indexer": (AttentionConfig, {"num_heads": 2, "head_dim": 8, "window": 4,
                                             "indexer": IndexerConfig(**INDEXER)}, "window"),
    "sinks and indexer": (AttentionConfig, {"num_heads": 2, "head_dim": 8, "sinks": True,
                                            "indexer": IndexerConfig(**INDEXER)}, "sinks"),
    "index head too small": (AttentionConfig, {"num_heads": 2, "head_dim": 16, "indexer": IndexerConfig(**INDEXER)},
                             "indexer.rope_dim"),
    "index rotation in nope": (MLAConfig, {**MLA_DIMS, "qk_rope_head_dim": 0, "rope": RopeConfig(kind="none"),
                                           "indexer": IndexerConfig(**INDEXER)}, "indexer.rope_dim"),
    "odd shared key": (MLAConfig, {**MLA_DIMS, "qk_rope_head_dim": 5}, "qk_rope_head_dim"),
    "nothing to rotate": (MLAConfig, {**MLA_DIMS, "qk_rope_head_dim": 0}, "qk_rope_head_dim"),
    "no query rank": (MLAConfig, {**MLA_DIMS, "q_lora_rank": 0}, "q_lora_rank"),
    "partial rotation": (MLAConfig, {**MLA_DIMS, "rope": RopeConfig(partial_rotary_factor=0.5)},
                         "rope.partial_rotary_factor"),
    "value heads": (DeltaRuleConfig, {"num_heads": 4, "num_value_heads": 6, "head_dim": 8}, "num_value_heads"),
    "rank of a scalar gate": (DeltaRuleConfig, {"num_heads": 4, "head_dim": 8, "decay": "scalar", "gate_rank": 8},
                              "gate_rank"),
    "one tap": (DeltaRuleConfig, {"num_heads": 4, "head_dim": 8, "conv_size": 1}, "conv_size"),
    "unstable beta": (DeltaRuleConfig, {"num_heads": 4, "head_dim": 8, "beta_scale": 3.0}, "beta_scale"),
    "growing state": (DeltaRuleConfig, {"num_heads": 4, "head_dim": 8, "lower_bound": 1.0}, "lower_bound"),
    "rank without gate": (DeltaRuleConfig, {"num_heads": 4, "head_dim": 8, "output_gate": "none",
                                            "output_gate_rank": 4}, "output_gate_rank"),
    "empty range": (DeltaRuleConfig, {"num_heads": 4, "head_dim": 8, "a_init": (16.0, 1.0)}, "a_init"),
    "discretize without step": (LinearAttentionConfig, {"num_heads": 4, "head_dim": 8, "discretize": True},
                                "discretize"),
    "linear gate behind a weight": (LinearAttentionConfig, {"num_heads": 4, "head_dim": 8, "output_gate": "linear"},
                                    "output_gate"),
    "rotation of odd heads": (LinearAttentionConfig, {"num_heads": 4, "head_dim": 7, "rotation": "retnet"}, "rotation"),
    "negative norm eps": (LinearAttentionConfig, {"num_heads": 4, "head_dim": 8, "norm_eps": -1.0}, "norm_eps"),
    "no topk": (IndexerConfig, {"topk": 0}, "topk"),
    "theta": (RopeConfig, {"theta": 0.0}, "theta"),
    "yarn factor": (YarnConfig, {"factor": 0.5, "original_max_position": 64}, "factor"),
    "yarn betas": (YarnConfig, {"factor": 2.0, "original_max_position": 64, "beta_fast": 1.0, "beta_slow": 4.0},
                   "beta_fast"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_that_cannot_be_used_are_refused_by_name(name):
    config, options, key = BAD[name]
    with pytest.raises(ConfigError) as error:
        config(**options)
    assert error.value.key == key
    assert "\n" not in str(error.value)


def one_layer(config: MixerConfig, layer_index: int = 1, dtype: torch.dtype = torch.float64, layers=()):
    torch.manual_seed(0)
    mixer = build_mixer(config, context_of(layer_index=layer_index, layers=layers)).to(dtype)
    mixer.init_weights(0.3)
    return mixer


# Multi-head latent attention: both forms


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_full", "bailing_full", "deepseek_v32"])
def test_the_absorbed_form_gives_the_numbers_and_gradients_of_the_expanded_one(name, monkeypatch):
    mixer, results = build(name), {}
    for absorbed in (True, False):
        x = inputs(2, 33).requires_grad_()
        mixer.zero_grad()
        monkeypatch.setattr(mixer, "_absorbs", lambda queries, sparse, decoding, absorbed=absorbed: absorbed)
        y = run(mixer, x)
        y.square().sum().backward()
        results[absorbed] = [y, x.grad, *(p.grad for p in mixer.parameters() if p.grad is not None)]
    for got, expected in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_decoding_uses_the_absorbed_form_and_training_the_expanded_one():
    mixer = one_layer(MLAConfig(num_heads=2, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16))
    assert mixer._absorbs(1, False, decoding=True)
    assert not mixer._absorbs(512, False, decoding=True)
    assert not mixer._absorbs(1, False, decoding=False)  # ranks with unlike numbers of tokens use the same modules
    state = mixer.new_state(1, 8)
    run(mixer, inputs(1, 4), state=state)
    assert state.latent.append(torch.zeros(1, 0, 72)).shape == (1, 4, 72)


def test_yarn_scales_the_softmax_of_mla():
    yarn = YarnConfig(factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0)
    mixer = one_layer(MLAConfig(**MLA_DIMS, rope=RopeConfig(kind="interleaved", scaling=yarn)))
    assert mixer.scale == pytest.approx(12**-0.5 * (0.1 * math.log(40.0) + 1) ** 2)
    assert yarn.table_scale() == 1.0


# Indexer


def test_the_indexer_selects_the_keys_of_highest_score_within_the_document():
    mixer, x = build("deepseek_v32"), inputs(1, 40)
    borders = CuSeqlens([0, 13, 40])
    seq = SequenceInfo.make(1, 40, x.device, borders)
    latent = mixer.q_a_norm(mixer.q_a_proj(x))
    indices = mixer.indexer(x, latent, seq)
    q, w = mixer.indexer.queries(x, latent, seq)
    scores = mixer.indexer.scores(q, mixer.indexer.keys(x, seq), w)[0]
    for t in range(40):
        start = 0 if t < 13 else 13
        best = scores[t, start : t + 1].topk(min(6, t + 1 - start)).indices + start
        chosen = indices[0, t]
        assert set(chosen[chosen >= 0].tolist()) == set(best.tolist())


def test_scores_carry_gradients_into_every_indexer_parameter():
    mixer, x = build("attention_indexed"), inputs(1, 12)
    seq = SequenceInfo.make(1, 12, x.device)
    q, w = mixer.indexer.queries(x, x, seq)
    mixer.indexer.scores(q, mixer.indexer.keys(x, seq), w).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.indexer.parameters())


@pytest.mark.parametrize("name", ["attention_indexed", "deepseek_v32"])
def test_dense_mode_is_the_layer_without_its_indexer(name):
    mixer, x = build(name), inputs(1, 30)
    sparse = run(mixer, x)
    mixer.attention_mode = "dense"
    dense = run(mixer, x)
    plain_config = mixer.config.__class__(**{**vars(mixer.config), "indexer": None})
    plain = build_mixer(plain_config, context_of()).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("indexer.")})
    assert torch.equal(dense, run(plain, x))
    assert not torch.allclose(sparse, dense)
    # The first tokens see no more keys than are selected.
    torch.testing.assert_close(sparse[:, :6], dense[:, :6], rtol=1e-9, atol=1e-10)


def test_a_context_within_topk_is_not_scored(monkeypatch):
    mixer = build("deepseek_v32")
    scored = []
    monkeypatch.setattr("hybridlm.model.mixers.common.indexer.indexer_topk", lambda *a, **k: scored.append(a))
    run(mixer, inputs(1, 6))
    run(mixer, inputs(1, 12), CuSeqlens([0, 6, 12]))
    assert scored == []


def test_modes_are_checked():
    with pytest.raises(ConfigError, match="needs an indexer"):
        build("llama").attention_mode = "sparse"
    with pytest.raises(ConfigError, match="is unknown"):
        build("deepseek_v32").attention_mode = "spars"
    mixer = one_layer(MLAConfig(**MLA_DIMS, indexer=IndexerConfig(**INDEXER, mode="dense")))
    assert mixer.attention_mode == "dense"


def shared_stack(pattern: str):
    """Layers with (F) and without (S) an indexer of their own."""
    configs = [MLAConfig(**MLA_DIMS, indexer=IndexerConfig(**INDEXER, share=kind == "S")) for kind in pattern]
    return [one_layer(config, layer_index=i, layers=configs) for i, config in enumerate(configs)]


def selections(layers, x, order=None, seq=None):
    """The indices each layer attends to, running the layers in `order` with one scratch pad."""
    seq = SequenceInfo.make(x.shape[0], x.shape[1], x.device) if seq is None else seq
    found = {}
    for i in range(len(layers)) if order is None else order:
        # Every layer gets its own input, so that their selections differ.
        found[i] = layers[i].select(x * (i + 1) + i, x.roll(i, -1), seq, None).indices
    return found, seq


def test_a_sharing_layer_reads_the_selection_of_the_nearest_indexed_one():
    layers, x = shared_stack("FFSSFS"), inputs(1, 30)
    assert not any(n.startswith("indexer") for n, _ in layers[2].named_parameters())
    found, _ = selections(layers, x)
    assert torch.equal(found[2], found[1])
    assert torch.equal(found[3], found[1])
    assert torch.equal(found[5], found[4])
    assert not torch.equal(found[1], found[0])
    assert not torch.equal(found[1], found[4])


def test_recomputing_layers_backwards_finds_the_same_selections():
    layers, x = shared_stack("FFSSFS"), inputs(1, 30)
    found, seq = selections(layers, x)
    again, _ = selections(layers, x, order=[5, 4, 3, 2, 1, 0], seq=seq)
    assert all(torch.equal(found[i], again[i]) for i in found)


def test_sharing_without_an_earlier_indexer_is_refused():
    with pytest.raises(ConfigError, match=r"indexer\.share: layer 0 reads the keys .* no earlier layer leaves"):
        shared_stack("S")


def test_sharing_decodes_like_the_full_forward():
    layers, x = shared_stack("FS"), inputs(1, 20)

    def stack(x, states, offset):
        seq = SequenceInfo.make(1, x.shape[1], x.device, offset=offset)
        for layer, state in zip(layers, states, strict=True):
            x = x + layer(x, seq, state)[0]
        return x

    with torch.no_grad():
        states = [layer.new_state(1, 20) for layer in layers]
        pieces = [stack(x[:, t : t + 1], states, t) for t in range(20)]
        torch.testing.assert_close(torch.cat(pieces, 1), stack(x, [None, None], 0), rtol=1e-8, atol=1e-9)


# Decay and delta rule


def test_lightning_slopes_are_as_published():
    slopes = compute_decay_slopes("lightning", 64, 0, 80)
    assert slopes[0] == pytest.approx(2 ** (-8 / 64) * (1 + 1e-5))
    assert slopes[-1] == pytest.approx(2**-8 * (1 + 1e-5))
    last = compute_decay_slopes("lightning", 64, 79, 80)
    assert 0 < last[0] < 1e-4
    assert compute_decay_slopes("lightning", 64, 80, 80) == last


def test_alibi_slopes_are_as_published():
    """The lists of Press et al. 2022 for 8 heads, and for 12, no power of two."""
    first = [2.0**-h for h in range(1, 9)]
    assert compute_decay_slopes("alibi", 8, 0, 10**9) == pytest.approx([s * (1 + 1e-5) for s in first])
    twelve = compute_decay_slopes("alibi", 12, 3, 7)
    factor = 1 - 3 / (6 + 1e-5) + 1e-5
    assert twelve == pytest.approx([s * factor for s in [*first, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]])


@pytest.mark.parametrize(("name", "dim"), [("transnormer", 8), ("transnormer_angles", 6)])
def test_transnormer_is_the_layer_of_the_released_code(name, dim):
    """Masked products of silu(q) and silu(k), a norm without weight over all heads, a gate without an activation.

    With learned angles each dim of a score is multiplied by the cosine of its angle times the distance.
    """
    mixer, x = build(name), inputs(1, 9)
    slopes = compute_decay_slopes("alibi", 3, layer_index=1, num_layers=4)
    with torch.no_grad():
        q, k, v = (p(x[0]).view(9, 3, dim) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        distance = torch.arange(9)[:, None] - torch.arange(9)
        o = torch.zeros(9, 3, dim, dtype=x.dtype)
        for h in range(3):
            mask = (-slopes[h] * distance).double().exp().tril()
            pairs = torch.nn.functional.silu(q[:, None, h]) * torch.nn.functional.silu(k[None, :, h])
            if mixer.theta is not None:
                pairs = pairs * (distance[..., None] * mixer.theta[h]).cos()
            o[:, h] = (pairs.sum(-1) * mask) @ v[:, h]
        o = o.flatten(1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.g_proj(x[0])
        torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o), rtol=1e-6, atol=1e-6)  # decays are fp32 numbers


def test_the_preset_of_transnormer_learns_angles_in_its_first_layer_from_the_published_ones():
    model = load_model_config("hybrid_tiny", ["model.schedule.linear=transnormer", "model.schedule.ratio=inf"])
    first, second = (build_mixer(model.mixers["transnormer"], model.layer_context(index)) for index in (0, 1))
    assert second.theta is None
    first.init_weights(0.02)
    heads, dim = first.theta.shape
    expected = [10000 ** (-2 * i / (heads * dim)) for i in range(heads * dim)]
    torch.testing.assert_close(first.theta.detach().flatten(), torch.tensor(expected))


def test_retnet_is_the_recurrence_of_the_paper_on_rotated_queries_and_keys():
    """Token by token with complex numbers: dims 2j and 2j + 1 are one number, turned by 10000^(-j / (K / 2 - 1))."""
    mixer, x = build("retnet"), inputs(1, 9)
    with torch.no_grad():
        q, k = (getattr(mixer, f"{n}_proj")(x[0]).view(9, 4, 4, 2) for n in "qk")
        q, k = torch.view_as_complex(q.contiguous()), torch.view_as_complex(k.contiguous())
        v = mixer.v_proj(x[0]).view(9, 4, 12)
        turn = torch.tensor([1e4 ** (-j / 3) for j in range(4)], dtype=torch.float64)
        o = torch.zeros(9, 4, 12, dtype=torch.float64)
        for t in range(9):
            for s in range(t + 1):
                score = (q[t] * (k[s] * torch.polar(torch.ones(4).double(), (s - t) * turn)).conj()).real.sum(-1)
                decay = torch.tensor([(1 - 2.0 ** (-5 - h)) ** (t - s) for h in range(4)], dtype=torch.float64)
                o[t] += (8**-0.5 * decay * score)[:, None] * v[s]
        o = o / (o.square().mean(-1, keepdim=True) + mixer.o_norm.eps).sqrt()
        gate = mixer.g_proj(x[0])
        expected = mixer.o_proj(o.flatten(1) * gate * gate.sigmoid())
        torch.testing.assert_close(run(mixer, x)[0], expected, rtol=1e-5, atol=1e-6)  # angles are fp32


def test_projections_of_retnet_start_as_published():
    torch.manual_seed(0)
    mixer = one_layer(LinearAttentionConfig(num_heads=4, head_dim=16, projection_init="retnet"), dtype=torch.float32)
    for name, gain in (("q", 2**-2.5), ("k", 2**-2.5), ("v", 2**-2.5), ("g", 2**-2.5), ("o", 0.5)):
        weight = getattr(mixer, f"{name}_proj").weight
        assert weight.std().item() == pytest.approx(gain * (2 / sum(weight.shape)) ** 0.5, rel=0.1), name
        assert weight.abs().max() <= gain * (6 / sum(weight.shape)) ** 0.5, name


def test_retnet_slopes_are_as_published():
    slopes = compute_decay_slopes("retnet", 3, 5, 8)
    assert [math.exp(-s) for s in slopes] == pytest.approx([1 - 2**-5, 1 - 2**-6, 1 - 2**-7])


def test_slopes_stay_fp32_whatever_the_model_is_cast_to():
    mixer = one_layer(LinearAttentionConfig(num_heads=4, head_dim=8), dtype=torch.float32)
    run(mixer, inputs(1, 3, torch.float32))
    mixer.bfloat16()
    run(mixer, inputs(1, 3, torch.bfloat16))
    assert mixer._constant_g.dtype == torch.float32
    assert "_constant_g" not in mixer.state_dict()


def test_published_initial_values():
    torch.manual_seed(0)
    mixer = one_layer(DeltaRuleConfig(num_heads=256, head_dim=4, a_init=(1.0, 16.0)), dtype=torch.float32)
    rate, step = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 2
    assert 15 < rate.max() <= 16
    assert abs(rate.mean() - 8.5) < 1
    assert 0.99e-3 <= step.min() < 1.1e-3
    assert 0.09 < step.max() <= 0.1001
    assert abs(step.log().mean() - math.log(1e-2)) < 0.1
    assert mixer.q_conv.abs().max() <= 0.5
    assert mixer.q_conv.std() > 0.2
    gdn = one_layer(DeltaRuleConfig(num_heads=4, head_dim=4, decay="scalar", a_init=(1.0, 1.0), dt_bias_init="ones"))
    assert torch.equal(gdn.A_log, torch.zeros(4).double())
    assert torch.equal(gdn.dt_bias, torch.ones(4).double())


def test_a_lower_bounded_gate_never_passes_its_bound():
    mixer = build("kda_safe", torch.float32)
    g = mixer.build_forget_gate().log_decay(mixer.project_forget_gate(100 * inputs(1, 50, torch.float32)))
    assert -5 <= g.min() < -4.9
    assert g.max() <= 0


def test_gate_dtype_model_rounds_the_decay():
    import hybridlm.model.mixers.delta_rule as module

    seen = {}
    real = module.delta_rule

    def spy(*args, g, gate, **kwargs):
        seen["g"] = g if gate is None else gate.log_decay(g)
        return real(*args, g=g, gate=gate, **kwargs)

    for name, expected in (("kda_safe", torch.bfloat16), ("kda", torch.float32)):
        mixer = build(name, torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "delta_rule", spy)
            run(mixer, inputs(1, 4, torch.bfloat16))
        assert seen["g"].dtype == expected


def test_half_and_interleaved_rope_are_the_same_up_to_the_order_of_dims():
    half = one_layer(AttentionConfig(num_heads=2, head_dim=8))
    paired = one_layer(AttentionConfig(num_heads=2, head_dim=8, rope=RopeConfig(kind="interleaved")))
    paired.load_state_dict(half.state_dict())
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for projection in (paired.q_proj, paired.k_proj):
        projection.weight.data = projection.weight.view(2, 8, HIDDEN)[:, order].reshape(16, HIDDEN)
    x = inputs(1, 12)
    torch.testing.assert_close(run(paired, x), run(half, x), rtol=1e-9, atol=1e-10)
