"""Probes: small tasks that tell mixers apart where the loss does not. See docs/evaluation.md.

A probe is one file with a class and its registration. Those of this folder are imported here; one of your own is
imported by `--import FILE`.
"""

from hybridlm.evaluation.probes.base import IGNORE as IGNORE
from hybridlm.evaluation.probes.base import PROBES as PROBES
from hybridlm.evaluation.probes.base import Probe as Probe
from hybridlm.evaluation.probes.base import ProbeBatch as ProbeBatch
from hybridlm.evaluation.probes.base import Score as Score
from hybridlm.evaluation.probes.base import make_probe as make_probe
from hybridlm.evaluation.probes.base import register_probe as register_probe
from hybridlm.evaluation.probes.copying import Copy as Copy
from hybridlm.evaluation.probes.copying import SelectiveCopy as SelectiveCopy
from hybridlm.evaluation.probes.needle import Needle as Needle
from hybridlm.evaluation.probes.ngram import InContextNGram as InContextNGram
from hybridlm.evaluation.probes.recall import MultiQueryRecall as MultiQueryRecall
from hybridlm.evaluation.probes.states import ModularArithmetic as ModularArithmetic
from hybridlm.evaluation.probes.states import Parity as Parity
from hybridlm.evaluation.probes.states import Permutations as Permutations
from hybridlm.evaluation.probes.tracking import VariableTracking as VariableTracking
from hybridlm.evaluation.probes.updates import KeyValueUpdates as KeyValueUpdates
