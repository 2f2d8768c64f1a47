"""Sparse methods by tables, clusters, hashes and maps of blocks, each against its definition, query by query."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from hybridlm.evaluation.sparse import make_sparse_method, sparse_softmax
from hybridlm.evaluation.sparse.clusters import k_means
from hybridlm.evaluation.sparse.measure import _attend
from hybridlm.model.mixers.common.dense_attention import AttentionCall
from hybridlm.model.model import HybridLM
from hybridlm.run_config import load_config
from tests.evaluation.test_sparse import H, K, T, masks, tensors

SCALE = K**-0.5


def heads(q, k):
    """Queries and keys of each query head, lists of [T, K]."""
    return [q[0, :, h] for h in range(H)], [k[0, :, h // 2] for h in range(H)]


def read(mask, h, t):
    return set(mask[h, t].nonzero()[:, 0].tolist())


def test_double_sparsity_scores_by_the_heavy_channels_alone():
    q, k, _ = tensors()
    method = make_sparse_method("double_sparsity", {"budget": 5, "share": 4, "bits": 2, "calibration": 12})
    mask, _ = masks(method, q, k)
    assert mask[:, :12].sum() == H * 12 * 13 // 2, "the tokens that choose the channels are dense"
    for h, (qs, ks) in enumerate(zip(*heads(q, k), strict=True)):
        weight = [sum(abs(float(qs[t, c] * ks[t, c])) for t in range(12)) for c in range(K)]
        heavy = sorted(range(K), key=lambda c: -weight[c])[:2]

        def rounded(x, heavy=heavy):
            x = [float(x[c]) for c in heavy]
            low, step = min(x), (max(x) - min(x)) / 3 or 1.0
            return [low + step * round((value - low) / step) for value in x]

        for t in range(12, T):
            score = [sum(a * b for a, b in zip(rounded(qs[t]), rounded(ks[s]), strict=True)) for s in range(t + 1)]
            cut = sorted(score, reverse=True)[4]
            found = read(mask, h, t)
            assert len(found) == 5
            assert {s for s in range(t + 1) if score[s] > cut + 1e-9} <= found
            assert all(score[s] > cut - 1e-9 for s in found)


def test_clusters_are_read_by_their_centroids_and_the_last_is_cut():
    q, k, _ = tensors()
    method = make_sparse_method("clusterkv", {"budget": 9, "prompt": 24, "first": 2, "tokens": 5})
    mask, _ = masks(method, q, k)
    assert mask[:, :24].sum() == H * 24 * 25 // 2, "a prompt is dense"
    centroids, cluster = k_means(k[0, 2:24].transpose(0, 1), 4)
    for g in range(2):
        keys = k[0, 2:24, g]
        for c in range(4):
            members = keys[cluster[g] == c]
            torch.testing.assert_close(centroids[g, c], members.mean(0))
        cosine = torch.nn.functional.normalize(keys, dim=-1) @ torch.nn.functional.normalize(centroids[g], dim=-1).T
        assert torch.equal(cosine.argmax(-1), cluster[g]), "every key has the centroid of its direction"
    for h in range(H):
        for t in range(24, T):
            order = sorted(range(4), key=lambda c: -float(q[0, t, h] @ centroids[h // 2, c]))
            listed = [s + 2 for c in order for s in (cluster[h // 2] == c).nonzero()[:, 0].tolist()]
            assert read(mask, h, t) == {0, 1, *listed[:7], *range(24, t + 1)}


def test_magic_pig_draws_by_hashes_and_weighs_by_the_chance():
    q, k, v = tensors()
    method = make_sparse_method("magicpig", {"hashes": 3, "tables": 6, "prompt": 24, "first": 2, "local": 4})
    mask, scores = masks(method, q, k)
    vectors = torch.randn(K, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with sparse_softmax(HybridLM(load_config("train", ["model=hybrid_tiny"]).model), None) as tally:
        o = _attend(AttentionCall(q, k, v, None, SCALE, None, None), method, tally)
    for h, (qs, ks) in enumerate(zip(*heads(q, k), strict=True)):
        centred = ks[2:20] - ks[2:20].mean(0)
        for t in range(24, T):
            drawn, log_chance = [], {}
            for s in range(2, 20):
                signs = [torch.sign(x @ vectors).view(6, 3) for x in (qs[t], centred[s - 2])]
                if sum(torch.equal(a, b) for a, b in zip(*signs, strict=True)) >= 2:
                    drawn.append(s)
                cosine = float(qs[t] @ centred[s - 2] / qs[t].norm() / centred[s - 2].norm())
                p = (1 - math.acos(cosine) / math.pi) ** 3
                log_chance[s] = math.log(1 - (1 - p) ** 6 - 6 * p * (1 - p) ** 5)
            assert read(mask, h, t) == {0, 1, *drawn, *range(20, t + 1)}
            places = sorted(read(mask, h, t))
            logits = torch.stack([scores[h, t, s] - log_chance.get(s, 0.0) for s in places])
            torch.testing.assert_close(o[0, t, h], logits.softmax(0) @ v[0, places, h // 2])


@pytest.mark.parametrize(("hashes", "tables"), [(10, 150), (3, 6), (1, 2), (32, 150)])
@pytest.mark.parametrize("cosine", [-0.95, -0.55, -0.125, 0.0, 0.5, 0.9, 1.0])
def test_the_chance_of_a_key_is_exact_in_fp32(hashes, tables, cosine):
    """Against the definition in 200 decimal digits."""
    method = make_sparse_method("magicpig", {"hashes": hashes, "tables": tables})
    given = torch.tensor([cosine])
    with localcontext(prec=200):
        x = Decimal(1 - math.acos(float(given)) / math.pi) ** hashes
        expected = float((1 - (1 - x) ** tables - tables * x * (1 - x) ** (tables - 1)).ln())
    found = method.log_chance(given)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_key_opposite_to_the_query_has_a_finite_weight():
    assert make_sparse_method("magicpig", {}).log_chance(torch.tensor([-1.0])).isfinite().all()


def test_drawing_is_unbiased_over_the_random_vectors():
    """The mean over seeds of the sum of weights exp(s) / P over drawn keys is the sum over all keys."""
    q, k, _ = tensors()
    total, expected = 0.0, None
    for seed in range(300):
        method = make_sparse_method("magicpig", {"hashes": 2, "tables": 12, "prompt": 30, "first": 1, "local": 1,
                                                 "seed": seed})
        reader = method.reader(q[0], k[0], SCALE)
        scores = torch.einsum("hk,shk->hs", q[0, 35], k[0].repeat_interleave(2, 1))[:, None] * SCALE
        mask, rows = reader.reads(slice(35, 36), scores), slice(35, 36)
        part = slice(1, 29)
        total = total + ((scores + reader.correction(rows)).exp() * mask)[..., part].sum(-1)
        expected = scores[..., part].exp().sum(-1)
    torch.testing.assert_close(total / 300, expected, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("pattern", ["a_shape", "vertical_slash", "block_sparse"])
def test_patterns_of_minference(pattern, monkeypatch):
    from hybridlm.evaluation.sparse import minference

    monkeypatch.setattr(minference, "BLOCK", 4)
    monkeypatch.setattr(minference, "VOTERS", 6)
    q, k, _ = tensors()
    mask, scores = masks(make_sparse_method("minference", {"budget": 10, "pattern": pattern}), q, k)
    for h, (qs, ks) in enumerate(zip(*heads(q, k), strict=True)):
        p = {t: scores[h, t, : t + 1].softmax(0) for t in range(T - 6, T)}
        column = [sum(float(p[t][s]) for t in p if s <= t) for s in range(T)]
        diagonal = [sum(float(p[t][t - d]) for t in p if d <= t) for d in range(T)]
        columns = {0, max(range(1, T), key=lambda s: column[s])}  # half of two are the first
        slashes = {*range(4), *sorted(range(4, T), key=lambda d: -diagonal[d])[:4]}
        for t in range(T):
            if pattern == "a_shape":
                expected = {s for s in range(t + 1) if s < 2 or s > t - 8}
            elif pattern == "vertical_slash":
                expected = {s for s in range(t + 1) if s in columns or t - s in slashes}
            else:
                own, b = qs[t // 4 * 4 : t // 4 * 4 + 4].mean(0), 4
                score = [float(own @ ks[j * b : j * b + b].mean(0)) for j in range(t // 4 + 1)]
                best = sorted(range(len(score)), key=lambda j: -score[j])[:2]
                expected = {s for s in range(t + 1) if s // 4 in best}
            assert read(mask, h, t) == expected


def test_a_head_takes_the_pattern_that_holds_most_attention():
    q, k, _ = tensors()
    found = {name: masks(make_sparse_method("minference", {"budget": 10, "pattern": name}), q, k)
             for name in ("a_shape", "vertical_slash", "block_sparse", "choose")}
    p = found["choose"][1].softmax(-1)
    held = torch.stack([(p * found[name][0]).sum((1, 2)) for name in ("a_shape", "vertical_slash", "block_sparse")])
    torch.testing.assert_close((p * found["choose"][0]).sum((1, 2)), held.max(0).values)


@pytest.mark.parametrize("tau", [0.0, 1.0], ids=["columns and diagonals", "query-aware"])
def test_flex_prefill_covers_the_attention_of_the_last_queries(tau):
    q, k, _ = tensors()
    q, k, b, gamma = 2 * q, 2 * k, 4, 0.6
    mask, scores = masks(make_sparse_method("flexprefill", {"gamma": gamma, "tau": tau, "least": 4, "block": b}), q, k)
    blocks = T // b
    for h, (qs, ks) in enumerate(zip(*heads(q, k), strict=True)):
        last = torch.stack([scores[h, t].softmax(0) for t in range(T - b, T)])
        column = last.mean(0)
        diagonal = torch.stack([sum(last[i, T - b + i - d] for i in range(b) if T - b + i >= d) / b for d in range(T)])

        def chosen(mass):
            tokens = 1 + sum(float(mass.sort(descending=True).values[: n + 1].sum()) <= gamma for n in range(T))
            count = 1 if tau else min(blocks, tokens // b + 1)
            per_block = mass.view(blocks, b).sum(-1)
            per_block[0] = torch.inf
            return set(per_block.sort(descending=True).indices[:count].tolist())

        columns, slashes = chosen(column), chosen(diagonal)
        pairs = {(i, j) for i in range(blocks) for j in range(i + 1) if j in columns or i - j in slashes}
        if tau:
            score = torch.stack([qs[i * b : i * b + b].mean(0) for i in range(blocks)]) @ torch.stack(
                [ks[j * b : j * b + b].mean(0) for j in range(blocks)]).T * SCALE
            p = score.masked_fill(torch.ones(blocks, blocks, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            total = 0.0
            for value, place in sorted(((float(p[i, j]), (i, j)) for i in range(blocks) for j in range(i + 1)),
                                       reverse=True):
                total += value
                if total <= gamma * blocks:
                    pairs.add(place)
        for t in range(T):
            assert read(mask, h, t) == {s for s in range(t + 1) if (t // b, s // b) in pairs}


def test_flex_prefill_reads_short_documents_whole():
    q, k, _ = tensors()
    for options in ({"block": 20, "least": 1}, {"block": 4, "least": 40}):
        assert masks(make_sparse_method("flexprefill", options), q, k)[0].sum() == H * T * (T + 1) // 2


@pytest.mark.parametrize("tokens", [T, 37], ids=["whole blocks", "a short last block"])
def test_xattention_covers_the_sums_of_antidiagonals(tokens):
    q, k, _ = (x[:, :tokens] for x in tensors())
    b, S, threshold = 8, 4, 0.7
    method = make_sparse_method("xattention", {"threshold": threshold, "block": b, "stride": S})
    found = method.reader(q[0], k[0], SCALE).map_HIJ
    tiles, blocks = -(-tokens // S), -(-tokens // b)
    for h, (qs, ks) in enumerate(zip(*heads(q, k), strict=True)):
        zero = torch.zeros(K, dtype=torch.float64)

        def at(x, place, zero=zero):
            return x[place] if place < tokens else zero

        mass = torch.zeros(blocks, blocks, dtype=torch.float64)
        for i in range(tiles):
            score = torch.stack([sum(at(qs, i * S + S - 1 - n) @ at(ks, j * S + n) for n in range(S))
                                 for j in range(i + 1)]) * SCALE / S
            for j, p in enumerate(score.softmax(0)):
                mass[i * S // b, j * S // b] += p
        for i in range(blocks):
            chosen = {0, i}
            for j in sorted(range(1, i), key=lambda j: -float(mass[i, j])):
                if float(mass[i, sorted(chosen)].sum()) < threshold * float(mass[i].sum()):
                    chosen.add(j)
            assert set(found[h, i].nonzero()[:, 0].tolist()) == chosen


def test_sparge_skips_blocks_that_are_like_themselves_only():
    q, k, _ = tensors()
    directions = torch.randn(5, 1, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    k = k.clone()
    k[0, :32:, :] = 0.2 * k[0, :32] + directions[:4].repeat_interleave(8, 0)
    q = 0.3 * q + directions[4]
    bq, bk, cdf, least = 8, 4, 0.7, 0.5
    mask, _ = masks(make_sparse_method("sparge", {
        "cdf": cdf, "similarity": least, "query_block": bq, "key_block": bk}), q, k)

    def similarity(x):
        unit = x / x.norm(dim=-1, keepdim=True)
        return float((unit @ unit.T).mean())

    skipped = 0
    for h, (qs, ks) in enumerate(zip(*heads(q, k), strict=True)):
        like = [similarity(ks[j * bk : j * bk + bk]) > least for j in range(T // bk)]
        for i in range(T // bq):
            block = qs[i * bq : i * bq + bq]
            visible = range((i + 1) * bq // bk)
            score = {j: float(block.mean(0) @ ks[j * bk : j * bk + bk].mean(0)) * SCALE for j in visible if like[j]}
            chosen = {j for j in visible if not like[j] or similarity(block) <= least}
            order = sorted(score, key=lambda j: -score[j])
            p = torch.tensor([score[j] for j in order], dtype=torch.float64).softmax(0)
            chosen |= set(order[: max(1, sum(float(p[: n + 1].sum()) <= cdf for n in range(len(order))))])
            skipped += len(set(visible) - chosen)
            for t in range(i * bq, i * bq + bq):
                assert read(mask, h, t) == {s for s in range(t + 1) if s // bk in chosen}
    assert skipped > 0
