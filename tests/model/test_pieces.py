"""Every mixer computes on pieces of rows what it computes on the rows: outputs, losses, all gradients."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from mixer_cases import CASES, HIDDEN, build

from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from threads import together

B, T = 2, 36
PACKED = [0, 1, 17, 18, 30, 36, 36 + 9, 36 + 12, 72]  # cuts at 9, 12, 18, 24, 27: inside documents and on borders


def whole(packed):
    return SequenceInfo.make(B, T, torch.device("cpu"), CuSeqlens(PACKED) if packed else None)


def losses(aux):
    return [value for name, value in aux.items() if name.startswith("loss/")]


def backward(mixer, x, w, seq, share=1.0):
    """Outputs, gradients of the inputs and of the parameters, and the aux."""
    x = x.clone().requires_grad_()
    o, aux = mixer(x, seq)
    ((o * w).sum() + sum(losses(aux)) * share).backward()
    return o.detach(), x.grad, {n: p.grad for n, p in mixer.named_parameters()}, {n: v.detach() for n, v in aux.items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pieces", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_pieces_are_the_whole(name, pieces, packed):
    config = CASES[name]
    if not config.is_linear and config.num_heads % pieces:
        pytest.skip(f"{config.num_heads} heads")
    torch.manual_seed(0)
    mixer = build(name).double().train()
    x, w = torch.randn(2, B, T, HIDDEN, dtype=torch.float64)
    o, dx, grads, aux = backward(mixer, x, w, whole(packed))

    def piece(peers):
        seq = whole(packed).split(peers)
        return backward(copy.deepcopy(mixer), seq.own(x), seq.own(w), seq, 1 / pieces)

    for p in mixer.parameters():
        p.grad = None
    parts = together(piece, pieces)
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 1), o)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), dx)
    for key, expected in grads.items():
        found = [p[2][key] for p in parts if p[2][key] is not None]
        if expected is None:
            assert not found
        else:
            torch.testing.assert_close(sum(found), expected, msg=lambda m, key=key: f"{key}: {m}")
    for key, expected in aux.items():
        mean = sum(p[3][key] for p in parts) / pieces
        torch.testing.assert_close(mean, expected, msg=lambda m, key=key: f"{key}: {m}")
