"""Configuration of one branch: the option `residual` of a mixer or a feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import require


@dataclass(kw_only=True)
class BranchConfig:
    """Order of a branch f (mixer or feed-forward), its norm and the addition to the residual h.

    pre:    h + f(norm(h))                              (most models)
    post:   h + norm(f(h))                              (OLMo 2/3, full layers of OLMo-Hybrid)
    normed: x = norm(h); alpha * x + beta * f(x)        (MiniMax-01: the residual is the normed input)
    aside:  s = f(norm(h)); h stays, and the next branch reads h + s in place of h, or s alone if it is aside too
                                                        (shared blocks of Zamba and Zamba2)
    `alpha` and `beta` scale the residual and the branch in every form.

    Args:
        embedding: whether a mixer reads the embedding of the tokens behind h, norm([h; e]) of twice the width.
        project: whether a square matrix multiplies the output of the branch.
    """

    form: Literal["pre", "post", "normed", "aside"] = "pre"
    alpha: float = 1.0
    beta: float = 1.0
    embedding: bool = False
    project: bool = False

    def __post_init__(self) -> None:
        require(self.form != "aside" or self.alpha == 1.0, "alpha", "has no effect on a branch that is aside",
                got=self.alpha, expected="1")
        require(not self.embedding or self.form in ("pre", "aside"), "embedding", "needs a norm before the branch",
                got=self.form, expected="form: pre or aside")
