"""Sets new mixers in place of softmax attention so that each layer computes nearly what it did, on some text.

What attention leaves open is set from how it attends: decays from how far each head looks back, convolutions as the
identity, gates open (`SequenceMixer.calibrate`). What remains per head is a scale: least squares finds it, and it is
multiplied into the columns of the output projection.

Source: after Taylor-Calibrate (2026); the least squares here are joint over the heads of a layer.

B rows, T tokens, N = B T tokens, D hidden size, H heads, V dims per head, X = H V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.model import HybridLM
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.stand_ins import block_of
from hybridlm_kernels import CuSeqlens

MIN_LOOK_BACK = 1.5  # tokens: shorter half-lives leave nothing of the state


@dataclass(frozen=True)
class MixerCall:
    """One call of a mixer in a forward: what it got and what it gave, [B, T, D] each."""

    input: Tensor
    output: Tensor
    seq: SequenceInfo


@dataclass(frozen=True)
class LayerFit:
    """The result of calibrating one layer.

    Args:
        layer: index of the layer.
        look_back: mean distance in tokens to the keys that each head reads; empty where that is unknown.
        error_before: |student - teacher|^2 / |teacher|^2 of the layer's output as it started.
        error: the same after calibration; a layer that gives nothing has 1.
    """

    layer: int
    look_back: list[float]
    error_before: float
    error: float


@contextmanager
def recorded_calls(model: HybridLM, layers: Sequence[int]) -> Iterator[dict[int, list[MixerCall]]]:
    """Record the calls of the mixers of some layers in the forwards made inside, by layer."""
    calls: dict[int, list[MixerCall]] = {layer: [] for layer in layers}
    hooks = []
    for layer in layers:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any, layer: int = layer) -> None:
            calls[layer].append(MixerCall(args[0].detach(), output[0].detach(), args[1]))

        hooks.append(mixer_of(model, layer).register_forward_hook(record))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def mixer_of(model: HybridLM, layer: int) -> SequenceMixer:
    """The mixer of a layer."""
    return block_of(model, layer).mixer


@torch.no_grad()
def calibrate(teacher: HybridLM, student: HybridLM, layers: Sequence[int],
              batches: Sequence[tuple[Tensor, CuSeqlens | None]]) -> list[LayerFit]:
    """Calibrate the mixers of some layers of a student to those of its teacher, in place.

    Args:
        teacher: the model with softmax attention in these layers.
        student: the same model with other mixers there, which have taken over the attention's weights.
        layers: their indices.
        batches: token ids, int64 [B, T], with the borders of documents (None: each row is one); a few are enough.

    Returns:
        What was found for each layer, in order.
    """
    with recorded_calls(teacher.eval(), layers) as calls:
        for ids, borders in batches:
            teacher(ids.to(teacher.device), cu_seqlens=borders, logits_to_keep=1)
    before = {layer: relative_error(mixer_of(student, layer), calls[layer]) for layer in sorted(layers)}
    fits = []
    for layer in sorted(layers):
        new, old = mixer_of(student, layer), mixer_of(teacher, layer)
        distances = [found for call in calls[layer] if (found := old.look_back(call.input, call.seq)) is not None]
        look_back: list[float] = []
        if distances:
            mean_H = torch.stack(distances).mean(0)
            look_back = mean_H.tolist()
            new.calibrate(mean_H.clamp(min=MIN_LOOK_BACK))
        fit_head_scales(new, calls[layer])
        fits.append(LayerFit(layer, look_back, before[layer], relative_error(new, calls[layer])))
    return fits


@torch.no_grad()
def fit_head_scales(mixer: SequenceMixer, calls: Sequence[MixerCall]) -> Tensor | None:
    """Scale each head's columns of the output projection so that the output is nearest to what it should be.

    It minimises |sum over heads of c_h W_h u_h - y|^2 over c, where u_h is what reaches the projection from head h.

    Args:
        mixer: the mixer, whose output projection is changed.
        calls: inputs, and the outputs y it should give.

    Returns:
        The scales c [H] in fp64; None where the mixer has no such projection.
    """
    found = mixer.output_projection()
    if found is None:
        return None
    projection, heads = found
    gram_HH = torch.zeros(heads, heads, dtype=torch.float64)
    moment_H = torch.zeros(heads, dtype=torch.float64)
    weight_DX = projection.weight.double()
    weight_XX = weight_DX.mT @ weight_DX
    for call in calls:
        u_NX = _inputs_of(projection, mixer, call).flatten(0, 1).double()
        both_XX = (u_NX.mT @ u_NX) * weight_XX  # its sum over the dims of two heads is the product of their outputs
        gram_HH += both_XX.unflatten(1, (heads, -1)).unflatten(0, (heads, -1)).sum((1, 3)).cpu()
        moment_X = ((call.output.flatten(0, 1).double() @ weight_DX) * u_NX).sum(0)
        moment_H += moment_X.unflatten(0, (heads, -1)).sum(1).cpu()
    scale_H = torch.linalg.pinv(gram_HH, hermitian=True) @ moment_H
    if not scale_H.isfinite().all():
        return None
    scale_X = scale_H.to(weight_DX.device).repeat_interleave(weight_DX.shape[1] // heads)
    projection.weight.copy_(weight_DX * scale_X)
    return scale_H


def relative_error(mixer: SequenceMixer, calls: Sequence[MixerCall]) -> float:
    """|mixer(x) - y|^2 / |y|^2 over the calls: 0 is equal, and an output of zero has 1."""
    with torch.no_grad():
        wrong = sum(float((mixer(call.input, call.seq)[0].double() - call.output.double()).square().sum())
                    for call in calls)
    return wrong / max(sum(float(call.output.double().square().sum()) for call in calls), 1e-300)


def _inputs_of(projection: nn.Linear, mixer: SequenceMixer, call: MixerCall) -> Tensor:
    """Compute the input of the projection in a call of the mixer, [B, T, H V]."""
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        mixer(call.input, call.seq)
    finally:
        hook.remove()
    return seen[0]
