"""The Triton delta rule against the fp64 recurrence: outputs, states and every gradient."""

import pytest
import torch

from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.ops.delta_rule import triton_backend as backend
from hybridlm_kernels.random_inputs import recurrence_inputs, select_tokens
from hybridlm_kernels.recurrence import arguments, triton_chunk_tables, triton_tiles
from hybridlm_kernels.recurrence.gates import Gate
from hybridlm_kernels.recurrence.triton_channel_pairs import merged_levels
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.against_reference import counted
from tests.support.kernel_compare import error
from tests.support.recurrences import (
    assert_causal,
    assert_final_states_change_nothing,
    assert_triton_equals_reference,
    call,
    set_gates,
)


def make_inputs(decay, **sizes):
    return recurrence_inputs(decay, beta=True, **sizes)


def compare(inputs, device, **options):
    assert_triton_equals_reference("delta_rule", inputs, device, **options)


def run(inputs, device, backend="triton", **options):
    """Outputs and last states in fp32, without gradients."""
    single = {name: x.to(device, torch.float32) for name, x in inputs.items()}
    return call("delta_rule", single, backend=backend, **options)


@pytest.fixture(autouse=True)
def uncut_documents(monkeypatch):
    """No document is cut into segments, unless a test says so."""
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 0)


@pytest.fixture
def in_segments(monkeypatch):
    """Documents of more than one chunk are cut into two segments or three."""
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 6)
    monkeypatch.setattr(backend, "MIN_SEGMENTS_PER_DOCUMENT", 2)
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)


@pytest.mark.parametrize(("decay", "T"), [("none", 65), ("scalar", 1), ("scalar", 66), ("channel", 15),
                                          ("channel", 65)])
def test_equals_the_recurrence(decay, T, device):
    compare(make_inputs(decay, T=T, K=12), device)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_segments_of_a_document(decay, device, monkeypatch, in_segments):
    joins = counted(monkeypatch, backend, "join_kernel")
    compare(make_inputs(decay, T=129, V=12), device)
    assert len(joins) == 2


def test_segments_of_packed_documents(device, monkeypatch, in_segments):
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 18)
    inputs = make_inputs("scalar", T=131, documents=3)
    compare(inputs, device, cu_seqlens=CuSeqlens([0, 1, 130, 131], device))


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_grouped_value_heads_and_more_channels_than_a_block(decay, device):
    compare(make_inputs(decay, T=18, HV=2, K=68, V=68), device)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("gates", ["0", "-12", "mixed", "-inf"])
def test_decays_at_the_extremes(decay, gates, device):
    inputs = make_inputs(decay, T=36)
    set_gates(inputs["g"], gates)
    compare(inputs, device)


@pytest.mark.parametrize(("decay", "gate"), [("scalar", "softplus"), ("scalar", "logsigmoid"), ("channel", "softplus"),
                                             ("channel", "lower_bounded")])
def test_gates_and_norms_inside(decay, gate, device):
    inputs = make_inputs(decay, T=20, HV=2, raw=True, gate=gate)
    compare(inputs, device, gate=gate, beta_sigmoid=2.0, qk_l2norm=True, scale=0.3)


@pytest.mark.parametrize(("bound", "levels"), [(-1.0, 6), (-5.0, 4), (-20.0, None), (-100.0, None), (None, None)])
def test_levels_that_meet_in_one_product(bound, levels):
    rate = torch.zeros(1)
    gate = Gate("softplus", rate) if bound is None else Gate("lower_bounded", rate, lower_bound=bound)
    merged, checked = merged_levels(gate, torch.bfloat16)
    assert checked == (levels is None)
    for dtype in (torch.float16, torch.float32):  # without the room, or the digits
        assert merged_levels(gate, dtype) == (0, False)
    if levels:  # the exponents that a token at the end of its block may have
        assert merged == levels
        assert -bound * 1.4427 * 2**levels <= 2 * triton_tiles.MAX_EXPONENT.value < 2 * 127


@pytest.mark.parametrize(("merged", "checked", "gates"), [
    (5, True, "0"), (5, True, "-12"), (5, True, "-inf"), (5, True, "some strong"), (6, True, "some strong"),
    (4, False, "-3")])  # four levels are safe down to -5
def test_levels_in_one_product(merged, checked, gates, device, monkeypatch):
    monkeypatch.setattr(backend, "merged_levels", lambda gate, dtype: (merged, checked))
    inputs = make_inputs("channel", T=66)
    if gates == "some strong":  # so that some rows and channels take levels, others do not
        inputs["g"].fill_(-3.0)
        inputs["g"][:, ::7, :, 3:] = -50.0
        inputs["g"][:, 40:] = -0.1
    else:
        set_gates(inputs["g"], gates)
    compare(inputs, device)


