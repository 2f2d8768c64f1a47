"""Operations on tensors for hybrid language models: mixers, routing, losses, each with its backends."""

from hybridlm_kernels.ops.attention import attention as attention
from hybridlm_kernels.ops.attention_total import attention_total as attention_total
from hybridlm_kernels.ops.delta_rule import delta_rule as delta_rule
from hybridlm_kernels.ops.forgetting_attention import forgetting_attention as forgetting_attention
from hybridlm_kernels.ops.indexer_kl import attention_recall as attention_recall
from hybridlm_kernels.ops.indexer_kl import indexer_kl as indexer_kl
from hybridlm_kernels.ops.linear_attention import linear_attention as linear_attention
from hybridlm_kernels.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from hybridlm_kernels.ops.linear_scan import linear_scan as linear_scan
from hybridlm_kernels.ops.moe import moe_experts as moe_experts
from hybridlm_kernels.ops.norm import gated_rms_norm as gated_rms_norm
from hybridlm_kernels.ops.norm import l2_norm as l2_norm
from hybridlm_kernels.ops.norm import rms_norm as rms_norm
from hybridlm_kernels.ops.pooled_indexer import Pools as Pools
from hybridlm_kernels.ops.pooled_indexer import pooled_indexer_kl as pooled_indexer_kl
from hybridlm_kernels.ops.pooled_indexer import pooled_topk as pooled_topk
from hybridlm_kernels.ops.rotary import rotary as rotary
from hybridlm_kernels.ops.selective_scan import selective_scan as selective_scan
from hybridlm_kernels.ops.short_conv import short_conv as short_conv
from hybridlm_kernels.ops.sparse_attention import indexer_topk as indexer_topk
from hybridlm_kernels.ops.sparse_attention import sparse_attention as sparse_attention
from hybridlm_kernels.ops.swiglu import swiglu as swiglu
from hybridlm_kernels.ops.value_decay_attention import value_decay_attention as value_decay_attention
from hybridlm_kernels.packing import CuSeqlens as CuSeqlens
from hybridlm_kernels.recurrence.gates import Gate as Gate
from hybridlm_kernels.registry import KernelUnavailable as KernelUnavailable
