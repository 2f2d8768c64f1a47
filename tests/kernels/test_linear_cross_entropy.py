"""The fused loss: values, gradients for any use of its results, and memory."""

import pytest
import torch
import torch.nn.functional as F

from hybridlm_kernels import linear_cross_entropy
from hybridlm_kernels.ops.linear_cross_entropy import chunked_loss as chunked
from hybridlm_kernels.ops.linear_cross_entropy import torch_backend as eager
from tests.support.kernel_compare import LargestTensor, error, tensors

OPTIONS = [{}, {"soft_cap": 2.0}, {"z_loss": 1e-2}, {"z_loss": 1e-2, "soft_cap": 2.0}]


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_LOGITS", 1)
    monkeypatch.setattr(chunked, "MIN_CHUNK_TOKENS", 64)


def case(tokens=150, dim=20, vocabulary=57, dtype=torch.float64):
    x, weight = tensors((tokens, dim), (vocabulary, dim), dtype=dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    labels[::7] = -100
    return x, weight, labels


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [1, 64, 65, 150])
def test_equals_reference(tokens, options):
    x, weight, labels = case(tokens)
    results = []
    for backend in ("torch", "reference"):
        loss, z, count = linear_cross_entropy(x, weight, labels, backend=backend, **options)
        total = 0.7 * loss + 1.3 * options.get("z_loss", 0.0) * z
        results.append([loss, z, count, *torch.autograd.grad(total, (x, weight))])
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-12


def test_equals_cross_entropy():
    x, weight, labels = case()
    loss, _, count = linear_cross_entropy(x, weight, labels)
    expected = F.cross_entropy(x @ weight.T, labels)
    assert torch.allclose(loss / count, expected)
    grads = torch.autograd.grad(loss / count, (x, weight))
    for grad, other in zip(grads, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert torch.allclose(grad, other)


def test_loss_and_z_have_their_own_gradients():
    x, weight, labels = case()
    _, z, _ = linear_cross_entropy(x, weight, labels, z_loss=1e-4)
    expected = ((torch.logsumexp(x @ weight.T, -1) ** 2) * (labels != -100)).sum()
    for grad, other in zip(torch.autograd.grad(z, (x, weight)), torch.autograd.grad(expected, (x, weight)),
                           strict=True):
        assert error(grad, other) < 1e-12


def test_without_z_loss_its_sum_is_for_reading_only():
    x, weight, labels = case()
    loss, z, count = linear_cross_entropy(x, weight, labels)
    assert loss.requires_grad
    assert not z.requires_grad
    assert count.item() == (labels != -100).sum().item()


def test_nothing_as_large_as_the_logits_exists():
    x, weight, labels = case(tokens=2000, dim=10, vocabulary=512, dtype=torch.float32)
    for options in OPTIONS:
        with LargestTensor() as largest:
            loss, z, _ = linear_cross_entropy(x, weight, labels, **options)
            (loss + z if z.requires_grad else loss).backward()
        assert 0 < largest.numel <= 64 * 512


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_another_number_ignores(backend):
    x, weight, labels = case()
    options = {"z_loss": 1e-2, "soft_cap": 2.0, "backend": backend}
    expected = linear_cross_entropy(x, weight, labels.masked_fill(labels == 3, -100), **options)
    got = linear_cross_entropy(x, weight, labels.masked_fill(labels == -100, 3), ignore_index=3, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_ignored_tokens_change_nothing():
    x, weight, labels = case()
    other = x.detach().clone()
    other[::7] = 1e4
    results = []
    for inputs in (x, other.requires_grad_()):
        loss, z, _ = linear_cross_entropy(inputs, weight, labels)
        dx, dweight = torch.autograd.grad(loss, (inputs, weight))
        assert torch.equal(dx[::7], torch.zeros_like(dx[::7]))
        results.append((loss, z, dweight))
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_no_tokens_or_none_that_count(z_loss):
    for tokens in (0, 5):
        x, weight, _ = case(tokens)
        labels = torch.full((tokens,), -100)
        loss, z, count = linear_cross_entropy(x, weight, labels, z_loss=z_loss)
        assert (loss.item(), z.item(), count.item()) == (0.0, 0.0, 0)
        for grad in torch.autograd.grad(loss, (x, weight)):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_autocast_runs_products_in_bf16_and_sums_in_fp32(z_loss):
    x, weight, labels = case(dtype=torch.float32)
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.T, labels, reduction="sum"), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = linear_cross_entropy(x, weight, labels, z_loss=z_loss)
    assert loss.dtype == torch.float32
    for grad, other in zip(torch.autograd.grad(loss, (x, weight)), expected, strict=True):
        assert grad.dtype == torch.float32
        assert 1e-6 < error(grad, other) < 1e-2


def test_large_logits_stay_finite():
    x, weight, labels = case(dtype=torch.float32)
    loss, _, _ = linear_cross_entropy(x * 1e3, weight * 1e3, labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (x, weight)))


def test_no_gradient_wanted(monkeypatch):
    x, weight, labels = case()
    monkeypatch.setattr(eager._TorchLossChunks, "product_gradients", None)  # not called
    with torch.no_grad():
        loss, _, _ = linear_cross_entropy(x, weight, labels)
    assert not loss.requires_grad
    assert torch.allclose(loss, F.cross_entropy(x @ weight.T, labels, reduction="sum"))


def test_second_backward_is_refused():
    x, weight, labels = case()
    loss, _, _ = linear_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="another forward"):
        loss.backward()


def test_bad_arguments():
    x, weight, labels = case()
    with pytest.raises(ValueError, match=r"\[V, D\]"):
        linear_cross_entropy(x, weight[:, :-1], labels)
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(x, weight, labels[:-1])
    with pytest.raises(ValueError, match="soft_cap"):
        linear_cross_entropy(x, weight, labels, soft_cap=-1.0)
