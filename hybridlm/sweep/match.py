"""Equal budgets: every point is made as large, as costly or as forgetful as the reference.

Parameters and FLOPs are matched by the width of the feed-forward, which leaves the residual stream, the embedding and
the heads of a comparison alone; where whole widths are too coarse (a toy with many experts), `hidden_size` moves too,
as little as it can. Decode state is matched by head counts: of the linear mixers, then of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from hybridlm.config.checks import validate
from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, decode_state_bytes, training_flops
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.mixers.attention import AttentionConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.sweep.plan import Point, named
from hybridlm.sweep.request import SweepConfig
from hybridlm.training.stages import plan as stages_of

TOLERANCE = 0.01
GRAINS = (64, 32, 16, 8, 4, 2, 1)  # widths divisible by more are faster, so they are tried first
LARGEST = 64  # times the width or the head count that there was
_UNITS = {"params": "parameters", "flops": "FLOPs a token", "state": "bytes of decode state"}

Budget = Callable[[ModelConfig], float]


def match_points(points: list[Point], sweep: SweepConfig) -> list[str]:
    """Gives every point the budget of the reference within 1 %, in place; returns what to say about it.

    Raises:
        ConfigError: points that cannot have it, with the nearest that they can.
    """
    if sweep.match == "none":
        if sweep.reference is not None:
            named(points, sweep.reference, "sweep.reference")
        return ["budgets are not matched (sweep.match=none)"]
    reference = points[0] if sweep.reference is None else named(points, sweep.reference, "sweep.reference")
    target = budget_of(reference, sweep)(reference.config.model)
    found: dict[str, ModelConfig | float] = {}
    failed = []
    for point in points:
        before = point.config.model
        key = repr((before, stages_of(point.config)[0].sequence_length))
        if key not in found:
            found[key] = match_model(before, budget_of(point, sweep), target, sweep.match)
        result = found[key]
        if isinstance(result, ModelConfig):
            point.changed = _changes(before, result)
            point.config.model = result
            validate(point.config)
        else:
            failed.append((point, result))
    if failed:
        point, nearest = failed[0]
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise ConfigError("sweep.match", f"{point.name}{others} cannot have the {_UNITS[sweep.match]} of "
                          f"{reference.name} within 1 %", got=f"{nearest:,.0f} at the nearest",
                          expected=f"{target:,.0f}",
                          hint="leave these points out, take another sweep.reference, or sweep.match=none")
    return [f"every point has the {_UNITS[sweep.match]} of {reference.name} ({target:,.0f}"
            f"{f' at {sweep.state_context} tokens' if sweep.match == 'state' else ''}) within 1 %"]


def budget_of(point: Point, sweep: SweepConfig) -> Budget:
    """What `sweep.match` counts, as a function of the model."""
    length = stages_of(point.config)[0].sequence_length
    if sweep.match == "params":
        return lambda model: count_parameters(model).total_with_mtp
    if sweep.match == "flops":
        return lambda model: training_flops(model, length)
    return lambda model: decode_state_bytes(model, sweep.state_context)


def match_model(model: ModelConfig, budget: Budget, target: float, match: str) -> ModelConfig | float:
    """The model changed as little as makes its budget equal; the nearest budget where nothing does."""
    nearest = budget(model)
    if _near(nearest, target):
        return model
    for variant, whole, resize in _by_heads(model) if match == "state" else _by_width(model):
        for size in _sizes(whole, lambda size: budget(resize(variant, size)), target):  # noqa: B023
            changed = resize(variant, size)
            reached = budget(changed)
            if _near(reached, target):
                return changed
            if abs(reached - target) < abs(nearest - target):
                nearest = reached
    return nearest


def _near(value: float, target: float) -> bool:
    return abs(value - target) <= TOLERANCE * target


def _sizes(whole: int, budget: Callable[[int], float], target: float) -> Iterator[int]:
    """Sizes around that where a growing budget crosses the target, the rounder ones first."""
    low, high = 1, LARGEST * whole
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if budget(middle) < target else (low, middle)
    for grain in GRAINS:
        below = (low - 1) // grain * grain
        pair = [size for size in (below, below + grain) if 0 < size <= LARGEST * whole]
        yield from sorted(pair, key=lambda size: abs(budget(size) - target))


Resize = Callable[[ModelConfig, int], ModelConfig]


def _by_width(model: ModelConfig) -> Iterator[tuple[ModelConfig, int, Resize]]:
    """Hidden sizes, that of the model first, each with its feed-forward to be resized."""
    feed_forward, hidden = model.feed_forward, model.hidden_size
    whole = int(getattr(feed_forward, _width_key(feed_forward)))

    def resize(variant: ModelConfig, size: int) -> ModelConfig:
        return replace(variant, feed_forward=_widen(feed_forward, size))

    for grain in (8,) if hidden >= 256 else (8, 4, 2):  # a wide model has fine steps in its feed-forward
        for width in _outward(hidden, grain, hidden // 2, 2 * hidden):
            try:
                variant = replace(model, hidden_size=width)
                count_parameters(variant)  # the parts look at the width they stand in
            except ConfigError:
                continue
            yield variant, whole, resize


def _outward(start: int, step: int, low: int, high: int) -> Iterator[int]:
    yield start
    for distance in range(step, high - low, step):
        yield from (size for size in (start - distance, start + distance) if low <= size <= high)


def _width_key(feed_forward: FeedForwardConfig) -> str:
    return "moe_intermediate_size" if feed_forward.kind == "moe" else "intermediate_size"


def _widen(feed_forward: FeedForwardConfig, size: int) -> FeedForwardConfig:
    """Experts of another width; widths that a config writes out beside them keep their proportion."""
    key = _width_key(feed_forward)
    whole = getattr(feed_forward, key)
    sizes = {key: size}
    for other in ("shared_intermediate_size", "intermediate_size"):
        value = getattr(feed_forward, other, None)
        if other != key and value is not None:
            sizes[other] = max(1, round(value * size / whole))
    return replace(feed_forward, **sizes)  # type: ignore[arg-type]


def _by_heads(model: ModelConfig) -> Iterator[tuple[ModelConfig, int, Resize]]:
    """Numbers of key-value heads, those of the model first, each with the linear mixers' heads to be resized."""
    used = {name: model.mixers[name] for name in dict.fromkeys(model.layers())}
    linear = {name: mixer for name, mixer in used.items() if isinstance(mixer, RecurrentConfig)}
    softmax = {name: mixer for name, mixer in used.items() if isinstance(mixer, AttentionConfig)}

    def resize(names: Iterable[str]) -> Resize:
        chosen = list(names)
        return lambda variant, size: replace(variant, mixers={
            **variant.mixers, **{name: _with_heads(variant.mixers[name], size) for name in chosen}})

    if linear:
        yield model, max(mixer.num_heads for mixer in linear.values()), resize(linear)
    if softmax:
        heads = max(mixer.kv_heads for mixer in softmax.values())
        yield model, heads, resize(softmax)
        for count in _outward(heads, 1, 1, 4 * heads) if linear else ():
            yield resize(softmax)(model, count), max(mixer.num_heads for mixer in linear.values()), resize(linear)


def _with_heads(mixer: MixerConfig, count: int) -> MixerConfig:
    """`count` heads in the state; those that share one stay as many as they were."""
    if isinstance(mixer, RecurrentConfig):
        values = None if mixer.num_value_heads is None else count * (mixer.value_heads // mixer.num_heads)
        return replace(mixer, num_heads=count, num_value_heads=values)
    assert isinstance(mixer, AttentionConfig)
    shared = mixer.num_heads // mixer.kv_heads
    return replace(mixer, num_heads=count * shared, num_kv_heads=count if mixer.num_kv_heads is not None else None)


def _changes(before: ModelConfig, after: ModelConfig) -> dict[str, list[Any]]:
    """{dotted key: [before, after]} of what differs."""
    from hybridlm.config.serialization import to_dict
    from hybridlm.training.run_folder import flatten

    old, new = flatten(to_dict(before)), flatten(to_dict(after))
    return {f"model.{key}": [old.get(key), new[key]] for key in new if old.get(key) != new[key]}
