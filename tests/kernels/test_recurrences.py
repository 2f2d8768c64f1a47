"""The chunked delta rule and linear attention equal the recurrence in values and gradients, whatever the length, the
gate, the packing or the groups of steps; they are causal to the last bit, and states carry over."""

import importlib
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.random_inputs import recurrence_inputs, select_tokens
from hybridlm_kernels.recurrence import chunk_layout
from tests.support.kernel_compare import error
from tests.support.recurrences import (
    KINDS,
    assert_causal,
    assert_close,
    assert_final_states_change_nothing,
    call,
    document_alone,
    set_gates,
    with_gradients,
)

kinds = pytest.mark.parametrize(("operation", "decay"), KINDS)


def make_inputs(operation, decay, **sizes):
    return recurrence_inputs(decay, beta=operation == "delta_rule", **{"H": 2, "HV": 2, "K": 6, "V": 5} | sizes)


def small_chunks(monkeypatch, chunk=16, elements=None):
    """Chunks of 16 tokens, so that few tokens make many; `elements` limits a group of steps."""
    for operation in ("delta_rule", "linear_attention"):
        backend = importlib.import_module(f"hybridlm_kernels.ops.{operation}.torch_backend")
        monkeypatch.setattr(backend, "chunk_size", lambda *_: chunk)
    if elements is not None:
        monkeypatch.setitem(chunk_layout.STEP_GROUP_MAX_ELEMENTS, "cpu", elements)
        chunk_layout._layout_of_plain_rows.cache_clear()


@kinds
@pytest.mark.parametrize("T", [1, 15, 33, 65])
def test_equals_the_recurrence(operation, decay, T):
    inputs = make_inputs(operation, decay, T=T, B=2)
    expected = with_gradients(operation, inputs, backend="reference")
    assert_close(with_gradients(operation, inputs, backend="torch"), expected, 1e-12)
    single = {name: x.float() for name, x in inputs.items()}
    assert_close(with_gradients(operation, single, backend="torch"), expected, 1e-5)


@kinds
def test_grouped_value_heads_in_chunks_of_64(operation, decay, monkeypatch):
    small_chunks(monkeypatch, 64)
    inputs = make_inputs(operation, decay, T=70, HV=6)
    expected = with_gradients(operation, inputs, backend="reference")
    assert_close(with_gradients(operation, inputs, backend="torch"), expected, 1e-12)


@pytest.mark.parametrize(("operation", "decay"), [kind for kind in KINDS if kind[1] != "none"])
@pytest.mark.parametrize("gates", ["0", "-12", "-50", "mixed", "-inf"])
def test_any_gate(operation, decay, gates):
    inputs = make_inputs(operation, decay, T=70)
    set_gates(inputs["g"], gates)
    expected = with_gradients(operation, inputs, backend="reference")
    got = with_gradients(operation, {name: x.float() for name, x in inputs.items()}, backend="torch")
    # One constant per head: its gradient is what is left of the terms of all tokens, of both signs.
    assert_close(got, expected, 1e-5, {"g": 5e-5} if decay == "constant" else None)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize(("l2norm", "left_out"), [(False, ()), (True, ()), (True, ("beta",)), (False, ("beta",)),
                                                  (True, ("initial_state",)), (False, ("beta", "initial_state"))])
def test_options_of_the_delta_rule(decay, l2norm, left_out):
    inputs = make_inputs("delta_rule", decay, T=40, HV=4)
    inputs["k"] = inputs["k"] * (3.0 if l2norm else 1.0)
    inputs = {name: x for name, x in inputs.items() if name not in left_out}
    options = {"qk_l2norm": l2norm, "scale": 0.3}
    expected = with_gradients("delta_rule", inputs, backend="reference", **options)
    assert_close(with_gradients("delta_rule", inputs, backend="torch", **options), expected, 1e-12)


@kinds
def test_gradcheck(operation, decay, monkeypatch):
    small_chunks(monkeypatch)
    inputs = make_inputs(operation, decay, B=2, T=18, H=1, K=2, V=2, documents=4)
    names = list(inputs)

    def run(*values):
        return call(operation, dict(zip(names, values, strict=True)), cu_seqlens=[0, 9, 10, 18, 36], backend="torch")

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs.values()], fast_mode=True)


