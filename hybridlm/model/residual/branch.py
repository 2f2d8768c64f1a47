"""Configuration of one branch: the option `residual` of a mixer or a feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class BranchConfig:
    """Order of a branch f (mixer or feed-forward), its norm and the addition to the residual h.

    pre:    h + f(norm(h))                              (most models)
    post:   h + norm(f(h))                              (OLMo 2/3, full layers of OLMo-Hybrid)
    normed: x = norm(h); alpha * x + beta * f(x)        (MiniMax-01: the residual is the normed input)
    `alpha` and `beta` scale the residual and the branch in every form.
    """

    form: Literal["pre", "post", "normed"] = "pre"
    alpha: float = 1.0
    beta: float = 1.0
