"""Triton backends against the reference: interpreted on a CPU, native on a CUDA device.

    TRITON_INTERPRET=1 python -m pytest tests/triton          # on any machine, fp32
    python -m pytest tests/triton                             # on a CUDA device

Without either, nothing here is collected; `tests/kernels/test_triton.py` runs each file interpreted.
"""


import pytest
import torch

from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED

if not INTERPRETED and not (INSTALLED and torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    """Where the tensors of a test live."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that a kernel is to fill holds NaN first: what it leaves unwritten shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        plain = getattr(torch, name)

        def poisoned(*args, _plain=plain, **kwargs):
            out = _plain(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **kwargs: torch.empty(
        *size, **{"dtype": x.dtype, "device": x.device} | kwargs))
