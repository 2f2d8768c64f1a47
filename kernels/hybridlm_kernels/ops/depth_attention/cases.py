"""Cases of attention over depth for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn, token_inputs
from hybridlm_kernels.ops.depth_attention import depth_attention

SOURCES = 5  # the embedding, finished blocks and the running sum in the middle of Kimi K3

CASES: list[OperationCases] = [
    ([CheckCase("depth_attention", "3 sources", depth_attention,
                lambda: randn(query=(48,), sources=(3, 2, 40, 48)), {"eps": 1e-6})],
     [BenchCase("5 sources", depth_attention,
                token_inputs(lambda s: {"query": (s.model_dim,), "sources": (SOURCES, s.tokens, s.model_dim)}),
                lambda s: 6.0 * SOURCES * s.tokens * s.model_dim, ("query", "sources"), {"eps": 1e-6})]),
]
