import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hybridlm.config.schema import OptimizerConfig
from hybridlm.errors import CheckpointError
from hybridlm.tensor_storage import stored_tensors
from hybridlm.training.optimizer import Muon, build_optimizer, orthogonalise, plan_groups


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"f": nn.ModuleDict({
            "q_proj": nn.Linear(8, 16, bias=True), "norm": nn.RMSNorm(8),
            "router": nn.Linear(8, 4, bias=False)})})])
        self.layers[0]["f"].q_conv = nn.Parameter(torch.randn(16, 4))
        self.layers[0]["f"].A_log = nn.Parameter(torch.randn(2, 2))
        self.layers[0]["f"].gate = nn.Parameter(torch.randn(1, 8))
        self.layers[0]["f"].gate_up = nn.Parameter(torch.randn(4, 6, 8))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def fp32_parameter_names(self):
        return ["layers.0.f.router.weight", "layers.0.f.A_log"]


def stored(state, folder):
    """The state as a checkpoint has it."""
    save_file(dict(state), folder / "optimizer.safetensors")
    return stored_tensors(folder, "optimizer")


def by_group(kind):
    model = Toy()
    return {(g.rule, g.decay): {n.replace("layers.0.f.", "") for n in g.names}
            for g in plan_groups(model.named_parameters(), kind, model.fp32_parameter_names())}


def test_adamw_decays_matrices_alone():
    groups = by_group("adamw")
    assert groups == {
        ("adamw", True): {"q_proj.weight", "router.weight", "gate_up", "lm_head.weight"},
        ("adamw", False): {"embed.weight", "q_proj.bias", "norm.weight", "q_conv", "A_log", "gate"}}


def test_muon_takes_hidden_matrices_and_expert_stacks():
    groups = by_group("muon")
    assert groups[("muon", True)] == {"q_proj.weight", "gate_up"}
    assert groups[("adamw", True)] == {"router.weight", "lm_head.weight"}
    assert "embed.weight" in groups[("adamw", False)]


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


def trained(optimizers, model, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_by_name_restores_bitwise(kind, tmp_path):
    first = Toy()
    one = build_optimizer(first, OptimizerConfig(kind=kind))
    trained(one, first, 3, seed=1)
    second = Toy()
    second.load_state_dict(first.state_dict())
    two = build_optimizer(second, OptimizerConfig(kind=kind))
    saved = {name: tensor.clone() for name, tensor in one.state_tensors().items()}
    assert any(name.endswith("/embed.weight") for name in saved)
    two.load_state_tensors(stored(saved, tmp_path))
    trained(one, first, 2, seed=2)
    trained(two, second, 2, seed=2)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_state_of_untrained_parameters_is_refused_unless_a_stage_hands_over(tmp_path):
    model = Toy()
    full = build_optimizer(model, OptimizerConfig())
    trained(full, model, 1, seed=0)
    state = full.state_tensors()
    model.embed.weight.requires_grad_(False)
    part = build_optimizer(model, OptimizerConfig())
    with pytest.raises(CheckpointError, match=r"embed\.weight"):
        part.load_state_tensors(stored(state, tmp_path))
    part.load_state_tensors(stored(state, tmp_path), strict=False)
    assert len(part.state_tensors()) == len(state) - 3


def test_state_of_another_rule_or_shape_is_refused(tmp_path):
    model = Toy()
    adam = build_optimizer(model, OptimizerConfig())
    trained(adam, model, 1, seed=0)
    muon = build_optimizer(model, OptimizerConfig(kind="muon"))
    with pytest.raises(CheckpointError, match="another update rule"):
        muon.load_state_tensors(stored(adam.state_tensors(), tmp_path))
    state = dict(adam.state_tensors())
    state["exp_avg/embed.weight"] = torch.zeros(3, 8)
    with pytest.raises(CheckpointError, match=r"shape \[3, 8\]"):
        adam.load_state_tensors(stored(state, tmp_path))


def test_learning_rates_keep_their_ratio():
    model = Toy()
    optimizers = build_optimizer(model, OptimizerConfig(kind="muon", lr=1e-3, muon_lr=1e-2), lr=2e-3)
    optimizers.set_lr(1e-3)
    rates = {type(m).__name__: m.param_groups[0]["lr"] for m in optimizers.members}
    assert rates == pytest.approx({"AdamW": 1e-3, "Muon": 1e-2})
