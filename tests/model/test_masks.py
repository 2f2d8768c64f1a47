"""Patterns of visible keys: each equals dense attention with its table, which is written out here once more."""

import itertools

import pytest
import torch
from transformers.masking_utils import chunked_overlay

from hybridlm.config.serialization import from_dict
from hybridlm.errors import ConfigError
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.mixers.common.masks import MaskConfig, attend_seen, masked_attention
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens

T = 45
MASKS = {
    "chunk": MaskConfig(kind="chunk", size=8), "chunk, longer than the row": MaskConfig(kind="chunk", size=64),
    "strided": MaskConfig(kind="strided", size=6), "fixed": MaskConfig(kind="fixed", size=8, columns=3),
    "log": MaskConfig(kind="log", size=3), "log, the token alone": MaskConfig(kind="log", size=1),
    "window and first block": MaskConfig(kind="blocks", size=7, columns=1, block=4),
    "random blocks": MaskConfig(kind="blocks", size=5, columns=1, block=4, random=3),
    "window alone": MaskConfig(kind="blocks", size=5),
    "dilated": MaskConfig(kind="dilated", size=4, branches=3),
    "dilated, thirds": MaskConfig(kind="dilated", size=6, branches=2, factor=3)}


def sees(mask, t, s):
    """The definitions of the papers, for one query and one key; random blocks are read off the table below."""
    n, near = mask.size, 0 <= t - s < mask.size
    return {"chunk": t // n == s // n, "strided": near or (t - s) % n == 0,
            "fixed": t // n == s // n or s % n in range(n - mask.columns, n),
            "log": near or t - s in (1, 2, 4, 8, 16, 32),
            "dilated": any(t // (n * r) == s // (n * r) and t % r == s % r
                           for r in [mask.factor**i for i in range(mask.branches)]),
            "blocks": near or s // mask.block < mask.columns}[mask.kind]


def table(mask, length, layer=3):
    expected = torch.tensor([[s <= t and sees(mask, t, s) for s in range(length)] for t in range(length)])
    position = torch.arange(length)
    ours = mask.sees(position[:, None], position, layer)
    if not mask.random:
        assert torch.equal(ours, expected)
    return ours


def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
            for shape in ((2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8), (4,))]


@pytest.mark.parametrize("borders", [None, [0, 1, 30, 45, 52, 90]])
@pytest.mark.parametrize("name", MASKS)
def test_equals_dense_attention_with_the_table_and_its_gradients(name, borders):
    mask, (q, k, v, sinks) = MASKS[name], tensors()
    seq = SequenceInfo.make(2, T, q.device, None if borders is None else CuSeqlens(borders))
    found = masked_attention(q, k, v, seq, mask, layer=3, sinks_H=sinks)
    spans = [(0, T), (T, 2 * T)] if borders is None else list(itertools.pairwise(borders))
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    parts = [attend_seen(*(x[None, a:b] for x in rows), table(mask, b - a), sinks)[0] for a, b in spans]
    expected = torch.cat(parts).view_as(found)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v, sinks)) for o in (found, expected)),
                            strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_chunks_are_those_of_llama_4():
    overlay = chunked_overlay(8, torch.zeros(1, dtype=torch.long))
    theirs = torch.tensor([[s <= t and bool(overlay(0, 0, t, s)) for s in range(20)] for t in range(20)])
    assert torch.equal(MASKS["chunk"].sees(torch.arange(20)[:, None], torch.arange(20), 0), theirs)


@pytest.mark.parametrize("name", MASKS)
def test_counts_of_visible_keys_are_those_of_the_table(name):
    mask = MASKS[name]
    for length in (1, 5, 16, T):
        counted, said = float(table(mask, length).sum(1).double().mean()), mask.visible_keys(length)
        if mask.kind == "blocks":  # an upper bound: blocks overlap the window and one another
            assert counted <= said + 1e-9 <= mask.size + (mask.columns + mask.random) * mask.block + 1e-9
        else:
            assert said == pytest.approx(counted)


def test_random_blocks_lie_before_the_query_and_differ_between_layers_and_blocks_of_queries():
    mask = MaskConfig(kind="blocks", size=1, block=4, random=2)
    one, other = (table(mask, 64, layer) for layer in (0, 1))
    assert not torch.equal(one, other)
    far = torch.stack([rows.any(0) for rows in (one & ~torch.eye(64, dtype=torch.bool)).split(4)]).view(16, 16, 4)
    blocks = far.any(-1)
    assert not blocks[1:].triu(1).any()
    drawn = blocks.tril(-1)[4:].sum(1)
    assert drawn.min() >= 1
    assert drawn.max() == 2
    assert blocks.tril(-1)[:, :12].any(0).sum() >= 8  # of the 12 early blocks


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "chunk", "size": 0}, "size: must be positive"), ({"kind": "fixed", "size": 4}, "columns: must be keys"),
    ({"kind": "log", "size": 4, "columns": 1}, "columns: is not used by the mask log"),
    ({"kind": "strided", "size": 4, "random": 1}, "random: is not used by the mask strided"),
    ({"kind": "dilated", "size": 4, "branches": 70}, "branches: makes .* too large; got 70; expected at most 61 with"),
    ({"kind": "dilated", "size": 6, "branches": 10**9, "factor": 3}, "branches: makes .* expected at most 39 with"),
    ({"kind": "chunk", "size": 2**63}, "size: is too large"),
    ({"kind": "blocks", "size": 4, "block": 2**63}, "block: is too large"),
    ({"kind": "log", "size": 4, "factor": 3}, "factor: is not used by the mask log; got 3; expected 2, or kind"),
    ({"kind": "chunk", "size": 4, "block": 8}, "block: is not used by the mask chunk; got 8; expected 64, or kind bl"),
    ({"kind": "spiral", "size": 4}, "kind")])
def test_bad_masks_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(AttentionConfig, {"kind": "attention", "num_heads": 2, "head_dim": 8, "mask": options})


@pytest.mark.parametrize("mask", [MaskConfig(kind="dilated", size=4, branches=61),
                                  MaskConfig(kind="chunk", size=2**63 - 1), MaskConfig(kind="strided", size=2**63 - 1),
                                  MaskConfig(kind="log", size=2**63 - 1),
                                  MaskConfig(kind="blocks", size=2**63 - 1)])
def test_the_largest_sizes_that_are_accepted_can_be_computed(mask):
    """A segment that holds the whole sequence makes every key visible to later queries, but for a dilated pattern."""
    t = torch.arange(5)
    seen = mask.sees(t[:, None], t, layer=0)
    if mask.kind != "dilated":
        assert torch.equal(seen, torch.ones(5, 5, dtype=torch.bool).tril())
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    expected = attend_seen(q, k, k, seen, None)
    torch.testing.assert_close(masked_attention(q, k, k, SequenceInfo.make(1, 5, q.device), mask, layer=0), expected)


def test_a_mask_stands_beside_no_window():
    with pytest.raises(ConfigError, match="window: cannot stand beside a mask; got 5"):
        AttentionConfig(num_heads=2, head_dim=8, window=5, mask=MASKS["chunk"])
