"""One indexer for all layers that read an earlier layer's keys (CLSA), against the definition, query by query."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import AttentionConfig, IndexerConfig, SharedAttentionConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_model_config
from tests.support.mixer_cases import build_layers, context_of, inputs

LENGTH, TOPK = 23, 6
SOURCE = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
OWNER = SharedAttentionConfig(indexer=IndexerConfig(form="dot", num_heads=1, head_dim=6, topk=TOPK, rope_kind="none"))
READER = SharedAttentionConfig(q_norm="head", indexer=IndexerConfig(share=True))


def run(mixers, xs):
    """Outputs and aux of the two readers."""
    seq = SequenceInfo.make(1, LENGTH, xs[0].device)
    mixers[0](xs[0], seq)
    return [mixer(x, seq) for mixer, x in zip(mixers[1:], xs[1:], strict=True)]


def attention_of(mixer, source, x_source, x):
    """Scores of attention [H, L, L], -inf for later keys, and values [L, G, 8]."""
    seq = SequenceInfo.make(1, LENGTH, x.device)
    k = source._heads(source.k_proj(x_source), source.k_norm, seq)[0].repeat_interleave(2, 1)
    q = source._heads(mixer.q_proj(x) if mixer.q_norm is None else mixer.q_norm(
        mixer.q_proj(x).unflatten(-1, (-1, 8))).flatten(-2), None, seq)[0]
    scores = torch.einsum("thk,shk->hts", q, k) / 8**0.5
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf), source.v_proj(x_source)[0].view(LENGTH, 2, 8)


def index_scores(owner, x):
    """u_t . v_s / sqrt(Di), [L, L]."""
    u, v = owner.indexer.q_proj(x)[0], owner.indexer.k_norm(owner.indexer.k_proj(x))[0]
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (u @ v.T / 6**0.5).masked_fill(later, -torch.inf)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_all_readers_attend_to_the_keys_of_largest_product_of_the_first(mode):
    mixers, xs = build_layers(SOURCE, OWNER, READER, std=0.5), [inputs(1, LENGTH, seed=seed) for seed in (1, 2, 3)]
    for mixer in mixers[1:]:
        mixer.set_attention(mode, {})
    index = index_scores(mixers[1], xs[1])
    for (y, _), mixer, x in zip(run(mixers, xs), mixers[1:], xs[1:], strict=True):
        scores, v = attention_of(mixer, mixers[0], xs[0], x)
        o = torch.zeros(LENGTH, 4, 8, dtype=x.dtype)
        for t in range(LENGTH):
            best = sorted(range(t + 1), key=lambda s, t=t: (-float(index[t, s]), s))
            keys = sorted(best[:TOPK] if mode == "sparse" else best)
            for h in range(4):
                o[t, h] = scores[h, t, keys].softmax(0) @ v[keys, h // 2]
        torch.testing.assert_close(y[0], mixer.o_proj(o.flatten(1)), rtol=1e-9, atol=1e-9)


def test_the_losses_of_all_readers_are_the_divergence_from_their_mean_attention_and_reach_the_indexer_alone():
    mixers = build_layers(SOURCE, OWNER, READER, std=0.5)
    xs = [inputs(1, LENGTH, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    for mixer in mixers:
        mixer.train()
        mixer.set_attention("dense", {})
    sum(aux["loss/indexer_kl"] for _, aux in run(mixers, xs)).div(2).backward()
    assert all(x.grad is None for x in xs)
    reached = {(i, n) for i, mixer in enumerate(mixers) for n, p in mixer.named_parameters() if p.grad is not None}
    expected = {n for n, _ in mixers[1].named_parameters() if n.startswith("indexer.")}
    assert reached == {(1, n) for n in expected}
    with torch.no_grad():
        target = torch.stack([attention_of(mixer, mixers[0], xs[0], x)[0].softmax(-1).mean(0)
                              for mixer, x in zip(mixers[1:], xs[1:], strict=True)]).mean(0)
    log_p = index_scores(mixers[1], xs[1].detach()).log_softmax(-1)
    loss = -(target * log_p.masked_fill(target == 0, 0.0)).sum(-1).mean()  # up to the entropy, a constant
    names = sorted(expected)
    gradients = torch.autograd.grad(loss, [mixers[1].get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(mixers[1].get_parameter(name).grad, gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: IndexerConfig(form="dot", num_heads=2), "num_heads: must be 1 where form is dot; got 2; expected 1"),
    (lambda: SharedAttentionConfig(window=4, indexer=IndexerConfig(share=True)),
     "window: cannot stand beside an indexer; got 4; expected null"),
    (lambda: SharedAttentionConfig(blocks=True, indexer=IndexerConfig(share=True)),
     "blocks: cannot stand beside an indexer; got True; expected false"),
    (lambda: SharedAttentionConfig(indexer=IndexerConfig()), "indexer.rope_dim: does not fit the index heads"),
    (lambda: build_mixer(OWNER, context_of(layer_index=1, layers=[
        AttentionConfig(num_heads=2, head_dim=8, window=5), OWNER])), "indexer: needs a source that sees all keys"),
])
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_a_layer_cannot_read_the_selection_of_one_that_reads_all_keys():
    options = [f"model.mixers.{name}.indexer.mode=dense" for name in ("select", "cross")]
    with pytest.raises(ConfigError) as caught:
        load_model_config("clsa_tiny", options[:1])
    assert str(caught.value).startswith(
        "model.mixers.cross.indexer.mode: shares the selection of layer 5, which reads all keys and selects none; got "
        "'sparse'; expected dense, or sparse in both layers")
    for changed in (options, options[1:]):
        assert load_model_config("clsa_tiny", changed).mixers["cross"].indexer.mode == "dense"
