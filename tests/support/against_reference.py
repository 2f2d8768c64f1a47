"""What Triton tests share: outputs and gradients in fp32 against fp64, and which kernels were launched."""

import torch

from tests.support.kernel_compare import error


def assert_equals_reference(run, inputs, device, tolerance=1e-5):
    """run(backend, *inputs) gives the same by Triton in fp32 as by the reference in fp64, and so do its gradients."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        out = run(backend, *leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert error(got, expected) <= tolerance


class _Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


def counted(monkeypatch, module, name):
    """The list of launches of the module's kernel, as they come."""
    kernel = _Counted(getattr(module, name))
    monkeypatch.setattr(module, name, kernel)
    return kernel.launches
