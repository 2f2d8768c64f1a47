"""Sequence mixers. Importing this package registers every kind."""

from hybridlm.model.mixers.attention import Attention as Attention
from hybridlm.model.mixers.attention import AttentionConfig as AttentionConfig
from hybridlm.model.mixers.base import MIXERS as MIXERS
from hybridlm.model.mixers.base import SequenceMixer as SequenceMixer
from hybridlm.model.mixers.base import build_mixer as build_mixer
from hybridlm.model.mixers.base import register_mixer as register_mixer
from hybridlm.model.mixers.decay import Decay as Decay
from hybridlm.model.mixers.decay import DecayConfig as DecayConfig
from hybridlm.model.mixers.delta_rule import DeltaRule as DeltaRule
from hybridlm.model.mixers.delta_rule import DeltaRuleConfig as DeltaRuleConfig
from hybridlm.model.mixers.indexed import IndexedMixer as IndexedMixer
from hybridlm.model.mixers.indexer import IndexerConfig as IndexerConfig
from hybridlm.model.mixers.mla import MLA as MLA
from hybridlm.model.mixers.mla import MLAConfig as MLAConfig
