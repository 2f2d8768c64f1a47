"""The Triton kernels of linear_attention against the fp64 reference: every output and gradient, in fp32."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import linear_attention
from hybridlm_kernels.ops.linear_attention import triton_backend as backend
from hybridlm_kernels.random_inputs import recurrence_inputs, select_tokens
from hybridlm_kernels.recurrence import arguments, triton_chunk_tables
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.against_reference import counted
from tests.support.kernel_compare import error
from tests.support.recurrences import (
    assert_causal,
    assert_final_states_change_nothing,
    assert_triton_equals_reference,
    call,
    document_alone,
    set_gates,
)

DECAYS = ("none", "constant", "scalar", "channel")
decays = pytest.mark.parametrize("decay", DECAYS)


def compare(decay, inputs, device, **options):
    """Against the reference; a constant decay does not learn, unless told so."""
    fixed = ("g",) if decay == "constant" else ()
    assert_triton_equals_reference("linear_attention", inputs, device, **{"fixed": fixed} | options)


def single(inputs, device):
    return {name: x.float().to(device) for name, x in inputs.items()}


@pytest.fixture(autouse=True)
def uncut_documents(monkeypatch):
    """No document is cut into segments, unless a test says so."""
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 0)


@pytest.mark.parametrize(("decay", "T"), [("none", 65), ("constant", 65), ("scalar", 1), ("scalar", 65),
                                          ("channel", 1), ("channel", 65)])
def test_equals_the_recurrence(decay, T, device):
    compare(decay, recurrence_inputs(decay, T=T, K=20, V=12), device)


@pytest.mark.parametrize(("decay", "gate"), [("scalar", "softplus"), ("scalar", "lower_bounded"),
                                             ("channel", "softplus"), ("channel", "logsigmoid")])
def test_gates_inside_and_grouped_heads(decay, gate, device):
    compare(decay, recurrence_inputs(decay, T=24, HV=2, V=20, gate=gate), device, gate=gate, scale=0.7)


def test_gates_that_do_not_learn(device):
    """Then no scores are kept, and the scans backward find them again."""
    compare("scalar", recurrence_inputs("scalar", T=66), device, fixed=("g",))


def test_a_constant_that_learns(device):
    compare("constant", recurrence_inputs("constant", T=15), device, fixed=(), tolerances={"g": 5e-5})


@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
@pytest.mark.parametrize("gates", ["0", "-50", "mixed", "-inf"])
def test_any_gate(decay, gates, device):
    inputs = recurrence_inputs(decay, T=40)
    set_gates(inputs["g"], gates)
    compare(decay, inputs, device)


@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
def test_packed(decay, device):
    borders = [0, 1, 66, 68]
    inputs = recurrence_inputs(decay, T=68, documents=3)
    compare(decay, inputs, device, cu_seqlens=borders)
    inputs = single(inputs, device)
    o, last = call("linear_attention", inputs, cu_seqlens=borders, backend="triton")
    for n, (start, end) in enumerate(pairwise(borders)):
        alone = {name: x.clone().requires_grad_() for name, x in document_alone(inputs, n, start, end).items()}
        o_n, last_n = call("linear_attention", alone, backend="triton")
        assert error(o[:, start:end], o_n.detach()) < 1e-6
        assert error(last[n], last_n[0].detach()) < 1e-6


@decays
def test_segments_change_nothing(decay, device, monkeypatch):
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 2)
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)
    launches = counted(monkeypatch, backend, "join_kernel")
    compare(decay, recurrence_inputs(decay, T=129), device)
    assert len(launches) == {"channel": 3}.get(decay, 4)


@decays
def test_causal_to_the_last_bit(decay, device):
    inputs = single(recurrence_inputs(decay, T=66), device)
    assert_causal(lambda inputs: call("linear_attention", inputs, backend="triton")[0], inputs, (14, 63))


@pytest.mark.parametrize(("decay", "gate"), [("none", None), ("constant", None), ("scalar", "softplus"),
                                             ("channel", "lower_bounded")])
def test_decoding_equals_one_call(decay, gate, device):
    inputs = single(recurrence_inputs(decay, T=20, B=2, HV=2, K=20, V=12, gate=gate), device)
    one_call, last = call("linear_attention", inputs, gate=gate, backend="triton")
    state, outputs = inputs["initial_state"], []
    for tokens in (slice(0, 3), slice(3, 4), slice(4, 20)):
        some = select_tokens(inputs, tokens) | {"initial_state": state}
        o, state = call("linear_attention", some, gate=gate, backend="triton")
        outputs.append(o)
    assert error(torch.cat(outputs, 1), one_call) < 1e-6
    assert error(state, last) < 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="float32 is refused beyond 128")
def test_heads_beyond_128(device, monkeypatch):
    monkeypatch.setattr(arguments, "MAX_KEY_DIM_FP32", 256)
    compare("scalar", recurrence_inputs("scalar", T=9, K=136, V=136), device)


@pytest.mark.parametrize(("decay", "gate"), [("none", None), ("constant", None), ("scalar", "softplus"),
                                             ("channel", None)])
def test_values_wider_than_keys_can_be(decay, gate, device):
    """Without a decay per channel in pieces of 128 (float32); states and gates sum over them."""
    compare(decay, recurrence_inputs(decay, T=9, K=12, V=136, gate=gate), device, gate=gate)


def test_decoding_of_wide_values(device):
    inputs = single(recurrence_inputs("scalar", T=4, K=12, V=280), device)
    expected = call("linear_attention", inputs, backend="reference")
    for found, want in zip(call("linear_attention", inputs, backend="triton"), expected, strict=True):
        assert error(found, want) < 1e-6


def test_keys_wider_than_the_block_of_channels(device):
    compare("channel", recurrence_inputs("channel", T=9, K=68, V=68), device)


@pytest.mark.parametrize("gates", ["0", "-inf", "some strong"])
def test_levels_in_one_product(gates, device, monkeypatch):
    monkeypatch.setattr(backend, "merged_levels", lambda gate, dtype: (5, True))
    inputs = recurrence_inputs("channel", T=66)
    if gates == "some strong":  # so that some rows and channels take levels, others do not
        inputs["g"].fill_(-3.0)
        inputs["g"][:, ::7, :, 3:] = -50.0
        inputs["g"][:, 40:] = -0.1
    else:
        set_gates(inputs["g"], gates)
    compare("channel", inputs, device)


def test_offsets_beyond_32_bits():
    """Offsets of the last head of a batch of 2^25 tokens with 96 heads of 128."""
    tables = backend.get_chunk_tables(1, 2**25, None, torch.device("cpu"))
    first = tables.chunks[-1, 0]
    assert first.dtype == torch.int64
    assert (first * 96 + 95) * 128 > 2**31


def test_refused_calls(device):
    q = torch.zeros(1, 20, 1, 300, device=device)
    with pytest.raises(RuntimeError, match="key head dims up to 256; got 300"):
        linear_attention(q, q, q, backend="triton")
    with pytest.raises(RuntimeError, match="overflow float16"):
        linear_attention(*[torch.zeros(1, 20, 1, 16, dtype=torch.float16, device=device)] * 3, backend="triton")


@pytest.mark.parametrize(("decay", "parallel"), [("scalar", 0), ("channel", 8)])
def test_without_final_states(decay, parallel, device, monkeypatch):
    """Uncut, and in segments."""
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: parallel)
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)
    assert_final_states_change_nothing("linear_attention", recurrence_inputs(decay, T=130, K=12), device)
