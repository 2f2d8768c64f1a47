"""Strong decays per channel: no matrix product reads a denormal number, with which CPUs are slow; nothing is lost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm_kernels import delta_rule, linear_attention
from tests.support.kernel_compare import error

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


class CountDenormals(TorchDispatchMode):
    """Within it, `read` counts denormal numbers among the inputs of matrix products, and `products` the products."""

    read = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products += 1
            for x in tree_leaves((args, kwargs or {})):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    self.read += int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strength", [3.0, 8.0, 30.0])
@pytest.mark.parametrize("operation", ["delta_rule", "linear_attention"])
def test_products_read_no_denormals(operation, strength):
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 130, 2, 16, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v, -strength * g.abs(),
                                           torch.rand(1, 130, 2, generator=generator))]

    def run(tensors, backend):
        q, k, v, g, beta = tensors
        if operation == "linear_attention":
            return linear_attention(q, k, v, g=g, backend=backend)[0] + 0.0 * beta[..., None]
        return delta_rule(q, k, v, g=g, beta=beta, qk_l2norm=True, backend=backend)[0]

    with CountDenormals() as counts:
        y = run(inputs, "torch")
        grads = torch.autograd.grad(y.square().sum(), inputs)
    assert counts.products > 20
    assert counts.read == 0
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(exact, "reference")
    assert error(y, expected) < 2e-6
    for found, right in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert error(found, right) < 1e-5
