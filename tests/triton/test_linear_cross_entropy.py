"""The fused loss with Triton's cross entropy: values, gradients for any use of its results, labels."""

import pytest
import torch

from hybridlm_kernels import KernelUnavailable, linear_cross_entropy
from hybridlm_kernels.ops.linear_cross_entropy import chunked_loss as chunked
from tests.support.kernel_compare import error, tensors

OPTIONS = [{}, {"soft_cap": 2.0}, {"z_loss": 1e-2}, {"z_loss": 1e-2, "soft_cap": 2.0}]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_LOGITS", 1)
    monkeypatch.setattr(chunked, "MIN_CHUNK_TOKENS", 16)


def case(tokens, vocabulary, dim=20, ignored=slice(0, None, 7)):
    x, weight = tensors((tokens, dim), (vocabulary, dim))
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    labels[ignored] = -100
    return x, weight, labels


def results(backend, inputs, labels, device, dtype, options):
    x, weight = (t.detach().to(device, dtype).requires_grad_() for t in inputs)
    loss, z, count = linear_cross_entropy(x, weight, labels.to(device), backend=backend, **options)
    total = 0.7 * loss + 1.3 * options.get("z_loss", 0.0) * z
    return [loss, z, count, *torch.autograd.grad(total, (x, weight))]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (33, 57), (7, 4099)])
def test_equals_reference(tokens, vocabulary, options, device):
    x, weight, labels = case(tokens, vocabulary, ignored=slice(1, None, 7))
    got = results("triton", (x, weight), labels, device, torch.float32, options)
    for value, expected in zip(got, results("reference", (x, weight), labels, device, torch.float64, options),
                               strict=True):
        assert error(value, expected) <= 1e-5


def test_another_number_ignores_with_every_option(device):
    x, weight, labels = case(33, 57, ignored=slice(0))
    labels[::5] = 3
    options = {"z_loss": 1e-2, "soft_cap": 2.0, "ignore_index": 3}
    got = results("triton", (x, weight), labels, device, torch.float32, options)
    labels = labels.masked_fill(labels == 3, -100)
    expected = results("reference", (x, weight), labels, device, torch.float64, {"z_loss": 1e-2, "soft_cap": 2.0})
    assert all(error(a, b) <= 1e-5 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_ignored_tokens_leave_exact_zeros(options, device):
    x, weight, labels = case(7, 33, ignored=slice(None))
    loss, z, count, *grads = results("triton", (x * 1e30, weight), labels, device, torch.float32, options)
    assert (loss.item(), z.item(), count.item()) == (0.0, 0.0, 0)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_no_tokens(device):
    x, weight, labels = case(0, 9)
    loss, z, count, dx, dweight = results("triton", (x, weight), labels, device, torch.float32, {})
    assert (loss.item(), z.item(), count.item(), dx.numel()) == (0.0, 0.0, 0, 0)
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_strided_inputs(device):
    x, weight, labels = case(40, 33)
    expected = results("reference", (x, weight), labels, device, torch.float64, {})
    x, weight = (t.detach().to(device, torch.float32).T.contiguous().requires_grad_() for t in (x, weight))
    labels = torch.stack([labels, labels.flip(0)], -1).to(device)[:, 0]
    loss, *_ = linear_cross_entropy(x.T, weight.T, labels, backend="triton")
    grads = torch.autograd.grad(0.7 * loss, (x, weight))
    assert all(error(g.T, e) <= 1e-5 for g, e in zip(grads, expected[3:], strict=True))


@pytest.mark.parametrize("scale", [1e3, 0.0])
def test_large_and_equal_logits(scale, device):
    x, weight, labels = case(9, 33)
    inputs = (x * scale, weight * scale)
    got = results("triton", inputs, labels, device, torch.float32, {"soft_cap": 30.0})
    expected = results("reference", inputs, labels, device, torch.float64, {"soft_cap": 30.0})
    assert all(error(a, b) <= 1e-5 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("label", [33, -1])
def test_a_label_outside_the_vocabulary_shows(label, device):
    x, weight, labels = case(9, 33)
    labels[3] = label
    assert results("triton", (x, weight), labels, device, torch.float32, {})[0].isnan()


def test_products_run_in_the_dtype_of_autocast(device):
    x, weight, labels = case(20, 33)
    expected = results("reference", (x, weight), labels, device, torch.float64, {})
    with torch.autocast(device, dtype=torch.float16):
        got = results("triton", (x, weight), labels, device, torch.float32, {})
    assert [t.dtype for t in (got[0], *got[3:])] == [torch.float32] * 3
    assert all(error(a, b) <= 5e-3 for a, b in zip(got, expected, strict=True))
    assert error(got[4], expected[4]) > 1e-6


def test_bf16_products_are_refused_where_they_would_be_wrong(device):
    if device != "cpu":
        return
    x, weight, labels = case(4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(KernelUnavailable, match="bfloat16"):
        linear_cross_entropy(x.float(), weight.float(), labels, backend="triton")
