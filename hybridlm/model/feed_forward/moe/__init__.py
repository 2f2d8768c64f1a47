"""Mixture of experts, a kind of several files: config, router, experts, and the mixture that joins them."""

from hybridlm.model.feed_forward.moe.config import MoEConfig as MoEConfig
from hybridlm.model.feed_forward.moe.experts import Experts as Experts
from hybridlm.model.feed_forward.moe.mixture import MixtureOfExperts as MixtureOfExperts
from hybridlm.model.feed_forward.moe.router import Router as Router
