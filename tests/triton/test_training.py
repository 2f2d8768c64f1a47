"""The tiny systems train with every Triton backend there is as they do with torch. Two layers, 32 tokens."""


import pytest

pytest.importorskip("hydra", reason="a run is composed by hydra, which a machine with the kernels alone need not have")
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm_kernels import registry
from tests.support import tiny_run

SYSTEMS = {
    "kimi_linear_tiny": [],  # KDA, then MLA by the override of its last layer; dense, then experts
    "minimax_01_tiny": ["model.schedule.ratio=1"],
    "qwen3_next_tiny": ["model.schedule.ratio=1"],
    "hybrid_tiny": ["model.schedule.ratio=1"],
    "deepseek_v32_tiny": ["model.mixers.dsa.indexer.topk=16", "model.mixers.dsa.indexer.num_heads=4"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_run.config(folder)
    return folder


def losses(system, text, folder, backends):
    config = load_config("train", [
        f"model={system}", "model.num_layers=2", *SYSTEMS[system], f"run_dir={folder}", f"data.path={text}/text.py",
        f"data.cache_dir={text}/cache", "data.validation_fraction=0.1", "training.steps=2", "training.batch_size=1",
        "training.sequence_length=32", "training.eval_batches=1", "training.log_every=1", "training.precision=fp32",
        "model.z_loss=1e-4",
        *(f"+kernels.{name}={backend}" for name, backend in backends.items())])
    train(config)
    return [row[key] for row in tiny_run.records(folder) for key in ("loss", "total_loss", "grad_norm")]


@pytest.mark.parametrize("system", SYSTEMS)
def test_same_losses_as_torch(system, text, tmp_path):
    has = {op.name: [b.name for b in op.backends] for op in registry.operations()}
    plain = losses(system, text, tmp_path / "torch", {name: "torch" for name in has if "torch" in has[name]})
    fast = losses(system, text, tmp_path / "triton", {name: "triton" for name in has if "triton" in has[name]})
    assert len(plain) == 6
    assert fast == pytest.approx(plain, rel=1e-5)
