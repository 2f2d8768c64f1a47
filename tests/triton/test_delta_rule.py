"""The Triton delta rule against the fp64 recurrence: outputs, states and every gradient."""

import pytest
import torch

from hybridlm_kernels import CuSeqlens, delta_rule
from hybridlm_kernels.ops.delta_rule import triton_backend as backend
from hybridlm_kernels.recurrence import arguments as recurrence
from hybridlm_kernels.recurrence import triton_chunk_tables as triton_chunks
from hybridlm_kernels.recurrence.gates import Gate
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.against_reference import counted
from tests.support.kernel_compare import error

TOLERANCE = 1e-5


def make_inputs(decay, *, B=1, T=65, H=1, HV=1, K=12, V=16, N=None, raw=False):
    """Random inputs by name; gates lie in [-1, 0] and keys are of length one, unless `raw`."""
    generator = torch.Generator().manual_seed(T + 7 * HV)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, HV, V), "beta": randn(B, T, HV),
              "initial_state": randn(N or B, HV, K, V)}
    if decay != "none":
        inputs["g"] = randn(B, T, HV, K) if decay == "channel" else randn(B, T, HV)
    if not raw:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = inputs["beta"].sigmoid()
        if decay != "none":
            inputs["g"] = -inputs["g"].sigmoid()
    return inputs


def run(inputs, backend, gate=None, bound=-5.0, **options):
    """Outputs, last states and the gradients of all inputs for one fixed upstream gradient."""
    dtype, device = (torch.float64, "cpu") if backend == "reference" else (torch.float32, options.pop("device"))
    options.pop("device", None)
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    call = dict(leaves)
    if gate:
        call["gate"] = Gate(gate, A_log=call.pop("A_log", None), dt_bias=call.pop("dt_bias"), lower_bound=bound,
                            normalizer=4.0)
    o, state = delta_rule(call.pop("q"), call.pop("k"), call.pop("v"), **call, **options, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, state)]
    grads = torch.autograd.grad([o, state], list(leaves.values()), upstream)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_equals_the_recurrence(inputs, device, **options):
    got, expected = (run(inputs, backend, device=device, **options) for backend in ("triton", "reference"))
    for name, x in expected.items():
        assert got[name].shape == x.shape
        assert error(got[name].cpu(), x) <= TOLERANCE, name


@pytest.fixture(autouse=True)
def whole_documents(monkeypatch):
    """No document is cut into segments, unless a test says so."""
    monkeypatch.setattr(backend, "parallel_programs", lambda device: 0)


@pytest.fixture
def two_launches(monkeypatch):
    """Chunks and their scan apart, however short the documents."""
    monkeypatch.setattr(backend, "ONE_LAUNCH_MAX_CHUNKS", 0)


@pytest.fixture
def full_device(monkeypatch, two_launches):
    """Few programs fill the device, so that chunks and their scan go together, however long the documents."""
    monkeypatch.setattr(backend, "parallel_programs", lambda device: 2)


@pytest.fixture
def segments(monkeypatch, two_launches):
    """Documents of more than one chunk are cut into two segments or three."""
    monkeypatch.setattr(backend, "parallel_programs", lambda device: 6)
    monkeypatch.setattr(backend, "MIN_SEGMENTS_PER_DOCUMENT", 2)
    monkeypatch.setattr(triton_chunks, "MIN_CHUNKS_PER_SEGMENT", 1)


@pytest.mark.parametrize(("decay", "T"), [("none", 65), ("scalar", 1), ("scalar", 100), ("channel", 15),
                                          ("channel", 65)])
def test_equals_the_recurrence(decay, T, device):
    assert_equals_the_recurrence(make_inputs(decay, T=T), device)


@pytest.mark.parametrize(("decay", "T"), [("none", 20), ("scalar", 65)])
def test_two_launches(decay, T, device, monkeypatch, two_launches):
    launches = counted(monkeypatch, backend, "fused_kernel")
    assert_equals_the_recurrence(make_inputs(decay, T=T), device)
    assert not launches


@pytest.mark.parametrize(("decay", "launches"), [("none", 1), ("scalar", 1), ("channel", 0)])
def test_short_documents_take_one_launch(decay, launches, device, monkeypatch):
    counts = [counted(monkeypatch, backend, name) for name in ("fused_kernel", "chunk_kernel", "scan_kernel")]
    forward(make_inputs(decay, T=17), device)
    assert [len(c) for c in counts] == [launches, 1 - launches, 1 - launches]


