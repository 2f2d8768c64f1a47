"""Equal budgets: gives every point the parameters (all, or those that a token meets), the training FLOPs or the decode
state of the reference.

Parameters and FLOPs are matched by the width of the feed-forward, which leaves the residual stream, the embedding and
the heads of a comparison alone. Where whole widths are too coarse (a toy with many experts), `hidden_size` changes too,
as little as possible. Decode state is matched by head counts: of the linear mixers, then of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from hybridlm.config.checks import validate
from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, decode_state_bytes, training_flops
from hybridlm.sweep.point import Point, find_point
from hybridlm.sweep.request import Budget, SweepConfig
from hybridlm.training.run_changes import flatten
from hybridlm.training.stages import plan_stages

TOLERANCE = 0.01  # allowed difference, as a fraction of the target
PREFERRED_DIVISORS = (64, 32, 16, 8, 4, 2, 1)  # of widths, tried in this order: kernels are faster at rounder ones
MAX_GROWTH = 64  # the largest size tried, as a multiple of the given one
UNITS = {"params": "parameters", "active": "active parameters per token", "flops": "FLOPs per token",
         "state": "bytes of decode state"}

Cost = Callable[[ModelConfig], float]
Resize = Callable[[ModelConfig, int], ModelConfig]


def match_points(points: list[Point], sweep: SweepConfig) -> list[str]:
    """Give every point the budget of the reference within 1 %, in place.

    Args:
        points: the points; `config.model` and `changed` of those that must change are replaced.
        sweep: says which budget, and which point is the reference.

    Returns:
        Sentences for the notes of the plan.

    Raises:
        ConfigError: points that cannot have the budget, with the nearest one that they can have.
    """
    if sweep.match == "none":
        if sweep.reference is not None:
            find_point(points, sweep.reference, "sweep.reference")
        return ["budgets are not matched (sweep.match=none)"]
    reference = points[0] if sweep.reference is None else find_point(points, sweep.reference, "sweep.reference")
    target = make_cost(reference, sweep)(reference.config.model)
    matched: dict[str, ModelConfig | float] = {}  # points with equal models are matched once
    failed: list[tuple[Point, float]] = []
    for point in points:
        before = point.config.model
        key = repr((before, plan_stages(point.config)[0].sequence_length))
        if key not in matched:
            matched[key] = match_model(before, make_cost(point, sweep), target, sweep.match)
        result = matched[key]
        if isinstance(result, ModelConfig):
            point.changed = _list_changes(before, result)
            point.config.model = result
            validate(point.config)
        else:
            failed.append((point, result))
    if failed:
        point, nearest = failed[0]
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise ConfigError("sweep.match", f"{point.name}{others} cannot have the {UNITS[sweep.match]} of "
                          f"{reference.name} within 1 %", got=f"{nearest:,.0f} at the nearest",
                          expected=f"{target:,.0f}",
                          hint="leave these points out, take another sweep.reference, or sweep.match=none")
    context = f" at {sweep.state_context} tokens" if sweep.match == "state" else ""
    return [f"every point has the {UNITS[sweep.match]} of {reference.name} ({target:,.0f}{context}) within 1 %"]


def make_cost(point: Point, sweep: SweepConfig) -> Cost:
    """The function of a model that `sweep.match` makes equal."""
    length = plan_stages(point.config)[0].sequence_length
    if sweep.match == "params":
        return lambda model: count_parameters(model).total_with_mtp
    if sweep.match == "active":
        return lambda model: count_parameters(model).active_with_head
    if sweep.match == "flops":
        return lambda model: training_flops(model, length)
    return lambda model: decode_state_bytes(model, sweep.state_context)


def match_model(model: ModelConfig, cost: Cost, target: float, match: Budget) -> ModelConfig | float:
    """Resize a model as little as possible so that its cost is the target within 1 %.

    Args:
        model: the config to start from, which is not changed.
        cost: the cost of a config.
        target: the cost to reach.
        match: which cost it is: it decides what is resized.

    Returns:
        The changed config, or the nearest cost that was reached where no size reaches the target.

    >>> from hybridlm.run_config import load_model_config
    >>> model = load_model_config("hybrid_tiny")
    >>> larger = match_model(model, lambda model: count_parameters(model).total, 300_000, "params")
    >>> abs(count_parameters(larger).total / 300_000 - 1) < 0.01
    True
    """
    nearest = cost(model)
    if _is_near(nearest, target):
        return model
    for variant, size_now, resize in _head_variants(model) if match == "state" else _width_variants(model):
        for size in _sizes_to_try(size_now, partial(_cost_at_size, cost, variant, resize), target):
            changed = resize(variant, size)
            reached = cost(changed)
            if _is_near(reached, target):
                return changed
            if abs(reached - target) < abs(nearest - target):
                nearest = reached
    return nearest


def _is_near(value: float, target: float) -> bool:
    return abs(value - target) <= TOLERANCE * target


def _cost_at_size(cost: Cost, model: ModelConfig, resize: Resize, size: int) -> float:
    return cost(resize(model, size))


def _sizes_to_try(size_now: int, cost: Callable[[int], float], target: float) -> Iterator[int]:
    """Sizes around the one where the cost, which grows with the size, crosses the target; the rounder ones first."""
    largest = MAX_GROWTH * size_now
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if cost(middle) < target:
            low = middle + 1
        else:
            high = middle
    for divisor in PREFERRED_DIVISORS:
        below = (low - 1) // divisor * divisor
        pair = [size for size in (below, below + divisor) if 0 < size <= largest]
        yield from sorted(pair, key=lambda size: abs(cost(size) - target))


def _width_variants(model: ModelConfig) -> Iterator[tuple[ModelConfig, int, Resize]]:
    """Variants of the model by hidden size, the given one first.

    Yields:
        The variant, the width of the feed-forward, and a function that gives a variant another width of feed-forward.
    """
    feed_forward = model.feed_forward
    hidden = model.hidden_size
    width_now = feed_forward.width()
    if width_now is None:  # the kind has no width to change
        return

    def resize(variant: ModelConfig, size: int) -> ModelConfig:
        return replace(variant, feed_forward=feed_forward.with_width(size))

    steps = (8,) if hidden >= 256 else (8, 4, 2)  # a wide model has fine enough steps in its feed-forward
    for step in steps:
        for width in _search_outward(hidden, step, hidden // 2, 2 * hidden):
            try:
                variant = replace(model, hidden_size=width)
                count_parameters(variant)  # raises where a mixer or feed-forward does not fit this width
            except ConfigError:
                continue
            yield variant, width_now, resize


def _search_outward(start: int, step: int, low: int, high: int) -> Iterator[int]:
    """Yield `start`, then the numbers at a growing distance from it, below and above, within `low` and `high`."""
    yield start
    for distance in range(step, high - low, step):
        yield from (size for size in (start - distance, start + distance) if low <= size <= high)


def _head_variants(model: ModelConfig) -> Iterator[tuple[ModelConfig, int, Resize]]:
    """Variants of the model by its number of key and value heads, the given one first.

    Yields:
        The variant, the number of heads of its linear mixers, and a function that changes that number; then also the
        given model with its number of key and value heads, and a function that changes that.
    """
    used = {name: model.mixers[name] for name in dict.fromkeys(model.layers())}
    heads = {name: count for name, mixer in used.items() if (count := mixer.state_heads()) is not None}
    linear = {name: count for name, count in heads.items() if used[name].is_linear}
    softmax = {name: count for name, count in heads.items() if not used[name].is_linear}

    def resize_linear(variant: ModelConfig, count: int) -> ModelConfig:
        return _set_heads(variant, linear, count)

    def resize_softmax(variant: ModelConfig, count: int) -> ModelConfig:
        return _set_heads(variant, softmax, count)

    linear_heads = max(linear.values(), default=0)
    if linear:
        yield model, linear_heads, resize_linear
    if softmax:
        kv_heads = max(softmax.values())
        yield model, kv_heads, resize_softmax
        if linear:
            for count in _search_outward(kv_heads, 1, 1, 4 * kv_heads):
                yield resize_softmax(model, count), linear_heads, resize_linear


def _set_heads(model: ModelConfig, names: Iterable[str], count: int) -> ModelConfig:
    """The model in which the mixers of these names have `count` heads in their state."""
    changed = {name: model.mixers[name].with_state_heads(count) for name in names}
    return replace(model, mixers={**model.mixers, **changed})


def _list_changes(before: ModelConfig, after: ModelConfig) -> dict[str, list[Any]]:
    """{dotted key: [before, after]} of the differences between two models."""
    old, new = flatten(to_dict(before)), flatten(to_dict(after))
    return {f"model.{key}": [old.get(key), new[key]] for key in new if old.get(key) != new[key]}
