"""Cases of residual streams for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn, token_inputs
from hybridlm_kernels.ops.streams import read_streams, write_streams

STREAMS = 4  # as in the published models

CASES: list[OperationCases] = [
    ([CheckCase("read_streams", "4 streams", read_streams, lambda: randn(streams=(3, 40, 4, 48), read=(3, 40, 4)))],
     [BenchCase("4 streams", read_streams,
                token_inputs(lambda s: {"streams": (s.tokens, STREAMS, s.model_dim), "read": (s.tokens, STREAMS)}),
                lambda s: 2.0 * STREAMS * s.tokens * s.model_dim, ("streams", "read"))]),
    ([CheckCase("write_streams", "4 streams, mixed", write_streams,
                lambda: randn(streams=(3, 40, 4, 48), carry=(3, 40, 4, 4), write=(3, 40, 4), output=(3, 40, 48))),
      CheckCase("write_streams", "3 streams, unmixed", write_streams,
                lambda: randn(streams=(3, 40, 3, 48), write=(3, 40, 3), output=(3, 40, 48)), {"carry": None})],
     [BenchCase("4 streams, mixed", write_streams,
                token_inputs(lambda s: {"streams": (s.tokens, STREAMS, s.model_dim),
                                        "carry": (s.tokens, STREAMS, STREAMS), "write": (s.tokens, STREAMS),
                                        "output": (s.tokens, s.model_dim)}),
                lambda s: 2.0 * STREAMS * (STREAMS + 1) * s.tokens * s.model_dim,
                ("streams", "carry", "write", "output"))]),
]