@pytest.mark.parametrize(("decay", "borders"), [("scalar", [0, 1, 131, 132]), ("channel", [0, 65, 132])])
def test_documents_that_fill_the_device_take_one_launch(decay, borders, device, monkeypatch, full_device):
    fused = counted(monkeypatch, backend, "fused_channel_kernel" if decay == "channel" else "fused_kernel")
    inputs = make_inputs(decay, T=132, N=len(borders) - 1, K=20, V=36)
    assert_equals_the_recurrence(inputs, device, cu_seqlens=CuSeqlens(borders, device))
    assert len(fused) == 1


@pytest.mark.parametrize(("decay", "parallel", "longest", "one_launch"), [
    ("scalar", 1, 64, True), ("none", 2, 3, True), ("scalar", 4, 64, False), ("scalar", 1, 2, False),
    ("channel", 2, 64, False), ("scalar", 0, 64, False)])
def test_when_one_launch_is_enough(decay, parallel, longest, one_launch, device, monkeypatch, two_launches):
    """Five chunks, at most three of them in a row: 1.7 rounds of one program, 0.8 of two, 0.4 of four. With a decay a
    channel the memory of three programs is more than that of two launches."""
    monkeypatch.setattr(backend, "parallel_programs", lambda device: parallel)
    monkeypatch.setattr(backend, "FULL_DEVICE_ONE_LAUNCH_MAX_CHUNKS", longest)
    x = {name: x.to(device, torch.float32) for name, x in make_inputs(decay, T=132, N=3).items()}
    inputs = backend._DeltaRuleInputs(x["q"], x["k"], x["v"], x.get("g"), x["beta"], None, None, x["initial_state"])
    options = backend._DeltaRuleOptions(1.0, CuSeqlens([0, 1, 131, 132], device), False, None, None)
    assert backend._DeltaRuleLaunches(inputs, options).in_one_launch() == one_launch


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_pieces_of_a_document(decay, device, monkeypatch, segments):
    joins = counted(monkeypatch, backend, "join_kernel")
    inputs = make_inputs(decay, T=130, K=20, V=12)
    assert_equals_the_recurrence(inputs, device)
    assert len(joins) == 2


def test_pieces_of_packed_documents(device, monkeypatch, segments):
    monkeypatch.setattr(backend, "parallel_programs", lambda device: 18)
    assert_equals_the_recurrence(make_inputs("scalar", T=132, N=3), device,
                                 cu_seqlens=CuSeqlens([0, 1, 131, 132], device))


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_grouped_value_heads_and_more_channels_than_a_block(decay, device):
    assert_equals_the_recurrence(make_inputs(decay, T=18, HV=2, K=20, V=20), device)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("gate", ["0", "-12", "mixed", "-inf"])
def test_decays_at_the_extremes(decay, gate, device):
    inputs = make_inputs(decay, T=40)
    g = inputs["g"]
    if gate == "mixed":  # strong, then weak: differences of sums over the chunk would lose the weak ones
        g *= 0.01
        g[:, :20] = -50.0
    elif gate == "-inf":
        g.view(-1)[::5] = -torch.inf
    else:
        g.fill_(float(gate))
    assert_equals_the_recurrence(inputs, device)


@pytest.mark.parametrize(("decay", "gate"), [("scalar", "softplus"), ("scalar", "logsigmoid"), ("channel", "softplus"),
                                             ("channel", "lower_bounded")])
def test_gates_and_norms_inside(decay, gate, device):
    inputs = make_inputs(decay, T=36, HV=2, raw=True)
    generator = torch.Generator().manual_seed(3)
    inputs["dt_bias"] = torch.randn(inputs["g"].shape[2:], generator=generator, dtype=torch.float64)
    if gate != "logsigmoid":
        inputs["A_log"] = torch.randn(2, generator=generator, dtype=torch.float64)
    assert_equals_the_recurrence(inputs, device, gate=gate, beta_sigmoid=2.0, qk_l2norm=True, scale=0.3)


@pytest.mark.parametrize(("bound", "levels"), [(-1.0, 6), (-5.0, 4), (-20.0, 2), (-30.0, 0), (-100.0, 0)])
def test_levels_that_meet_in_one_product(bound, levels):
    gate = Gate("lower_bounded", torch.zeros(1), lower_bound=bound)
    assert [backend.merged_levels(gate, dtype) for dtype in (torch.bfloat16, torch.float16)] == [levels, 0]
    if levels:  # the exponent that a token at the end of its block may have
        assert -bound * 1.4427 * 2**(levels - 1) <= backend.MAX_LOG2_EXPONENT < 127


@pytest.mark.parametrize("gate", [None, Gate("softplus", torch.zeros(1)), Gate("logsigmoid")])
def test_without_a_bound_no_exponent_is_positive(gate):
    assert backend.merged_levels(gate, torch.bfloat16) == 0


