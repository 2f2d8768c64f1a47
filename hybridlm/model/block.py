"""One layer: a mixer, then a feed-forward, or one of them alone, each joined to the model's residual stream.

Parameters: `mixer_norm`, `mixer`, `feed_forward_norm`, `feed_forward`, then those of the residual, if it has any, and
`mixer_projection` or `feed_forward_projection` where a branch has one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.model.config import ModelConfig
from hybridlm.model.decode_state import LayerState
from hybridlm.model.feed_forward import build_feed_forward
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.contract import Aux, SequenceMixer, build_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual import BRANCH_NAMES, BranchName, build_branch_norm, build_residual_branch
from hybridlm.model.residual.contract import Stream
from hybridlm.model.run_adapters import PerRunLinear, add_run_adapters
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import LAYER_INPUT

COMPILER = "inductor"  # backend of torch.compile


# Stands for the mixer of a layer where no state is decoded: from (mixer, x [B, T, D], seq) to what a mixer gives.
MixerStandIn = Callable[[SequenceMixer, Tensor, SequenceInfo], tuple[Tensor, Aux]]


class Block(nn.Module):
    """One layer of the model: a mixer and a feed-forward, each with its norm, joined to the residual stream.

    A layer that has one of the two alone has no norm and no residual for the other.

    Args:
        config: the config of the model.
        mixer_name: key of `config.mixers`.
        layer_index: index of the layer, which decides its feed-forward.
        stream_context: what the residual is told: `layer_index` and `num_layers` count the layers of its stream; None:
            what the mixer is told.
        runs: how often the layer runs in one forward.

    Attributes:
        branches: which of the two the layer has, in their order.
        mixer_stand_in: what runs in place of the mixer in forwards without a decode state; None: the mixer itself. It
            has no part in the model's parameters.
    """

    def __init__(self, config: ModelConfig, mixer_name: str, layer_index: int,
                 stream_context: LayerContext | None = None, runs: int = 1):
        super().__init__()
        context = config.layer_context(layer_index)
        in_stream = stream_context or context
        mixer_branch, feed_forward_branch = config.branches(mixer_name)
        self.mixer_stand_in: MixerStandIn | None = None
        self._compiled: Callable[..., tuple[Stream, dict[str, Aux]]] | None = None
        self.mixer_name = mixer_name
        self.branches = config.present_branches(mixer_name)
        if "mixer" in self.branches:
            self.mixer_norm = (build_branch_norm(config.residual, in_stream) if context.mixer_input is None
                               else RMSNorm.of(config.norm, context.mixer_width))
        self.mixer = build_mixer(config.mixers[mixer_name], context)
        self.layer_index = layer_index
        self.input_is_read = context.is_read(LAYER_INPUT)
        if "feed_forward" in self.branches:
            self.feed_forward_norm = build_branch_norm(config.residual, in_stream)
        self.feed_forward = build_feed_forward(config.feed_forward_after(mixer_name), context)
        if "mixer" in self.branches:
            self.mixer_residual = build_residual_branch(config.residual, mixer_branch, in_stream, "mixer")
        if "feed_forward" in self.branches:
            self.feed_forward_residual = build_residual_branch(config.residual, feed_forward_branch, in_stream,
                                                               "feed_forward")
        self.reads_embedding = mixer_branch.embedding
        for name, branch in zip(BRANCH_NAMES, (mixer_branch, feed_forward_branch), strict=True):
            if name in self.branches and branch.project:
                width = config.hidden_size
                self.add_module(f"{name}_projection", nn.Linear(width, width, bias=False))
        self.used_adapters: list[str] = []
        if runs > 1 and config.schedule.run_adapters is not None:
            self.used_adapters = add_run_adapters(self, config.schedule.run_adapters, runs)
        self._per_run = tuple(module for module in self.modules() if isinstance(module, PerRunLinear))

    def compile_layer(self) -> None:
        """Run `forward` without a decode state as one graph of torch.compile from now on, in this object only.

        A copy is not compiled. Layers of one kind share their graph.
        """
        self._compiled = torch.compile(self._compute, backend=COMPILER)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None, "mixer_stand_in": None}  # they belong to this object

    def forward(self, stream: Stream, seq: SequenceInfo,
                state: LayerState | None = None, run: int = 0) -> tuple[Stream, dict[str, Aux]]:
        """Run the mixer, then the feed-forward.

        Args:
            stream: the stream before this layer, in the form of the model's residual.
            seq: positions and documents of the tokens.
            state: from `new_state`, updated in place; None when training.
            run: number of this run, where the layer runs several times in one forward.

        Returns:
            The stream after this layer, and the aux of the branches `mixer` and `feed_forward`.
        """
        for linear in self._per_run:
            linear.run = run
        compute = self._compute if self._compiled is None or state is not None else self._compiled
        return compute(stream, seq, state)

    def _compute(self, stream: Stream, seq: SequenceInfo,
                 state: LayerState | None = None) -> tuple[Stream, dict[str, Aux]]:
        aux: dict[str, Aux] = {name: {} for name in BRANCH_NAMES}
        for name in self.branches:
            run = self._run_mixer if name == "mixer" else self._run_feed_forward
            stream, aux[name] = run(stream, seq, state)
        return stream, aux

    def _run_mixer(self, stream: Stream, seq: SequenceInfo, state: LayerState | None) -> tuple[Stream, Aux]:
        norm: Any = self.mixer_norm
        if self.reads_embedding:
            assert seq.embedding_BTD is not None
            norm = partial(self._norm_with_embedding, seq.embedding_BTD)
        x_BTD, kept = self.mixer_residual.read(stream, norm)
        if self.input_is_read:
            seq.leave(LAYER_INPUT, self.layer_index, x_BTD)
        if self.mixer_stand_in is None or state is not None:
            y_BTD, aux = self.mixer(x_BTD, seq, None if state is None else state.mixer)
        else:
            y_BTD, aux = self.mixer_stand_in(self.mixer, x_BTD, seq)
        return self.mixer_residual.write(kept, self._project("mixer", y_BTD), self.mixer_norm), aux

    def _norm_with_embedding(self, embedding_BTD: Tensor, h_BTD: Tensor) -> Tensor:
        return self.mixer_norm(torch.cat([h_BTD, embedding_BTD.to(h_BTD.dtype)], -1))

    def _run_feed_forward(self, stream: Stream, seq: SequenceInfo, state: LayerState | None) -> tuple[Stream, Aux]:
        x_BTD, kept = self.feed_forward_residual.read(stream, self.feed_forward_norm)
        y_BTD, aux = self.feed_forward(x_BTD, seq, None if state is None else state.feed_forward)
        y_BTD = self._project("feed_forward", y_BTD)
        return self.feed_forward_residual.write(kept, y_BTD, self.feed_forward_norm), aux

    def _project(self, branch: BranchName, output_BTD: Tensor) -> Tensor:
        """The output of a branch, multiplied by its projection where it has one."""
        projection = self._modules.get(f"{branch}_projection")
        return output_BTD if projection is None else projection(output_BTD)

    @property
    def runs_as_branches(self) -> bool:
        """Whether the layer does nothing but read, run and write its branches with weights that all runs share."""
        special = self.input_is_read or self.reads_embedding or bool(self._per_run)
        return not special and not any(f"{name}_projection" in self._modules for name in BRANCH_NAMES)

    def new_state(self, batch: int, max_length: int) -> LayerState:
        """Empty decode state for `batch` rows of at most `max_length` tokens."""
        return LayerState(self.mixer.new_state(batch, max_length), self.feed_forward.new_state(batch, max_length))

    def record(self, aux: dict[str, Aux]) -> None:
        """Pass the feed-forward its aux: once per training forward, also where checkpointing computes it twice."""
        if aux["feed_forward"]:
            self.feed_forward.record(aux["feed_forward"])
