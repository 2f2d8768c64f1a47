"""Selectors that weigh blocks inside the softmax (HiLS, DashAttention), against their definitions, query by query."""

import math

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.contract_check import Subject
from hybridlm.model.mixers import AttentionConfig, BlockAttentionConfig, block_attention
from hybridlm.model.mixers.common.block_selection import choose_blocks
from hybridlm.model.mixers.selectors import EntmaxSelectorConfig, LandmarkSelectorConfig
from hybridlm.model.mixers.selectors.entmax import entmax
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from tests.support.kernel_compare import LargestTensor
from tests.support.mixer_cases import build, context_of, inputs, run, subject
from tests.support.mixer_forms.block_attention import HEADS

LENGTH, H = 33, 4


def rotated(x_LHK, mixer, positions):
    """Vectors [L, H, K] rotated to the given positions."""
    seq = SequenceInfo(torch.as_tensor(positions).view(1, -1))
    return rotate(x_LHK[None], mixer.config.rope, mixer.config.rope.rotary_dim(8), seq)[0]


def heads_of(mixer, x):
    """Rotated queries and keys, and values, [L, heads, 8]."""
    pairs = (mixer.q_proj, mixer.q_norm), (mixer.k_proj, mixer.k_norm)
    q, k = (rotated(mixer._heads(projection(x[0]), norm), mixer, range(len(x[0]))) for projection, norm in pairs)
    return q, k, mixer.v_proj(x[0]).view(len(x[0]), 2, 8)


