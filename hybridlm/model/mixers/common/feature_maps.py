"""Feature maps of kernelised attention: phi(q) . phi(k) in place of exp(q . k), each causal and token by token.

No map looks at another token: neither a maximum over keys nor the length of the row.

B rows, T tokens, H heads, K dims per head, M random or learned directions, F features.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.parameter_roles import VECTOR, ParameterRole

Side = Literal["q", "k"]


class FeatureMap(nn.Module, abc.ABC):
    """The features of queries and of keys; a map may have parameters of its own for each of the two.

    Args:
        heads: heads H.
        head_dim: dims K of each query and key.
        count: what the map calls its size: directions M of a random or learned map, products of DPFP, the length of
            cosFormer; None is the map's own choice.
    """

    fp32_tensors_of_map: ClassVar[tuple[str, ...]] = ()  # names of tensors that stay in fp32
    has_count: ClassVar[bool] = False

    def __init__(self, heads: int, head_dim: int, count: int | None):
        super().__init__()
        self.heads, self.head_dim, self.count = heads, head_dim, count

    @classmethod
    def default_count(cls, head_dim: int) -> int:
        """The size of a map whose config names none."""
        return head_dim

    @classmethod
    @abc.abstractmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        """Features F per head."""

    @classmethod
    def num_params(cls, heads: int, head_dim: int, count: int) -> int:
        """Trained parameters of the map, for queries and keys together."""
        return 0

    @classmethod
    def flops(cls, heads: int, head_dim: int, count: int) -> float:
        """FLOPs per token of the map's matrix products, for the query and the key together."""
        return 0.0

    @abc.abstractmethod
    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        """The features [B, T, H, F].

        Args:
            x_BTHK: queries or keys, in fp32 at least.
            side: which of the two they are.
            positions_BT: position of each token in its document.
        """

    def reset_parameters(self) -> None:
        """Set parameters and buffers to their published start."""

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """One matrix per head, or vectors."""
        return {name: ParameterRole("expert_stack") if p.dim() == 3 else VECTOR for name, p in self.named_parameters()}


class EluPlusOne(FeatureMap):
    """elu(x) + 1, always positive (Katharopoulos et al. 2020, eq. 7)."""

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return head_dim

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        return F.elu(x_BTHK) + 1.0


class Relu(EluPlusOne):
    """max(x, 0)."""

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        return x_BTHK.relu()


class SoftmaxOverDims(EluPlusOne):
    """The softmax over the dims of a head (Liger)."""

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        return x_BTHK.softmax(-1)


class Dpfp(FeatureMap):
    """Products of [relu(x), relu(-x)] with itself rolled by 1 to `count` places (Schlag et al. 2021, eq. 37)."""

    has_count = True

    @classmethod
    def default_count(cls, head_dim: int) -> int:
        return min(4, 2 * head_dim - 1)

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return 2 * head_dim * count

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        both = torch.cat([x_BTHK.relu(), (-x_BTHK).relu()], -1)
        return torch.cat([both * both.roll(places, -1) for places in range(1, self.num_products + 1)], -1)

    @property
    def num_products(self) -> int:
        """Rolled products."""
        return self.default_count(self.head_dim) if self.count is None else self.count


class CosFormer(FeatureMap):
    """relu(x) times the cosine and the sine of pi i / 2 M at position i, counted from 1 (Qin et al. 2022, eq. 10).

    `count` is M: a configured length, never that of the row.
    """

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return 2 * head_dim

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        assert self.count is not None
        angle_BT11 = ((positions_BT + 1).to(x_BTHK.dtype) * (math.pi / (2 * self.count)))[..., None, None]
        positive = x_BTHK.relu()
        return torch.cat([positive * angle_BT11.cos(), positive * angle_BT11.sin()], -1)


class Taylor(FeatureMap):
    """1 + s + s^2 / 2 of s = q . k / sqrt(K) (Arora et al. 2024, Based, section 4.1).

    Of the products x_i x_j those with i < j are kept once, times sqrt(2): 1 + K + K (K + 1) / 2 features.
    """

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return 1 + head_dim + head_dim * (head_dim + 1) // 2

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        x_BTHK = x_BTHK * self.head_dim**-0.25
        return torch.cat([torch.ones_like(x_BTHK[..., :1]), x_BTHK, squares(x_BTHK) * 0.5**0.5], -1)


