"""Sparse attention tried on models: what each method reads, against its definition, and the command."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.evaluation.sparse import SPARSE_METHODS, BudgetMethod, make_sparse_method, sparse_softmax
from hybridlm.evaluation.sparse.measure import _attend
from hybridlm.model.mixers.common.dense_attention import AttentionCall
from hybridlm.model.model import HybridLM
from hybridlm.run_config import load_config
from hybridlm_kernels import attention
from hybridlm_kernels.packing import CuSeqlens

T, H, G, K = 40, 4, 2, 8


def tensors(batch=1, tokens=T):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, K, generator=generator, dtype=torch.float64) for heads in (H, G, G)]


def masks(method, q, k, window=None):
    """What a method reads of one document, [H, T, T], in pieces that do not fit evenly; None counts as all."""
    reader = method.reader(q[0], k[0], K**-0.5, window)
    scores = torch.einsum("thk,shk->hts", q[0], k[0].repeat_interleave(H // G, 1)) * K**-0.5
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - (window or T))
    scores = scores.masked_fill(~seen, -torch.inf)
    cut = method.piece_length(T) or 16
    rows = [slice(0, min(7, cut)), slice(min(7, cut), cut), slice(cut, T)]
    found = [reader.reads(piece, scores[:, piece]) for piece in rows if piece.start < piece.stop]
    filled = [torch.ones(H, piece.stop - piece.start, T, dtype=torch.bool) if mask is None else mask
              for piece, mask in zip(rows, found, strict=True)]
    return torch.cat(filled, 1) & seen, scores


def test_exact_reads_the_best_keys():
    q, k, _ = tensors()
    mask, scores = masks(make_sparse_method("exact", {"budget": 6, "first": 1, "local": 2}), q, k)
    for h in range(H):
        for t in range(T):
            forced = {0, t, max(t - 1, 0)}
            others = sorted(set(range(t + 1)) - forced, key=lambda s: -float(scores[h, t, s]))
            assert set(mask[h, t].nonzero()[:, 0].tolist()) == forced | set(others[: 6 - len(forced)])


@pytest.mark.parametrize("window", [None, 18])
def test_one_list_for_all_heads_holds_the_keys_of_most_attention(window):
    q, k, _ = tensors()
    method = make_sparse_method("exact", {"budget": 6, "first": 1, "local": 2, "shared": True})
    mask, scores = masks(method, q, k, window)
    attention = scores.softmax(-1).sum(0)
    for t in range(T):
        seen = set(range(max(0, t + 1 - (window or T)), t + 1))
        forced = {0, t, max(t - 1, 0)} & seen
        others = sorted(seen - forced, key=lambda s: -float(attention[t, s]))
        for h in range(H):
            assert set(mask[h, t].nonzero()[:, 0].tolist()) == forced | set(others[: 6 - len(forced)])


def test_streaming_reads_the_first_and_the_newest():
    q, k, _ = tensors()
    mask, _ = masks(make_sparse_method("streaming", {"budget": 7, "first": 2}), q, k)
    for t in range(T):
        assert set(mask[0, t].nonzero()[:, 0].tolist()) == {s for s in range(t + 1) if s < 2 or s > t - 5}


@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("score", ["bound", "mean"])
def test_pages_are_the_best_by_what_a_query_can_know_of_them(score, window):
    q, k, _ = tensors()
    mask, _ = masks(make_sparse_method("pages", {"budget": 16, "page": 4, "score": score}), q, k, window)
    for h in range(H):
        for t in range(T):
            found = {}
            oldest = max(0, t + 1 - (window or T))
            for page in range(oldest // 4, t // 4 + 1):
                keys = k[0, 4 * page : min(4 * page + 4, t + 1), h // 2]
                bound = torch.maximum(q[0, t, h] * keys.amax(0), q[0, t, h] * keys.amin(0)).sum()
                found[page] = float(bound if score == "bound" else q[0, t, h] @ keys.mean(0))
            best = sorted(found, key=lambda page: -found[page])[:4]
            assert set(mask[h, t].nonzero()[:, 0].tolist()) == {s for s in range(oldest, t + 1) if s // 4 in best}


@pytest.mark.parametrize("window", [None, 12])
def test_h2o_keeps_the_newest_and_those_with_most_attention_so_far(window):
    q, k, _ = tensors()
    mask, scores = masks(make_sparse_method("h2o", {"budget": 8, "recent": 3}), q, k, window)
    for g in range(G):
        kept, mass = set(), dict.fromkeys(range(T), 0.0)
        for t in range(T):
            kept = {s for s in kept | {t} if s > t - (window or T)}
            assert set(mask[2 * g, t].nonzero()[:, 0].tolist()) == kept
            assert torch.equal(mask[2 * g, t], mask[2 * g + 1, t]), "heads of a group share one cache"
            places = sorted(kept)
            for h in (2 * g, 2 * g + 1):
                for s, p in zip(places, scores[h, t, places].softmax(0).tolist(), strict=True):
                    mass[s] += p
            if len(kept) > 8:
                kept.remove(min((s for s in kept if s <= t - 3), key=lambda s: mass[s]))


def test_snapkv_keeps_what_the_last_queries_of_the_prompt_attend_to():
    q, k, _ = tensors()
    method = make_sparse_method("snapkv", {"budget": 9, "prompt": 24, "window": 4, "kernel": 3})
    mask, scores = masks(method, q, k)
    assert mask[:, :24].sum() == H * 24 * 25 // 2, "a prompt is dense"
    for g in range(G):
        votes = sum(scores[h, t, :24].softmax(0) for h in (2 * g, 2 * g + 1) for t in range(20, 24))
        smooth = [float(votes[max(0, s - 1) : s + 2].sum()) / 3 for s in range(24)]
        best = sorted(range(20), key=lambda s: -smooth[s])[:5]
        for t in range(24, T):
            expected = {*best, *range(20, t + 1)}
            assert set(mask[2 * g, t].nonzero()[:, 0].tolist()) == expected


COVERING = {"magicpig": {"local": 99}, "flexprefill": {"gamma": 1.0, "tau": 0.0, "least": 12, "block": 4},
            "xattention": {"threshold": 1.0, "block": 8, "stride": 4}, "double_sparsity": {"calibration": 5},
            "sparge": {"cdf": 1.0, "query_block": 8, "key_block": 4}}  # by options other than a budget


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", SPARSE_METHODS)
def test_a_budget_that_covers_the_document_is_dense_attention(name, window):
    q, k, v = tensors(batch=2)
    borders = CuSeqlens([0, 1, 17, 40, 52, 80])
    sinks = torch.linspace(-1, 1, H, dtype=torch.float64)
    call = AttentionCall(q, k, v, borders, K**-0.5, window, sinks)
    with sparse_softmax(HybridLM(load_config("train", ["model=hybrid_tiny"]).model), None) as tally:
        budget = {"budget": 999} if issubclass(SPARSE_METHODS[name], BudgetMethod) else {}
        method = make_sparse_method(name, {**budget, **COVERING.get(name, {}), "dense_layers": 0})
        o = _attend(call, method, tally)
    dense = attention(q, k, v, window=window, sinks_H=sinks, cu_seqlens=borders)
    torch.testing.assert_close(o, dense, rtol=1e-10, atol=1e-10)
    assert tally.read == tally.visible
    assert tally.mass / tally.queries == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "options"), [
    ("exact", {}), ("streaming", {}), ("double_sparsity", {"calibration": 8}), ("minference", {"pattern": "a_shape"}),
    ("snapkv", {"prompt": 24, "window": 4}), ("clusterkv", {"prompt": 24, "first": 2, "tokens": 5})])
def test_a_budget_is_spent_on_keys_of_the_window(name, options):
    """Every query reads as many keys as its budget and its window have; behind a prompt the first one of it."""
    q, k, _ = tensors()
    mask, _ = masks(make_sparse_method(name, {"budget": 12, **options}), q, k, 18)
    if "prompt" in options:
        assert set(mask[:, 24, :24].sum(-1).tolist()) == {12}
    else:
        assert (mask.sum(-1)[:, 12:] >= 12).all()


BLOCKS = {"xattention": {"threshold": 0.5, "block": 64, "stride": 16}, "pages": {"budget": 48},
          "quest": {"budget": 48, "dense_layers": 0}, "exact": {"budget": 16}, "streaming": {"budget": 16},
          "sparge": {"cdf": 0.5, "query_block": 64, "similarity": -1.0},
          "flexprefill": {"gamma": 0.5, "tau": 0.0, "least": 64, "block": 64},
          **{f"minference {pattern}": {"budget": budget, "pattern": pattern}
             for pattern, budget in (("a_shape", 40), ("vertical_slash", 40), ("block_sparse", 64))}}


@pytest.mark.parametrize("name", BLOCKS)
def test_keys_that_have_left_the_window_change_nothing(name):
    """The last 64 of 320 queries see the last 127 keys; those before are made large, and still do not compete."""
    q, k, v = tensors(tokens=320)
    method = make_sparse_method(name.partition(" ")[0], BLOCKS[name])
    other = torch.cat([50 * k[:, :192], k[:, 192:]], 1)
    with sparse_softmax(HybridLM(load_config("train", ["model=hybrid_tiny"]).model), None) as tally:
        found = [_attend(AttentionCall(q, keys, v, None, K**-0.5, 64, None), method, tally)[:, 256:]
                 for keys in (k, other)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], attention(q, k, v, window=64)[:, 256:])


def test_query_aware_blocks_are_pairs_of_the_window():
    q, k, _ = tensors()
    method = make_sparse_method("flexprefill", {"gamma": 0.7, "tau": 9.0, "least": 1, "block": 4})
    found = method.reader(q[0], k[0], K**-0.5, 10).map_HIJ
    for h in range(H):
        means = [x[0, :, head].unflatten(0, (-1, 4)).mean(1) for x, head in ((q, h), (k, h // 2))]
        pairs = [(i, j) for i in range(10) for j in range(i + 1) if 4 * j + 3 > 4 * i - 10]
        score = torch.full((10, 10), -torch.inf, dtype=torch.float64)
        for i, j in pairs:
            score[i, j] = means[0][i] @ means[1][j] * K**-0.5
        mass, total, kept = score.softmax(-1), 0.0, set()
        for i, j in sorted(pairs, key=lambda pair: -float(mass[pair])):
            total += float(mass[i, j])
            kept |= {(i, j)} if total <= 7.0 else set()
        read = {tuple(pair) for pair in found[h].nonzero().tolist()}
        assert kept <= read <= set(pairs)
        assert len(kept) > 10


def test_recall_and_keys_are_those_of_the_mask():
    q, k, v = tensors()
    method = make_sparse_method("streaming", {"budget": 5, "first": 1})
    with sparse_softmax(HybridLM(load_config("train", ["model=hybrid_tiny"]).model), None) as tally:
        o = _attend(AttentionCall(q, k, v, None, K**-0.5, 30, None), method, tally)
    scores = torch.einsum("thk,shk->hts", q[0], k[0].repeat_interleave(2, 1)) * K**-0.5
    t, s = torch.arange(T)[:, None], torch.arange(T)
    seen = (s <= t) & (s > t - 30)
    mask = seen & ((s < 1) | (s > t - 4) | ((t > 29) & (s > t - 5)))
    dense = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    assert tally.to_dict()["recall"] == pytest.approx(float((dense * mask).sum(-1).mean()))
    assert tally.to_dict()["keys_read"] == pytest.approx(float(mask.sum(-1).double().mean()))
    assert tally.to_dict()["keys_visible"] == pytest.approx(float(seen.sum(-1).double().mean()))
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(o[0], torch.einsum("hts,shk->thk", p, v[0].repeat_interleave(2, 1)))


def test_only_softmax_layers_of_a_hybrid_change_and_layers_may_stay_dense():
    config = load_config("train", ["model=hybrid_tiny"]).model
    model = HybridLM(config).eval()
    model.init_weights(0)
    ids = torch.randint(0, config.vocab_size, (1, 50), generator=torch.Generator().manual_seed(0))
    softmax = sum(not config.mixers[name].is_linear for name in config.layers())
    with torch.no_grad():
        dense = model(ids).logits
        method = make_sparse_method("streaming", {"budget": 3, "first": 1})
        with sparse_softmax(model, method) as tally:
            sparse = model(ids).logits
        assert tally.layers == (softmax, softmax)
        torch.testing.assert_close(sparse[:, :3], dense[:, :3], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(sparse[:, 20:], dense[:, 20:], atol=1e-5)
        with sparse_softmax(model, make_sparse_method("streaming", {"budget": 3, "dense_layers": softmax})) as tally:
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)
        assert tally.layers == (0, softmax)
        assert torch.equal(model(ids).logits, dense), "outside of the context nothing is replaced"


@pytest.mark.parametrize(("name", "options", "message"), [
    ("quests", {}, "--sparse: no such method; got 'quests'; expected one of clusterkv"),
    ("quest", {"budget": 0}, "budget: is too small; got 0; expected at least 1"),
    ("quest", {"pages": 3}, "unknown key; did you mean 'page'?"),
    ("h2o", {"recent": -1}, "recent: is too small"),
    ("xattention", {"budget": 8}, "unknown key"),
    ("xattention", {"stride": 48}, "stride: does not divide the block; got 48; expected a divisor of 128"),
    ("flexprefill", {"gamma": 1.5}, "gamma: is no share; got 1.5; expected above 0, at most 1"),
    ("magicpig", {"tables": 1}, "tables: is too small; got 1; expected at least 2"),
    ("magicpig", {"hashes": 64}, "hashes: is too large; got 64; expected at most 32"),
])
def test_a_mistake_is_one_line(name, options, message):
    with pytest.raises(ConfigError) as caught:
        make_sparse_method(name, options)
    assert message in str(caught.value)
