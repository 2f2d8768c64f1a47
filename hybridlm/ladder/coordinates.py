"""Coordinate check: whether activations and their changes in training keep their size when a model gets wider.

The same batch is trained on for a few steps at several widths (Yang et al., arXiv 2203.03466, appendix D.1). For each
activation, the slope of log2 of its root mean square over log2 of the width should be near 0, over seeds:

  size    the activation itself
  change  its difference to step 0
  update  (W_t - W_0) x_0 of a linear map: the part of the change that its own learning rate decides

Under the standard parametrization changes must grow with the width; a check that does not see this sees nothing.
Slopes differ between seeds, those of the last residual by 0.14 (one standard deviation, widths 64 to 256, 4 layers, one
step), so that the mean of a few lies beyond a bound by chance now and then. An interval that lies beyond it tells;
one that reaches into the bounds but is wider than these leaves the check undecided. What is not finite is unstable.
Activations of stable size say that training at one learning rate is possible at all widths, not that the rate is good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor, nn

from hybridlm.ladder.rungs import carry
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM, build_model
from hybridlm.model.parametrization import Kind
from hybridlm.optimizers import OptimizerConfig, build_optimizer

QUANTITIES = ("size", "change", "update")
STABLE_SLOPES = (-0.15, 0.15)  # of log2 RMS over log2 width
LEVEL = 0.95  # probability of the interval of a slope
# Logits of fresh weights fall with the root of the width, and hide those that are learned until these are larger. An
# update of a linear map falls as much where it has nothing to do with its inputs, and not at all where it is aligned.
FALLING_SLOPES = {"logits": (-0.65, 0.15), "update": (-0.65, 0.35)}


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of a coordinate check.

    Args:
        widths: hidden sizes, ascending.
        base: hidden size whose hyperparameters are carried to them; None: the first of them.
        seeds: seeds of first weights and tokens.
        steps: optimizer steps, at a constant learning rate without clipping.
        rows: sequences of the batch.
        length: tokens per sequence.
    """

    widths: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = 5
    rows: int = 4
    length: int = 64
    base: int | None = None


