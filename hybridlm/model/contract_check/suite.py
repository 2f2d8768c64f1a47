"""All checks by name, in the order in which they are run."""

from __future__ import annotations

from hybridlm.model.contract_check import computation, context_parallel, costs, initialisation
from hybridlm.model.contract_check.verdicts import Check

CHECKS: dict[str, Check] = {
    "initialisation": initialisation.check_initialisation,
    "causality": computation.check_causality,
    "packed documents": computation.check_packed_documents,
    "decoding": computation.check_decoding,
    "gradients": computation.check_gradients,
    "every parameter learns": computation.check_every_parameter_learns,
    "activation checkpointing": computation.check_activation_checkpointing,
    "training after inference": computation.check_training_after_inference,
    "fp32 parameters": computation.check_fp32_parameters,
    "half precision": computation.check_half_precision,
    "parameter count": costs.check_parameter_count,
    "parameter roles": costs.check_parameter_roles,
    "flops": costs.check_flops,
    "state bytes": costs.check_state_bytes,
    "activation bytes": costs.check_activation_bytes,
    "context parallel": context_parallel.check_context_parallel,
    "shard traffic": context_parallel.check_shard_traffic,
}
