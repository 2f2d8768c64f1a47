"""Residuals: how the branches of a model are joined. Importing this package registers every form."""

from hybridlm.model.residual.attention import AttentionResidualConfig as AttentionResidualConfig
from hybridlm.model.residual.branch import BranchConfig as BranchConfig
from hybridlm.model.residual.contract import BRANCH_NAMES as BRANCH_NAMES
from hybridlm.model.residual.contract import RESIDUALS as RESIDUALS
from hybridlm.model.residual.contract import BranchName as BranchName
from hybridlm.model.residual.contract import Residual as Residual
from hybridlm.model.residual.contract import ResidualBranch as ResidualBranch
from hybridlm.model.residual.contract import ResidualConfig as ResidualConfig
from hybridlm.model.residual.contract import build_branch_norm as build_branch_norm
from hybridlm.model.residual.contract import build_residual as build_residual
from hybridlm.model.residual.contract import build_residual_branch as build_residual_branch
from hybridlm.model.residual.contract import register_residual as register_residual
from hybridlm.model.residual.gated import GatedReadConfig as GatedReadConfig
from hybridlm.model.residual.hyper import HyperConfig as HyperConfig
from hybridlm.model.residual.ihc import IHCConfig as IHCConfig
from hybridlm.model.residual.mhc import MHCConfig as MHCConfig
from hybridlm.model.residual.mhc import SinglePassMHCConfig as SinglePassMHCConfig
from hybridlm.model.residual.single import SingleResidualConfig as SingleResidualConfig
