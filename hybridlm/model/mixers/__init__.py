"""Sequence mixers. Importing this package registers every kind."""

from hybridlm.model.mixers.attention import Attention as Attention
from hybridlm.model.mixers.attention import AttentionConfig as AttentionConfig
from hybridlm.model.mixers.common.indexed_attention import IndexedMixer as IndexedMixer
from hybridlm.model.mixers.common.indexer import IndexerConfig as IndexerConfig
from hybridlm.model.mixers.contract import MIXERS as MIXERS
from hybridlm.model.mixers.contract import MixerConfig as MixerConfig
from hybridlm.model.mixers.contract import SequenceMixer as SequenceMixer
from hybridlm.model.mixers.contract import build_mixer as build_mixer
from hybridlm.model.mixers.contract import register_mixer as register_mixer
from hybridlm.model.mixers.delta_rule import DeltaRule as DeltaRule
from hybridlm.model.mixers.delta_rule import DeltaRuleConfig as DeltaRuleConfig
from hybridlm.model.mixers.gated_conv import GatedConv as GatedConv
from hybridlm.model.mixers.gated_conv import GatedConvConfig as GatedConvConfig
from hybridlm.model.mixers.linear_attention import LinearAttention as LinearAttention
from hybridlm.model.mixers.linear_attention import LinearAttentionConfig as LinearAttentionConfig
from hybridlm.model.mixers.mamba import Mamba as Mamba
from hybridlm.model.mixers.mamba import MambaConfig as MambaConfig
from hybridlm.model.mixers.min_rnn import MinRNN as MinRNN
from hybridlm.model.mixers.min_rnn import MinRNNConfig as MinRNNConfig
from hybridlm.model.mixers.mla import MLA as MLA
from hybridlm.model.mixers.mla import MLAConfig as MLAConfig
from hybridlm.model.mixers.rg_lru import RGLRU as RGLRU
from hybridlm.model.mixers.rg_lru import RGLRUConfig as RGLRUConfig
from hybridlm.model.mixers.rwkv6 import RWKV6 as RWKV6
from hybridlm.model.mixers.rwkv6 import RWKV6Config as RWKV6Config