def bounded_inputs(gates, T, N=None):
    """Gates at 95 % of their bound, at 5 %, or each token and channel at one of the two."""
    inputs = make_inputs("channel", T=T, N=N, raw=True)
    sign = {"strong": 1.0, "weak": -1.0, "mixed": inputs["g"].sign()}[gates]
    nothing = torch.zeros(inputs["g"].shape[2:], dtype=torch.float64)
    return inputs | {"g": torch.full_like(inputs["g"], 3.0) * sign, "dt_bias": nothing, "A_log": nothing[:, 0].clone()}


BOUNDED = {"gate": "lower_bounded", "beta_sigmoid": 1.0, "qk_l2norm": True}


@pytest.mark.parametrize(("bound", "gates"), [(-1.0, "strong"), (-5.0, "strong"), (-5.0, "weak"), (-5.0, "mixed"),
                                              (-20.0, "mixed")])
def test_bounded_gates_at_the_extremes(bound, gates, device):
    assert_equals_the_recurrence(bounded_inputs(gates, 70), device, bound=bound, **BOUNDED)


def test_bounded_gates_in_one_launch(device, monkeypatch, full_device):
    fused = counted(monkeypatch, backend, "fused_channel_kernel")
    assert_equals_the_recurrence(bounded_inputs("mixed", 132, N=2), device,
                                 cu_seqlens=CuSeqlens([0, 65, 132], device), **BOUNDED)
    assert len(fused) == 1


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_packed_documents(decay, device):
    inputs = make_inputs(decay, T=66, N=3)
    assert_equals_the_recurrence(inputs, device, cu_seqlens=CuSeqlens([0, 1, 65, 66], device))


def test_without_beta_and_state(device):
    inputs = make_inputs("scalar", T=20)
    assert_equals_the_recurrence({name: inputs[name] for name in "qkvg"}, device)


def test_beta_of_zero_has_a_gradient(device):
    inputs = make_inputs("none", T=20)
    inputs["beta"][:, ::3] = 0.0
    assert_equals_the_recurrence(inputs, device)


def forward(inputs, device, backend="triton", **options):
    x = {name: x.to(device, torch.float32) for name, x in inputs.items()}
    return delta_rule(x.pop("q"), x.pop("k"), x.pop("v"), **x, **options, backend=backend)


@pytest.mark.parametrize(("decay", "path"), [("scalar", None), ("channel", None), ("scalar", "two_launches"),
                                             ("channel", "full_device"), ("channel", "segments")])
def test_causal_to_the_last_bit(decay, path, device, request):
    if path:
        request.getfixturevalue(path)
    inputs = make_inputs(decay, T=70)
    before, _ = forward(inputs, device)
    for t in (20, 64):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in ("q", "k", "v", "beta", "g"):
            changed[name][:, t + 1 :] *= 0.5
        after, _ = forward(changed, device)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


@pytest.mark.parametrize(("decay", "gate"), [("none", None), ("scalar", "softplus"), ("channel", "lower_bounded")])
def test_token_by_token_equals_the_whole(decay, gate, device):
    inputs = make_inputs(decay, T=20, HV=2, raw=True)
    options = {"qk_l2norm": True, "beta_sigmoid": 1.0}
    if gate:
        bias = torch.linspace(-1, 1, inputs["g"][0, 0].numel(), device=device).view(inputs["g"].shape[2:])
        options["gate"] = Gate(gate, A_log=torch.tensor([0.3, -0.2], device=device), dt_bias=bias)
    whole, last = forward(inputs, device, **options)
    state, outputs = inputs.pop("initial_state"), []
    for tokens in (slice(0, 1), slice(1, 2), slice(2, 18), slice(18, 20)):
        part = {name: x[:, tokens] for name, x in inputs.items()}
        o, state = forward(part | {"initial_state": state}, device, **options)
        outputs.append(o)
    assert error(torch.cat(outputs, 1), whole) < 1e-6
    assert error(state, last) < 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="float32 is refused beyond 128")
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_heads_of_256(decay, device, monkeypatch):
    monkeypatch.setattr(recurrence, "MAX_HEAD_DIM_FP32", 256)
    assert_equals_the_recurrence(make_inputs(decay, T=18, K=256, V=256), device)


@pytest.mark.parametrize(("K", "message"), [(300, "has head dims up to 256; got 300"),
                                            (200, "in float32 has head dims up to 128, .*; got 200; use bfloat16")])
def test_large_heads_are_refused(K, message, device):
    inputs = make_inputs("none", T=3, K=K)
    with pytest.raises(RuntimeError, match=rf"delta_rule: .* {message}"):
        forward(inputs, device)
