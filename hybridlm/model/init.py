"""Fresh weights, the same for the same parameter whatever stands around it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from hybridlm.model.feed_forward.contract import FeedForward
from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.norm import RMSNorm


def init_weights(model: nn.Module, std: float, seed: int, device: torch.device | str | None = None,
                 done: Callable[[nn.Module], None] | None = None) -> None:
    """Initialise every parameter and buffer of `model`, also after `to_empty`.

    Each mixer, feed-forward, embedding and plain projection draws from its own stream, seeded by (seed, its name):
    layer 5's feed-forward starts with the same values whatever mixers the schedule puts around it, so two schedules
    of a sweep differ in what is compared and in nothing else. The caller's random state is left as it was. The values
    belong to the kind of device: a CPU and a GPU draw different ones.

    `device` is where each of these parts is allocated, one after the other, for a model on "meta". `done` gets each as
    soon as its values are there, and may leave less of it in memory before the next one is allocated.
    """
    found = {p.device for p in model.parameters()} if device is None else {torch.device(device)}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in found if d.type == "cuda")), torch.no_grad():
        for name, part in _parts(model, ""):
            if device is not None:
                part.to_empty(device=device)
            torch.manual_seed(stream(seed, name))
            if isinstance(part, RMSNorm):
                part.reset_parameters()
            elif isinstance(part, SequenceMixer | FeedForward):
                part.init_weights(std)
            else:
                part.weight.normal_(std=std)  # type: ignore[operator]
            if done is not None:
                done(part)


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What is initialised by itself, by name."""
    if isinstance(module, RMSNorm | SequenceMixer | FeedForward | nn.Linear | nn.Embedding):
        yield name, module
    elif not (children := list(module.named_children())):
        if next(module.parameters(), None) is not None:
            raise TypeError(f"{name}: no initialisation is known for {type(module).__name__}")
    else:
        for child_name, child in children:
            yield from _parts(child, f"{name}.{child_name}" if name else child_name)


def stream(seed: int, name: str) -> int:
    """A 63-bit seed for the stream of `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
