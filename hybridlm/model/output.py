"""The result of a forward, and how the losses and statistics of layers become those of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import LayerState, device_of, join_rows, reorder_rows
from hybridlm.model.mixers.contract import Aux


@dataclass
class ModelState:
    """The decode state of all layers after `length` tokens of each of `batch` rows; updated in place.

    Rows that hold fewer tokens are padded in front: `padding_B` int64 [B] counts these entries; None: no row is.
    """

    layers: list[LayerState]
    batch: int
    max_length: int
    length: int = 0
    padding_B: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        """Reorder the rows in place, as beam search does: row i becomes what row `rows[i]` was.

        Args:
            rows: int64, as many as rows shall stay.
        """
        for layer in self.layers:
            reorder_rows(layer, rows)
        self.padding_B = reorder_rows(self.padding_B, rows)
        self.batch = len(rows)

    @classmethod
    def join(cls, states: Sequence[ModelState], max_new_tokens: int) -> ModelState:
        """One state of the rows of several, padded in front to the longest.

        Args:
            states: states that hold tokens; they are not used any more.
            max_new_tokens: tokens that each row of the new state has room for.
        """
        length = max(state.length for state in states)
        padding = [length - state.length for state in states for _ in range(state.batch)]
        layers = [join_rows([state.layers[index] for state in states], [length - state.length for state in states],
                            length + max_new_tokens) for index in range(len(states[0].layers))]
        tensor_B = torch.tensor(padding, device=device_of(layers)) if any(padding) else None
        return cls(layers, len(padding), length + max_new_tokens, length, tensor_B)


@dataclass
class ModelOutput:
    """Result of one forward; attributes are named as in transformers.

    Attributes:
        logits: [B, T, V], or of the last positions only.
        loss: the scalar that is trained, the weighted sum of `losses`.
        losses: scalars, not weighted: `lm` and `mtp` in nats per token, `z` the mean of logsumexp^2, `balance` (1 where
            experts are balanced), and others that layers have.
        stats: scalars without gradient, each the mean over the layers that have it, with the extremes as `<name>_min`
            and `<name>_max`; some also per layer, as `<name>/<layer>`.
        state: the decode state that was passed in.
        hidden_states: where asked for, the stream [B, T, D] before the first layer and after each one; the last one is
            after the final norm, as in transformers.
        num_tokens: number of tokens that the `lm` loss is a mean over.
        batch_fraction: tokens of text of this forward over those of the global batch; 1 without one.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    state: ModelState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    num_tokens: Tensor | None = None
    batch_fraction: float | Tensor = 1.0


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of one optimizer step, which several forwards compute (micro batches, processes).

    A forward that gets the global batch divides its sums by the counts of that batch. The losses of all parts then
    add up to those of the batch, and so do their gradients, however it is divided (accumulation, processes). Without
    it losses are means over the forward's own tokens.
    """

    targets: tuple[int, ...]  # number of targets that count, per each of the 1 + mtp.depth tokens ahead
    tokens: int  # number of tokens without padding, whether they have a target or not


class AuxTotals:
    """Collects the aux of all branches of one forward."""

    def __init__(self) -> None:
        self._losses: dict[str, list[tuple[float, Tensor]]] = {}
        self._stats: dict[str, list[Tensor]] = {}
        self._by_layer: dict[str, Tensor] = {}

    def add(self, branch: nn.Module, aux: Aux, layer: str) -> None:
        """Add the aux of a mixer or feed-forward of the layer that records call `layer`."""
        weights = getattr(branch, "loss_weights", {})
        for key, value in aux.items():
            group, _, name = key.partition("/")
            if group == "loss":
                self._losses.setdefault(name, []).append((weights.get(name, 0.0), value))
            elif group in ("stat", "layer"):
                self._stats.setdefault(name, []).append(value.detach())
                if group == "layer":
                    self._by_layer[f"{name}/{layer}"] = value.detach()

    def losses(self, batch_fraction: float | Tensor = 1.0, weights: Mapping[str, float] | None = None,
               ) -> tuple[dict[str, Tensor], Iterable[Tensor]]:
        """Each loss averaged over its layers, and the weighted terms of the model's loss.

        Args:
            batch_fraction: multiplies all of them.
            weights: weights by name of the loss, which replace those of the layers' own configs.
        """
        for name in set(weights or ()) & set(self._losses):
            self._losses[name] = [(weights[name], value) for _, value in self._losses[name]]  # type: ignore[index]
        means = {name: torch.stack([value for _, value in terms]).mean() * batch_fraction
                 for name, terms in self._losses.items()}
        weighted = [weight * batch_fraction / len(terms) * value
                    for terms in self._losses.values() for weight, value in terms if weight]
        return means, weighted

    def stats(self) -> dict[str, Tensor]:
        """Each statistic: mean and extremes over its layers, and the values of single layers."""
        out: dict[str, Tensor] = {}
        for name, values in self._stats.items():
            stacked = torch.stack(values)
            out[name], out[f"{name}_min"], out[f"{name}_max"] = stacked.mean(), stacked.min(), stacked.max()
        return out | self._by_layer
