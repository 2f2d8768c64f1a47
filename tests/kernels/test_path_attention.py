"""PaTH attention: equal to the keys reflected token by token, causal, packed, and continued from moved keys."""

import pytest
import torch
import torch.nn.functional as F

from hybridlm_kernels import attention, forgetting_attention, path_attention
from hybridlm_kernels.ops.path_attention.torch_backend import move_keys
from tests.support.kernel_compare import assert_same_function, error, tensors


def case(T=37, B=1, H=2, G=1, K=4, dtype=torch.float64):
    """q, k, v, w of length one, beta in (0, 2), and logarithms of gates."""
    q, k, v, w, beta, g = tensors((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, G, K), (B, T, G), (B, T, H),
                                  dtype=dtype)
    return [x.detach().requires_grad_() for x in (q, k, v, F.normalize(w, dim=-1), 2 * beta.sigmoid(),
                                                  F.logsigmoid(g))]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("T", [1, 16, 17, 140])
def test_equals_reference(T, gated):
    *inputs, g = case(T, H=4, G=2)
    assert_same_function(lambda backend: path_attention(*inputs, g_BSH=g if gated else None, backend=backend),
                         [*inputs, *([g] if gated else [])], 1e-11)


def test_blocks_walk_back_over_many_chunks():
    *inputs, g = (x.detach() for x in case(600, K=4))
    torch.testing.assert_close(path_attention(*inputs, g_BSH=g), path_attention(*inputs, g_BSH=g, backend="reference"))


@pytest.mark.parametrize("gated", [False, True])
def test_packed_equals_reference(gated):
    *inputs, g = case(70, B=2)
    cuts = [0, 1, 3, 40, 40, 70, 139, 140]
    assert_same_function(lambda backend: path_attention(*inputs, g_BSH=g if gated else None, scale=0.3,
                                                        cu_seqlens=cuts, backend=backend),
                         [*inputs, *([g] if gated else [])], 1e-11)


def test_the_scores_are_products_of_matrices():
    q, k, v, w, beta, _ = (x.detach() for x in case(9, H=1))
    o = path_attention(q, k, v, w, beta, scale=1.0, backend="reference")
    eye = torch.eye(4, dtype=q.dtype)
    for t in range(9):
        scores = []
        for s in range(t + 1):
            product = eye
            for i in range(s + 1, t + 1):  # factors of later tokens stand to the left
                product = (eye - beta[0, i, 0] * torch.outer(w[0, i, 0], w[0, i, 0])) @ product
            scores.append(q[0, t, 0] @ product @ k[0, s, 0])
        torch.testing.assert_close(o[0, t, 0], torch.stack(scores).softmax(0) @ v[0, : t + 1, 0])


def test_without_reflections_it_is_attention():
    q, k, v, w, beta, g = case(80, H=4, G=2)
    torch.testing.assert_close(path_attention(q, k, v, w, 0.0 * beta), attention(q, k, v))
    torch.testing.assert_close(path_attention(q, k, v, w, 0.0 * beta, g_BSH=g), forgetting_attention(q, k, v, g))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_later_tokens_read_moved_keys(backend):
    q, k, v, w, beta, g = (x.detach() for x in case(100))
    whole = path_attention(q, k, v, w, beta, g_BSH=g)
    past = move_keys(None, k[:, :70], w[:, :70], beta[:, :70])
    later = slice(70, None)
    o = path_attention(q[:, later], k[:, later], v, w[:, later], beta[:, later], g_BSH=g, past_BPGK=past,
                       backend=backend)
    torch.testing.assert_close(o, whole[:, later])
    end = move_keys(past, k[:, later], w[:, later], beta[:, later])
    torch.testing.assert_close(end, move_keys(None, k, w, beta))


def test_later_tokens_change_no_bit():
    inputs = [x.detach() for x in case(300, dtype=torch.float32)]
    before = path_attention(*inputs[:5], g_BSH=inputs[5])
    for t in (0, 63, 64, 255):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t + 1 :] *= 0.5
        after = path_attention(*changed[:5], g_BSH=changed[5])
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_half_precision_is_near_and_shapes_are_checked():
    *inputs, _ = (x.detach() for x in case(60))
    half = path_attention(*(x.bfloat16() for x in inputs))
    assert half.dtype == torch.bfloat16
    assert error(half, path_attention(*inputs)) < 0.03
    with pytest.raises(ValueError, match=r"path_attention: beta must be \[1, 60, 1\]; got \[1, 60\]"):
        path_attention(*inputs[:4], inputs[4][..., 0])
