"""Checks of mixers on shards of rows, which each of four ranks makes (test_context_parallel.py)."""

import copy

import torch

from hybridlm.distributed.context_parallel import ContextParallelGroup
from hybridlm.errors import ConfigError
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from tests.support.mixer_cases import CASES, HIDDEN, build, subject
from tests.support.mixer_forms import collect_names

B, T = 2, 36
BORDERS = [0, 1, 17, 18, 30, 36, 45, 48, 72]


def adjoint(shard_group):
    """<f(x), y> = <x, f'(y)> over all ranks, for each exchange of the protocol."""
    torch.manual_seed(shard_group.rank)
    for f, shape in ((shard_group.gather, (3, 2)), (shard_group.exchange, (shard_group.size, 3, 2)),
                     (shard_group.from_previous, (3, 2))):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = f(x)
        y = torch.randn_like(out)
        out.backward(y)
        both = shard_group.all_sum(torch.stack([(out * y).sum(), (x * x.grad).sum()]))
        torch.testing.assert_close(both[0], both[1], msg=str(f))
    here = torch.tensor([float(shard_group.rank)])
    assert shard_group.gather(here).flatten().tolist() == list(range(shard_group.size))
    assert shard_group.from_previous(here + 1).item() == shard_group.rank
    assert shard_group.exchange(here + 10 * torch.arange(shard_group.size)[:, None]).flatten().tolist() == [
        other + 10 * shard_group.rank for other in range(shard_group.size)]


def backward(name, mixer, x, w, seq, share):
    x = x.clone().requires_grad_()
    o, aux = subject(name).run_on(mixer, x, seq)
    loss = (o * w).sum() + share * sum(value for name, value in aux.items() if name.startswith("loss/"))
    loss.backward()
    return o.detach(), x.grad, [torch.zeros_like(p) if p.grad is None else p.grad for p in mixer.parameters()]


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def compare(name, shard_group, dtype, tolerance):
    mixer = build(name, dtype).train()
    torch.manual_seed(0)
    x, w = torch.randn(2, B, T, HIDDEN, dtype=dtype)
    seq = SequenceInfo.make(B, T, torch.device("cpu"), CuSeqlens(BORDERS))
    expected = backward(name, copy.deepcopy(mixer), x, w, seq, 1.0)
    seq = seq.shard_rows(shard_group)
    o, dx, grads = backward(name, mixer, seq.local_tokens(x), seq.local_tokens(w), seq, 1 / shard_group.size)
    pairs = [(o, seq.local_tokens(expected[0])), (dx, seq.local_tokens(expected[1]))]
    if dtype == torch.float64:
        pairs += [(shard_group.all_sum(a), b) for a, b in zip(grads, expected[2], strict=True)]
    else:  # the gradient of a single gate parameter is known to 3e-5 in fp32, with shards or without
        pairs.append((flat([shard_group.all_sum(g) for g in grads]), flat(expected[2])))
    for found, wanted in pairs:
        error = float((found - wanted).norm())
        assert error <= tolerance * float(wanted.norm()) + 1e-12, (name, shard_group.size, dtype, error)


def divides(name, shards):
    """Whether the form can work on rows in so many shards."""
    try:
        CASES[name].check_context_parallel(shards, T // shards)
    except ConfigError:
        return False
    return True


def check_mixers():
    """Every mixer on shards of rows against the same rows whole, with all four ranks or two pairs of them."""
    names = sorted(CASES.keys() - collect_names("UNDIVIDED"))  # in one order on all ranks
    assert all(divides(name, 2) for name in names), "give the form two heads, or name it in UNDIVIDED"
    most = {name: 4 if divides(name, 4) else 2 for name in names}
    for size in (2, 4):
        shard_group = ContextParallelGroup.make(size)
        adjoint(shard_group)
        for name in names:
            if size <= most[name]:
                compare(name, shard_group, torch.float64, 1e-9)
            if size == most[name]:
                compare(name, shard_group, torch.float32, 1e-5)
