"""Ladders whose law is known: losses of architectures over rungs and seeds, with noise that is given."""

import numpy as np

from hybridlm.ladder.law import Law
from hybridlm.ladder.measurements import Measurement, Results

COMPUTES = {"r0": 1.2e12, "r1": 5e12, "r2": 1.4e13}
SEVEN = COMPUTES | {"r4": 1.3e16, "r5": 1.4e17, "r6": 2.1e18, "r7": 1.3e19}


def ladder(laws, computes=COMPUTES, *, seeds=3, common=0.0, own=0.0, speeds=None, flops=None, random=0):
    """Results of `laws` by architecture, the first of which is the reference.

    `common` is the standard deviation of what all architectures of a seed share, `own` that of each; losses get both.
    """
    generator = np.random.default_rng(random)
    found = []
    for rung, compute in computes.items():
        for seed in range(seeds):
            shared = common * generator.standard_normal()
            for name, law in laws.items():
                noise = shared + own * generator.standard_normal()
                found.append(Measurement(name, rung, seed, law.loss(compute) + noise, compute,
                                         (flops or {}).get(name, 1e6), (speeds or {}).get(name, 1000.0)))
    return Results(found, list(computes), next(iter(laws)))


MARIN = Law(1.6, 88.32, 0.0941)
EQUAL = {"full": MARIN, "kda": MARIN}
BETTER = {"full": MARIN, "kda": Law(1.6, 86.0, 0.0941)}
