"""Call an operation directly: the gated delta rule on packed documents, then token by token.

    python examples/operations.py

Operations are functions on tensors [batch, time, heads, dim]. They need torch alone, no config and no model.
"""

import torch

from hybridlm_kernels import delta_rule, registry


def main() -> float:
    """Print two ways to compute the same outputs and the largest difference between them, which is returned."""
    torch.manual_seed(0)
    tokens, heads, dim = 48, 2, 16
    q, k, v = (torch.randn(1, tokens, heads, dim) for _ in range(3))
    log_decay = -torch.rand(1, tokens, heads, dim)  # one decay per channel, as in KDA; at most 0
    strength = torch.rand(1, tokens, heads)
    borders = [0, 20, 48]  # two documents in one row: neither sees the other

    packed, states = delta_rule(q, k, v, g=log_decay, beta=strength, qk_l2norm=True, cu_seqlens=borders)
    print(f"packed    outputs {list(packed.shape)}, one final state per document {list(states.shape)}")

    state, pieces = None, []
    for t in range(borders[1], borders[2]):  # the second document alone, one token at a time, as in decoding
        here = slice(t, t + 1)
        o, state = delta_rule(q[:, here], k[:, here], v[:, here], g=log_decay[:, here], beta=strength[:, here],
                              qk_l2norm=True, initial_state=state)
        pieces.append(o)
    difference = (torch.cat(pieces, 1) - packed[:, borders[1] :]).abs().max().item()
    print(f"decoding  token by token differs by at most {difference:.1e}")
    for choice in registry.explain():
        print(f"backend   {choice.operation}: {choice.backend} ({choice.why})")
    return difference


if __name__ == "__main__":
    main()
