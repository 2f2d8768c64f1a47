"""The Triton kernels of linear_attention against the fp64 reference: every output and gradient, in fp32."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import Gate, linear_attention
from hybridlm_kernels.ops.linear_attention import triton_backend as backend
from hybridlm_kernels.recurrence import arguments as recurrence
from hybridlm_kernels.recurrence import triton_chunk_tables as triton_chunks
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.against_reference import counted
from tests.support.kernel_compare import error

DECAYS = ("none", "constant", "scalar", "channel")
decays = pytest.mark.parametrize("decay", DECAYS)
GATES = {"scalar": "softplus", "channel": "lower_bounded"}


def make_inputs(decay, *, T=65, B=1, H=1, HV=1, K=20, V=12, N=None, gate=None, strength=1.0):
    generator = torch.Generator().manual_seed(T + 7 * HV)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"q": randn(B, T, H, K), "k": torch.nn.functional.normalize(randn(B, T, H, K), dim=-1),
              "v": randn(B, T, HV, V), "initial_state": randn(N or B, HV, K, V)}
    shape = {"constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}.get(decay)
    if shape and gate is None:
        inputs["g"] = -strength * torch.rand(shape, generator=generator, dtype=torch.float64)
    elif shape:
        inputs |= {"g": randn(*shape), "dt_bias": randn(*shape[2:])}
        if gate != "logsigmoid":
            inputs["A_log"] = 0.3 * randn(HV)
    return inputs


def call(inputs, gate=None, **options):
    rest = {name: x for name, x in inputs.items() if name in ("g", "initial_state")}
    if gate:
        rest["gate"] = Gate(gate, inputs.get("A_log"), inputs["dt_bias"], normalizer=4.0)
    return linear_attention(inputs["q"], inputs["k"], inputs["v"], **rest, **options)


def with_gradients(inputs, fixed=(), **options):
    leaves = {name: x.detach().clone().requires_grad_(name not in fixed) for name, x in inputs.items()}
    o, state = call(leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, state)]
    wanted = {name: x for name, x in leaves.items() if name not in fixed}
    grads = torch.autograd.grad([o, state], list(wanted.values()), upstream)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(wanted, grads, strict=True))}


def compare(inputs, device, fixed=(), tolerances=None, **options):
    """Triton in fp32 against the reference in fp64."""
    expected = with_gradients(inputs, fixed, backend="reference", **options)
    single = {name: x.float().to(device) for name, x in inputs.items()}
    got = with_gradients(single, fixed, backend="triton", **options)
    for name, x in expected.items():
        assert got[name].shape == x.shape
        limit = (tolerances or {}).get(name, 1e-5)
        assert error(got[name].cpu(), x) <= limit, (name, error(got[name].cpu(), x))


@pytest.fixture(autouse=True)
def whole_documents(monkeypatch):
    """No document is cut into segments, unless a test says so."""
    monkeypatch.setattr(backend, "parallel_programs", lambda device: 0)


@decays
@pytest.mark.parametrize("T", [1, 63, 65])
def test_equals_the_recurrence(decay, T, device):
    compare(make_inputs(decay, T=T), device, fixed=("g",) if decay == "constant" else ())


@pytest.mark.parametrize(("decay", "gate"), [("scalar", "softplus"), ("scalar", "lower_bounded"),
                                             ("channel", "softplus"), ("channel", "lower_bounded"),
                                             ("channel", "logsigmoid")])
def test_gates_inside_and_grouped_heads(decay, gate, device):
    compare(make_inputs(decay, T=40, HV=2, K=16, V=24, gate=gate), device, gate=gate, scale=0.7)


def test_gates_that_do_not_learn(device):
    """Then no scores are kept, and the scans backward find them again."""
    compare(make_inputs("scalar", T=66), device, fixed=("g",))


def test_a_constant_that_learns(device):
    compare(make_inputs("constant", T=15), device, tolerances={"g": 5e-5})


@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
@pytest.mark.parametrize("kind", ["zero", "-50", "mixed", "-inf"])
def test_any_gate(decay, kind, device):
    inputs = make_inputs(decay, T=66)
    g = inputs["g"]
    if kind == "zero":
        g.zero_()
    elif kind == "-50":
        g.fill_(-50.0)
    elif kind == "-inf":
        g.view(-1)[::5] = -torch.inf
    elif decay != "constant":  # strong at first, then weak
        g *= 0.01
        g[:, :40] = -50.0
    compare(inputs, device, fixed=("g",) if decay == "constant" else ())


@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
def test_packed(decay, device):
    borders = [0, 1, 65, 68]
    compare(make_inputs(decay, T=34, B=2, N=4), device, ("g",) if decay == "constant" else (),
            cu_seqlens=sorted({*borders, 34}))
    inputs = {n: x.float().to(device) for n, x in make_inputs(decay, T=68, N=3).items()}
    o, last = call(inputs, cu_seqlens=borders, backend="triton")
    for n, (a, b) in enumerate(pairwise(borders)):
        alone = {name: x if x.dim() < 3 else x[n : n + 1] if name == "initial_state" else x[:, a:b]
                 for name, x in inputs.items()}
        o_n, last_n = call({name: x.clone().requires_grad_() for name, x in alone.items()}, backend="triton")
        assert error(o[:, a:b], o_n.detach()) < 1e-6
        assert error(last[n], last_n[0].detach()) < 1e-6


@decays
def test_pieces_change_nothing(decay, device, monkeypatch):
    monkeypatch.setattr(backend, "parallel_programs", lambda device: 2)
    monkeypatch.setattr(triton_chunks, "MIN_CHUNKS_PER_SEGMENT", 1)
    launches = counted(monkeypatch, backend, "join_kernel")
    compare(make_inputs(decay, T=130, K=16, V=16), device, fixed=("g",) if decay == "constant" else ())
    assert len(launches) == {"channel": 3}.get(decay, 4)


@decays
def test_causal_to_the_last_bit(decay, device):
    inputs = {n: x.float().to(device) for n, x in make_inputs(decay, T=66).items()}
    before, _ = call(inputs, backend="triton")
    for t in (14, 63):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            if x.dim() > 2 and x.shape[1] == 66:
                x[:, t + 1 :] *= 2
        after, _ = call(changed, backend="triton")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


@decays
def test_decoding_equals_the_whole(decay, device):
    gate = GATES.get(decay)
    inputs = {n: x.float().to(device) for n, x in make_inputs(decay, T=20, B=2, HV=2, gate=gate).items()}
    whole, last = call(inputs, gate=gate, backend="triton")
    state, outputs = inputs.pop("initial_state"), []
    for tokens in (slice(0, 3), slice(3, 4), slice(4, 20)):
        part = {n: x[:, tokens] if x.dim() > 2 else x for n, x in inputs.items()}
        o, state = call(part | {"initial_state": state}, gate=gate, backend="triton")
        outputs.append(o)
    assert error(torch.cat(outputs, 1), whole) < 1e-6
    assert error(state, last) < 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="float32 is refused beyond 128")
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_heads_of_256(decay, device, monkeypatch):
    monkeypatch.setattr(recurrence, "MAX_HEAD_DIM_FP32", 256)
    compare(make_inputs(decay, T=18, K=256, V=256), device)


def test_offsets_beyond_32_bits():
    """Offsets of the last head of a batch of 2^25 tokens with 96 heads of 128."""
    tables = backend.get_chunk_tables(1, 2**25, None, torch.device("cpu"))
    first = tables.chunks[-1, 0]
    assert first.dtype == torch.int64
    assert (first * 96 + 95) * 128 > 2**31


def test_what_it_refuses(device):
    q = torch.zeros(1, 20, 1, 300, device=device)
    with pytest.raises(RuntimeError, match="head dims up to 256; got 300"):
        linear_attention(q, q, q, backend="triton")
    with pytest.raises(RuntimeError, match="overflow float16"):
        linear_attention(*[torch.zeros(1, 20, 1, 16, dtype=torch.float16, device=device)] * 3, backend="triton")
