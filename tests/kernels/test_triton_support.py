"""Triton backends serve the device of their tensors, whichever device is the current one."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch

from hybridlm_kernels import triton_support
from hybridlm_kernels.registry import Call
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED, lazy_triton_backend


def test_kernels_are_launched_on_the_device_of_the_first_tensor(monkeypatch):
    current = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.remove(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setitem(sys.modules, "made_up_module", types.SimpleNamespace(
        function=lambda flag, x, y: (list(current), flag, x, y)))
    x, y = torch.zeros(1), torch.ones(1)
    during, *arguments = lazy_triton_backend("made_up_module", "function").run(None, x, y)
    assert [t is x for t in during] == [True]
    assert arguments[0] is None
    assert arguments[1] is x
    assert not current


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")
def test_the_capability_is_that_of_the_call_s_device(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5) if index == 1 else (9, 0))
    backend = lazy_triton_backend("no.module", "function")
    calls = [Call("cuda", torch.bfloat16, needs_grad=False, device_index=index) for index in (0, 1)]
    assert [backend.supports(call) for call in calls] == [
        (True, ""), (False, "needs compute capability 8.0 or newer; this GPU has 7.5")]


def test_a_call_knows_the_index_of_its_device():
    assert Call.of(torch.zeros(1, device="meta")).device_index is None
    assert triton_support.parallel_programs(torch.device("cpu")) == 0
