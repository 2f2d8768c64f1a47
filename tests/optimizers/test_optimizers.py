"""Optimizers by kind: what each updates, remembers and refuses; their steps against torch's; state by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hybridlm.config.serialization import from_dict
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.model.model import build_model
from hybridlm.model.parameter_roles import CONVOLUTION, VECTOR, ParameterRole, find_roles
from hybridlm.optimizers import (
    OPTIMIZERS,
    AdafactorConfig,
    AdamWConfig,
    MuonConfig,
    OptimizerConfig,
    PerMatrixOptimizer,
    build_optimizer,
)
from hybridlm.optimizers.memory import optimizer_state_bytes, state_bytes
from hybridlm.optimizers.muon import Muon, orthogonalise
from hybridlm.optimizers.optimizer_set import plan_groups
from hybridlm.tensor_storage import stored_tensors
from hybridlm.training import train
from tests.support import tiny_run

KINDS = sorted(OPTIMIZERS)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 16)
        self.norm = nn.RMSNorm(8)
        self.router = nn.Linear(8, 4, bias=False)
        self.gate = nn.Linear(8, 1, bias=False)
        self.q_conv = nn.Parameter(torch.randn(16, 4))
        self.A_log = nn.Parameter(torch.randn(2, 2))
        self.gate_up = nn.Parameter(torch.randn(4, 6, 8))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def parameter_roles(self):
        return find_roles(self, {"q_conv": CONVOLUTION, "A_log": VECTOR, "gate_up": ParameterRole("expert_stack"),
                                 "router.weight": ParameterRole("router"),
                                 "lm_head.weight": ParameterRole("output_head")})

    def fp32_parameter_names(self):
        return ["router.weight", "A_log"]


def make(kind, **options):
    return from_dict(OptimizerConfig, {"kind": kind, **options})


def stored(state, folder):
    """The state as a checkpoint has it."""
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "optimizer.safetensors")
    return stored_tensors(folder, "optimizer")


def trained(optimizers, model, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers.step()


VECTORS = {"q_proj.bias", "norm.weight", "q_conv", "A_log", "gate.weight"}


@pytest.mark.parametrize(("kind", "groups"), [
    ("adamw", {("adamw", False): {"embed.weight"} | VECTORS,
               ("adamw", True): {"q_proj.weight", "router.weight", "gate_up", "lm_head.weight"}}),
    ("lion", {("lion", False): {"embed.weight"} | VECTORS,
              ("lion", True): {"q_proj.weight", "router.weight", "gate_up", "lm_head.weight"}}),
    ("muon", {("adamw", False): {"embed.weight"} | VECTORS, ("adamw", True): {"router.weight", "lm_head.weight"},
              ("muon", True): {"q_proj.weight", "gate_up"}}),
    ("adafactor", {("adamw", False): VECTORS, ("adafactor", False): {"embed.weight"},
                   ("adafactor", True): {"q_proj.weight", "router.weight", "gate_up", "lm_head.weight"}}),
])
def test_a_kind_takes_parameters_by_role_and_decays_matrices_alone(kind, groups):
    found = plan_groups(Toy(), make(kind))
    assert [(group.rule.kind, group.decay) for group in found] == list(groups)
    assert {(group.rule.kind, group.decay): set(group.names) for group in found} == groups


def test_options_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match=r"muon_lr: unknown key; it is an option of kind 'muon'"):
        make("adamw", muon_lr=1.0)
    with pytest.raises(ConfigError, match=r"kind: unknown kind; got 'sgd'; expected one of ada.*lion, muon"):
        make("sgd")
    with pytest.raises(ConfigError, match="min_weight_rms: must be positive"):
        make("adafactor", min_weight_rms=0.0)
    with pytest.raises(ConfigError, match="decay_exponent: must be below 0"):
        make("adafactor", decay_exponent=0.5)
    with pytest.raises(ConfigError, match="betas: must be a decay rate"):
        make("lion", betas=[0.9, 1.0])


@pytest.mark.parametrize("shape", [(3, 8, 32), (3, 32, 8)])
def test_muon_equals_torch_muon_on_each_matrix(shape):
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(shape))
    alone = [nn.Parameter(stack[i].detach().clone()) for i in range(shape[0])]
    ours = Muon([{"params": [stack]}], lr=0.02, momentum=0.95, weight_decay=0.1)
    theirs = torch.optim.Muon(alone, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        start = stack.detach().clone()
        stack.grad = torch.randn(shape)
        for i, matrix in enumerate(alone):
            matrix.grad = stack.grad[i].clone()
        ours.step()
        theirs.step()
        expected = torch.stack([m.detach() for m in alone])
        # both iterate in bf16: equal up to a few of its roundings, measured against the size of the update
        assert (stack.detach() - expected).abs().max() <= 0.02 * (expected - start).abs().max()


def test_orthogonalise_gives_singular_values_near_one():
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(2, 16, 24)).float())
    assert singular.min() > 0.3
    assert singular.max() < 1.4


def test_matrices_of_a_stack_are_stepped_as_parameters_of_their_own():
    torch.manual_seed(0)
    stack, single = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(5, 4))
    alone = [nn.Parameter(m.detach().clone()) for m in (*stack, single)]
    ours = PerMatrixOptimizer(torch.optim.Adafactor, [{"params": [stack, single]}], lr=0.02, d=1.5)
    theirs = torch.optim.Adafactor(alone, lr=0.02, d=1.5)
    for _ in range(3):
        stack.grad, single.grad = torch.randn(3, 8, 6), torch.randn(5, 4)
        for parameter, grad in zip(alone, (*stack.grad, single.grad), strict=True):
            parameter.grad = grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(stack, torch.stack(alone[:3]))
    assert torch.equal(single, alone[3])


@pytest.mark.parametrize("kind", KINDS)
def test_state_by_name_restores_bitwise(kind, tmp_path):
    first = Toy()
    one = build_optimizer(first, make(kind))
    trained(one, first, 3, seed=1)
    second = Toy()
    second.load_state_dict(first.state_dict())
    two = build_optimizer(second, make(kind))
    assert any(name.endswith("/embed.weight") for name in one.state_tensors())
    two.load_state_tensors(stored(one.state_tensors(), tmp_path))
    trained(one, first, 2, seed=2)
    trained(two, second, 2, seed=2)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_what_the_config_says(kind):
    config = make(kind)
    model = build_model(tiny_run.model())
    optimizers = build_optimizer(model, config)
    trained(optimizers, model, 1, seed=0)
    state = optimizers.state_tensors()
    measured = sum(4 * tensor.numel() for tensor in state.values() if tensor.dim())
    assert measured == state_bytes(model, config) == optimizer_state_bytes(model.config, config)
    for group in plan_groups(model, config):
        for name in group.names:
            wanted = group.rule.state_shapes(model.get_parameter(name).shape)
            assert {key: state[f"{key}/{name}"].shape for key in wanted} == wanted


def test_state_of_untrained_parameters_is_refused_unless_a_stage_hands_over(tmp_path):
    model = Toy()
    full = build_optimizer(model, AdamWConfig())
    trained(full, model, 1, seed=0)
    saved = stored(full.state_tensors(), tmp_path)
    model.embed.weight.requires_grad_(False)
    frozen = build_optimizer(model, AdamWConfig())
    with pytest.raises(CheckpointError, match=r"embed\.weight"):
        frozen.load_state_tensors(saved)
    frozen.load_state_tensors(saved, strict=False)
    assert len(frozen.state_tensors()) == len(saved) - 3


def test_state_of_another_rule_or_shape_is_refused(tmp_path):
    model = Toy()
    adam = build_optimizer(model, AdamWConfig())
    trained(adam, model, 1, seed=0)
    for kind in ("muon", "lion", "adafactor"):
        with pytest.raises(CheckpointError, match="another update rule"):
            build_optimizer(model, make(kind)).load_state_tensors(stored(adam.state_tensors(), tmp_path))
    state = adam.state_tensors()
    state["exp_avg/embed.weight"] = torch.zeros(3, 8)
    with pytest.raises(CheckpointError, match=r"shape \[3, 8\]"):
        adam.load_state_tensors(stored(state, tmp_path))


@pytest.mark.parametrize(("config", "rates"), [
    (MuonConfig(lr=1e-3, muon_lr=1e-2), {"adamw": 1e-3, "muon": 1e-2}),
    (AdafactorConfig(lr=1e-2, adamw_lr=1e-3), {"adamw": 1e-4, "adafactor": 1e-3})])
def test_learning_rates_keep_their_ratio(config, rates):
    optimizers = build_optimizer(Toy(), config, lr=2e-3)
    optimizers.set_lr(1e-3)
    assert {m.param_groups[0]["rule"]: m.param_groups[0]["lr"] for m in optimizers.members} == pytest.approx(rates)


@pytest.fixture
def own_kind():
    """The optimizer that docs/training.md writes."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    example = page.split("### An optimizer of your own")[1].split("```python\n")[1].split("```")[0]
    names = {"__name__": "my_optimizer"}
    exec(example, names)
    yield "sgd"
    del OPTIMIZERS["sgd"]


def test_an_optimizer_of_ones_own_trains_and_goes_on(own_kind, tmp_path):
    schedule = {"kind": "constant", "warmup": 0}  # a longer run has the same rates
    options = {"optimizer": {"kind": own_kind, "momentum": 0.8, "schedule": schedule}, "eval_every": 0}
    train(tiny_run.config(tmp_path / "whole", steps=4, **options))
    for steps in (3, 4):
        train(tiny_run.config(tmp_path / "resumed", steps=steps, **options))
    losses = tiny_run.losses(tmp_path / "whole/run")
    assert tiny_run.losses(tmp_path / "resumed/run")[4][:3] == losses[4][:3]
    assert losses[1] != losses[4]
    config = make(own_kind)
    assert optimizer_state_bytes(tiny_run.model(), config) == 4 * build_model(tiny_run.model()).num_params()