@kinds
@pytest.mark.parametrize("elements", [None, 1])
def test_packed_documents_equal_documents_alone(operation, decay, elements, monkeypatch):
    small_chunks(monkeypatch, elements=elements)
    borders = [0, 1, 17, 22, 55, 58, 74, 76, 93, 110]
    inputs = make_inputs(operation, decay, B=2, T=55, HV=4, documents=len(borders) - 1)
    packed = with_gradients(operation, inputs, cu_seqlens=borders, backend="torch")
    expected = with_gradients(operation, inputs, cu_seqlens=borders, backend="reference")
    assert_close(packed, expected, 1e-12)
    for n, (start, end) in enumerate(pairwise(borders)):
        o, state = call(operation, document_alone(inputs, n, start, end), backend="torch")
        assert error(packed["o"].flatten(0, 1)[start:end], o[0]) < 1e-12
        assert error(packed["state"][n], state[0]) < 1e-12


@kinds
@pytest.mark.parametrize(("T", "cuts"), [(7, (0, 5)), (66, (0, 5, 15, 16, 31, 32, 63, 64))])
def test_causal_to_the_last_bit(operation, decay, T, cuts):
    inputs = make_inputs(operation, decay, T=T, dtype=torch.float32)
    assert_causal(lambda inputs: call(operation, inputs, backend="torch")[0], inputs, cuts)


@kinds
def test_documents_never_see_each_other(operation, decay):
    borders = CuSeqlens([0, 40, 41, 100])
    inputs = make_inputs(operation, decay, T=100, documents=3, dtype=torch.float32)
    before, states = call(operation, inputs, cu_seqlens=borders, backend="torch")
    inputs["v"][:, 40] += 1.0
    after, states_after = call(operation, inputs, cu_seqlens=borders, backend="torch")
    same = torch.ones(100, dtype=torch.bool)
    same[40] = False
    assert torch.equal(before[:, same], after[:, same])
    assert torch.equal(states[[0, 2]], states_after[[0, 2]])
    assert not torch.equal(states[1], states_after[1])


@kinds
@pytest.mark.parametrize("cut", [1, 37, 64])
def test_two_calls_equal_one(operation, decay, cut):
    """The state of the first call is handed to the second, gradients included."""
    inputs = make_inputs(operation, decay, T=80)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def run(tokens, state):
        return call(operation, select_tokens(leaves, tokens) | {"initial_state": state}, backend="torch")

    one_call, last = call(operation, leaves, backend="torch")
    first, middle = run(slice(0, cut), leaves["initial_state"])
    second, end = run(slice(cut, None), middle)
    assert error(torch.cat([first, second], 1), one_call) < 1e-12
    assert error(end, last) < 1e-12
    grads = torch.autograd.grad(one_call.square().sum() + last.sum(), list(leaves.values()))
    again = torch.autograd.grad(torch.cat([first, second], 1).square().sum() + end.sum(), list(leaves.values()))
    for a, b in zip(grads, again, strict=True):
        assert error(b, a) < 1e-11


@kinds
def test_decoding_equals_one_call(operation, decay):
    inputs = make_inputs(operation, decay, T=20, B=2, dtype=torch.float32)
    one_call, last = call(operation, inputs)
    state, outputs = inputs["initial_state"], []
    for t in range(20):
        o, state = call(operation, select_tokens(inputs, slice(t, t + 1)) | {"initial_state": state})
        outputs.append(o)
    assert error(torch.cat(outputs, 1), one_call) < 1e-6
    assert error(state, last) < 1e-6


@kinds
def test_groups_of_steps_change_nothing(operation, decay, monkeypatch):
    inputs = make_inputs(operation, decay, T=90, B=2)
    small_chunks(monkeypatch)
    one_group = with_gradients(operation, inputs, backend="torch")
    small_chunks(monkeypatch, elements=1)
    assert len(chunk_layout.get_chunk_layout(2, 90, 16, None, torch.device("cpu")).step_groups(4)) == 6
    assert_close(with_gradients(operation, inputs, backend="torch"), one_group, 1e-14)
    chunk_layout._layout_of_plain_rows.cache_clear()


@kinds
@pytest.mark.parametrize("T", [3, 50])
def test_half_precision(operation, decay, T):
    """Half inputs are computed in float32: the outputs differ from it by their own rounding alone."""
    inputs = make_inputs(operation, decay, T=T)
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    wide = with_gradients(operation, {name: x.float() for name, x in inputs.items()}, backend="torch")
    half = with_gradients(operation, inputs, backend="torch")
    assert half["o"].dtype == torch.bfloat16
    assert half["state"].dtype == torch.float32
    assert error(half["o"], wide["o"]) < 0.004
    assert error(half["state"], wide["state"]) < 1e-6
    for name, x in inputs.items():
        assert half[name].dtype == x.dtype
        assert error(half[name], wide[name]) < 0.01, name


