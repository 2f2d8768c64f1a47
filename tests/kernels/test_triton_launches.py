"""Every launch as a CUDA device would get it, as far as Triton's language goes: the arguments that are there, and what
their values make of them (None and 1 become constants). The interpreter knows no types, and the compile check builds
kernels with arguments of its own. Nothing is run; what kernels should have written is zero.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch

import hybridlm_kernels as ops
from hybridlm_kernels import registry
from hybridlm_kernels.random_inputs import recurrence_inputs
from hybridlm_kernels.recurrence import triton_chunk_tables
from hybridlm_kernels.tools import doctor
from hybridlm_kernels.tools.cases import check_cases
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED
from tests.support.erase_forms import make_inputs
from tests.support.recurrences import KINDS, call

pytestmark = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")
LAUNCHED = []  # one list, for kernels are built once and kept
TRITON = {op.name for op in registry.operations() if "triton" in [backend.name for backend in op.backends]}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A stand-in for a driver; tensors stay on the CPU. Yields the names of the kernels that were launched."""
    import triton

    from tests.support.triton_ir import TARGET, inlined

    LAUNCHED.clear()

    def build(source, target, options):
        inlined(source, options)
        return SimpleNamespace(run=lambda *_: LAUNCHED.append(source.fn.__name__), launch_metadata=lambda *_: None,
                               function=0, packed_metadata=0)

    def first_configuration(tuner, *args, **constants):
        return tuner.fn.run(*args, **constants, **tuner.configs[0].all_kwargs())

    driver = SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: "no device",
                             get_current_stream=lambda device: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr("triton.compiler.compile", build)
    monkeypatch.setattr(triton.runtime.autotuner.Autotuner, "run", first_configuration)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _plain=plain, **options: _plain(*args, **options).zero_())
    backends = [backend for op in registry.operations() for backend in op.backends if backend.name == "triton"]
    for backend in backends:
        object.__setattr__(backend, "devices", ("cpu",))
    registry.configure({})  # forgets what was decided
    yield LAUNCHED
    for backend in backends:
        object.__setattr__(backend, "devices", ("cuda",))
    registry.configure({})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [case for case in check_cases() if case.operation in TRITON],
                         ids=lambda case: f"{case.operation}, {case.label}")
def test_the_doctor_s_cases(case, dtype, device):
    try:
        doctor._evaluate(case, "triton", case.inputs(), dtype, "cpu")
        launches = True
    except registry.KernelUnavailable:  # another backend computes it
        launches = False
    assert bool(device) is launches


kinds = pytest.mark.parametrize(("operation", "decay"), KINDS)


def launch(operation, decay, T, *, HV=2, gate=None, trained=True, optional=True, borders=None, final_state=True):
    """Forward and, if `trained`, backward, in bfloat16; with the tensors that may be left out, or without."""
    documents = len(borders or (0, T)) - 1 if optional else 0
    inputs = recurrence_inputs(decay, T=T, HV=HV, documents=documents, beta=optional and operation == "delta_rule",
                               gate=gate, dtype=torch.float32)
    if not optional:
        inputs.pop("dt_bias", None)
    inputs = {name: x.bfloat16().requires_grad_(trained) for name, x in inputs.items()}
    o, state = call(operation, inputs, gate=gate, cu_seqlens=borders, backend="triton", final_state=final_state)
    if trained:
        (o.float().sum() + state.sum()).backward()


@kinds
def test_one_token_and_one_head(operation, decay, device):
    """Numbers of tokens, heads and documents are 1, which makes them constants of the code."""
    launch(operation, decay, 1, HV=1, optional=False)
    assert len(device) > 2
    launch(operation, decay, 1, HV=1, optional=False, trained=False)
    assert device[-1] == "decode_kernel"


@pytest.mark.parametrize("gate", ["softplus", "lower_bounded", "logsigmoid"])
@pytest.mark.parametrize(("operation", "decay"), [kind for kind in KINDS if kind[1] in ("scalar", "channel")])
def test_gates(operation, decay, gate, device):
    launch(operation, decay, 20, gate=gate, borders=[0, 1, 20])
    launch(operation, decay, 20, gate=gate, optional=False)
    launch(operation, decay, 2, gate=gate, trained=False)
    assert device


@kinds
@pytest.mark.parametrize("cut", [True, False])
def test_documents_in_segments_and_uncut(operation, decay, cut, device, monkeypatch):
    backend = importlib.import_module(f"hybridlm_kernels.ops.{operation}.triton_backend")
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 18 if cut else 2)
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)
    if operation == "delta_rule":
        monkeypatch.setattr(backend, "MIN_SEGMENTS_PER_DOCUMENT", 2)
    launch(operation, decay, 200)
    assert ("join_kernel" in device) == cut
    launch(operation, decay, 200, HV=1, optional=False)
    launch(operation, decay, 200, optional=False, final_state=False)


