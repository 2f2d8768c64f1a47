"""One layer: a mixer branch, then a feed-forward branch. B rows, T tokens, D model width.

`Branch` is the only place that knows the residual stream: a mixer or a feed-forward sees its own input alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward import FeedForward, build_feed_forward
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.contract import Aux, SequenceMixer, build_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.config import ResidualConfig
from hybridlm.model.sequence import SequenceInfo


class Branch(nn.Module):
    """f with its norm, joined to the residual stream h in one of the forms of `ResidualConfig`."""

    def __init__(self, f: SequenceMixer | FeedForward, residual: ResidualConfig, context: LayerContext):
        super().__init__()
        self.form, self.alpha, self.beta = residual.form, residual.alpha, residual.beta
        self.norm = RMSNorm.of(context.norm, context.hidden_size)
        self.f = f

    def forward(self, h_BTD: Tensor, seq: SequenceInfo, *state: Any) -> tuple[Tensor, Aux]:
        """`state`: the decode state of a mixer; nothing for a feed-forward."""
        if self.form == "post":
            y_BTD, aux = self.f(h_BTD, seq, *state)
            return self._join(h_BTD, self.norm(y_BTD)), aux
        x_BTD = self.norm(h_BTD)
        y_BTD, aux = self.f(x_BTD, seq, *state)
        return self._join(x_BTD if self.form == "normed" else h_BTD, y_BTD), aux

    def _join(self, h_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        h_BTD = h_BTD if self.alpha == 1.0 else self.alpha * h_BTD
        return h_BTD + (y_BTD if self.beta == 1.0 else self.beta * y_BTD)

    def init_weights(self, std: float) -> None:
        self.norm.reset_parameters()
        self.f.init_weights(std)

    def extra_repr(self) -> str:
        return f"{self.form}, alpha={self.alpha}, beta={self.beta}"


class Block(nn.Module):
    """Mixer `mixer_name` of the config, then the feed-forward of layer `layer_index`."""

    def __init__(self, config: ModelConfig, mixer_name: str, layer_index: int):
        super().__init__()
        context = config.layer_context(layer_index)
        mixer = config.mixers[mixer_name]
        self.mixer_name = mixer_name
        self.mixer = Branch(build_mixer(mixer, context), mixer.residual, context)
        self.feed_forward = Branch(build_feed_forward(config.feed_forward, context),
                                   config.feed_forward.residual or mixer.residual, context)

    def forward(self, h_BTD: Tensor, seq: SequenceInfo, state: Any | None = None) -> tuple[Tensor, dict[str, Aux]]:
        """The residual stream after this layer, and the aux of both branches by name."""
        h_BTD, mixer_aux = self.mixer(h_BTD, seq, state)
        h_BTD, feed_forward_aux = self.feed_forward(h_BTD, seq)
        return h_BTD, {"mixer": mixer_aux, "feed_forward": feed_forward_aux}

    def record(self, aux: dict[str, Aux]) -> None:
        """Once for each training forward, whatever was computed again since."""
        if aux["feed_forward"]:
            self.feed_forward.f.record(aux["feed_forward"])  # type: ignore[operator]
