"""Recall of indexers by layer and position, against the recall of the operation and against definitions."""

import itertools

import pytest
import torch

from hybridlm.data.packing import Batch
from hybridlm.errors import ConfigError
from hybridlm.evaluation import indexer_recall as module
from hybridlm.evaluation.indexer_recall import MEASURES, indexer_recall
from hybridlm.model.mixers.common.indexed_attention import indexed_mixers
from hybridlm.model.model import HybridLM
from hybridlm.run_config import load_config
from hybridlm.training.sparse_attention import measuring_recall
from hybridlm_kernels.packing import CuSeqlens

TOPK = 4
BORDERS = [0, 30, 33, 40, 80]  # two rows of 40 tokens


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = load_config("train", ["model=deepseek_v32_tiny", f"model.mixers.dsa.indexer.topk={TOPK}"]).model
    return HybridLM(config).double().eval()


def batch(model, borders=BORDERS):
    rows = 2 if borders == BORDERS else 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (rows, borders[-1] // rows), generator=generator)
    return Batch(ids, ids[..., None], CuSeqlens(borders), num_bytes=0, num_tokens=ids.numel(), sample_ids=())


def test_means_are_those_of_the_operation_and_positions_add_up(model):
    found = indexer_recall(model, [batch(model)])
    with measuring_recall(model), torch.no_grad():
        stats = model(batch(model).input_ids, cu_seqlens=CuSeqlens(BORDERS), logits_to_keep=1).stats
    counted = sum(max(stop - start - TOPK, 0) for start, stop in itertools.pairwise(BORDERS))
    assert {row["topk"] for row in found["layers"]} == {TOPK}
    assert [row["layer"] for row in found["layers"]] == [m.layer_index for m in indexed_mixers(model.layers)]
    for row in [*found["layers"], found["mean"]]:
        assert 0 < row["first"] < row["recall"] <= row["attainable"] <= 1
        for key in MEASURES:
            parts = sum(part[key] * part["queries"] for part in row["by_position"])
            assert parts == pytest.approx(row[key] * row["queries"])
    for row in found["layers"]:
        layer = row["layer"]
        assert row["queries"] == counted
        assert row["kl"] == pytest.approx(float(stats[f"indexer_kl/{layer}"]))
        assert row["recall"] == pytest.approx(float(stats[f"indexer_recall/{layer}"]))
        assert row["attainable"] == pytest.approx(float(stats[f"indexer_attainable/{layer}"]))
        assert [(part["start"], part["stop"]) for part in row["by_position"]] == [(4, 8), (8, 16), (16, 32), (32, 64)]
        assert row["by_position"][-1]["queries"] == 8  # of the document of 40 tokens
    assert all(mixer.selection_observer is None and not mixer.measuring for mixer in indexed_mixers(model))


@pytest.mark.parametrize("elements", [2**22, 1])  # one piece, many
def test_shares_follow_their_definitions(monkeypatch, elements):
    monkeypatch.setattr(module, "PIECE_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(2)
    tokens, heads, listed = 21, 4, 5
    q, k = (torch.randn(tokens, n, 8, generator=generator, dtype=torch.float64) for n in (heads, 2))
    chosen = torch.full((tokens, listed), -1)
    for t in range(tokens):
        chosen[t, : min(t + 1, listed)] = torch.randperm(t + 1, generator=generator)[:listed]
    seen = 0
    for t_Q, shares_QM in module._shares(q, k, chosen, 0.5):
        for t, shares in zip(t_Q.tolist(), shares_QM.tolist(), strict=True):
            p = torch.stack([(k[: t + 1, h // 2] @ q[t, h] * 0.5).softmax(0) for h in range(heads)]).mean(0)
            expected = {"recall": p[chosen[t]].sum(), "attainable": p.topk(listed).values.sum(),
                        "window": p[-listed:].sum(), "window_first": p[1 - listed :].sum() + p[0], "first": p[0],
                        "random": listed / (t + 1)}
            assert shares == pytest.approx([float(expected[key]) for key in MEASURES])
            seen += 1
    assert seen == tokens - listed


def test_positions_are_those_of_the_queries_where_layers_read_different_numbers_of_keys(model):
    wanted = [4, 7, 7, 8]
    mixers = indexed_mixers(model.layers)
    for mixer, topk in zip(mixers, wanted, strict=True):
        mixer.set_topk(topk)
    try:
        found = indexer_recall(model, [batch(model, [0, 40])])
    finally:
        for mixer in mixers:
            mixer.set_topk(None)
    assert [row["topk"] for row in found["layers"]] == wanted
    for row in found["layers"]:
        counts = {(part["start"], part["stop"]): part["queries"] for part in row["by_position"]}
        expected = {(start, stop): sum(t >= row["topk"] for t in range(start, min(stop, 40)))
                    for start, stop in ((4, 8), (8, 16), (16, 32), (32, 64))}
        assert counts == {bucket: count for bucket, count in expected.items() if count}


@pytest.mark.parametrize(("name", "said"), [
    ("quickstart", "the model has no indexer.*recipe=dsa_tiny"),
    ("deepseek_v4_tiny", "not keys; got 'csa'; expected [^;]*$")])
def test_a_model_without_indexers_is_refused(name, said):
    config = load_config(name) if name == "quickstart" else load_config("train", [f"model={name}"])
    with pytest.raises(ConfigError, match=said):
        indexer_recall(HybridLM(config.model), [])


def test_short_documents_have_no_shares(model):
    found = indexer_recall(model, [batch(model, [0, TOPK])])
    assert found["mean"]["queries"] == 0
    assert found["mean"]["recall"] is None
