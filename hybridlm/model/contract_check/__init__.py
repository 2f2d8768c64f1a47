"""The contract of mixers and feed-forwards as checks that run: `hybridlm check KIND`, and the test suite.

    subject.py           the mixer or feed-forward that is checked, and how it is built and run
    verdicts.py          running the checks: passed, failed or skipped, each with a reason
    computation.py       causality, packed documents, decoding, gradients, recomputation, half precision
    initialisation.py    every tensor gets a value
    costs.py             parameters, FLOPs, state and activations: the config's numbers beside the built module
    executed_flops.py    FLOPs counted while a module runs
    context_parallel.py  rows cut into shards equal uncut rows
    thread_shards.py     the shards of one row as threads of this process
"""

from hybridlm.model.contract_check.subject import Subject as Subject
from hybridlm.model.contract_check.subject import small_context as small_context
from hybridlm.model.contract_check.suite import CHECKS as CHECKS
from hybridlm.model.contract_check.verdicts import ContractViolation as ContractViolation
from hybridlm.model.contract_check.verdicts import NotClaimed as NotClaimed
from hybridlm.model.contract_check.verdicts import Verdict as Verdict
from hybridlm.model.contract_check.verdicts import run_checks as run_checks