@pytest.mark.parametrize("form", ["free vector, before", "own key, before", "read before"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_erasing_forms(form, decay, device, monkeypatch):
    """Uncut and in segments, trained and decoding, also where numbers of tokens and heads are 1."""
    backend = importlib.import_module("hybridlm_kernels.ops.delta_rule.triton_backend")
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)
    monkeypatch.setattr(backend, "MIN_SEGMENTS_PER_DOCUMENT", 2)
    for T, heads, parallel in ((1, 1, 0), (200, 2, 18)):
        monkeypatch.setattr(backend, "parallel_programs", lambda *_, programs=parallel: programs)
        inputs, options = make_inputs(form, decay, T=T, H=heads, HV=heads, K=16, V=16, dtype=torch.float32)
        inputs = {name: x.bfloat16() for name, x in inputs.items()}
        call("delta_rule", inputs, backend="triton", **options)
        o, state = call("delta_rule", {name: x.requires_grad_() for name, x in inputs.items()}, backend="triton",
                        **options)
        (o.float().sum() + state.sum()).backward()
    assert {"join_kernel", "decode_kernel"} < set(device)
    assert ("value_key_gradients_kernel" in device) == form.startswith("free")


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_several_writes_per_token(decay, device):
    for tokens, HV in ((1, 1), (30, 2)):
        inputs = recurrence_inputs(decay, T=3 * tokens, HV=HV, beta=True, dtype=torch.float32)
        inputs |= {name: inputs[name][:, :tokens] for name in ("q", "g") if name in inputs}
        inputs = {name: x.bfloat16().requires_grad_() for name, x in inputs.items()}
        o, state = call("delta_rule", inputs, steps=3, backend="triton")
        (o.float().sum() + state.sum()).backward()
    assert device.count("gradients_kernel") == 2


def half(*shape):
    return torch.randn(shape).bfloat16().requires_grad_()


OTHERS = {
    "short_conv, all": lambda: ops.short_conv(half(1, 1, 1), half(1, 4), half(1), activation="silu",
                                              initial_state=half(1, 1, 3), backend="triton")[0],
    "short_conv, packed": lambda: ops.short_conv(half(1, 9, 5), half(5, 2), cu_seqlens=[0, 1, 9], backend="triton")[0],
    "rms_norm, one row": lambda: ops.rms_norm(half(1, 60), half(60), 1e-6, backend="triton"),
    "rms_norm, one number": lambda: ops.rms_norm(half(1, 1), half(1), 1e-6, backend="triton"),
    "gated_rms_norm, sigmoid": lambda: ops.gated_rms_norm(half(3, 60), half(3, 60), half(60), 1e-6,
                                                          activation="sigmoid", backend="triton"),
    "swiglu": lambda: ops.swiglu(half(1), half(1), backend="triton"),
    "swiglu, halves": lambda: ops.swiglu(*half(7, 40).chunk(2, -1), limit=1.0, backend="triton"),
    "rotary, one pair": lambda: ops.rotary(half(1, 1, 1, 3), torch.ones(1, 1), torch.ones(1, 1), backend="triton"),
    "rotary, a row each": lambda: ops.rotary(half(2, 5, 2, 64), torch.ones(2, 5, 32), torch.ones(2, 5, 32),
                                             backend="triton"),
    "loss, all": lambda: sum(ops.linear_cross_entropy(half(9, 20), half(33, 20), torch.arange(9), z_loss=1e-2,
                                                      soft_cap=2.0, backend="triton")[:2]),
    "loss, one token": lambda: ops.linear_cross_entropy(half(1, 20), half(1, 20), torch.zeros(1, dtype=torch.int64),
                                                        backend="triton")[0],
    "experts, clamped": lambda: ops.moe_experts(half(9, 16), half(3, 16, 16), half(3, 16, 8),
                                                torch.zeros(9, 2, dtype=torch.int64), half(9, 2), limit=0.5,
                                                backend="triton"),
    "experts, one of one": lambda: ops.moe_experts(half(1, 16), half(1, 16, 16), half(1, 16, 8),
                                                   torch.zeros(1, 1, dtype=torch.int32), half(1, 1), backend="triton"),
    "forgetting_attention, one token": lambda: ops.forgetting_attention(
        half(1, 1, 1, 16), half(1, 1, 1, 16), half(1, 1, 1, 16), half(1, 1, 1), backend="triton"),
    "forgetting_attention, packed": lambda: ops.forgetting_attention(
        half(2, 9, 2, 40), half(2, 9, 1, 40), half(2, 9, 1, 24), half(2, 9, 2).detach(), window=4,
        cu_seqlens=[0, 1, 9, 18], backend="triton"),
    "forgetting_attention, cached keys": lambda: ops.forgetting_attention(
        half(1, 1, 2, 16), half(1, 9, 1, 16), half(1, 9, 1, 16), half(1, 9, 2), backend="triton"),
    "sparse_attention, absorbed": lambda: _absorbed(half(1, 4, 2, 40)),
    "selected_attention, one token": lambda: ops.selected_attention(
        half(1, 1, 1, 16), half(1, 1, 1, 16), half(1, 1, 1, 16), torch.zeros(1, 1, 1, 1, dtype=torch.int64), block=1,
        backend="triton")[0],
    "selected_attention, all": lambda: ops.selected_attention(
        half(2, 9, 4, 40), half(2, 9, 2, 40), half(2, 9, 2, 24), torch.zeros(2, 9, 2, 3, dtype=torch.int64), block=4,
        window=3, window_k_BWGK=half(2, 9, 2, 40), window_v_BWGV=half(2, 9, 2, 24), sinks_H=half(4),
        bias_BTUN=half(2, 9, 2, 3), cu_seqlens=[0, 1, 9, 18], backend="triton")[0],
}


def _absorbed(k):
    return ops.sparse_attention(half(1, 4, 2, 40), k[:, :, :1], k[:, :, :1, :32],
                                torch.zeros(1, 4, 1, dtype=torch.int32), backend="triton")


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations(name, device):
    out = OTHERS[name]()
    forward = len(device)
    out.float().sum().backward()
    assert len(device) >= forward > 0  # the loss finds its gradient with its value


def test_the_choice_of_keys(device):
    for borders in (None, [0, 1, 9]):
        ops.indexer_topk(half(1, 9, 2, 16).detach(), half(1, 9, 16).detach(), half(1, 9, 2).detach(), 4,
                         cu_seqlens=borders, backend="triton")
    assert device
