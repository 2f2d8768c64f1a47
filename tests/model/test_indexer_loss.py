"""The indexer learns from its own loss alone, the model from its own; both modes, both cores, packed, recomputed."""

import pytest
import tiny_lm
import torch
from mixer_cases import MLA_DIMS, NOPE, build, context_of, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm.model.config import MTPConfig, ScheduleConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, IndexerConfig, MLAConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens, attention_recall, indexer_kl
from hybridlm_kernels.indexer_kl import torch as kl_blocks
from hybridlm_kernels.sparse_attention import torch as sparse_blocks

MODES = ["dense", "sparse"]
CORES = ["attention_indexed", "deepseek_v32", "glm_moe_dsa"]
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
    monkeypatch.setattr("hybridlm.model.mixers.indexer.indexer_kl", lambda *a, **k: pytest.fail("computed"))
    if how == "frozen":
        mixer.indexer.requires_grad_(False)
    elif how == "weight 0":
        mixer.kl_weight = 0.0
    elif how == "evaluation":
        mixer.eval()
    with torch.set_grad_enabled(how != "no gradient"):
        assert mixer(x, seq_of(x))[1] == {}


def test_sharing_layers_have_no_loss_of_their_own():
    config = MLAConfig(**MLA_DIMS, rope=NOPE, indexer=IndexerConfig(**INDEXER, rope_kind="none"))
    shared = MLAConfig(**MLA_DIMS, rope=NOPE, indexer=IndexerConfig(share=True))
    first, second = build_mixer(config, context_of(layer_index=0)), build_mixer(shared, context_of(layer_index=1))
    x = inputs(1, 20, torch.float32)
    seq = seq_of(x)
    assert first(x, seq)[1]
    assert second(x, seq)[1] == {}


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


def sparse_lm(mode="sparse", pattern=("linear", "full", "dsa", "dsa"), **options):
    mixers = {"linear": DeltaRuleConfig(num_heads=2, head_dim=16),
              "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
              "dsa": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8,
                                     indexer=IndexerConfig(**INDEXER, mode=mode))}
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


@pytest.mark.parametrize("mode", MODES)
def test_recomputing_layers_gives_the_same_gradients(mode):
    results = []
    for checkpointing in (False, True):
        model = sparse_lm(mode)
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
    for module, budget in ((kl_blocks, "CPU_ELEMENTS"), (sparse_blocks, "BLOCK_ELEMENTS"),
                           (sparse_blocks, "INDEX_ELEMENTS")):
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
