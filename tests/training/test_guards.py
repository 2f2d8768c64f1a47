import pytest
import torch
from torch import nn

from hybridlm.distributed.engine import Contribution
from hybridlm.distributed.engines.single import SingleConfig, SingleEngine
from hybridlm.training.guards import BadStepGuard, first_bad_layer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)])
        self.power = nn.Identity()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.power(x).sum()


class Part:
    def __init__(self, x):
        self.x = x

    def to(self, device, non_blocking=False):
        return self


def objective(model, part):
    return Contribution(model(part.x))


def diagnose(net, x=None, objective=objective):
    engine = SingleEngine(SingleConfig(device="cpu"))
    engine.prepare(net, None)
    return first_bad_layer(engine, objective, [Part(torch.ones(1, 2)), Part(torch.ones(1, 2) if x is None else x)])


def test_a_bad_weight_is_named():
    net = Net()
    net.layers[1][0].weight.data[0, 0] = float("nan")
    assert diagnose(net) == "weight 'layers.1.0.weight' itself is not finite"


def test_the_innermost_layer_of_the_forward_is_named():
    net = Net()
    net.layers[1][0].register_forward_hook(lambda m, a, out: out / 0)
    assert diagnose(net) == "layer 'layers.1.0'"


def test_bad_input_is_said_to_be_one():
    found = diagnose(Net(), torch.tensor([[1.0, float("inf")]]))
    assert found == "layer 'layers.0.0', whose input is not finite either"


def test_a_gradient_that_overflows_is_named_by_where_it_arrives():
    net = Net()
    net.layers[1][0].register_full_backward_hook(lambda m, into, out: (into[0] * float("inf"),))
    for p in net.parameters():
        nn.init.constant_(p, 0.5)
    assert diagnose(net) == "the gradient that reaches the output of layer 'layers.0.1'"


def test_a_loss_made_of_finite_layers():
    assert diagnose(Net(), objective=lambda m, part: Contribution(m(part.x) * float("nan"))) == \
        "the loss, computed from finite layers"


def test_what_cannot_be_found_again_is_said():
    assert diagnose(Net()).startswith("nothing: the same batch is finite")


def test_hooks_are_gone_afterwards():
    net = Net()
    diagnose(net)
    assert all(not module._forward_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_guard_counts_steps_in_a_row():
    guard = BadStepGuard(2)
    assert [guard.count_step(good) for good in (False, True, False, False)] == [False, False, False, True]


@pytest.mark.parametrize("limit", [1, 3])
def test_limit(limit):
    guard = BadStepGuard(limit)
    assert [guard.count_step(False) for _ in range(limit)] == [False] * (limit - 1) + [True]
