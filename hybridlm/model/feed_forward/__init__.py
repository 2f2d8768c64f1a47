"""Feed-forwards: importing this package registers every kind."""

from hybridlm.model.feed_forward.contract import FEED_FORWARDS as FEED_FORWARDS
from hybridlm.model.feed_forward.contract import FeedForward as FeedForward
from hybridlm.model.feed_forward.contract import FeedForwardConfig as FeedForwardConfig
from hybridlm.model.feed_forward.contract import RoutedExperts as RoutedExperts
from hybridlm.model.feed_forward.contract import build_feed_forward as build_feed_forward
from hybridlm.model.feed_forward.contract import register_feed_forward as register_feed_forward
from hybridlm.model.feed_forward.dense import DenseConfig as DenseConfig
from hybridlm.model.feed_forward.dense import SwiGLU as SwiGLU
from hybridlm.model.feed_forward.moe import MixtureOfExperts as MixtureOfExperts
from hybridlm.model.feed_forward.moe import MoEConfig as MoEConfig
from hybridlm.model.feed_forward.no_feed_forward import NoFeedForward as NoFeedForward
from hybridlm.model.feed_forward.no_feed_forward import NoFeedForwardConfig as NoFeedForwardConfig
from hybridlm.model.feed_forward.rwkv_channel_mix import RWKVChannelMix as RWKVChannelMix
from hybridlm.model.feed_forward.rwkv_channel_mix import RWKVChannelMixConfig as RWKVChannelMixConfig
from hybridlm.model.feed_forward.squared_relu import SquaredReLU as SquaredReLU
from hybridlm.model.feed_forward.squared_relu import SquaredReLUConfig as SquaredReLUConfig
