import pytest
import torch
from torch import nn

from hybridlm.distributed.engine import Contribution, check_fp32, pick_precision
from hybridlm.distributed.engines.single import SingleConfig, SingleEngine
from hybridlm.errors import ConfigError
from hybridlm.model.model import build_model
from hybridlm.optimizers import AdamWConfig, build_optimizer
from hybridlm.optimizers.roles import fp32_names
from tests.support import tiny_run


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.steps = []

    def forward(self, x):
        return (self.w * x).sum()

    def post_optimizer_step(self, update):
        self.steps.append(update)


class Move:
    def __init__(self, x):
        self.x = x

    def to(self, device, non_blocking=False):
        return self


def objective(model, part):
    return Contribution(model(part.x))


@pytest.fixture
def ready():
    model = Linear()
    engine = SingleEngine(SingleConfig(device="cpu"))
    engine.prepare(model, build_optimizer(model, AdamWConfig(lr=0.1)))
    return engine, model


def step(engine, x, clip=0.0):
    return engine.update(engine.compute_gradients(objective, [Move(torch.tensor(x))]), lr=0.1, clip=clip)


def test_norm_and_clip(ready):
    engine, model = ready
    seen = {}
    engine.optimizers.members[0].optimizer.register_step_pre_hook(
        lambda *_: seen.update(grad=model.w.grad.clone()))
    update = step(engine, [6.0, 8.0], clip=1.0)
    assert update.grad_norm == pytest.approx(10)
    assert seen["grad"].tolist() == pytest.approx([0.6, 0.8])
    assert model.w.grad is None
    assert model.steps == [True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(ready, bad):
    engine, model = ready
    step(engine, [1.0, 1.0])
    weight = model.w.detach().clone()
    state = {name: t.clone() for name, t in engine.optimizers.state_tensors().items()}
    update = step(engine, [bad, 1.0])
    assert not update.applied
    assert torch.equal(model.w, weight)
    assert all(torch.equal(t, state[name]) for name, t in engine.optimizers.state_tensors().items())
    assert model.w.grad is None
    assert model.steps == [True, False]
    assert step(engine, [1.0, 1.0]).applied


def test_fp32_parameters_are_checked_by_name():
    model = build_model(tiny_run.model(), seed=0)
    names = fp32_names(model)
    assert any(name.endswith("router.weight") for name in names)
    engine = SingleEngine(SingleConfig(device="cpu"))
    engine.prepare(model, build_optimizer(model, AdamWConfig()), names)
    model.layers[1].feed_forward.router.bfloat16()
    with pytest.raises(RuntimeError, match=r"layers\.1\.feed_forward\.router\.(weight|bias).*must stay float32"):
        check_fp32(model, sorted(names))


def test_bf16_is_autocast_over_fp32_weights_and_release_takes_it_off():
    model = build_model(tiny_run.model(), seed=0)
    engine = SingleEngine(SingleConfig(device="cpu"), "bf16")
    engine.prepare(model, build_optimizer(model, AdamWConfig()), fp32_names(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(16).view(1, 16)
    dtypes = []
    handle = model.layers[1].mixer.q_proj.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    loss = engine.wrapped(ids, labels=ids).loss.detach()
    handle.remove()
    assert dtypes == [torch.bfloat16]
    assert loss.dtype == torch.float32
    engine.release()
    exact = model(ids, labels=ids).loss.detach()
    assert float(loss) != float(exact)
    assert float(loss) == pytest.approx(float(exact), rel=0.02)


def test_asking_for_a_missing_gpu_or_knowing_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.device.*no GPU"):
        SingleEngine(SingleConfig(device="cuda"))
    assert pick_precision("auto", torch.device("cpu")) == "fp32"
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"


def test_random_numbers_of_a_step_are_a_function_of_seed_and_step(ready):
    engine, _ = ready
    draws = {}
    for key in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        engine.begin_step(*key)
        draws.setdefault(key, []).append(torch.rand(3).tolist())
    assert draws[0, 1][0] == draws[0, 1][1]
    assert len({tuple(d[0]) for d in draws.values()}) == 3
