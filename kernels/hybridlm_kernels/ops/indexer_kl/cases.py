"""Cases of the indexer's loss and of its recall for the doctor and the tests."""

from hybridlm_kernels.cases import CheckCase, OperationCases, randn
from hybridlm_kernels.ops.indexer_kl import attention_recall, indexer_kl
from hybridlm_kernels.random_inputs import random_index_inputs, random_selection

MAIN = ("main_q", "main_k")
CASES: list[OperationCases] = [
    ([CheckCase("indexer_kl", "all keys, packed", indexer_kl, random_index_inputs, {"cu_seqlens": [0, 1, 30, 70, 140]},
                fixed=MAIN),
      CheckCase("indexer_kl", "16 of 70 keys", indexer_kl,
                lambda: random_index_inputs() | {"indices": random_selection()}, fixed=MAIN)], []),
    ([CheckCase("attention_recall", "16 of 70 keys", attention_recall,
                lambda: randn(main_q=(2, 70, 4, 32), main_k=(2, 70, 2, 32)) | {"indices": random_selection()},
                fixed=MAIN)], []),
]
