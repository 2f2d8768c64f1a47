"""Optimizers by kind, one file each. Importing this package registers every kind. See docs/training.md."""

from hybridlm.optimizers.adafactor import AdafactorConfig as AdafactorConfig
from hybridlm.optimizers.adamw import AdamWConfig as AdamWConfig
from hybridlm.optimizers.contract import OPTIMIZERS as OPTIMIZERS
from hybridlm.optimizers.contract import MatrixOptimizer as MatrixOptimizer
from hybridlm.optimizers.contract import OptimizerConfig as OptimizerConfig
from hybridlm.optimizers.contract import register_optimizer as register_optimizer
from hybridlm.optimizers.lion import LionConfig as LionConfig
from hybridlm.optimizers.lr_schedule import LRScheduleConfig as LRScheduleConfig
from hybridlm.optimizers.muon import MuonConfig as MuonConfig
from hybridlm.optimizers.optimizer_set import OptimizerSet as OptimizerSet
from hybridlm.optimizers.optimizer_set import build_optimizer as build_optimizer
from hybridlm.optimizers.per_matrix import PerMatrixOptimizer as PerMatrixOptimizer
