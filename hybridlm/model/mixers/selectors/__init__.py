"""Selectors of blocks. Importing this package registers every kind."""

from hybridlm.model.mixers.selectors.bound import BoundSelector as BoundSelector
from hybridlm.model.mixers.selectors.bound import BoundSelectorConfig as BoundSelectorConfig
from hybridlm.model.mixers.selectors.compressed import CompressedSelector as CompressedSelector
from hybridlm.model.mixers.selectors.compressed import CompressedSelectorConfig as CompressedSelectorConfig
from hybridlm.model.mixers.selectors.entmax import EntmaxSelector as EntmaxSelector
from hybridlm.model.mixers.selectors.entmax import EntmaxSelectorConfig as EntmaxSelectorConfig
from hybridlm.model.mixers.selectors.gate import GateSelector as GateSelector
from hybridlm.model.mixers.selectors.gate import GateSelectorConfig as GateSelectorConfig
from hybridlm.model.mixers.selectors.index_heads import IndexHeadsSelector as IndexHeadsSelector
from hybridlm.model.mixers.selectors.index_heads import IndexHeadsSelectorConfig as IndexHeadsSelectorConfig
from hybridlm.model.mixers.selectors.landmark import LandmarkSelector as LandmarkSelector
from hybridlm.model.mixers.selectors.landmark import LandmarkSelectorConfig as LandmarkSelectorConfig
from hybridlm.model.mixers.selectors.mean import MeanSelector as MeanSelector
from hybridlm.model.mixers.selectors.mean import MeanSelectorConfig as MeanSelectorConfig
