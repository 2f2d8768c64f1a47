"""Operations on tensors for hybrid language models: mixers, routing, losses, each with its backends."""

from .decay_attention import decay_attention as decay_attention
from .delta_rule import delta_rule as delta_rule
from .packing import CuSeqlens as CuSeqlens
from .registry import KernelUnavailable as KernelUnavailable
from .short_conv import short_conv as short_conv
