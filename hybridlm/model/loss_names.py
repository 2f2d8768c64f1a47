"""Names of the losses that a model may have, from the model itself and from every registered kind of layer."""

from __future__ import annotations

from collections.abc import Mapping

from hybridlm.kind_registry import KindRegistry
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward import FEED_FORWARDS
from hybridlm.model.mixers import MIXERS

# Cross-entropy of the next token, of the tokens after it (multi-token prediction), and the mean of logsumexp^2.
MODEL_LOSSES = ("lm", "mtp", "z")
# Those that compare with a teacher: outputs of converted layers, the stream after each layer, next-token distributions.
TEACHER_LOSSES = ("layer_output", "hidden", "teacher_kl")


def trains_next_token(weights: Mapping[str, float], z_loss: float) -> bool:
    """Whether training with these weights of losses asks for the logits of the next token.

    Args:
        weights: those of a stage, by name.
        z_loss: the model's own weight of the mean of logsumexp^2.

    >>> trains_next_token({}, 0.0), trains_next_token({"lm": 0}, 0.0), trains_next_token({"lm": 0}, 1e-4)
    (True, False, True)
    """
    return weights.get("lm", 1.0) != 0 or weights.get("z", z_loss) != 0


def mixer_losses() -> tuple[str, ...]:
    """Names of the losses that mixers of any registered kind may have, without repetitions."""
    return _declared(MIXERS)


def model_losses(model: ModelConfig) -> tuple[str, ...]:
    """Names of the losses that training of a model with this config may have, those with a teacher left out.

    Example:
        >>> from hybridlm import load_config
        >>> model_losses(load_config("kda_dsa_tiny").model)
        ('lm', 'z', 'indexer_kl', 'balance')
    """
    own = [name for name in MODEL_LOSSES if name != "mtp" or model.mtp.depth]
    parts = (*(model.mixers[name].own_losses() for name in model.used_mixers()), model.feed_forward.own_losses())
    return tuple(dict.fromkeys([*own, *(name for names in parts for name in names)]))


def known_losses() -> tuple[str, ...]:
    """Names that `ModelOutput.losses` may have and `loss_weights` of a training stage may set.

    A mixer or feed-forward declares the losses of its layers in `loss_names` of its config class; kinds of a user's own
    count as soon as they are registered.

    Returns:
        The names without repetitions, the model's own first.

    Example:
        >>> [name for name in known_losses() if name in ("lm", "balance", "indexer_kl")]
        ['lm', 'indexer_kl', 'balance']
    """
    return tuple(dict.fromkeys([*MODEL_LOSSES, *_declared(MIXERS), *_declared(FEED_FORWARDS), *TEACHER_LOSSES]))


def _declared(registry: KindRegistry) -> tuple[str, ...]:
    """The `loss_names` of all kinds of a registry, without repetitions."""
    return tuple(dict.fromkeys(name for config, _ in registry.values()
                               for name in config.loss_names))  # type: ignore[attr-defined]
