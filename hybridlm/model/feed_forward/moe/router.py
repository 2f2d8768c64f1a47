"""The router of a mixture of experts: scores, group-limited selection, balance.

B rows, T tokens, N = B*T, D model width, E experts, A experts per token, G groups of M experts, R documents.
s: scores; b: correction bias; the sets and symbols are those of DeepSeek-V3, section 2.1.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.balance import balance_loss
from hybridlm.model.feed_forward.moe.config import MoEConfig
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.parameter_roles import ParameterRole, matrix_role
from hybridlm.model.sequence import SequenceInfo

MAX_BIAS_STEP = 0.01  # of a score in 0..1; larger steps overshoot the spread of scores among tokens in deeper models
TABLE_ROWS = 4096  # token ids whose experts are drawn at once
NORM_EPS = 1e-20  # sigmoid scores of a token's experts may all be tiny


class Router(nn.Module):
    """Chooses A of E experts for each token. Scores, bias and weights are fp32 whatever surrounds them.

    `load` counts the tokens each expert got since the last optimizer step (int64, not saved): ranks add theirs up
    before `balance`.

    Args:
        config: of the mixture.
        hidden_size: width D of the tokens.
        hashed_tokens: size of the vocabulary whose ids choose the experts, by the buffer `table` [V, A], which starts
            with distinct random experts for each id and does not learn; None: scores choose.
    """

    weight: nn.Parameter
    table: Tensor | None
    bias: Tensor | None
    load: Tensor
    quantiles: Tensor | None

    def __init__(self, config: MoEConfig, hidden_size: int, hashed_tokens: int | None = None):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        has_bias = config.has_bias and hashed_tokens is None
        self.register_buffer("bias", torch.zeros(config.num_experts) if has_bias else None)
        table = None
        if hashed_tokens is not None:
            table = torch.zeros(hashed_tokens, config.num_experts_per_tok, dtype=torch.int64)
        self.register_buffer("table", table)
        self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)
        quantile = has_bias and config.bias_update == "quantile"  # sums over micro batches, and their number last
        self.register_buffer("quantiles", torch.zeros(config.num_experts + 1) if quantile else None, persistent=False)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return {"weight": matrix_role(self.config.num_experts, self.hidden_size, "router")}

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        self.load.zero_()
        if self.quantiles is not None:
            self.quantiles.zero_()
        if self.bias is not None:
            self.bias.zero_()
        if self.table is not None:
            for rows in self.table.split(TABLE_ROWS):
                draw = torch.rand(len(rows), self.config.num_experts, device=rows.device)
                rows.copy_(draw.topk(self.config.num_experts_per_tok, dim=-1).indices)

    @property
    def moves_bias(self) -> bool:
        """Whether the bias follows the loads: it has a rate, and the weights beside it train."""
        # Not as an attribute: under ZeRO-3 that brings the weight together, and not every rank may ask for it.
        weight = next(p for name, p in self.named_parameters() if name == "weight")
        return self.bias is not None and self.config.updates_bias and weight.requires_grad

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor, Aux]:
        """Choose the experts of every token.

        Returns:
            Ids [N, A], their weights [N, A], and in training the losses and statistics of the layer.
        """
        logits_NE = self.logits(x_BTD)
        s_NE, ids_NA, weights_NA = self.choose(logits_NE, self._table_ids(seq))
        return ids_NA, weights_NA, self.aux(logits_NE, s_NE, ids_NA, seq) if self.training else {}

    def _table_ids(self, seq: SequenceInfo) -> Tensor | None:
        """Ids of the experts that the table has for the tokens, [N, A]; None without a table."""
        if self.table is None:
            return None
        if seq.token_ids_BT is None:
            raise ValueError("feed_forward.hash_layers choose experts by token ids: run the model with input_ids, not "
                             "inputs_embeds")
        return self.table[seq.token_ids_BT.reshape(-1).to(self.table.device)]

    def choose(self, logits_NE: Tensor, ids_NA: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [N, E], ids [N, A] of the chosen experts (those given, if any), and their weights [N, A]."""
        if self.config.router == "softmax":
            s_NE = torch.softmax(logits_NE, dim=-1)
        elif self.config.router == "sigmoid":
            s_NE = torch.sigmoid(logits_NE)
        else:
            s_NE = F.softplus(logits_NE).sqrt()
        if ids_NA is None:
            ids_NA = self.select(s_NE)
        weights_NA = s_NE.gather(1, ids_NA)
        if self.config.norm_topk_prob:
            total_N1 = weights_NA.sum(-1, keepdim=True)
            weights_NA = weights_NA / (total_N1 if self.config.router == "softmax" else total_N1 + NORM_EPS)
        return s_NE, ids_NA, weights_NA * self.config.routed_scaling_factor

    def logits(self, x_BTD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            return F.linear(x_BTD.reshape(-1, x_BTD.shape[-1]).to(dtype), self.weight.to(dtype))

    @torch.no_grad()
    def select(self, s_NE: Tensor) -> Tensor:
        """Ids of the best A experts by s + b, out of the best groups by the sum of their two best."""
        config = self.config
        choice_NE = s_NE if self.bias is None else s_NE + self.bias
        if config.topk_groups < config.num_groups:
            choice_NGM = choice_NE.unflatten(1, (config.num_groups, -1))
            best_NG = choice_NGM.topk(min(2, choice_NGM.shape[-1]), dim=-1).values.sum(-1)
            kept = best_NG.topk(config.topk_groups, dim=-1, sorted=False).indices
            dropped_NG = torch.ones_like(best_NG, dtype=torch.bool).scatter_(1, kept, False)
            choice_NE = choice_NGM.masked_fill(dropped_NG[..., None], -torch.inf).flatten(1)
        return choice_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    def aux(self, logits_NE: Tensor, s_NE: Tensor, ids_NA: Tensor, seq: SequenceInfo) -> Aux:
        aux: Aux = {}
        p_NE = s_NE if self.config.router == "softmax" else s_NE / (s_NE.sum(-1, keepdim=True) + NORM_EPS)
        if self.config.balance_loss and self.table is None:
            aux["loss/balance"] = self.balance_loss(s_NE, p_NE, ids_NA, seq)
        if self.config.router_z_loss:
            aux["loss/router_z"] = seq.mean_over_text(torch.logsumexp(logits_NE, dim=-1).square())
        with torch.no_grad():
            chosen = seq.text_of(ids_NA).flatten()
            load_E = torch.zeros_like(self.load).index_add_(0, chosen, torch.ones_like(chosen))
            entropy = -seq.mean_over_text(torch.xlogy(p_NE, p_NE).sum(-1))
            aux["load"] = load_E
            if self.quantiles is not None:
                aux["quantiles"] = self.score_quantiles(seq.text_of(s_NE))
            aux["stat/max_violation"] = load_E.max() * load_E.shape[0] / load_E.sum().clamp(min=1) - 1
            aux["stat/dead_experts"] = (load_E == 0).sum().float()
            aux["stat/router_entropy"] = entropy / math.log(max(2, p_NE.shape[1]))
        return aux

    def balance_loss(self, s_NE: Tensor, p_NE: Tensor, ids_NA: Tensor, seq: SequenceInfo) -> Tensor:
        """The balance loss per document, averaged over tokens; 1 when balanced (equations 17 to 20).

        The selection here knows neither bias nor groups, as in the paper: the loss pulls on what the scores alone would
        choose. P is the mean of the normalised scores.
        """
        if self.bias is not None or self.config.topk_groups < self.config.num_groups:
            ids_NA = s_NE.detach().topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices
        return balance_loss(p_NE, ids_NA, seq)

    @torch.no_grad()
    def score_quantiles(self, s_NE: Tensor) -> Tensor:
        """The bias of each expert at which it would have got its share of these tokens, [E + 1], and a one.

        An expert is chosen where s + b passes the token's threshold, its (A+1)-th largest s + b. With these thresholds,
        minus the (A N / E + 1)-th largest s - threshold is the bias that leaves the expert A N / E tokens.
        """
        assert self.bias is not None
        tokens, experts = s_NE.shape
        if tokens == 0:  # a shard of padding alone
            return s_NE.new_zeros(experts + 1).float()
        per_token = self.config.num_experts_per_tok
        threshold_N1 = (s_NE + self.bias).topk(per_token + 1, dim=-1).values[:, -1:]
        share = max(1, min(tokens, tokens * per_token // experts + 1))
        quantile_E = (s_NE - threshold_N1).topk(share, dim=0, sorted=True).values[-1]
        return torch.cat([-quantile_E, quantile_E.new_ones(1)]).float()

    def record(self, aux: Aux) -> None:
        """Add up the loads, and the quantiles of a forward."""
        self.load += aux["load"]
        if self.quantiles is not None:
            self.quantiles += aux["quantiles"]

    def step_sums(self) -> list[Tensor]:
        """The sums since the last optimizer step, which ranks add up before `balance`."""
        return [self.load] if self.quantiles is None else [self.load, self.quantiles]

    @torch.no_grad()
    def balance(self, update: bool = True) -> None:
        """Move the bias against the loads, and set these to zero.

        With a rate u: b_i += u * sign(mean load - load_i), as DeepSeek-V3 does. Without one the steps are in proportion
        to the violation, b_i += MAX_BIAS_STEP * clip(1 - load_i / mean load, -1, 1) (the variant of Wang et al. 2024,
        Auxiliary-loss-free load balancing, clipped): as long as the scores drift, in the first hundreds of steps, they
        are as large as the drift, and near balance they vanish instead of pushing experts to and fro.

        With `bias_update: quantile` the bias becomes the mean of `score_quantiles` over the micro batches of all ranks,
        which is one alternation per step of the allocation of Su 2026 (kexue.fm, 11619).

        Args:
            update: False after a skipped optimizer step: the bias stays.
        """
        if update and self.bias is not None and self.moves_bias:
            total = self.load.sum()
            experts = self.load.shape[0]
            rate = self.config.bias_update_rate
            if self.quantiles is not None:
                if self.quantiles[-1] > 0:
                    self.bias.copy_(self.quantiles[:-1] / self.quantiles[-1])
            elif rate is None:
                violation_E = (total - experts * self.load) / total.clamp(min=1)
                self.bias += MAX_BIAS_STEP * violation_E.clamp(-1, 1)
            else:
                self.bias += rate * torch.sign(total - experts * self.load)
        for total in self.step_sums():
            total.zero_()
