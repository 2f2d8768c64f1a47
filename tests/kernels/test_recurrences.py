"""The chunked delta rule and decay attention: equal to the recurrence in values and gradients, whatever the
length, the gate, the packing or the step_groups; causal to the last bit; states that carry over."""

import importlib
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hybridlm_kernels as ops
from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.recurrence import chunk_layout as chunks
from tests.support.kernel_compare import error

KINDS = [("delta_rule", "none"), ("delta_rule", "scalar"), ("delta_rule", "channel"), ("linear_attention", "none"),
         ("linear_attention", "constant"), ("linear_attention", "scalar"), ("linear_attention", "channel")]
kinds = pytest.mark.parametrize(("operation", "decay"), KINDS)


def make_inputs(operation, decay, *, B=1, T=65, H=2, HV=2, K=6, V=5, N=None, strength=1.0, dtype=torch.float64):
    """Random inputs by name; gates are uniform in [-strength, 0]; keys are of length one."""
    generator = torch.Generator().manual_seed(T + 7 * HV)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = {"q": randn(B, T, H, K), "k": torch.nn.functional.normalize(randn(B, T, H, K), dim=-1),
              "v": randn(B, T, HV, V), "initial_state": randn(N or B, HV, K, V)}
    gates = {"constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}
    if decay in gates:
        inputs["g"] = -strength * rand(*gates[decay])
    if operation == "delta_rule":
        inputs["beta"] = rand(B, T, HV)
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(operation, inputs, **options):
    rest = {name: x for name, x in inputs.items() if name not in "qkv"}
    return getattr(ops, operation)(inputs["q"], inputs["k"], inputs["v"], **rest, **options)


def with_gradients(operation, inputs, **options):
    """Outputs, final states and the gradients of all inputs, for one fixed random upstream gradient."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, state = call(operation, leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, state)]
    grads = torch.autograd.grad([o, state], list(leaves.values()), upstream)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_close(got, expected, tolerance):
    for name, x in expected.items():
        assert got[name].shape == x.shape, name
        assert error(got[name], x) <= tolerance, (name, error(got[name], x))


def small_chunks(monkeypatch, chunk=16, numbers=None):
    """Chunks of 16 tokens, so that few tokens make many; `numbers` limits a group."""
    for operation in ("delta_rule", "linear_attention"):
        backend = importlib.import_module(f"hybridlm_kernels.ops.{operation}.torch_backend")
        monkeypatch.setattr(backend, "chunk_size", lambda *_: chunk)
    if numbers is not None:
        monkeypatch.setitem(chunks.STEP_GROUP_MAX_ELEMENTS, "cpu", numbers)
        chunks._layout_of_plain_rows.cache_clear()


@kinds
@pytest.mark.parametrize("T", [1, 15, 63, 65, 130])
def test_equals_the_recurrence(operation, decay, T):
    inputs = make_inputs(operation, decay, T=T, B=2)
    expected = with_gradients(operation, inputs, backend="reference")
    assert_close(with_gradients(operation, inputs, backend="torch"), expected, 1e-12)
    single = {name: x.float() for name, x in inputs.items()}
    assert_close(with_gradients(operation, single, backend="torch"), expected, 1e-5)


@kinds
@pytest.mark.parametrize("chunk", [32, 64])
def test_grouped_value_heads(operation, decay, chunk, monkeypatch):
    small_chunks(monkeypatch, chunk)
    inputs = make_inputs(operation, decay, T=70, H=2, HV=6)
    expected = with_gradients(operation, inputs, backend="reference")
    assert_close(with_gradients(operation, inputs, backend="torch"), expected, 1e-12)


@pytest.mark.parametrize(("operation", "decay"), [kind for kind in KINDS if kind[1] != "none"])
@pytest.mark.parametrize("gate", ["zero", "-12", "-50", "mixed", "-inf"])
def test_any_gate(operation, decay, gate):
    inputs = make_inputs(operation, decay, T=100)
    g = inputs["g"]
    if gate == "zero":
        g.zero_()
    elif gate == "mixed":  # strong at first, then weak: sums over the chunk would lose the weak ones
        g[..., :1] = -50.0
        g *= 0.01
        if g.dim() > 1:
            g[:, :40] = -50.0
    elif gate == "-inf":
        g.view(-1)[::5] = -torch.inf
    else:
        g.fill_(float(gate))
    expected = with_gradients(operation, inputs, backend="reference")
    got = with_gradients(operation, {name: x.float() for name, x in inputs.items()}, backend="torch")
    if decay == "constant":  # one number a head: what is left of a hundred tokens' terms of both signs
        assert error(got.pop("g"), expected.pop("g")) <= 5e-5
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("left_out", [(), ("beta",), ("initial_state",), ("beta", "initial_state")])
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
    inputs = make_inputs(operation, decay, B=2, T=18, H=1, HV=2, K=2, V=2, N=4)
    names = list(inputs)

    def run(*values):
        return call(operation, dict(zip(names, values, strict=True)), cu_seqlens=[0, 9, 10, 18, 36],
                    backend="torch")

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs.values()], fast_mode=True)


@kinds
@pytest.mark.parametrize("numbers", [None, 1])
def test_packed_documents_equal_documents_alone(operation, decay, numbers, monkeypatch):
    small_chunks(monkeypatch, numbers=numbers)
    lengths = [1, 16, 5, 33, 32, 3, 17, 17, 16, 16, 20]
    borders = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    T = borders[-1] // 2
    borders = sorted({*borders, T})
    inputs = make_inputs(operation, decay, B=2, T=T, HV=4, N=len(borders) - 1)
    packed = with_gradients(operation, inputs, cu_seqlens=borders, backend="torch")
    expected = with_gradients(operation, inputs, cu_seqlens=borders, backend="reference")
    assert_close(packed, expected, 1e-12)
    for n, (a, b) in enumerate(pairwise(borders)):
        alone = {name: x if name == "g" and x.dim() == 1 else x.flatten(0, 1)[None, a:b]
                 for name, x in inputs.items() if name != "initial_state"}
        o, state = call(operation, alone, initial_state=inputs["initial_state"][n : n + 1], backend="torch")
        assert error(packed["o"].flatten(0, 1)[a:b], o[0]) < 1e-12
        assert error(packed["state"][n], state[0]) < 1e-12


@kinds
@pytest.mark.parametrize("T", [7, 130])
def test_causal_to_the_last_bit(operation, decay, T):
    inputs = make_inputs(operation, decay, T=T, dtype=torch.float32)
    before, _ = call(operation, inputs, backend="torch")
    for t in (t for t in (0, 5, 15, 16, 31, 32, 63, 64, 95, 128) if t + 1 < T):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name, x in changed.items():
            if name != "initial_state" and x.dim() > 1:
                x[:, t + 1 :] = -x[:, t + 1 :] if name != "g" else 3 * x[:, t + 1 :]
        after, _ = call(operation, changed, backend="torch")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


@kinds
def test_documents_never_see_each_other(operation, decay):
    borders = CuSeqlens([0, 40, 41, 100])
    inputs = make_inputs(operation, decay, T=100, N=3, dtype=torch.float32)
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
def test_two_parts_equal_the_whole(operation, decay, cut):
    inputs = make_inputs(operation, decay, T=80)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def part(tokens, state):
        cut_inputs = {name: x if name == "g" and x.dim() == 1 else x[:, tokens]
                      for name, x in leaves.items() if name != "initial_state"}
        return call(operation, cut_inputs, initial_state=state, backend="torch")

    whole, last = call(operation, leaves, backend="torch")
    first, middle = part(slice(0, cut), leaves["initial_state"])
    second, end = part(slice(cut, None), middle)
    assert error(torch.cat([first, second], 1), whole) < 1e-12
    assert error(end, last) < 1e-12
    grads = torch.autograd.grad(whole.square().sum() + last.sum(), list(leaves.values()))
    again = torch.autograd.grad(torch.cat([first, second], 1).square().sum() + end.sum(), list(leaves.values()))
    for a, b in zip(grads, again, strict=True):
        assert error(b, a) < 1e-11


@kinds
def test_token_by_token_equals_the_whole(operation, decay):
    inputs = make_inputs(operation, decay, T=20, B=2, dtype=torch.float32)
    whole, last = call(operation, inputs)
    state, outputs = inputs.pop("initial_state"), []
    for t in range(20):
        token = {name: x if name == "g" and x.dim() == 1 else x[:, t : t + 1] for name, x in inputs.items()}
        o, state = call(operation, token, initial_state=state)
        outputs.append(o)
    assert error(torch.cat(outputs, 1), whole) < 1e-6
    assert error(state, last) < 1e-6


@kinds
def test_segments_change_nothing(operation, decay, monkeypatch):
    inputs = make_inputs(operation, decay, T=90, B=2)
    small_chunks(monkeypatch)
    whole = with_gradients(operation, inputs, backend="torch")
    small_chunks(monkeypatch, numbers=1)
    assert len(chunks.get_chunk_layout(2, 90, 16, None, torch.device("cpu")).step_groups(4)) == 6
    assert_close(with_gradients(operation, inputs, backend="torch"), whole, 1e-14)
    chunks._layout_of_plain_rows.cache_clear()


@kinds
@pytest.mark.parametrize("T", [3, 50])
def test_half_precision(operation, decay, T):
    """Half inputs are computed in float32: the outputs differ from it by their own rounding alone."""
    inputs = make_inputs(operation, decay, T=T, dtype=torch.bfloat16)
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
    inputs = make_inputs(operation, decay, T=75, B=2, N=6)
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
