"""Operations on tensors for hybrid language models: mixers, routing, losses, each with its backends."""

from .attention import attention as attention
from .decay_attention import decay_attention as decay_attention
from .delta_rule import delta_rule as delta_rule
from .gates import Gate as Gate
from .indexer_kl import attention_recall as attention_recall
from .indexer_kl import indexer_kl as indexer_kl
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .moe import moe_experts as moe_experts
from .norm import gated_rms_norm as gated_rms_norm
from .norm import l2_norm as l2_norm
from .norm import rms_norm as rms_norm
from .packing import CuSeqlens as CuSeqlens
from .pooled_indexer import Pools as Pools
from .pooled_indexer import pooled_indexer_kl as pooled_indexer_kl
from .pooled_indexer import pooled_topk as pooled_topk
from .registry import KernelUnavailable as KernelUnavailable
from .rotary import rotary as rotary
from .short_conv import short_conv as short_conv
from .sparse_attention import indexer_topk as indexer_topk
from .sparse_attention import sparse_attention as sparse_attention
from .swiglu import swiglu as swiglu