@kinds
def test_autocast_changes_nothing(operation, decay):
    inputs = make_inputs(operation, decay, T=40, dtype=torch.float32)
    plain = with_gradients(operation, inputs, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_gradients(operation, inputs, backend="torch")
    for name, x in plain.items():
        assert torch.equal(x, cast[name]), name


@kinds
def test_no_memory_is_read_before_it_is_written(operation, decay):
    """torch.empty gives NaN here."""
    inputs = make_inputs(operation, decay, T=75, B=2, documents=6)
    borders = [0, 1, 34, 75, 80, 140, 150]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        packed = with_gradients(operation, inputs, cu_seqlens=borders, backend="torch")
        inputs["initial_state"] = inputs["initial_state"][:2]
        plain = with_gradients(operation, inputs, backend="torch")
    finally:
        torch.use_deterministic_algorithms(False)
    for got in (packed, plain):
        assert all(x.isfinite().all() for x in got.values())


@kinds
def test_strided_inputs_and_gradients_of_some(operation, decay):
    inputs = make_inputs(operation, decay, T=33, B=2)
    expected = with_gradients(operation, inputs, backend="torch")
    strided = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 2 else x
               for name, x in inputs.items()}
    assert_close(with_gradients(operation, strided, backend="torch"), expected, 1e-14)
    v = inputs["v"].requires_grad_()
    o, state = call(operation, inputs, backend="torch")
    (o.sum() + state.sum()).backward()
    assert v.grad is not None
    with torch.no_grad():
        assert torch.equal(call(operation, inputs, backend="torch")[0], o)


@kinds
def test_backward_can_run_twice(operation, decay):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(operation, decay, T=40).items()}
    o, state = call(operation, inputs, backend="torch")
    loss = o.square().sum() + state.sum()
    first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kinds
def test_activation_checkpointing(operation, decay):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(operation, decay, T=40).items()}

    def run(*values):
        o, state = call(operation, dict(zip(inputs, values, strict=True)), backend="torch")
        return o.square().sum() + state.sum()

    expected = torch.autograd.grad(run(*inputs.values()), list(inputs.values()))
    again = checkpoint(run, *inputs.values(), use_reentrant=False)
    grads = torch.autograd.grad(again, list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


BAD = [
    ({"q": (1, 9, 2, 6, 1)}, r"q must be \[batch, time, heads, dim\]"),
    ({"q": (1, 9, 2, 5)}, "q and k must have the same shape"),
    ({"v": (1, 8, 2, 5)}, "v has batch and time"),
    ({"v": (1, 9, 3, 5)}, "3 value heads must be a multiple of the 2 key heads"),
    ({"q": (1, 0, 2, 6), "k": (1, 0, 2, 6), "v": (1, 0, 2, 5)}, "no dimension may be 0"),
    ({"g": (1, 9, 1)}, r"g must have shape .*\[1, 9, 2\] \(scalar\) or \[1, 9, 2, 6\] \(channel\); got \[1, 9, 1\]"),
    ({"initial_state": (2, 2, 6, 5)}, r"initial_state must be \[rows.* = \[1, 2, 6, 5\]; got \[2, 2, 6, 5\]"),
]


@pytest.mark.parametrize("operation", ["delta_rule", "linear_attention"])
@pytest.mark.parametrize(("shapes", "message"), BAD)
def test_shapes_that_do_not_fit(operation, shapes, message):
    inputs = make_inputs(operation, "scalar", T=9)
    with pytest.raises(ValueError, match=message):
        call(operation, {**inputs, **{name: torch.zeros(shape) for name, shape in shapes.items()}})


@pytest.mark.parametrize("operation", ["delta_rule", "linear_attention"])
def test_other_mistakes(operation):
    inputs = make_inputs(operation, "scalar", T=9)
    with pytest.raises(ValueError, match="ends at 10, but the tensors hold 1 x 9 tokens"):
        call(operation, inputs, cu_seqlens=[0, 10])
    with pytest.raises(ValueError, match=r"initial_state must be \[documents"):
        call(operation, inputs, cu_seqlens=[0, 4, 9])
    with pytest.raises(ValueError, match="q must be a floating point tensor"):
        call(operation, {**inputs, "q": inputs["q"].long()})
    if operation == "delta_rule":
        with pytest.raises(ValueError, match=r"beta must have shape \[1, 9, 2\] \(scalar\); got \[1, 9\]"):
            call(operation, {**inputs, "beta": torch.zeros(1, 9)})


@pytest.mark.parametrize("borders", [None, [0, 3, 3, 20]])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("operation", ["delta_rule", "linear_attention"])
def test_without_final_states(operation, backend, borders):
    documents = 1 if borders is None else len(borders) - 1
    inputs = make_inputs(operation, "scalar", T=20, documents=documents)
    assert_final_states_change_nothing(operation, inputs, backend=backend, cu_seqlens=borders)