@pytest.mark.parametrize("merged", [5, 6])
def test_levels_in_one_product_are_causal_to_the_last_bit(merged, device, monkeypatch):
    monkeypatch.setattr(backend, "merged_levels", lambda gate, dtype: (merged, True))
    inputs = make_inputs("channel", T=66)
    inputs["g"][:, 30:] *= 40.0  # strong enough to be taken by levels, until they are halved
    assert_causal(lambda inputs: run(inputs, device)[0], inputs, (20, 40))


def bounded_inputs(gates, T, documents=None):
    """Gates at 95 % of their bound, at 5 %, or each token and channel at one of the two."""
    inputs = make_inputs("channel", T=T, documents=documents, raw=True)
    sign = {"strong": 1.0, "weak": -1.0, "mixed": inputs["g"].sign()}[gates]
    nothing = torch.zeros(inputs["g"].shape[2:], dtype=torch.float64)
    return inputs | {"g": torch.full_like(inputs["g"], 3.0) * sign, "dt_bias": nothing, "A_log": nothing[:, 0].clone()}


BOUNDED = {"gate": "lower_bounded", "beta_sigmoid": 1.0, "qk_l2norm": True}


@pytest.mark.parametrize(("bound", "gates"), [(-1.0, "strong"), (-5.0, "strong"), (-5.0, "weak"), (-20.0, "mixed")])
def test_bounded_gates_at_the_extremes(bound, gates, device):
    compare(bounded_inputs(gates, 65), device, bound=bound, **BOUNDED)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_packed_documents(decay, device):
    inputs = make_inputs(decay, T=67, documents=3, K=12)
    compare(inputs, device, cu_seqlens=CuSeqlens([0, 1, 66, 67], device))


def test_without_beta_and_state(device):
    inputs = make_inputs("scalar", T=20)
    compare({name: inputs[name] for name in "qkvg"}, device)


def test_beta_of_zero_has_a_gradient(device):
    inputs = make_inputs("none", T=20)
    inputs["beta"][:, ::3] = 0.0
    compare(inputs, device)


@pytest.mark.parametrize(("decay", "path"), [("scalar", None), ("channel", None), ("channel", "in_segments")])
def test_causal_to_the_last_bit(decay, path, device, request):
    if path:
        request.getfixturevalue(path)
    assert_causal(lambda inputs: run(inputs, device)[0], make_inputs(decay, T=66), (20, 64))


@pytest.mark.parametrize(("decay", "gate"), [("none", None), ("scalar", "softplus"), ("channel", "lower_bounded")])
def test_decoding_equals_one_call(decay, gate, device):
    inputs = make_inputs(decay, T=20, HV=2, K=12, raw=True, gate=gate)
    options = {"qk_l2norm": True, "beta_sigmoid": 1.0, "gate": gate}
    one_call, last = run(inputs, device, **options)
    state, outputs = inputs["initial_state"], []
    for tokens in (slice(0, 1), slice(1, 2), slice(2, 18), slice(18, 20)):
        o, state = run(select_tokens(inputs, tokens) | {"initial_state": state}, device, **options)
        outputs.append(o)
    assert error(torch.cat(outputs, 1), one_call) < 1e-6
    assert error(state, last) < 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="float32 is refused beyond 128")
def test_heads_beyond_128(device, monkeypatch):
    monkeypatch.setattr(arguments, "MAX_KEY_DIM_FP32", 256)
    compare(make_inputs("scalar", T=9, K=136, V=136), device)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_values_wider_than_keys_can_be(decay, device):
    compare(make_inputs(decay, T=9, K=12, V=280), device)


@pytest.mark.parametrize(("K", "message"), [(300, "has key head dims up to 256; got 300"),
                                            (200, "in float32 has key head dims up to 128, .*; got 200; use bfloat16")])
def test_large_heads_are_refused(K, message, device):
    with pytest.raises(RuntimeError, match=rf"delta_rule: .* {message}"):
        run(make_inputs("none", T=3, K=K), device)


@pytest.mark.parametrize("uncut", [True, False])
def test_without_final_states(uncut, device, request):
    if not uncut:
        request.getfixturevalue("in_segments")
    assert_final_states_change_nothing("delta_rule", make_inputs("channel", T=130, K=12), device)


def test_gradients_that_overflow_float16_are_not_finite(device):
    """Sums over a document that no fp16 number holds must reach a loss scaler as inf or NaN, not as numbers."""
    inputs = {name: x.half().to(device).requires_grad_() for name, x in make_inputs("scalar", T=130).items()}
    inputs["g"] = torch.zeros_like(inputs["g"], requires_grad=True)
    o, _ = call("delta_rule", inputs, backend="triton", final_state=False)
    q, k, v = torch.autograd.grad(o, [inputs[name] for name in "qkv"], torch.full_like(o, 6e4))
    assert not all(bool(grad.isfinite().all()) for grad in (q, k, v))
