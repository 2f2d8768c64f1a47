"""The prepared decode step of a model: the tokens of the plain forward, whatever was done to its modules."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hybridlm.model import decode_plan
from hybridlm.model.mixers import LinearAttentionConfig, MLAConfig
from hybridlm.model.model import HybridLM
from hybridlm_kernels import registry
from tests.support.tiny_lm import VOCABULARY, config, model, moe

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def lm():
    return model(feed_forward=moe(), init_std=0.3).eval()


@pytest.fixture
def runs(monkeypatch):
    """The number of tokens that went through a plan."""
    count = []
    run = decode_plan.DecodePlan.run
    monkeypatch.setattr(decode_plan.DecodePlan, "run", lambda *args: count.append(1) or run(*args))
    return count


@torch.no_grad()
def decoded(lm, rows=2):
    """Logits of the tokens from the fourth on, decoded one by one."""
    state = lm.new_state(rows, 12)
    lm(IDS[:rows, :4], state=state)
    return torch.cat([lm(IDS[:rows, t : t + 1], state=state).logits for t in range(4, 12)], 1)


@torch.no_grad()
def assert_as_in_one_forward(lm):
    for rows in (1, 2):
        torch.testing.assert_close(decoded(lm, rows), lm(IDS[:rows]).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_it_runs_without_gradients_in_evaluation_alone(lm, runs):
    assert_as_in_one_forward(lm)
    assert len(runs) == 16
    state = lm.new_state(2, 12)
    lm(IDS[:, :4], state=state)
    assert lm(IDS[:, 4:5], state=state).logits.requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        lm(IDS[:, 5:6], state=state)
    assert len(runs) == 16


def test_other_mixers(runs):
    mixers = {"linear": LinearAttentionConfig(num_heads=2, head_dim=16),
              "full": MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)}
    assert_as_in_one_forward(model(mixers=mixers, init_std=0.3).eval())
    assert len(runs) == 16


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as parameter-efficient training makes them."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


PROJECTIONS = ["layers.0.mixer.q_proj", "layers.0.mixer.b_proj", "layers.0.mixer.f_proj", "layers.0.mixer.o_proj",
               "layers.2.mixer.k_proj", "layers.2.mixer.o_proj", "layers.0.feed_forward.up_proj",
               "layers.1.feed_forward.shared.down_proj"]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_wrapped_layer_acts_also_when_it_is_wrapped_between_tokens(lm, name):
    decoded(lm)  # the plan is prepared
    parent, _, child = name.rpartition(".")
    owner = lm.get_submodule(parent)
    before = lm(IDS).logits
    setattr(owner, child, Adapted(getattr(owner, child)))
    assert not torch.allclose(lm(IDS).logits, before)
    assert_as_in_one_forward(lm)


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mixer", "layers.1.feed_forward", "layers.1.feed_forward.router",
                                  "layers.0.mixer.v_proj", "layers.0.mixer_norm", "layers.2.mixer.o_proj", "norm"])
def test_hooks_run(lm, name):
    decoded(lm)
    calls = []
    handle = lm.get_submodule(name).register_forward_hook(lambda *args: calls.append(1))
    decoded(lm)
    assert len(calls) == 9, "once for the prompt and for each token"
    handle.remove()
    decoded(lm)
    assert len(calls) == 9


def test_changed_and_replaced_parameters_act(lm):
    decoded(lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.1)
    assert_as_in_one_forward(lm)
    lm.load_state_dict({name: x * 0.8 for name, x in lm.state_dict().items()}, assign=True)
    assert_as_in_one_forward(lm)
    assert_as_in_one_forward(lm.bfloat16().float())


def test_copies_have_a_plan_of_their_own(lm):
    decoded(lm)
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.2)
        assert_as_in_one_forward(other)
    with torch.no_grad():
        state = lm.new_state(2, 12)
        lm(IDS[:, :5], state=state)
        twin = copy.deepcopy(state)
        expected = lm(IDS[:, 5:6], state=state).logits
        lm(IDS[:, 7:8], state=state)
        assert torch.equal(lm(IDS[:, 5:6], state=twin).logits, expected), "a copied state is not changed by the other"


def test_configured_backends_are_obeyed(lm, runs):
    decoded(lm)
    try:
        registry.configure({"delta_rule": "reference"})
        runs.clear()
        with registry.watching(lambda choice: runs.append(choice)):
            assert_as_in_one_forward(lm)
        assert {choice.backend for choice in runs if choice.operation == "delta_rule"} == {"reference"}
    finally:
        registry.configure({"delta_rule": "auto"})


def test_beams_reorder_rows_between_steps(lm):
    with torch.no_grad():
        state = lm.new_state(2, 12)
        lm(IDS[:, :4], state=state)
        lm(IDS[:, 4:5], state=state)
        state.reorder(torch.tensor([1, 1]))
        swapped = lm(IDS[:, 5:6], state=state).logits
        rows = torch.cat([IDS[[1, 1], :5], IDS[:, 5:6]], 1)
        torch.testing.assert_close(swapped, lm(rows).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_model_of_a_freed_plan_is_freed():
    lm = HybridLM(config()).eval()
    decoded(lm)
    assert lm in decode_plan._plans
    count = len(decode_plan._plans)
    del lm
    assert len(decode_plan._plans) < count
