"""Small kinds for tests of the contracts: a mixer that leaves values, one that reads them, and a feed-forward that
looks at the token before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import TokenCache
from hybridlm.model.feed_forward import FEED_FORWARDS
from hybridlm.model.feed_forward.contract import FeedForward, FeedForwardConfig
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.mixers import MIXERS, SequenceMixer
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.sharing import SharedKind, SharedRead

KEYS = SharedKind("the keys of all tokens", gradient=True, context_parallel="gathered")
GATE = SharedKind("the gate of each token", gradient=True)
FIXED = SharedKind("a gate that does not learn", gradient=False)


@dataclass(kw_only=True)
class SourceConfig(MixerConfig):
    kind: str = "test_source"

    def leaves(self, context):
        return KEYS, GATE, FIXED

    def num_params(self, context):
        return context.hidden_size**2

    def flops_per_token(self, context, context_length):
        return {"projections": 2.0 * self.num_params(context)}

    def state_bytes(self, context, context_length, element_bytes=2):
        return context_length * context.hidden_size * element_bytes

    def check_context_parallel(self, shards, length):
        pass


@dataclass(kw_only=True)
class ReaderConfig(MixerConfig):
    kind: str = "test_reader"
    source: int | None = None  # null: the nearest

    def reads(self, context):
        return [SharedRead(kind, self.source, "source") for kind in (KEYS, GATE, FIXED)]

    def num_params(self, context):
        return context.hidden_size**2

    def flops_per_token(self, context, context_length):
        return {"projections": 2.0 * self.num_params(context)}

    def state_bytes(self, context, context_length, element_bytes=2):
        return 0

    def check_context_parallel(self, shards, length):
        pass


class Source(SequenceMixer):
    """y = W x, and leaves W x of all tokens, its sigmoid and a gate without gradient."""

    def __init__(self, config, context):
        super().__init__()
        self.layer_index, self.is_read = context.layer_index, context.is_read(KEYS)
        self.proj = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x_BTD, seq, state=None):
        y_BTD = self.proj(x_BTD)
        keys_BSD = y_BTD if state is None else state.append(y_BTD)
        if self.is_read:
            seq.leave(KEYS, self.layer_index, keys_BSD)
            seq.leave(GATE, self.layer_index, y_BTD.sigmoid())
            seq.leave(FIXED, self.layer_index, {"gate": y_BTD.tanh()})
        return y_BTD, {}

    def new_state(self, batch, max_length):
        return TokenCache(max_length)

    def init_weights(self, std):
        nn.init.normal_(self.proj.weight, std=std)


class Reader(SequenceMixer):
    """y = W x * gate + the mean of the keys of the document so far, times the gate without gradient."""

    def __init__(self, config, context):
        super().__init__()
        self.source = context.source_of(config.reads(context)[0])
        self.proj = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x_BTD, seq, state=None):
        keys_BSD, fixed = seq.read(KEYS, self.source), seq.read(FIXED, self.source)["gate"]
        mean_BTD = mean_so_far(keys_BSD, x_BTD.shape[1], seq.history_borders)
        return self.proj(x_BTD) * seq.read(GATE, self.source) + mean_BTD * fixed, {}

    def new_state(self, batch, max_length):
        return None

    def init_weights(self, std):
        nn.init.normal_(self.proj.weight, std=std)


def mean_so_far(keys_BSD: Tensor, queries: int, borders) -> Tensor:
    """[B, T, D]: for each of the last `queries` tokens the mean over its document up to itself."""
    batch, length = keys_BSD.shape[:2]
    document_BS = torch.zeros(batch, length) if borders is None else borders.document_ids().view(batch, length)
    index_S = torch.arange(length)
    seen_BTS = (document_BS[:, -queries:, None] == document_BS[:, None]) & (index_S[-queries:, None] >= index_S)
    return seen_BTS.to(keys_BSD.dtype) @ keys_BSD / seen_BTS.sum(-1, keepdim=True)


@dataclass(kw_only=True)
class TokenShiftConfig(FeedForwardConfig):
    kind: str = "test_token_shift"
    keeps_state = True

    def num_params(self, context, *, active=False):
        return context.hidden_size**2 + context.hidden_size

    def flops_per_token(self, context):
        return {"projections": 2.0 * context.hidden_size**2}

    def state_bytes(self, context, context_length, element_bytes=2):
        return context.hidden_size * element_bytes

    def check_context_parallel(self, shards, length):
        pass

    def shard_traffic(self, context, rows, length, shards, element_bytes=2):
        return [ShardTraffic("from_previous", rows * context.hidden_size * element_bytes,
                             rows * context.hidden_size * element_bytes)]


class LastToken:
    """The last input of each row."""

    def __init__(self) -> None:
        self.x_B1D: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.x_B1D is None else self.x_B1D.numel() * self.x_B1D.element_size()


class TokenShift(FeedForward):
    """y_t = W (x_t + mix * x_{t-1}), where the token before is one of the same document."""

    fp32_parameters = ("mix",)

    def __init__(self, config, context):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(context.hidden_size))
        self.proj = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x_BTD, seq, state=None):
        if state is not None and state.x_B1D is not None:
            first_B1D = state.x_B1D
        else:
            first_B1D = torch.zeros_like(x_BTD[:, :1]) if seq.shard is None else seq.shard.tail(x_BTD, 1)
        before_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], 1)
        before_BTD = torch.where(seq.positions_BT[..., None] > 0, before_BTD, 0.0)
        if state is not None:
            state.x_B1D = x_BTD[:, -1:].detach().clone()
        return self.proj(x_BTD + (self.mix * before_BTD).to(x_BTD.dtype)), {}

    def new_state(self, batch, max_length):
        return LastToken()

    def init_weights(self, std):
        nn.init.normal_(self.mix, std=1.0)
        nn.init.normal_(self.proj.weight, std=std)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The kinds of this file can be built inside the block."""
    MIXERS.register("test_source", SourceConfig, Source)
    MIXERS.register("test_reader", ReaderConfig, Reader)
    FEED_FORWARDS.register("test_token_shift", TokenShiftConfig, TokenShift)
    try:
        yield
    finally:
        del MIXERS["test_source"], MIXERS["test_reader"], FEED_FORWARDS["test_token_shift"]
