"""The indexer's loss against its reference, by hand, packed, in blocks; and the recall of selections."""

import itertools
import math

import pytest
import torch

from hybridlm_kernels import attention, attention_recall, indexer_kl, indexer_topk
from hybridlm_kernels.ops.indexer_kl import reference
from hybridlm_kernels.ops.indexer_kl import torch_backend as eager
from tests.support.kernel_compare import LargestTensor, assert_same_function, error, tensors

# rows, queries, keys, index heads, index dim, heads, key heads, key dim
SHAPES = [(1, 1, 1, 1, 4, 1, 1, 4), (2, 37, 37, 4, 8, 4, 2, 8), (1, 90, 90, 3, 4, 4, 1, 12), (2, 1, 30, 4, 8, 2, 2, 4),
          (1, 20, 50, 2, 4, 6, 2, 8)]


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(eager, "CPU_BLOCK_ELEMENTS", 2000)


def case(batch, queries, keys, heads, dim, main_heads, groups, main_dim, dtype=torch.float64, seed=0):
    return tensors((batch, queries, heads, dim), (batch, keys, dim), (batch, queries, heads),
                   (batch, queries, main_heads, main_dim), (batch, keys, groups, main_dim), dtype=dtype, seed=seed)


def borders(batch, length):
    inner = {1, 3, length // 2, batch * length - length // 3, batch * length - 1}
    return sorted({*range(0, batch * length + 1, length), *(b for b in inner if 0 < b < batch * length)})


def listing(batch, queries, keys, count, cuts=None, seed=0):
    """Distinct visible keys in random order, some queries with none or one."""
    mask = reference.support(queries, keys, batch, None, None, torch.device("cpu")) if cuts is None else \
        reference.support(queries, keys, batch, None, eager.CuSeqlens(cuts), torch.device("cpu"))
    score = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~mask, -1.0)
    top = score.topk(min(count, keys), -1)
    index = top.indices.masked_fill(top.values < 0.2, -1)
    index[:, ::7, 1:] = -1
    index[:, ::11] = -1
    return index.int()


