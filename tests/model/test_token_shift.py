"""Token shift and the convolution module: documents, decoding in steps, and shards of rows."""

import torch

from hybridlm.model.decode_state import TensorState
from hybridlm.model.mixers.common.convolution import CausalConv
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens

CPU = torch.device("cpu")


def test_the_first_token_of_a_document_has_none_before_it():
    x = torch.arange(1.0, 7.0).view(2, 3, 1)
    seq = SequenceInfo.make(2, 3, CPU, CuSeqlens([0, 2, 3, 6]))
    assert previous_tokens(x, seq).flatten().tolist() == [0.0, 1.0, 0.0, 0.0, 4.0, 5.0]


def test_shift_and_convolution_go_on_from_the_decode_state():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    conv = CausalConv(3, 4).double()
    conv.reset_parameters()
    expected = conv(previous_tokens(x, SequenceInfo.make(2, 7, CPU)), SequenceInfo.make(2, 7, CPU))
    state, outputs = TensorState(), []
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        seq = SequenceInfo.make(2, end - begin, CPU, offset=begin)
        outputs.append(conv(previous_tokens(x[:, begin:end], seq, state), seq, state))
    assert torch.allclose(torch.cat(outputs, 1), expected, atol=1e-12)
    assert set(state.tensors) == {"shift", "conv"}
    assert state.num_bytes == 8 * (2 * 3 + 2 * 3 * 3)


def test_a_mix_of_one_is_the_token_before():
    x, before = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
    assert lerp_with_previous(x, before, torch.tensor([0.0, 1.0])).tolist() == [3.0, 2.0]