class Rebased(FeatureMap):
    """(q' . k')^2 / K, where q' and k' are LayerNorms with weights and biases of their own (Aksenov et al. 2024)."""

    fp32_tensors_of_map = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")

    def __init__(self, heads: int, head_dim: int, count: int | None):
        super().__init__(heads, head_dim, count)
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim, eps=1e-5) for _ in range(2))

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return head_dim * (head_dim + 1) // 2

    @classmethod
    def num_params(cls, heads: int, head_dim: int, count: int) -> int:
        return 4 * head_dim

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        norm = self.q_norm if side == "q" else self.k_norm
        return squares(norm(x_BTHK.to(norm.weight.dtype)).to(x_BTHK.dtype)) * self.head_dim**-0.5

    def reset_parameters(self) -> None:
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()


class Hedgehog(FeatureMap):
    """[softmax(W x), softmax(-W x)] over the features, one W per head (Zhang et al. 2024, section 4.1)."""

    def __init__(self, heads: int, head_dim: int, count: int | None):
        super().__init__(heads, head_dim, count)
        self.q_weight, self.k_weight = (nn.Parameter(torch.zeros(heads, head_dim, head_dim)) for _ in range(2))

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return 2 * head_dim

    @classmethod
    def num_params(cls, heads: int, head_dim: int, count: int) -> int:
        return 2 * heads * head_dim**2

    @classmethod
    def flops(cls, heads: int, head_dim: int, count: int) -> float:
        return 4.0 * heads * head_dim**2

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        y_BTHK = map_heads(x_BTHK, self.q_weight if side == "q" else self.k_weight)
        return torch.cat([y_BTHK.softmax(-1), (-y_BTHK).softmax(-1)], -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity."""
        for weight in (self.q_weight, self.k_weight):
            weight.copy_(torch.eye(self.head_dim, device=weight.device).expand_as(weight))


class T2R(FeatureMap):
    """relu(W x + b), one W and b per head (Kasai et al. 2021, eq. 4); `count` is the number of features."""

    fp32_tensors_of_map = ("q_bias", "k_bias")
    has_count = True

    def __init__(self, heads: int, head_dim: int, count: int | None):
        super().__init__(heads, head_dim, count)
        M = head_dim if count is None else count
        self.q_weight, self.k_weight = (nn.Parameter(torch.zeros(heads, M, head_dim)) for _ in range(2))
        self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(heads * M)) for _ in range(2))

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return count

    @classmethod
    def num_params(cls, heads: int, head_dim: int, count: int) -> int:
        return 2 * heads * count * (head_dim + 1)

    @classmethod
    def flops(cls, heads: int, head_dim: int, count: int) -> float:
        return 4.0 * heads * head_dim * count

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        weight, bias = (self.q_weight, self.q_bias) if side == "q" else (self.k_weight, self.k_bias)
        return (map_heads(x_BTHK, weight) + bias.to(x_BTHK.dtype).view(weight.shape[:2])).relu()

    def reset_parameters(self) -> None:
        """Weights and biases are uniform in +-K^-0.5, torch's start of a linear map."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.head_dim**-0.5), self.head_dim**-0.5)


class Performer(FeatureMap):
    """Positive random features of the softmax kernel, FAVOR+ (Choromanski et al. 2021, lemma 1).

    phi(x) = M^-1/2 (exp(w . x' - |x'|^2 / 2 - c) + 1e-4), x' = x K^-1/4, with orthogonal directions w that are drawn
    once. c is the largest exponent of a query, which cancels but for the 1e-4; keys have c = 0, because a maximum
    over them would look at later tokens.
    """

    fp32_tensors_of_map = ("omega",)
    has_count = True
    omega: Tensor

    def __init__(self, heads: int, head_dim: int, count: int | None):
        super().__init__(heads, head_dim, count)
        self.register_buffer("omega", torch.zeros(self.default_count(head_dim) if count is None else count, head_dim))

    @classmethod
    def default_count(cls, head_dim: int) -> int:
        return max(int(head_dim * math.log(head_dim)), 1)

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return count

    @classmethod
    def flops(cls, heads: int, head_dim: int, count: int) -> float:
        return 4.0 * heads * head_dim * count

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        x_BTHK = x_BTHK * self.head_dim**-0.25
        log_BTHM = x_BTHK @ self.omega.to(x_BTHK.dtype).T - 0.5 * x_BTHK.square().sum(-1, keepdim=True)
        if side == "q":
            log_BTHM = log_BTHM - log_BTHM.amax(-1, keepdim=True)
        return (log_BTHM.exp() + 1e-4) * self.omega.shape[0] ** -0.5

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw blocks of K orthogonal directions, with lengths of normal vectors."""
        M, K = self.omega.shape
        blocks = [torch.linalg.qr(torch.randn(K, K, device=self.omega.device))[0].T for _ in range(-(-M // K))]
        lengths_M1 = torch.randn(M, K, device=self.omega.device).norm(dim=1, keepdim=True)
        self.omega.copy_(torch.cat(blocks)[:M] * lengths_M1)


class RandomFourier(FeatureMap):
    """[sin, cos](w . (sigma x / |x|)) M^-1/2 with fixed normal directions w (Peng et al. 2021, RFA, eq. 3 and 8).

    sigma, one per head and dim, is learned and starts as 1.
    """

    fp32_tensors_of_map = ("omega", "sigma")
    has_count = True
    omega: Tensor

    def __init__(self, heads: int, head_dim: int, count: int | None):
        super().__init__(heads, head_dim, count)
        self.register_buffer("omega", torch.zeros(heads, head_dim if count is None else count, head_dim))
        self.sigma = nn.Parameter(torch.ones(heads * head_dim))

    @classmethod
    def num_features(cls, head_dim: int, count: int) -> int:
        return 2 * count

    @classmethod
    def num_params(cls, heads: int, head_dim: int, count: int) -> int:
        return heads * head_dim

    @classmethod
    def flops(cls, heads: int, head_dim: int, count: int) -> float:
        return 4.0 * heads * head_dim * count

    def forward(self, x_BTHK: Tensor, side: Side, positions_BT: Tensor) -> Tensor:
        unit = x_BTHK / (torch.linalg.vector_norm(x_BTHK, dim=-1, keepdim=True) + 1e-3)
        angle_BTHM = map_heads(unit * self.sigma.to(unit.dtype).view(self.heads, -1), self.omega)
        return torch.cat([angle_BTHM.sin(), angle_BTHM.cos()], -1) * self.omega.shape[1] ** -0.5

    def reset_parameters(self) -> None:
        nn.init.ones_(self.sigma)
        nn.init.normal_(self.omega)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu1": EluPlusOne, "relu": Relu, "softmax": SoftmaxOverDims, "dpfp": Dpfp, "cosformer": CosFormer,
    "taylor": Taylor, "rebased": Rebased, "hedgehog": Hedgehog, "t2r": T2R, "performer": Performer,
    "rfa": RandomFourier,
}


def check_count(kind: str, head_dim: int, count: int | None) -> None:
    """Refuse a size that the map does not have, or that is not positive.

    Raises:
        ConfigError: the size does not fit.
    """
    require(count is None or FEATURE_MAPS[kind].has_count, "features", f"feature_map={kind} has a fixed size",
            got=count, expected="null")
    require(count is None or count > 0, "features", "must be positive", got=count)
    require(kind != "dpfp" or count is None or count < 2 * head_dim, "features", "rolls by more places than there are",
            got=count, expected=f"at most {2 * head_dim - 1} products of {2 * head_dim} dims")


def squares(x: Tensor) -> Tensor:
    """The products x_i x_j of the last dim, K (K + 1) / 2 of them, whose inner product is (x . y)^2.

    >>> squares(torch.tensor([1.0, 2.0])).tolist()
    [1.0, 4.0, 2.8284270763397217]
    """
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return torch.cat([x.square(), x.index_select(-1, i) * x.index_select(-1, j) * 2**0.5], -1)


def map_heads(x_BTHK: Tensor, weight_HMK: Tensor) -> Tensor:
    """Multiply each head with a matrix of its own: [B, T, H, M]."""
    return torch.einsum("bthk,hmk->bthm", x_BTHK, weight_HMK.to(x_BTHK.dtype))