@pytest.mark.parametrize("form", ["all", "listed"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, packed, form):
    if packed and shape[1] != shape[2]:
        shape = (shape[0], shape[2], *shape[2:])
    q, k, w, main_q, main_k = case(*shape)
    cuts = borders(*shape[:2]) if packed else None
    index = listing(*shape[:3], 9, cuts) if form == "listed" else None

    def run(backend):
        return torch.stack(indexer_kl(q, k, w, main_q, main_k, indices_BTN=index, scale=0.7, cu_seqlens=cuts,
                                      backend=backend)[:1])

    assert_same_function(run, (q, k, w), 1e-12)
    entropies = [indexer_kl(q, k, w, main_q, main_k, indices_BTN=index, cu_seqlens=cuts, backend=b).entropy
                 for b in ("torch", "reference")]
    assert entropies[0] == pytest.approx(entropies[1].item(), rel=1e-12, abs=1e-12)
    assert not entropies[0].requires_grad


@pytest.mark.parametrize("listed", [False, True])
def test_gradients_by_finite_differences(listed):
    q, k, w, main_q, main_k = case(1, 11, 11, 2, 3, 2, 1, 4)
    index = listing(1, 11, 11, 5) if listed else None
    assert torch.autograd.gradcheck(
        lambda q, k, w: indexer_kl(q, k, w, main_q, main_k, indices_BTN=index).loss, (q, k, w), eps=1e-6, atol=1e-7)


def test_the_gradient_at_the_scores_is_their_softmax_minus_the_attention():
    """With one index head of dim S, unit keys and w = 1 the scores are q itself."""
    length = 6
    q = torch.rand(1, length, 1, length, dtype=torch.float64).add_(0.1).requires_grad_()
    k = torch.eye(length, dtype=torch.float64)[None]
    main_q, main_k = (x.detach() for x in tensors((1, length, 2, 4), (1, length, 2, 4)))
    result = indexer_kl(q, k, torch.ones(1, length, 1, dtype=torch.float64), main_q, main_k)
    result.loss.backward()
    for t in range(length):
        p = torch.softmax(torch.einsum("hk,shk->hs", main_q[0, t], main_k[0, : t + 1]) / 2, -1).mean(0)
        soft = torch.softmax(q.detach()[0, t, 0, : t + 1], -1)
        torch.testing.assert_close(q.grad[0, t, 0, : t + 1], (soft - p) / length)
        assert not q.grad[0, t, 0, t + 1 :].any()


def test_only_the_indexer_learns_and_only_if_asked():
    q, k, w, main_q, main_k = case(1, 9, 9, 2, 4, 2, 1, 4)
    loss = indexer_kl(q, k, w, main_q, main_k).loss
    assert torch.autograd.grad(loss, (main_q, main_k), allow_unused=True) == (None, None)
    assert not indexer_kl(q.detach(), k.detach(), w.detach(), main_q, main_k).loss.requires_grad
    with torch.no_grad():
        assert indexer_kl(q, k, w, main_q, main_k).loss == loss


def test_a_perfect_indexer_has_no_loss_and_a_blind_one_the_known_one():
    length = 40
    q, _, w, main_q, main_k = case(1, length, length, 1, 4, 1, 1, 4)
    with torch.no_grad():
        blind = indexer_kl(torch.zeros_like(q), torch.zeros(1, length, 4).double(), w, main_q, main_k)
        uniform = torch.arange(1, length + 1).double().log()
        assert blind.entropy == pytest.approx(uniform.mean().item())
        p = torch.softmax((main_q[0, :, 0] @ main_k[0, :, 0].T / 2).masked_fill(
            torch.ones(length, length).triu(1).bool(), -math.inf), -1)
        assert blind.loss == pytest.approx((torch.xlogy(p, p).sum(-1) + uniform).mean().item())
        # main scores above zero, so that relu keeps them: the indexer can say exactly the same
        positive_q, positive_k = main_q.abs(), main_k.abs()
        same = indexer_kl(positive_q, positive_k[:, :, 0], torch.ones_like(w), positive_q, positive_k, scale=1.0)
        assert abs(same.loss) < 1e-12


def test_packed_documents_are_as_if_alone():
    length, cuts = 60, [0, 1, 20, 60]
    q, k, w, main_q, main_k = case(1, length, length, 2, 4, 4, 2, 8)
    packed = indexer_kl(q, k, w, main_q, main_k, cu_seqlens=cuts).loss
    parts = [indexer_kl(*(x[:, a:b] for x in (q, k, w, main_q, main_k))).loss * (b - a)
             for a, b in itertools.pairwise(cuts)]
    assert packed.item() == pytest.approx((sum(parts) / length).item(), rel=1e-12)
    grads = torch.autograd.grad(packed, (q, k, w))
    alone = torch.autograd.grad(sum(parts) / length, (q, k, w))
    assert max(error(a, b) for a, b in zip(grads, alone, strict=True)) < 1e-12


def test_a_document_of_one_token_has_no_loss_and_no_gradient():
    q, k, w, main_q, main_k = case(1, 5, 5, 2, 4, 2, 1, 4)
    for options in ({"cu_seqlens": [0, 1, 2, 3, 4, 5]}, {"indices_BTN": torch.arange(5).view(1, 5, 1)}):
        result = indexer_kl(q, k, w, main_q, main_k, **options)
        assert abs(result.loss) < 1e-14
        assert abs(result.entropy) < 1e-14
        assert all(not g.any() for g in torch.autograd.grad(result.loss, (q, k, w)))
    empty = indexer_kl(q, k, w, main_q, main_k, indices_BTN=torch.full((1, 5, 3), -1))
    assert empty.loss == 0
    assert all(not g.any() for g in torch.autograd.grad(empty.loss, (q, k, w)))


def test_all_keys_listed_is_the_whole():
    q, k, w, main_q, main_k = case(2, 30, 30, 2, 4, 4, 2, 8, dtype=torch.float32)
    index = indexer_topk(q, k, w, 30)
    results = [indexer_kl(q, k, w, main_q, main_k, indices_BTN=i) for i in (None, index)]
    assert results[1].loss.item() == pytest.approx(results[0].loss.item(), rel=1e-5)
    grads = [torch.autograd.grad(r.loss, (q, k, w)) for r in results]
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-5


def test_half_precision_computes_in_fp32():
    inputs = case(1, 50, 50, 4, 8, 4, 2, 8, dtype=torch.bfloat16)
    result = indexer_kl(*inputs)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(indexer_kl(*(x.double() for x in inputs)).loss.item(), rel=1e-5)
    assert [g.dtype for g in torch.autograd.grad(result.loss, inputs[:3])] == [torch.bfloat16] * 3


@pytest.mark.parametrize("listed", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(listed):
    def largest(length):
        q, k, w, main_q, main_k = case(1, length, length, 2, 4, 2, 1, 4, dtype=torch.float32)
        index = indexer_topk(q, k, w, 8)
        with LargestTensor() as seen:
            indexer_kl(q, k, w, main_q, main_k, indices_BTN=index if listed else None).loss.backward()
            attention_recall(main_q, main_k, index)
        return seen.numel

    assert largest(1600) <= 2 * largest(800) < 1600 * 1600 // 16


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_recall_equals_reference(shape, packed):
    if packed and shape[1] != shape[2]:
        shape = (shape[0], shape[2], *shape[2:])
    _, _, _, main_q, main_k = case(*shape)
    cuts = borders(*shape[:2]) if packed else None
    index = listing(*shape[:3], 9, cuts)
    got, expected = (attention_recall(main_q, main_k, index, cu_seqlens=cuts, backend=b)
                     for b in ("torch", "reference"))
    assert got.mass == pytest.approx(expected.mass.item(), rel=1e-12)
    assert got.agreement == pytest.approx(expected.agreement.item(), rel=1e-6)
    assert got.attainable == pytest.approx(expected.attainable.item(), rel=1e-12)
    assert got.mass <= got.attainable < 1


def test_recall_from_the_pass_of_the_loss():
    q, k, w, main_q, main_k = case(1, 60, 60, 3, 4, 4, 2, 8)
    index = indexer_topk(q, k, w, 9, cu_seqlens=[0, 25, 60])
    for backend in ("torch", "reference"):
        both = indexer_kl(q, k, w, main_q, main_k, recall_of_BTN=index, cu_seqlens=[0, 25, 60], backend=backend)
        alone = attention_recall(main_q, main_k, index, cu_seqlens=[0, 25, 60])
        assert both.recall.mass.item() == pytest.approx(alone.mass.item(), rel=1e-10)
        assert both.recall.agreement.item() == pytest.approx(alone.agreement.item(), rel=1e-10)
        assert not both.recall.mass.requires_grad
        assert both.loss == indexer_kl(q, k, w, main_q, main_k, cu_seqlens=[0, 25, 60], backend=backend).loss
    with pytest.raises(ValueError, match="without indices"):
        indexer_kl(q, k, w, main_q, main_k, recall_of_BTN=index, indices_BTN=index)


def test_recall_by_hand():
    """Attention of one query over four keys with probabilities 0.1, 0.4, 0.2, 0.3."""
    main_q = torch.ones(1, 1, 1, 1)
    main_k = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().view(1, 4, 1, 1)
    for listed, mass, agreement, attainable in (([1, 3], 0.7, 1.0, 0.7), ([0, 1], 0.5, 0.5, 0.7),
                                                ([0, -1], 0.1, 0.0, 0.4), ([1, -1], 0.4, 1.0, 0.4)):
        found = attention_recall(main_q, main_k, torch.tensor(listed).view(1, 1, 2), scale=1.0)
        assert found.mass == pytest.approx(mass, rel=1e-6)
        assert found.agreement == pytest.approx(agreement)
        assert found.attainable == pytest.approx(attainable, rel=1e-6)
    everything = attention_recall(main_q, main_k, torch.tensor([[[0, 1, 2, 3]]]), scale=1.0)
    assert everything == (1.0, 1.0, 1.0)


def test_recall_leaves_out_queries_that_had_nothing_to_choose():
    """Three keys for all: the first three queries list all they see."""
    _, _, _, main_q, main_k = case(1, 8, 8, 1, 4, 1, 1, 4)
    index = torch.arange(3).expand(1, 8, 3).clone()
    index[index > torch.arange(8)[None, :, None]] = -1
    found = attention_recall(main_q, main_k, index)
    tail = attention_recall(main_q[:, 3:], main_k, index[:, 3:])
    assert found.mass == pytest.approx(tail.mass.item())
    assert found.agreement == pytest.approx(tail.agreement.item())


def test_dense_attention_is_what_recall_measures():
    """Values of one for the listed keys make attention itself sum up the listed mass."""
    _, _, _, main_q, main_k = case(1, 20, 20, 1, 4, 2, 2, 8)
    index = torch.arange(4).expand(1, 20, 4).masked_fill(torch.arange(4) > torch.arange(20)[None, :, None], -1)
    value = (torch.arange(20) < 4).double().view(1, 20, 1, 1).expand(1, 20, 2, 1)
    mass = attention(main_q, main_k, value)[0, 4:].mean()
    assert attention_recall(main_q, main_k, index).mass == pytest.approx(mass.item(), rel=1e-10)


def test_bad_arguments():
    q, k, w, main_q, main_k = case(2, 8, 8, 2, 4, 4, 2, 8)
    index = torch.zeros(2, 8, 3, dtype=torch.int64)
    for bad in ((q, k[:1], w, main_q, main_k), (q, k[:, :5], w, main_q, main_k), (q, k, w[..., :1], main_q, main_k),
                (q, k, w, main_q[:, :4], main_k), (q, k, w, main_q, main_k[:, :4]), (q, k, w, main_q[:, :, :3], main_k),
                (q, k, w, main_q[..., :4], main_k)):
        with pytest.raises(ValueError, match="indexer_kl"):
            indexer_kl(*bad)
    with pytest.raises(ValueError, match="indices"):
        indexer_kl(q, k, w, main_q, main_k, indices_BTN=index.float())
    with pytest.raises(ValueError, match="but the tensors hold"):
        indexer_kl(q[:, :4], k, w[:, :4], main_q[:, :4], main_k, cu_seqlens=[0, 4, 8])
    with pytest.raises(ValueError, match="attention_recall"):
        attention_recall(main_q, main_k, index[:, :3])
