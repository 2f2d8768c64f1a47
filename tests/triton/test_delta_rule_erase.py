"""The Triton delta rule with erase keys, free erase vectors and reads before the decay, against the fp64 recurrence."""

import pytest
import torch

from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.ops.delta_rule import triton_backend as backend
from hybridlm_kernels.recurrence import triton_chunk_tables
from tests.support.against_reference import counted
from tests.support.erase_forms import make_inputs
from tests.support.kernel_compare import error
from tests.support.recurrences import (
    assert_causal,
    assert_final_states_change_nothing,
    assert_triton_equals_reference,
    call,
    set_gates,
)

ONE_HEAD = {"H": 1, "HV": 1}
RWKV_7 = ("free vector, before", "channel")
COMBA = ("own key, before", "scalar")


def compare(form_inputs, device, **more):
    inputs, options = form_inputs
    assert_triton_equals_reference("delta_rule", inputs, device, **options, **more)


def run(form_inputs, device, **more):
    """Outputs and last states in fp32, without gradients."""
    inputs, options = form_inputs
    single = {name: x.to(device, torch.float32) for name, x in inputs.items()}
    return call("delta_rule", single, backend="triton", **options, **more)


@pytest.fixture(autouse=True)
def uncut_documents(monkeypatch):
    """No document is cut into segments, unless a test says so."""
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 0)


@pytest.mark.parametrize(("form", "decay"), [
    RWKV_7, ("free vector", "channel"), ("own key", "channel"), ("own key, before", "channel"),
    ("read before", "channel"), COMBA, ("own key", "scalar"), ("read before", "scalar"), ("own key", "none")])
def test_equals_the_recurrence(form, decay, device):
    compare(make_inputs(form, decay, T=66, K=12, **ONE_HEAD), device)


@pytest.mark.parametrize(("form", "decay"), [("free vector, before", "scalar"), ("own key, before", "scalar"),
                                             ("own key", "channel")])
def test_grouped_value_heads(form, decay, device):
    """Free erase vectors are one per value head here, and erase keys one per key head."""
    compare(make_inputs(form, decay, T=18, H=1, HV=2), device)


@pytest.mark.parametrize(("form", "decay"), [RWKV_7, COMBA])
def test_more_channels_than_a_block(form, decay, device):
    compare(make_inputs(form, decay, T=18, K=68, V=68, **ONE_HEAD), device)


@pytest.mark.parametrize(("form", "decay"), [RWKV_7, ("read before", "channel"), COMBA, ("read before", "scalar")])
@pytest.mark.parametrize("gates", ["mixed", "-inf"])
def test_decays_at_the_extremes(form, decay, gates, device):
    inputs, options = make_inputs(form, decay, T=36, **ONE_HEAD)
    set_gates(inputs["g"], gates)
    compare((inputs, options), device)


@pytest.mark.parametrize("form", ["free vector, before", "read before"])
@pytest.mark.parametrize("strong", [False, True])
def test_levels_in_one_product(form, strong, device, monkeypatch):
    monkeypatch.setattr(backend, "merged_levels", lambda gate, dtype: (5, True))
    inputs, options = make_inputs(form, "channel", T=66, **ONE_HEAD)
    if strong:  # so that some rows and channels take levels, others do not
        inputs["g"][:, ::7, :, 3:] = -50.0
    compare((inputs, options), device)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_comba_s_gates_and_norms_inside(decay, device):
    """The normalised write key is the erase key, and the gate of the token acts after the read."""
    inputs, options = make_inputs("read before", decay, T=36, H=1, HV=2)
    inputs["k"] = inputs["k"] * 3.0
    inputs |= {"A_log": torch.tensor([0.2, -0.3]).double(), "dt_bias": 0.1 * inputs["g"][0, 0]}
    compare((inputs, options), device, gate="softplus", beta_sigmoid=1.0, qk_l2norm=True, scale=0.3)


def test_norms_beside_free_erase_vectors(device):
    inputs, options = make_inputs("free vector, before", "channel", T=18, **ONE_HEAD)
    inputs["k"] = inputs["k"] * 3.0
    del inputs["erase_key"]  # the normalised key takes its place
    compare((inputs, options), device, qk_l2norm=True)


@pytest.mark.parametrize(("form", "decay"), [RWKV_7, COMBA])
def test_segments_of_a_document(form, decay, device, monkeypatch):
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 6)
    monkeypatch.setattr(backend, "MIN_SEGMENTS_PER_DOCUMENT", 2)
    monkeypatch.setattr(triton_chunk_tables, "MIN_CHUNKS_PER_SEGMENT", 1)
    joins = counted(monkeypatch, backend, "join_kernel")
    compare(make_inputs(form, decay, T=129, **ONE_HEAD), device)
    assert len(joins) == 2


@pytest.mark.parametrize(("form", "decay"), [RWKV_7, COMBA])
def test_packed_documents(form, decay, device):
    inputs = make_inputs(form, decay, T=37, documents=3, **ONE_HEAD)
    compare(inputs, device, cu_seqlens=CuSeqlens([0, 1, 20, 37], device))


@pytest.mark.parametrize(("form", "decay"), [RWKV_7, COMBA])
def test_causal_to_the_last_bit(form, decay, device):
    inputs, options = make_inputs(form, decay, T=66, **ONE_HEAD)
    assert_causal(lambda inputs: run((inputs, options), device)[0], inputs, (20, 64))


def test_without_final_states(device):
    inputs, options = make_inputs(*RWKV_7, T=20, **ONE_HEAD)
    assert_final_states_change_nothing("delta_rule", inputs, device, **options)


@pytest.mark.parametrize(("form", "decay"), [RWKV_7, COMBA, ("read before", "channel")])
def test_decoding_equals_one_call(form, decay, device):
    inputs, options = make_inputs(form, decay, T=20, HV=4, K=12)
    one_call, last = run((inputs, options), device)
    state, outputs = inputs.pop("initial_state"), []
    for start, end in ((0, 1), (1, 2), (2, 18), (18, 20)):
        tokens = {name: x[:, start:end] for name, x in inputs.items()}
        o, state = run((tokens | {"initial_state": state}, options), device)
        outputs.append(o)
    assert error(torch.cat(outputs, 1), one_call) < 1e-6
    assert error(state, last) < 1e-6
