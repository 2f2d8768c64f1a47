"""Comparison of our mixers with layers of transformers: sizes, weights under our names, inputs and masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers import build_mixer
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.sequence import SequenceInfo

BATCH, LENGTH, HIDDEN = 2, 70, 64
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def ours(config: MixerConfig, weights: dict[str, Tensor], x: Tensor, *, eps: float = 1e-5, zero_centered: bool = False,
         layer_index: int = 1, num_layers: int = 4) -> Tensor:
    """Output of our mixer with exactly these weights."""
    mixer = build_mixer(config, context(eps, zero_centered, layer_index, num_layers))
    mixer.load_state_dict(weights)
    return mixer(x, SequenceInfo.make(*x.shape[:2], x.device))[0]


def context(eps: float = 1e-5, zero_centered: bool = False, layer_index: int = 1, num_layers: int = 4) -> LayerContext:
    return LayerContext(hidden_size=HIDDEN, layer_index=layer_index, num_layers=num_layers, max_position=4096,
                        norm=NormConfig(eps=eps, zero_centered=zero_centered))


def random_weights(layer: nn.Module, seed: int = 0) -> None:
    """Every parameter away from its neutral value, projections large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or parameter.dim() == 1:
            parameter.data = (0.0 if "A_log" in name or "bias" in name else 1.0) + 0.2 * noise
        else:
            parameter.data = noise * (0.5 if "conv" in name else parameter.shape[-1] ** -0.5)


def renamed(layer: nn.Module, names: dict[str, str], drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The layer's weights under our names."""
    result = {}
    for name, value in layer.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if not name.startswith(drop or ("-",)):
            result[name] = value
    return result


def causal_mask(length: int = LENGTH, window: int | None = None) -> Tensor:
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    keep = keep if window is None else keep.triu(1 - window)
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(BATCH, 1, length, length).masked_fill(~keep, hidden)


def positions(length: int = LENGTH) -> Tensor:
    return torch.arange(length)[None].expand(BATCH, -1)


def token_inputs() -> Tensor:
    """The same normal inputs [BATCH, LENGTH, HIDDEN] for both sides."""
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3))
