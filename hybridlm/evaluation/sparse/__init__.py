"""Sparse attention tried on trained models. Importing this package registers every method."""

from hybridlm.evaluation.sparse import clusters as clusters
from hybridlm.evaluation.sparse import double_sparsity as double_sparsity
from hybridlm.evaluation.sparse import eviction as eviction
from hybridlm.evaluation.sparse import fixed as fixed
from hybridlm.evaluation.sparse import flex_prefill as flex_prefill
from hybridlm.evaluation.sparse import magic_pig as magic_pig
from hybridlm.evaluation.sparse import minference as minference
from hybridlm.evaluation.sparse import pages as pages
from hybridlm.evaluation.sparse import resa as resa
from hybridlm.evaluation.sparse import search as search
from hybridlm.evaluation.sparse import sparge as sparge
from hybridlm.evaluation.sparse import xattention as xattention
from hybridlm.evaluation.sparse.contract import SPARSE_METHODS as SPARSE_METHODS
from hybridlm.evaluation.sparse.contract import BudgetMethod as BudgetMethod
from hybridlm.evaluation.sparse.contract import KeyReader as KeyReader
from hybridlm.evaluation.sparse.contract import PromptMethod as PromptMethod
from hybridlm.evaluation.sparse.contract import SparseMethod as SparseMethod
from hybridlm.evaluation.sparse.contract import make_sparse_method as make_sparse_method
from hybridlm.evaluation.sparse.contract import register_sparse_method as register_sparse_method
from hybridlm.evaluation.sparse.measure import SparseTally as SparseTally
from hybridlm.evaluation.sparse.measure import sparse_softmax as sparse_softmax
