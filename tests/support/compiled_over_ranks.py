"""Check that each of two ranks makes: compiled layers under an engine train as the same layers uncompiled."""

import torch

from hybridlm.model import block
from tests.support.zero_checks import ready, step, weights


def check(kind):
    """Three steps of the engine, with and without compiled layers: the same norms and weights."""
    block.COMPILER = "aot_eager"  # inductor's kernels take a minute; the model's tests have them
    ends, norms = [], []
    for compiled in (False, True):
        engine, model, optimizers = ready(kind)
        if compiled:
            torch._dynamo.reset()
            model.compile_layers()
        engine.prepare(model, optimizers)
        norms.append([float(step(engine, number).grad_norm) for number in range(3)])
        ends.append(weights(engine))
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), rtol=1e-4, atol=0.0)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()
