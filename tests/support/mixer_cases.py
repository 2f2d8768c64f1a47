"""Small mixers, one for each published form, and the helpers that the mixer tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridlm.model.contract_check import Subject
from hybridlm.model.contract_check.subject import TOKEN_BITS
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers.contract import MixerConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from tests.support.mixer_forms import collect_forms
from tests.support.mixer_forms.softmax_attention import INDEXER as INDEXER
from tests.support.mixer_forms.softmax_attention import MLA_DIMS as MLA_DIMS
from tests.support.mixer_forms.softmax_attention import NOPE as NOPE

HIDDEN = 24

CASES: dict[str, MixerConfig] = collect_forms()
ZERO_CENTERED = {"qwen3_next_full", "gdn"}


def context_of(name: str = "", layer_index: int = 1, hidden_size: int = HIDDEN,
               layers: Sequence[MixerConfig] = ()) -> LayerContext:
    """The context of one layer; `layers` are the mixers of all of them, where they read from one another."""
    norm = NormConfig(eps=1e-5, zero_centered=name in ZERO_CENTERED)
    return LayerContext(hidden_size=hidden_size, layer_index=layer_index, num_layers=4, norm=norm, max_position=256,
                        vocab_size=2**TOKEN_BITS,
                        layers=[str(index) for index in range(len(layers))],
                        mixers={str(index): mixer for index, mixer in enumerate(layers)})


def build_layers(*configs: MixerConfig, std: float = 0.3) -> list:
    """One layer in fp64 for each config, which may read from those before it; no weight has a neutral value."""
    torch.manual_seed(0)
    found = []
    for index, config in enumerate(configs):
        mixer = build_mixer(config, context_of(layer_index=index, layers=configs))
        mixer.init_weights(std)
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        found.append(mixer.double())
    return found


def subject(name: str) -> Subject:
    """The mixer of case `name` as the contract checks take it."""
    return Subject(CASES[name], context_of(name))


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """The mixer of case `name` with every parameter away from its neutral value; seeds torch for what follows."""
    torch.manual_seed(seed)
    return subject(name).build(dtype, seed)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(mixer, x, cu_seqlens=None, state=None, offset: int = 0) -> torch.Tensor:
    seq = SequenceInfo.make(x.shape[0], x.shape[1], x.device, cu_seqlens, offset)
    return mixer(x, seq, state)[0]
