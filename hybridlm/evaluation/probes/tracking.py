"""Probe of multi-hop variable tracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from hybridlm.errors import require
from hybridlm.evaluation.probes.base import (
    Probe,
    append_questions,
    place_blocks,
    register_probe,
    require_at_most,
    require_positive,
)

ASSIGN, QUERY, FIRST = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Probe):
    """Variable tracking of RULER (Hsieh et al. 2024, arXiv 2404.06654), as tokens.

        ASSIGN a 7  x x  ASSIGN b a  x  ASSIGN c b  ...  QUERY c      7 is asked: two hops

    `num_chains` chains of `hops` + 1 assignments are mixed with each other and with random tokens; the order within
    a chain is kept. With `question: value` the value of each chain's last variable is asked, so that all hops must
    be made at once. `variables` is RULER's question: all variables that hold a value, in order of assignment; there
    each asked token lets the next be found in one hop.
    """

    task: ClassVar[str] = "variable_tracking"
    hops: int = 2
    num_chains: int = 4
    question: Literal["value", "variables"] = "value"
    variable_vocab: int = 32
    value_vocab: int = 32
    noise_vocab: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "num_chains", "variable_vocab", "value_vocab", "noise_vocab")
        require(self.hops >= 0, "hops", "must not be negative", got=self.hops)
        require_at_most(self, "num_chains", min(self.value_vocab, self.variable_vocab // (self.hops + 1)),
                        "needs different variables and values in all chains")

    @property
    def vocab_size(self) -> int:
        return FIRST + self.variable_vocab + self.value_vocab + self.noise_vocab

    @property
    def answer_ids(self) -> range:
        values = FIRST + self.variable_vocab
        return range(values, values + self.value_vocab) if self.question == "value" else range(FIRST, values)

    @property
    def min_length(self) -> int:
        return 3 * self.num_chains * (self.hops + 1) + self._question_length

    @property
    def _question_length(self) -> int:
        return self.num_chains * (2 if self.question == "value" else 2 + self.hops)

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        links = self.hops + 1
        variables_CL = FIRST + rng.choice(self.variable_vocab, (self.num_chains, links), replace=False)
        values_C = FIRST + self.variable_vocab + rng.choice(self.value_vocab, self.num_chains, replace=False)
        sources_CL = np.concatenate([values_C[:, None], variables_CL[:, :-1]], axis=1)
        done_C = np.zeros(self.num_chains, dtype=int)
        statements = []
        for chain in rng.permutation(np.repeat(np.arange(self.num_chains), links)):
            link = done_C[chain]
            statements.append((ASSIGN, variables_CL[chain, link], sources_CL[chain, link]))
            done_C[chain] += 1
        noise_T = FIRST + self.variable_vocab + self.value_vocab + rng.integers(
            self.noise_vocab, size=length - self._question_length)
        head_T = place_blocks(rng, statements, noise_T)
        order = rng.permutation(self.num_chains)
        if self.question == "value":
            return append_questions(head_T, [((QUERY, variables_CL[c, -1]), [values_C[c]]) for c in order])
        return append_questions(head_T, [((QUERY, values_C[c]), list(variables_CL[c])) for c in order])


register_probe("variable_tracking", VariableTracking)
