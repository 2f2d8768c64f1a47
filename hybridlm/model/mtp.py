"""Multi-token prediction, DeepSeek-V3 form (section 2.2). B rows, T tokens, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.block import Block
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual import build_residual
from hybridlm.model.sequence import SequenceInfo


class MTPModule(nn.Module):
    """Module of depth k: it makes the hidden state that predicts token i+k+1 from h_i of depth k-1 and token i+k.

        h'_i = eh_proj [enorm(emb(t_{i+k})); hnorm(h_i)]        embedding first
        h_i  = norm(block(h'))                                  block: causal over i, inside its document

    Names and order are those of the published weights (enorm, hnorm, eh_proj, one block, shared_head.norm = norm);
    embedding and output head are the main model's. As in transformers' `MtpModel`, the h of depth 0 is the main model's
    hidden state after its final norm, and that of depth k is the output of `norm`. The block has the mixer named by
    `mtp.mixer` (by default the last layer's) and the feed-forward of the last layer. Its positions are those of i,
    not of i+k: rotary attention sees differences alone.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.hidden_size
        self.enorm = RMSNorm.of(config.norm, hidden)
        self.hnorm = RMSNorm.of(config.norm, hidden)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        stream = config.mtp_context()
        self.block = Block(config, config.mtp.mixer or config.layers()[-1], config.num_layers - 1, stream)
        self.norm = RMSNorm.of(config.norm, hidden)
        self.residual = build_residual(config.residual, stream)

    def forward(self, h_BTD: Tensor, seq: SequenceInfo, embedding_BTD: Tensor) -> tuple[Tensor, dict[str, Aux]]:
        """Run the block of this depth.

        Args:
            h_BTD: normed hidden states [B, T, D] of the depth before (depth 0: the main model).
            seq: positions and documents of the tokens i.
            embedding_BTD: embeddings [B, T, D] of the tokens i + k.

        Returns:
            The normed hidden states [B, T, D] of this depth, and the aux of the block's branches.
        """
        x_BTD = self.eh_proj(torch.cat([self.enorm(embedding_BTD), self.hnorm(h_BTD)], dim=-1))
        stream, aux = self.block(self.residual.start(x_BTD), seq)
        return self.norm(self.residual.end(stream)), aux
