"""The tiny systems train with every Triton backend there is as they do with torch. Two layers, a few tokens."""

import pytest

pytest.importorskip("hydra", reason="a run is composed by hydra, which a machine with the kernels alone need not have")
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm_kernels import registry
from tests.support import tiny_run

SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.feed_forward.num_experts=4",
         "model.feed_forward.moe_intermediate_size=16"]
SYSTEMS = {
    # KDA, then MLA by the override of its last layer; dense, then experts
    "kimi_linear_tiny": ["model.mixers.kda.num_heads=2", "model.mixers.full.num_heads=2"],
    "minimax_01_tiny": ["model.schedule.ratio=1", "model.mixers.lightning.num_heads=2", "model.mixers.full.num_heads=2",
                        "model.mixers.full.num_kv_heads=1"],
    "qwen3_next_tiny": ["model.schedule.ratio=1", "model.mixers.gdn.num_heads=1", "model.mixers.gdn.num_value_heads=2",
                        "model.mixers.full.num_heads=2", "model.mixers.full.num_kv_heads=1"],
    "deepseek_v32_tiny": ["model.mixers.dsa.num_heads=2", "model.mixers.dsa.indexer.topk=4",
                          "model.mixers.dsa.indexer.num_heads=2", "model.feed_forward.num_groups=2",
                          "model.feed_forward.topk_groups=1"],
}


TOKENS = {"deepseek_v32_tiny": 6}  # sparse attention runs one program per query


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_run.config(folder)
    return folder


def losses(system, text, folder, backends):
    config = load_config("train", [
        f"model={system}", *SMALL, *SYSTEMS[system], f"run_dir={folder}", f"data.path={text}/text.py",
        f"data.cache_dir={text}/cache", "data.validation_fraction=0.1", "training.steps=2", "training.batch_size=1",
        f"training.sequence_length={TOKENS.get(system, 20)}", "training.eval_batches=1", "training.log_every=1",
        "training.precision=fp32", "model.z_loss=1e-4",
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
