"""Sparse attention tried on trained models. Importing this package registers every method."""

from hybridlm.evaluation.sparse import eviction as eviction
from hybridlm.evaluation.sparse import fixed as fixed
from hybridlm.evaluation.sparse import pages as pages
from hybridlm.evaluation.sparse import search as search
from hybridlm.evaluation.sparse.contract import SPARSE_METHODS as SPARSE_METHODS
from hybridlm.evaluation.sparse.contract import KeyReader as KeyReader
from hybridlm.evaluation.sparse.contract import SparseMethod as SparseMethod
from hybridlm.evaluation.sparse.contract import make_sparse_method as make_sparse_method
from hybridlm.evaluation.sparse.contract import register_sparse_method as register_sparse_method
from hybridlm.evaluation.sparse.measure import SparseTally as SparseTally
from hybridlm.evaluation.sparse.measure import sparse_softmax as sparse_softmax
