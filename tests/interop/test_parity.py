"""Every family against transformers: logits, loss gradients, greedy decoding, weights back bit by bit."""

import pytest
import torch

from hybridlm.interop.import_export import ExportPlan, import_hf, to_hf_model
from hybridlm.interop.tensor_source import StateDictSource
from hybridlm.model import generate
from hybridlm.tensor_storage import unique_tensors
from tests.support.hf_zoo import CASES, build, tokens

LOGITS, GRADIENTS = 2e-5, 1e-4  # absolute; relative RMS of each tensor


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradients_in_their_names(ours, family):
    """Our gradients as the exporter would write them, by official name."""
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in unique_tensors(ours).items()}
    for name in [name for name in grads if ".gate_proj.down." in name]:  # Zamba2 has one matrix for these two
        other = name.replace("gate_proj", "up_proj")
        grads[name] = grads[other] = grads[name] + grads[other]
    return dict(ExportPlan(ours.config, StateDictSource(grads), family=family).tensors())


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_decoding(case):
    theirs, family = build(case), CASES[case][0]
    ours = import_hf(theirs)
    ids = tokens(2, 80)  # more than a chunk of the linear layers, more than the index keeps
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids, use_cache=False).logits).abs().max() < LOGITS
        expected = theirs.generate(ids[:, :20], attention_mask=torch.ones_like(ids[:, :20]), max_new_tokens=16,
                                   do_sample=False, pad_token_id=0)
    assert torch.equal(torch.stack(list(generate(ours, ids[:, :20], 16, temperature=0)), 1), expected[:, 20:])

    their_loss = theirs(ids, labels=ids, use_cache=False).loss
    our_loss = ours(ids, labels=ids).loss
    assert abs(our_loss - their_loss) < LOGITS
    their_loss.backward()
    our_loss.backward()
    assert_gradients(gradients_in_their_names(ours, family), theirs, family)


def assert_gradients(ours, theirs, family):
    """Theirs as the official names: what import reads, applied to their gradients."""
    mine = import_hf_gradients(theirs)
    assert mine.keys() == ours.keys()
    for name, expected in mine.items():
        if not expected.dtype.is_floating_point:
            continue  # a table of expert numbers
        scale = expected.square().mean().sqrt()
        error = (ours[name] - expected).square().mean().sqrt()
        assert error <= GRADIENTS * scale + 1e-12, f"{name}: {error / scale:.1e}"


def import_hf_gradients(theirs):
    from hybridlm.interop.import_export import ImportPlan

    state = {name: torch.zeros_like(t) if t.grad is None else t.grad
             for name, t in theirs.state_dict(keep_vars=True).items()}
    plan = ImportPlan(theirs.config.to_dict(), StateDictSource(state))
    gradients = dict(plan.tensors())
    return dict(ExportPlan(plan.config, StateDictSource(gradients), family=plan.family.name).tensors())


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise_and_loads_in_transformers(case):
    theirs = build(case)
    ours = import_hf(theirs)
    back = to_hf_model(ours)
    assert type(back) is type(theirs)
    expected, got = theirs.state_dict(), back.state_dict()
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    ids = tokens(1, 30)
    with torch.no_grad():
        assert (back(ids, use_cache=False).logits - ours(ids).logits).abs().max() < LOGITS
