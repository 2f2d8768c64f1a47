"""The indexer learns from its own loss alone, the model from its own; both modes, both cores, packed, recomputed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm.model.config import MTPConfig, ScheduleConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, IndexerConfig, MLAConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens, attention_recall, indexer_kl
from hybridlm_kernels.ops.indexer_kl import reference
from hybridlm_kernels.ops.indexer_kl import torch_backend as kl_blocks
from hybridlm_kernels.ops.sparse_attention import torch_backend as sparse_blocks
from tests.support import tiny_lm
from tests.support.mixer_cases import MLA_DIMS, NOPE, build, context_of, inputs

MODES = ["dense", "sparse"]
CORES = ["attention_indexed", "deepseek_v32", "glm_moe_dsa", "glm5_next", "attention_pooled"]
INDEXER = {"num_heads": 4, "head_dim": 8, "topk": 6}


def seq_of(x, borders=None):
    return SequenceInfo.make(x.shape[0], x.shape[1], x.device, None if borders is None else CuSeqlens(borders))


def is_index(name):
    return "indexer." in name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CORES)
def test_the_loss_reaches_every_indexer_parameter_and_nothing_else(name, mode):
    mixer, x = build(name), inputs(2, 30).requires_grad_()
    mixer.attention_mode = mode
    _, aux = mixer(x, seq_of(x))
    aux["loss/indexer_kl"].backward()
    assert x.grad is None
    for parameter_name, parameter in mixer.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_index(parameter_name), parameter_name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CORES)
def test_the_output_reaches_no_indexer_parameter(name, mode):
    mixer, x = build(name), inputs(2, 30).requires_grad_()
    mixer.attention_mode = mode
    y, _ = mixer(x, seq_of(x))
    y.square().sum().backward()
    assert x.grad.any()
    for parameter_name, parameter in mixer.named_parameters():
        assert (parameter.grad is None) == is_index(parameter_name), parameter_name


@pytest.mark.parametrize("name", CORES)
def test_learning_changes_no_output(name):
    mixer, x = build(name), inputs(2, 30)
    for mode in MODES:
        mixer.attention_mode = mode
        learning, aux = mixer.train()(x, seq_of(x))
        evaluated, nothing = mixer.eval()(x, seq_of(x))
        assert torch.equal(learning, evaluated)
        assert aux
        assert nothing == {}


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_the_attention_the_layer_computes(packed):
    mixer, x = build("attention_indexed"), inputs(1, 30)
    borders = [0, 4, 17, 30] if packed else None
    seq = seq_of(x, borders)
    q, k = mixer._heads(mixer.q_proj(x), None, seq), mixer._heads(mixer.k_proj(x), None, seq)
    index = mixer.indexer.tensors(x, x, seq)
    indices = mixer.indexer(x, x, seq)
    mixer.attention_mode = "dense"
    _, aux = mixer(x, seq)
    dense = indexer_kl(*index, q, k, cu_seqlens=borders, backend="reference")
    recall = attention_recall(q, k, indices, cu_seqlens=borders, backend="reference")
    torch.testing.assert_close(aux["loss/indexer_kl"], dense.loss)
    torch.testing.assert_close(aux["layer/indexer_entropy"], dense.entropy)
    torch.testing.assert_close(aux["layer/indexer_recall"], recall.mass)
    torch.testing.assert_close(aux["layer/indexer_agreement"], recall.agreement)
    mixer.attention_mode = "sparse"
    _, aux = mixer(x, seq)
    torch.testing.assert_close(aux["loss/indexer_kl"], indexer_kl(*index, q, k, indices_BTN=indices).loss)
    assert "layer/indexer_recall" not in aux  # would cost the dense attention
    mixer.measuring = True
    _, aux = mixer.eval()(x, seq)
    torch.testing.assert_close(aux["layer/indexer_recall"], recall.mass)
    torch.testing.assert_close(aux["layer/indexer_agreement"], recall.agreement)


def test_both_forms_of_mla_teach_the_same():
    """Sparse layers run absorbed, dense ones expanded: with everything selected the losses are one."""
    mixer, x = build("deepseek_v32"), inputs(2, 30)
    mixer.indexer.topk = 29  # one short of everything, so that the absorbed form runs
    _, absorbed = mixer(x[:, :29], seq_of(x[:, :29]))
    selection = mixer.select(x, mixer.q_a_norm(mixer.q_a_proj(x)), seq_of(x), None)
    assert selection.indices.shape[-1] == 29
    _, absorbed = mixer(x, seq_of(x))
    mixer.indexer.topk = 30
    _, everything = mixer(x, seq_of(x))
    assert everything["layer/indexer_recall"] == 1
    mixer.attention_mode = "dense"
    _, dense = mixer(x, seq_of(x))
    torch.testing.assert_close(everything["loss/indexer_kl"], dense["loss/indexer_kl"])
    assert abs(absorbed["loss/indexer_kl"] - dense["loss/indexer_kl"]) < 0.1 * dense["loss/indexer_kl"]


@pytest.mark.parametrize("how", ["frozen", "weight 0", "evaluation", "no gradient"])
def test_no_loss_where_nothing_would_learn(how, monkeypatch):
    mixer, x = build("deepseek_v32"), inputs(1, 30)
    monkeypatch.setattr("hybridlm.model.mixers.common.indexer.indexer_kl", lambda *a, **k: pytest.fail("computed"))
    if how == "frozen":
        mixer.indexer.requires_grad_(False)
    elif how == "weight 0":
        mixer.kl_weight = 0.0
    elif how == "evaluation":
        mixer.eval()
    with torch.set_grad_enabled(how != "no gradient"):
        assert mixer(x, seq_of(x))[1] == {}


def sharing_layers(mode):
    """An indexed layer and one that shares its indexer, in fp64."""
    torch.manual_seed(0)
    options = [IndexerConfig(**INDEXER, rope_kind="none", mode=mode), IndexerConfig(share=True, mode=mode)]
    configs = [MLAConfig(**MLA_DIMS, rope=NOPE, indexer=option) for option in options]
    layers = [build_mixer(config, context_of(layer_index=i, layers=configs)).double()
              for i, config in enumerate(configs)]
    for layer in layers:
        layer.init_weights(0.3)
    return layers


def dense_attention(mixer, x, seq):
    """Queries and keys of every head."""
    q = mixer.q_proj(x).unflatten(-1, (mixer.config.num_heads, -1))
    latent, r = mixer.kv_a_proj(x).split([12, 4], -1)
    k = mixer.kv_b_proj(mixer.kv_a_norm(latent)).unflatten(-1, (mixer.config.num_heads, -1))[..., :8]
    return q, torch.cat([k, r[:, :, None].expand(-1, -1, mixer.config.num_heads, -1)], -1)


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_indexer_learns_from_every_layer_that_reads_its_selection(mode):
    layers, x, y = sharing_layers(mode), inputs(1, 20), inputs(1, 20, seed=2).requires_grad_()
    seq = seq_of(x)
    losses = [layer(value, seq)[1]["loss/indexer_kl"] for layer, value in zip(layers, (x, y), strict=True)]
    index = layers[0].indexer.tensors(x, x, seq)
    indices = layers[0].indexer(x, x, seq) if mode == "sparse" else None
    for layer, value, loss in zip(layers, (x, y), losses, strict=True):
        expected = indexer_kl(*index, *dense_attention(layer, value, seq), indices_BTN=indices, backend="reference")
        torch.testing.assert_close(loss, expected.loss)
    parameters = list(layers[0].indexer.parameters())
    own, shared, both = (torch.autograd.grad(loss, parameters, retain_graph=True)
                         for loss in (losses[0], losses[1], sum(losses)))
    for a, b, total in zip(own, shared, both, strict=True):
        assert b.any()
        torch.testing.assert_close(a + b, total)
    losses[1].backward()
    assert y.grad is None
    assert all(p.grad is None for n, p in layers[1].named_parameters())


def test_the_mean_loss_of_sharing_layers_is_the_kl_from_their_mean_attention():
    """But for a constant: the gradients are equal (IndexCache)."""
    layers, x, y = sharing_layers("dense"), inputs(1, 20), inputs(1, 20, seed=2)
    seq = seq_of(x)
    loss = sum(layer(value, seq)[1]["loss/indexer_kl"] for layer, value in zip(layers, (x, y), strict=True)) / 2
    main = [dense_attention(layer, value, seq) for layer, value in zip(layers, (x, y), strict=True)]
    mask = reference.support(20, 20, 1, None, None, x.device)
    p = sum(reference.main_attention(q, k, mask, 12**-0.5) for q, k in main) / 2
    q, k, w = layers[0].indexer.tensors(x, x, seq)
    log_q = torch.log_softmax(layers[0].indexer.scores(q, k, w).masked_fill(~mask, -torch.inf), -1)
    mean_kl = -(p * log_q.masked_fill(~mask, 0.0)).sum() / 20
    parameters = list(layers[0].indexer.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(mean_kl, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["frozen", "weight 0", "evaluation"])
def test_sharing_layers_have_no_loss_where_nothing_would_learn(how):
    first, second = sharing_layers("sparse")
    if how == "frozen":
        first.indexer.requires_grad_(False)
    elif how == "weight 0":
        second.kl_weight = 0.0
    else:
        second.eval()
    x = inputs(1, 20)
    seq = seq_of(x)
    first(x, seq)
    assert second(x, seq)[1] == {}


def test_measuring_reports_sharing_layers_too():
    layers, x = sharing_layers("sparse"), inputs(1, 20)
    seq = seq_of(x)
    for layer in layers:
        layer.measuring = True
        layer.eval()
    with torch.no_grad():
        statistics = [layer(x, seq)[1] for layer in layers]
    index = layers[0].indexer(x, x, seq)
    for layer, found in zip(layers, statistics, strict=True):
        recall = attention_recall(*dense_attention(layer, x, seq), index, backend="reference")
        torch.testing.assert_close(found["layer/indexer_recall"], recall.mass)


def test_first_and_local_tokens_reach_the_selection():
    torch.manual_seed(0)
    mixer = build_mixer(AttentionConfig(num_heads=2, head_dim=8, indexer=IndexerConfig(
        **INDEXER, num_first=1, num_local=3)), context_of())
    x = inputs(1, 40, torch.float32)
    seq = seq_of(x, [0, 15, 40])
    indices = mixer.indexer(x, x, seq)
    for t in range(40):
        start = 0 if t < 15 else 15
        wanted = {start, *range(max(start, t - 2), t + 1)}
        assert wanted <= set(indices[0, t].tolist())
        assert (indices[0, t] >= 0).sum() == min(6, t + 1 - start)
    state, out = mixer.eval().new_state(1, 40), []
    row = seq_of(x)
    with torch.no_grad():
        for t in range(40):
            out.append(mixer(x[:, t : t + 1], SequenceInfo.make(1, 1, x.device, offset=t), state)[0])
        torch.testing.assert_close(torch.cat(out, 1), mixer(x, row)[0], rtol=1e-4, atol=1e-5)


def sparse_lm(mode="sparse", pattern=("linear", "full", "dsa", "dsa"), indexer=INDEXER, **options):
    mixers = {"linear": DeltaRuleConfig(num_heads=2, head_dim=16),
              "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
              "dsa": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8,
                                     indexer=IndexerConfig(**indexer, mode=mode)),
              "shared": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8,
                                        indexer=IndexerConfig(share=True, mode=mode))}
    mixers = {name: mixer for name, mixer in mixers.items() if name in pattern}
    return tiny_lm.model(num_layers=len(pattern), schedule=ScheduleConfig(pattern=list(pattern)), mixers=mixers,
                         **options)


def ids(seed=0):
    return torch.randint(tiny_lm.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
def test_in_the_model_both_learn_from_their_own_loss_alone(mode):
    model = sparse_lm(mode, mtp=MTPConfig(depth=1))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(part):
        output = model(ids(), labels=ids())
        own, kl = output.losses["lm"] + 0.3 * output.losses["mtp"], output.losses["indexer_kl"]
        torch.testing.assert_close(output.loss, own + kl)
        return torch.autograd.grad({"all": output.loss, "own": own, "kl": kl}[part], parameters, allow_unused=True)

    whole, from_own, from_kl = gradients("all"), gradients("own"), gradients("kl")
    assert sum(map(is_index, names)) == 3 * 5
    for name, total, mine, indexers in zip(names, whole, from_own, from_kl, strict=True):
        wanted, other = (indexers, mine) if is_index(name) else (mine, indexers)
        assert other is None, name
        torch.testing.assert_close(total, wanted)


def test_statistics_are_of_the_sparse_layers_only():
    model = sparse_lm("dense")
    stats = model(ids(), labels=ids()).stats
    for name in ("kl", "entropy", "recall", "agreement", "attainable"):
        of_layers = [stats[f"indexer_{name}/{i}"] for i in (2, 3)]
        assert stats[f"indexer_{name}"] == pytest.approx((sum(of_layers) / 2).item())
        assert stats[f"indexer_{name}_min"] == min(of_layers)
        assert stats[f"indexer_{name}_max"] == max(of_layers)
        assert not any(f"indexer_{name}/{i}" in stats for i in (0, 1))
    assert 0 < stats["indexer_recall"] < 1


@pytest.mark.parametrize("indexer", [INDEXER, INDEXER | {"pool": 2}], ids=["tokens", "pools"])
@pytest.mark.parametrize("mode", MODES)
def test_recomputing_layers_gives_the_same_gradients(mode, indexer):
    results = []
    for checkpointing in (False, True):
        model = sparse_lm(mode, ("linear", "dsa", "shared", "dsa"), indexer)
        model.activation_checkpointing = checkpointing
        model(ids(), labels=ids(), cu_seqlens=tiny_lm.BORDERS).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_loss_weights_of_a_stage_replace_the_models():
    model = sparse_lm("dense", mtp=MTPConfig(depth=1), feed_forward=tiny_lm.moe())
    before = model(ids(), labels=ids())
    model.loss_weights = {"lm": 0.0, "mtp": 0.0, "balance": 0.0, "indexer_kl": 2.0}
    after = model(ids(), labels=ids())
    assert before.loss != after.loss
    torch.testing.assert_close(after.loss, 2 * after.losses["indexer_kl"])
    assert all(torch.equal(before.losses[name], after.losses[name]) for name in before.losses)


def test_an_indexer_learns_the_attention_of_its_layer():
    model = sparse_lm("dense", pattern=("dsa", "dsa"))
    model.requires_grad_(False)
    trained = [p.requires_grad_() for n, p in model.named_parameters() if is_index(n)]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    first = last = None
    for _ in range(60):
        last = model(ids(), labels=ids())
        first = first or last
        last.losses["indexer_kl"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert last.losses["indexer_kl"] < 0.5 * first.losses["indexer_kl"]
    assert last.stats["indexer_recall"] > first.stats["indexer_recall"]


class LargestTensor(TorchDispatchMode):
    """Within it, `numel` is the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["attention_indexed", "deepseek_v32"])
def test_a_training_step_holds_nothing_of_length_times_length(name, mode, monkeypatch):
    for module, budget in ((kl_blocks, "CPU_BLOCK_ELEMENTS"), (sparse_blocks, "CPU_MASKED_ELEMENTS"),
                           (sparse_blocks, "CPU_INDEX_ELEMENTS")):
        monkeypatch.setattr(module, budget, 2**12)
    mixer = build(name, torch.float32)
    mixer.attention_mode = mode

    def largest(length):
        x = inputs(1, length, torch.float32).requires_grad_()
        with LargestTensor() as seen:
            y, aux = mixer(x, seq_of(x))
            (y.sum() + aux["loss/indexer_kl"]).backward()
        return seen.numel

    assert largest(1200) <= 2.1 * largest(600) < 1200**2 / 8


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_trains_the_indexer_too(mode):
    model = sparse_lm(mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids(), labels=ids())
    output.loss.backward()
    assert output.losses["indexer_kl"].dtype == torch.float32
    exact = model(ids(), labels=ids()).losses["indexer_kl"]
    assert abs(output.losses["indexer_kl"] - exact) < 0.1 * exact
    for name, parameter in model.named_parameters():
        if is_index(name):
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.any()
