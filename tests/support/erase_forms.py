"""Calls of the delta rule with erase keys and vectors of its own, for tests of every backend."""

import torch
from torch.nn.functional import normalize

from hybridlm_kernels.random_inputs import recurrence_inputs

# What a form has: an erase key of its own, a free erase vector, and whether the state is read before its decay.
FORMS = {"own key": (True, False, False), "read before": (False, False, True), "own key, before": (True, False, True),
         "free vector": (True, True, False), "free vector, before": (True, True, True)}


def make_inputs(form, decay, *, T=40, dtype=torch.float64, **sizes):
    """Inputs with erase keys and vectors, and the options of the form."""
    own_key, free, before = FORMS[form]
    sizes = {"B": 1, "H": 2, "HV": 2, "K": 6, "V": 5} | sizes
    inputs = recurrence_inputs(decay, T=T, beta=not free, strength=2.0, dtype=dtype, **sizes)
    generator = torch.Generator().manual_seed(5)

    def keys(heads):
        shape = (sizes["B"], T, heads, sizes["K"])
        return normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)

    if own_key:
        inputs["erase_key"] = keys(sizes["H"])
    if free:
        inputs["erase_vector"] = -0.8 * keys(sizes["HV"])
    return inputs, {"erase_before_decay": before}
