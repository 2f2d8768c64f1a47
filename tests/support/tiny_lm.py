"""Small language models for the tests of the model around the mixers."""

from hybridlm.model.config import ModelConfig, MTPConfig, ScheduleConfig
from hybridlm.model.feed_forward import DenseConfig, MoEConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig
from hybridlm.model.model import build_model

VOCABULARY = 61
BORDERS = [0, 5, 6, 20, 29, 40]  # documents of 2 rows of 20 tokens


def dense(**options):
    return DenseConfig(**{"intermediate_size": 40, **options})


def moe(**options):
    return MoEConfig(**{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                        "num_shared_experts": 1, "dense_layers": [0], "intermediate_size": 40, "router": "sigmoid",
                        "num_groups": 4, "topk_groups": 2, "bias_update_rate": 0.01, "balance_loss": 0.01,
                        **options})


def config(**options):
    """Two linear layers and a full one; dense unless told otherwise."""
    mixers = {
        "linear": DeltaRuleConfig(num_heads=2, head_dim=16),
        "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    }
    defaults = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 3, "max_position": 64,
                "schedule": ScheduleConfig(linear="linear", full="full", ratio=2), "mixers": mixers,
                "feed_forward": dense(), "init_std": 0.1}
    return ModelConfig(**{**defaults, **options})


def model(seed=0, **options):
    return build_model(config(**options), seed=seed)


def with_mtp(depth=2, **options):
    return model(mtp=MTPConfig(depth=depth), **options)
