"""The balance loss of routers: of tokens to experts, or to memories.

N tokens, E choices, A chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.sequence import SequenceInfo


def balance_loss(p_NE: Tensor, ids_NA: Tensor, seq: SequenceInfo) -> Tensor:
    """The loss sum_i f_i P_i per document, averaged over tokens; 1 when the choices are balanced.

    f_i = E/(A T) * tokens that chose i, T tokens in the document; P_i the mean of p. The mean over tokens of
    <f_document, p_token> is this sum without a loop over documents. (DeepSeek-V3 2024, equations 17 to 20; with softmax
    scores the loss of Switch Transformer for top-A, by document.)

    Args:
        p_NE: probabilities of the choices, of all tokens; padding does not count.
        ids_NA: the choices, likewise.
        seq: the documents of the tokens.

    >>> seq = SequenceInfo.make(1, 2, torch.device("cpu"))
    >>> balance_loss(torch.full((2, 2), 0.5), torch.tensor([[0], [1]]), seq)
    tensor(1.)
    """
    choices = p_NE.shape[1]
    document_N, documents = seq.documents()
    with torch.no_grad():
        cell = seq.text_of(document_N[:, None] * choices + ids_NA).flatten()
        count_RE = torch.zeros(documents * choices, dtype=torch.int64, device=p_NE.device)
        count_RE = seq.all_sum(count_RE.index_add_(0, cell, torch.ones_like(cell)).view(documents, choices))
        f_RE = choices * count_RE.to(p_NE.dtype) / count_RE.sum(-1, keepdim=True).clamp(min=1)
    return seq.mean_over_text((f_RE[document_N] * p_NE).sum(-1))
