"""Fresh weights, the same for the same parameter whatever stands around it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from hybridlm.model.feed_forward.base import FeedForward
from hybridlm.model.mixers.base import SequenceMixer
from hybridlm.model.norm import RMSNorm


def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Initialise every parameter and buffer of `model`, also after `to_empty`.

    Each mixer, feed-forward, embedding and plain projection draws from its own stream, seeded by (seed, its name):
    layer 5's feed-forward starts with the same values whatever mixers the schedule puts around it, so two schedules
    of a sweep differ in what is compared and in nothing else. The caller's random state is left as it was. The values
    belong to the kind of device: a CPU and a GPU draw different ones.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)), torch.no_grad():
        _init(model, "", std, seed)


def _init(module: nn.Module, name: str, std: float, seed: int) -> None:
    if isinstance(module, RMSNorm):
        module.reset_parameters()
    elif isinstance(module, SequenceMixer | FeedForward):
        torch.manual_seed(stream(seed, name))
        module.init_weights(std)
    elif isinstance(module, nn.Linear | nn.Embedding):
        torch.manual_seed(stream(seed, name))
        module.weight.normal_(std=std)
    elif not (children := list(module.named_children())):
        if next(module.parameters(), None) is not None:
            raise TypeError(f"{name}: no initialisation is known for {type(module).__name__}")
    else:
        for child_name, child in children:
            _init(child, f"{name}.{child_name}" if name else child_name, std, seed)


def stream(seed: int, name: str) -> int:
    """A 63-bit seed for the stream of `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