@dataclass(frozen=True)
class Coordinate:
    """Growth of one quantity of one activation with the width.

    Args:
        name: of the activation, such as `kda.q_proj`, the same for all layers with that mixer.
        quantity: size, change or update.
        step: optimizer steps before it was measured.
        rms: root mean square by width, the geometric mean over seeds; infinite where that of a seed was not finite.
        slopes: of log2 rms over log2 width, by seed; none where it was zero or not finite at some width.
        diverged: number of seeds with which it was not finite at some width.
    """

    name: str
    quantity: str
    step: int
    rms: dict[int, float]
    slopes: tuple[float, ...]
    diverged: int = 0

    @property
    def slope(self) -> float | None:
        """Mean of the slopes, which is the slope of `rms`; None where there are none."""
        return statistics.fmean(self.slopes) if self.slopes else None

    @property
    def half_width(self) -> float:
        """Half of the interval around the mean slope, by Student's t; 0 for a single seed, whose spread is not known.

        >>> round(Coordinate("logits", "change", 1, {}, (0.1, 0.2, 0.3)).half_width, 3)
        0.248
        """
        count = len(self.slopes)
        if count < 2:
            return 0.0
        quantile = float(student_t.ppf(0.5 + LEVEL / 2, count - 1))
        return quantile * statistics.stdev(self.slopes) / math.sqrt(count)

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest slope that is stable for its name or quantity."""
        return FALLING_SLOPES.get(self.name) or FALLING_SLOPES.get(self.quantity) or STABLE_SLOPES

    @property
    def excess(self) -> float:
        """Distance of the mean slope from the bounds; 0 within them."""
        if self.slope is None:
            return 0.0
        low, high = self.bounds
        return max(low - self.slope, self.slope - high, 0.0)

    @property
    def is_stable(self) -> bool:
        """Whether it was finite everywhere, and the interval of the slope reaches into the bounds."""
        return self.diverged == 0 and self.excess <= self.half_width

    @property
    def is_uncertain(self) -> bool:
        """Whether the mean lies beyond the bounds, and its interval reaches into them: more seeds would tell."""
        return self.diverged == 0 and 0 < self.excess <= self.half_width

    @property
    def is_undecided(self) -> bool:
        """Whether it is uncertain, and its interval is wider than the bounds: an interval like this tells nothing.

        >>> Coordinate("kda output", "size", 1, {}, (0.9, 1.1)).is_undecided
        True
        """
        low, high = self.bounds
        return self.is_uncertain and 2 * self.half_width > high - low


def check_coordinates(model: ModelConfig, optimizer: OptimizerConfig, check: CoordinateCheck,
                      kind: Kind) -> list[Coordinate]:
    """Train at every width and seed, and compute the slopes.

    Args:
        model: the architecture, of any width; its `init_std` is that of the base.
        optimizer: its learning rate is that of the base.
        check: widths, base, seeds, steps and batch.
        kind: the parametrization.

    Returns:
        A coordinate per activation, quantity and step.
    """
    logs: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    base = (check.base or check.widths[0], model.num_layers)  # one depth: the width is all that changes
    for width in check.widths:
        config = carry(model, kind, (width, model.num_layers), base)
        for seed in check.seeds:
            for key, value in _train(config, optimizer, check, seed).items():
                logs.setdefault(key, {}).setdefault(width, []).append(_log2(value))
    found = []
    for (name, quantity, step), by_width in logs.items():
        means = {width: math.inf if math.inf in values else statistics.fmean(values)
                 for width, values in by_width.items()}
        by_seed = [{width: values[index] for width, values in by_width.items()} for index in range(len(check.seeds))]
        slopes = [_slope(logs) for logs in by_seed]
        found.append(Coordinate(name, quantity, step, {width: 2.0**mean for width, mean in means.items()},
                                tuple(slope for slope in slopes if slope is not None),
                                diverged=sum(math.inf in logs.values() for logs in by_seed)))
    return found


def steepest(coordinates: Sequence[Coordinate], quantity: str) -> Coordinate | None:
    """The coordinate of a quantity that grows most with the width; None where nothing of it was measured."""
    chosen = [each for each in coordinates if each.quantity == quantity and each.slope is not None]
    return max(chosen, key=lambda each: each.slope or 0.0, default=None)


def _log2(value: float) -> float:
    """Log2 of a root mean square: -inf for 0, inf for what is not finite.

    >>> _log2(8.0), _log2(0.0), _log2(math.nan)
    (3.0, -inf, inf)
    """
    if not math.isfinite(value):
        return math.inf
    return math.log2(value) if value > 0 else -math.inf


def _slope(log_by_width: dict[int, float]) -> float | None:
    """Slope of a least-squares line through (log2 width, log2 RMS).

    >>> _slope({16: 1.0, 32: 2.0, 64: 3.0})
    1.0
    """
    if not all(math.isfinite(value) for value in log_by_width.values()):
        return None
    x = [math.log2(width) for width in log_by_width]
    y = list(log_by_width.values())
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    spread = sum((each - x_mean) ** 2 for each in x)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / spread


def _train(config: ModelConfig, optimizer: OptimizerConfig, check: CoordinateCheck,
           seed: int) -> dict[tuple[str, str, int], float]:
    """Train one model, and return the root mean squares by (activation, quantity, step)."""
    model = build_model(config, seed=seed)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    # Frequencies as in text (Zipf): gradients then have a common direction, as those of real tokens have.
    frequencies_V = 1.0 / torch.arange(1, config.vocab_size + 1)
    ids_BT = torch.multinomial(frequencies_V, check.rows * check.length, replacement=True,
                               generator=generator).view(check.rows, check.length)
    optimizers = build_optimizer(model, optimizer)
    recorder = _Recorder(model)
    found: dict[tuple[str, str, int], float] = {}
    for step in range(1 + check.steps):
        output = model(ids_BT, labels=ids_BT, return_logits=True)
        assert output.logits is not None
        assert output.loss is not None
        recorder.outputs["logits"] = [output.logits.detach()]
        found |= recorder.measure(step)
        if step < check.steps:
            output.loss.backward()
            optimizers.step()
            optimizers.zero_grad()
    return found


class _Recorder:
    """Keeps outputs of embedding, linear maps, mixers, feed-forwards and the last residual, by a name without layer."""

    def __init__(self, model: HybridLM):
        self.outputs: dict[str, list[Tensor]] = {}
        self._first: dict[str, list[Tensor]] = {}
        self._linear: list[tuple[str, nn.Linear]] = []
        self._inputs: list[tuple[int, Tensor]] = []
        self._first_inputs: list[tuple[int, Tensor]] = []
        model.embed.register_forward_hook(self._keeper("embedding"))
        model.norm.register_forward_pre_hook(lambda module, args: self._keep("last residual", args[0]))
        for layer in model.layers:
            self._watch(str(layer.mixer_name), layer.mixer)  # type: ignore[arg-type]
            self._watch("feed_forward", layer.feed_forward)  # type: ignore[arg-type]

    def _watch(self, name: str, branch: nn.Module) -> None:
        branch.register_forward_hook(self._keeper(f"{name} output"))
        for path, module in branch.named_modules():
            if isinstance(module, nn.Linear):
                index = len(self._linear)
                self._linear.append((f"{name}.{path}", module))
                module.register_forward_hook(self._keeper(f"{name}.{path}", index))

    def _keeper(self, name: str, linear: int | None = None) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._keep(name, output if isinstance(output, Tensor) else output[0])
            if linear is not None and not self._first_inputs:
                self._inputs.append((linear, args[0].detach()))
        return keep

    def _keep(self, name: str, value: Tensor) -> None:
        self.outputs.setdefault(name, []).append(value.detach().float())

    def measure(self, step: int) -> dict[tuple[str, str, int], float]:
        """Root mean squares after one forward; forgets its outputs."""
        found = {(name, "size", step): _rms(values) for name, values in self.outputs.items()}
        if step == 0:
            self._first = self.outputs
            self._first_inputs = self._inputs
            self._weights = [module.weight.detach().clone() for _, module in self._linear]
        else:
            found |= {(name, "change", step): _rms([now - first for now, first in
                                                    zip(values, self._first[name], strict=True)])
                      for name, values in self.outputs.items()}
            moved: dict[str, list[Tensor]] = {}
            for index, value in self._first_inputs:
                name, module = self._linear[index]
                moved.setdefault(name, []).append(F.linear(value, module.weight.detach() - self._weights[index]))
            found |= {(name, "update", step): _rms(values) for name, values in moved.items()}
        self.outputs = {}
        return found


def _rms(values: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in values) / sum(value.numel() for value in values))
