"""Triton backends serve the device of their tensors, copy tables safely, and look at indices when told to."""

import gc
import re
import sys
import types
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hybridlm_kernels import CuSeqlens, moe_experts, selected_attention, sparse_attention, triton_support
from hybridlm_kernels.registry import Call
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED, lazy_triton_backend

CPU = torch.device("cpu")


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


def test_no_table_is_copied_inside_a_captured_graph(monkeypatch):
    table = triton_support.copy_table(np.arange(6).reshape(2, 3)[:, ::2], torch.device("cpu"))
    assert table.tolist() == [[0, 2], [3, 5]]
    assert table.dtype == torch.int64
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the same call once before the capture"):
        triton_support.copy_table(np.arange(3), torch.device("cuda"))


@pytest.mark.skipif(not INSTALLED, reason="needs triton")
def test_tables_that_a_graph_reads_are_kept(monkeypatch):
    """A cache of tables may forget one, and packed borders may go: a captured graph reads the table all the same."""
    from hybridlm_kernels.recurrence import triton_chunk_tables
    from hybridlm_kernels.recurrence.triton_scan import document_tiles

    def tables_of(length):
        borders = CuSeqlens([0, 1, length])
        return [triton_chunk_tables.get_chunk_tables(1, length, cuts, CPU) for cuts in (None, borders)] + [
            document_tiles(1, length, borders, CPU, 16)[0]]

    def left(length):
        found = [weakref.ref(table) for table in tables_of(length)]
        triton_chunk_tables._tables_of_plain_rows.cache_clear()
        gc.collect()
        return [reference() is not None for reference in found]

    assert left(77) == [False] * 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_support, "_READ_BY_GRAPHS", {})
    assert left(78) == [True] * 3


WRONG_INDICES = {
    "beyond the keys": (torch.tensor([[[0, 3]] * 3]), r"sparse_attention: indices must be from -1 to 2; got 3"),
    "below none": (torch.tensor([[[0, -2]] * 3]), r"sparse_attention: indices must be from -1 to 2; got -2"),
    "twice": (torch.tensor([[[0, -1], [0, -1], [2, 2]]]), r"indices must be distinct in a list; 2 stands twice")}


@pytest.mark.parametrize("name", WRONG_INDICES)
def test_indices_are_looked_at_on_request(name, monkeypatch):
    indices, message = WRONG_INDICES[name]
    q = torch.zeros(1, 3, 1, 2)
    monkeypatch.setenv("HYBRIDLM_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, q, q, indices)
    assert sparse_attention(q, q, q, torch.tensor([[[0, -1], [-1, -1], [2, 1]]])).isfinite().all()


WRONG_LISTS = {
    "token": (3, None, "selected_attention: indices must be from -1 to 2; got 3"),
    "block": (2, 2, "selected_attention: indices must be from -1 to 1; got 2"),
    "twice": (0, 2, "indices must be distinct in a list; 0 stands twice")}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_listed_tokens_and_blocks_are_looked_at_on_request(name, monkeypatch):
    wrong, block, message = WRONG_LISTS[name]
    q = torch.zeros(1, 3, 1, 2)
    lists = torch.tensor([0, wrong]).expand(1, 3, 1, 2)
    if name != "token":  # blocks behind a query are not read, so that one that does not exist goes unseen
        assert selected_attention(q, q, q, lists, block=block)[0].isfinite().all()
    monkeypatch.setenv("HYBRIDLM_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match=message):
        selected_attention(q, q, q, lists, block=block)
    assert selected_attention(q, q, q, torch.tensor([0, -1]).expand(1, 3, 1, 2), block=block)[0].isfinite().all()


def test_expert_ids_are_looked_at_on_request(monkeypatch):
    monkeypatch.setenv("HYBRIDLM_CHECK_INDICES", "1")
    gate_up, down = torch.ones(2, 2, 1), torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match="moe_experts: expert_ids must be from 0 to 1; got 2"):
        moe_experts(torch.ones(1, 1), gate_up, down, torch.tensor([[2]]), torch.ones(1, 1))


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")
def test_segments_are_joined_in_one_layout():
    """`join_kernel` overwrites the states that it has just read: each thread may only write what it read itself."""
    from hybridlm_kernels.recurrence.triton_join import compile_case
    from hybridlm_kernels.tools.compile_check import configurations

    for transition in ("matrix", "channel", "scalar"):
        case = compile_case(64, transition)
        text = built_ttgir(configurations(case)[0])
        layouts = set(re.findall(r"tt\.(?:load|store) .*: tensor<64x32x!tt\.ptr<f32>, (#\w+)>", text))
        assert len(layouts) == 1, (transition, layouts)


def built_ttgir(configured):
    """The kernel in the form in which values have layouts, for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(configured.source, target=GPUTarget("cuda", 90, 32), options=configured.options).asm["ttgir"]