def hils(t, mixer, x, q, k, v):
    """w_j times attention inside each block, by weights of estimates and of the exact mass of the newest blocks."""
    selector, b, local, topk = mixer.selector, mixer.config.block, mixer.config.local, mixer.config.topk
    raw = mixer.q_proj(x[0, t]) + selector.up_proj(selector.down_proj(x[0, t]))
    query = rotated(selector.q_norm(raw.view(1, H, 8)), mixer, [t])[0]
    far = list(range(max(0, t // b - local + 1)))
    near = list(range(max(0, (t // b - local + 1) * b), t + 1))
    z = torch.zeros(H, len(far), dtype=x.dtype)
    for h in range(H):
        for j in far:
            mu = rotated(selector.landmark[None], mixer, [(j + 1) * b - 1])[0, h]
            keys = k[j * b : (j + 1) * b, h // 2]
            p = (keys @ mu / 8**0.5).softmax(0)
            z[h, j] = query[h] @ (p @ keys) / 8**0.5 - (p * p.log()).sum()
    scores = torch.stack([k[: t + 1, h // 2] @ q[t, h] / 8**0.5 for h in range(H)])
    lse_near = scores[:, near].logsumexp(1)
    share = torch.cat([z, lse_near[:, None]], 1).log_softmax(1)[:, :-1].view(2, 2, -1).amax(1)
    o = torch.zeros(H, 8, dtype=x.dtype)
    for h in range(H):
        best = sorted(far, key=lambda j: (-float(share[h // 2, j]), j))[: topk - local]
        w = torch.cat([z[h, best], lse_near[h : h + 1]]).softmax(0)
        for weight, tokens in zip(w, [*(list(range(j * b, (j + 1) * b)) for j in best), near], strict=True):
            o[h] += weight * scores[h, tokens].softmax(0) @ v[tokens, h // 2]
    return o


def bisected_entmax(scores):
    """entmax with alpha 1.5, by bisection of its threshold."""
    low, high = scores.max() / 2 - 1, scores.max() / 2
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (scores / 2 - tau).clamp(min=0).square().sum() > 1 else (low, tau)
    return (scores / 2 - low).clamp(min=0).square()


def dash(t, mixer, x, q, k, v):
    """One softmax with a bias for each block, of those that entmax gives mass to and of the newest."""
    b, local, topk, sigma = mixer.config.block, mixer.config.local, mixer.config.topk, mixer.selector.sigma
    own, complete = t // b, range((t + 1) // b)
    p = torch.zeros(H, len(complete), dtype=x.dtype)
    for h in range(H):
        if not complete:
            continue
        found = []
        for j in complete:
            tokens = list(range(j * b, (j + 1) * b))
            m = rotated(mixer.selector.landmark.expand(b, 2, 8), mixer, tokens).mean(0)[h // 2]
            keys = k[tokens, h // 2]
            found.append(q[t, h] @ ((keys @ m / 8**0.5).softmax(0) @ keys) / 8**0.5)
        p[h] = bisected_entmax(torch.stack(found))
    mean = p.view(2, 2, -1).mean(1)
    o = torch.zeros(H, 8, dtype=x.dtype)
    for h in range(H):
        others = sorted((j for j in complete if mean[h // 2, j] > 1e-12 and j <= own - local),
                        key=lambda j: (-float(mean[h // 2, j]), j))
        newest = list(range(max(0, own - local + 1), own + 1))
        logs = [math.log(p[h, j] / b) if j in complete and p[h, j] > 1e-12 else 0.0 for j in range(own + 1)]
        average = sum(logs) / max(1, int((p[h] > 1e-12).sum()))
        tokens = [(s, (logs[j] - average) / sigma) for j in sorted(others[: topk - local] + newest)
                  for s in range(j * b, min((j + 1) * b, t + 1))]
        place = [s for s, _ in tokens]
        scores = k[place, h // 2] @ q[t, h] / 8**0.5 + torch.tensor([bias for _, bias in tokens], dtype=x.dtype)
        o[h] = scores.softmax(0) @ v[place, h // 2]
    return o


@torch.no_grad()
@pytest.mark.parametrize(("name", "define"), [("hils", hils), ("dash", dash)])
def test_it_equals_its_definition(name, define):
    mixer, x = build(name), inputs(1, LENGTH)
    q, k, v = heads_of(mixer, x)
    o = torch.stack([define(t, mixer, x, q, k, v) for t in range(LENGTH)])
    torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o.flatten(1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_entmax_is_that_of_a_bisected_threshold_and_so_is_its_gradient(seed):
    torch.manual_seed(seed)
    scores = (3 * torch.randn(4, 9, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(4, 9) > 0.3
    p = entmax(scores, mask)
    for row in range(4):
        torch.testing.assert_close(p[row, mask[row]], bisected_entmax(scores[row, mask[row]]), rtol=0, atol=1e-9)
        assert not p[row, ~mask[row]].any()
    assert torch.autograd.gradcheck(lambda s: entmax(s, mask), scores)
    assert not entmax(scores, torch.zeros(4, 9, dtype=torch.bool)).any()


def dense_twin(config, mixer, x):
    """Output and gradients of dense attention with the weights of `mixer`, and those of `mixer`."""
    twin = Subject(AttentionConfig(**HEADS, qk_norm=config.qk_norm), context_of()).build()
    names = dict(twin.named_parameters())
    twin.load_state_dict({name: value for name, value in mixer.state_dict().items() if name in names})
    found = []
    for module in (mixer, twin):
        x = x.detach().requires_grad_()
        y = run(module, x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for name, p in module.named_parameters() if name in names)])
    return found


def test_estimates_that_are_exact_give_dense_attention_and_its_output():
    """Blocks of one token have their key as entry and no entropy; with the queries of attention z is exact."""
    config = BlockAttentionConfig(**HEADS, block=1, topk=40, local=1, qk_norm="head",
                                  selector=LandmarkSelectorConfig(rank=2))
    mixer = Subject(config, context_of()).build()
    with torch.no_grad():
        mixer.selector.up_proj.weight.zero_()
        mixer.selector.q_norm.weight.copy_(mixer.q_norm.weight)
    (y, *_), (dense, *_) = dense_twin(config, mixer, inputs(2, LENGTH))
    torch.testing.assert_close(y, dense, rtol=1e-9, atol=1e-9)


def test_newest_blocks_that_cover_the_row_give_dense_attention():
    config = BlockAttentionConfig(**HEADS, block=4, topk=9, local=9, selector=EntmaxSelectorConfig(sigma=1e15))
    for a, b in zip(*dense_twin(config, Subject(config, context_of()).build(), inputs(2, LENGTH)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hils", "dash"])
def test_the_selector_learns_from_the_output_unless_attention_is_dense(name):
    mixer = build(name)
    mixer.freeze_idle_parameters()
    for mode in ("sparse", "dense"):
        mixer.attention_mode = mode
        mixer.zero_grad()
        y, aux = subject(name).run(mixer, inputs(1, LENGTH))
        y.square().sum().backward()
        assert not aux
        assert all((p.grad is not None) == (mode == "sparse") for p in mixer.selector.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["hils", "dash"])
def test_what_is_measured_is_the_share_of_dense_attention_that_is_read_and_no_divergence(name, monkeypatch):
    mixer, x = build(name), 5 * inputs(1, LENGTH)
    found = []
    monkeypatch.setattr(block_attention, "choose_blocks", lambda *options: found.append(choose_blocks(*options)) or
                        found[-1])
    mixer.measure_selection(True)
    aux = mixer.eval()(x, SequenceInfo.make(1, LENGTH, x.device))[1]
    q, k, _ = heads_of(mixer, x)
    read = []
    for t in range(LENGTH):
        for h in range(H):
            p = (k[: t + 1, h // 2] @ q[t, h] / 8**0.5).softmax(0)
            blocks = [j for j in found[0][0, t, h // 2].tolist() if j >= 0]
            read.append(sum(p[j * mixer.config.block : (j + 1) * mixer.config.block].sum() for j in blocks))
    assert list(aux) == ["layer/selector_recall"]
    torch.testing.assert_close(aux["layer/selector_recall"], torch.stack(read).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hils", "dash"])
def test_memory_of_training_grows_with_the_length_not_with_its_square(name, monkeypatch):
    mixer = build(name, torch.float32)
    for room in ("block_selection", "block_bias"):
        monkeypatch.setattr(f"hybridlm.model.mixers.common.{room}.PIECE_ELEMENTS", 2**13)

    def largest(length):
        with LargestTensor() as seen:
            run(mixer, inputs(1, length, torch.float32)).sum().backward()
        return seen.numel

    assert largest(1200) <= 2.2 * largest(600)
    assert largest(600) < 600 * 600


@pytest.mark.parametrize(("options", "message"), [
    ({"local": 0}, "selector: weighs blocks beside the newest ones; got 'landmark'; expected"),
    ({"local_window": 8}, "selector: weighs blocks beside the newest ones"),
])
def test_what_cannot_stand_beside_weights_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        BlockAttentionConfig(**HEADS, selector=LandmarkSelectorConfig(), **options)
    assert str(caught.value).startswith(message)
