"""Watches how experts are used over several steps, and says when routing collapses and when it has recovered.

With few tokens per expert some experts get none in a step by chance. So an expert counts as dead only where it got no
token in as many steps as give every expert of a balanced layer MIN_EXPECTED selections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

WINDOW_STEPS = 20  # least steps over which dead experts are averaged
MIN_EXPECTED = 20  # selections per expert of a balanced layer, from which none is no chance
COLLAPSED_FRACTION = 0.125  # of all experts, dead on average


class RoutingWatch:
    """Averages dead experts over a window of steps, and describes a collapse once, until it has grown or ended.

    Args:
        hint: what to do about it, for the end of the warning.

    Example:
        >>> watch = RoutingWatch("raise the rate")
        >>> dead = {"3": torch.tensor([500, 0, 500, 0])}
        >>> [watch.add(dead) for _ in range(WINDOW_STEPS)][-1]
        'routing collapses: 2 of 4 experts get no token, mean of the last 20 steps (layer 3: 2 of 4); raise the rate'
    """

    def __init__(self, hint: str = ""):
        self.hint = hint
        self.steps = 0  # of this window
        self.counted = 0  # times that dead experts were counted in this window
        self.dead: Counter[str] = Counter()  # by layer, summed over the counts
        self.loads = torch.zeros(0, dtype=torch.int64)  # summed since the last count
        self.warned_of = 0.0  # dead experts that the last warning named

    def add(self, loads: Mapping[str, Tensor]) -> str | None:
        """Count the loads of one step, int64 [E] by layer; return what there is to say, mostly nothing."""
        if not loads:
            return None
        step = torch.cat(list(loads.values())).cpu()  # one transfer
        self.loads = self.loads + step if self.loads.numel() else step
        self.steps += 1
        by_layer = dict(zip(loads, self.loads.split([load_E.numel() for load_E in loads.values()]), strict=True))
        if min(float(load_E.float().mean()) for load_E in by_layer.values()) >= MIN_EXPECTED:
            self.dead.update({layer: int((load_E == 0).sum()) for layer, load_E in by_layer.items()})
            self.counted += 1
            self.loads = self.loads[:0]
        if self.steps < WINDOW_STEPS or not self.counted:
            return None
        said = self._judge({layer: self.dead[layer] / self.counted for layer in by_layer},
                           {layer: load_E.numel() for layer, load_E in by_layer.items()})
        self.steps = self.counted = 0
        self.dead.clear()
        return said

    def _judge(self, dead: dict[str, float], experts: dict[str, int]) -> str | None:
        total, count = sum(dead.values()), sum(experts.values())
        mean = f"{total:.0f} of {count} experts get no token, mean of the last {self.steps} steps"
        if total < COLLAPSED_FRACTION * count:
            recovered, self.warned_of = self.warned_of > 0, 0.0
            return f"routing has recovered: {mean}" if recovered else None
        if total <= 1.25 * self.warned_of:  # said already
            return None
        self.warned_of = total
        worst = max(dead, key=lambda layer: dead[layer] / experts[layer])
        text = f"routing collapses: {mean} (layer {worst}: {dead[worst]:.0f} of {experts[worst]})"
        return f"{text}; {self.hint}" if self.hint else text
