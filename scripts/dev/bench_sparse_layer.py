#!/usr/bin/env python
r"""One layer of sparse attention on the CPU, forward and backward: DeepSeek's beside transformers', and NSA's.

    OMP_NUM_THREADS=1 python scripts/dev/bench_sparse_layer.py [--heads 16 64] [--length 2048] [--topk 128] \
        [--json FILE]
    OMP_NUM_THREADS=1 python scripts/dev/bench_sparse_layer.py --system nsa --length 4096 [--kv-heads 4 16]

The layer is the MLA of `deepseek_v32` with its indexer (8 heads of 32; keys of 64 + 32, values of 64, latent of 128),
with the same weights in all three. `core` is the attention without the projections around it: top-k and attention over
the selected latents, against attention over all keys. The indexer is frozen: transformers has no loss that trains it.

`nsa` is a layer of 16 query heads of 64 dims with keys of its own per branch, in the proportions that the preset takes
in a model of that context, against a layer of dense attention with as many key heads. Times are medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers import AttentionConfig, IndexerConfig, MLAConfig, NSAConfig, build_mixer
from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.rope import RopeConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention, indexer_topk, sparse_attention

HIDDEN, Q_RANK, LATENT, NOPE, ROPE, VALUE, INDEX_HEADS, INDEX_DIM = 512, 256, 128, 64, 32, 64, 8, 32


def times_in_turn(runs: dict[str, Callable[[], Any]], rounds: int, of: Callable[[list[float]], float]
                  ) -> dict[str, float]:
    """CPU milliseconds of each, run in turn: other work on the machine counts less than in wall time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: of(values) for name, values in times.items()}


def layer_runs(heads: int, length: int, topk: int) -> dict[str, Callable[[], Any]]:
    """A training step of the layer in each form; the outputs of the sparse ones are compared first."""
    from transformers import DeepseekV32Config  # type: ignore[attr-defined]
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

    torch.manual_seed(0)
    config = DeepseekV32Config(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads,
        q_lora_rank=Q_RANK, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE,
        index_topk=topk, index_n_heads=INDEX_HEADS, index_head_dim=INDEX_DIM, max_position_embeddings=length)
    config._attn_implementation = "sdpa"
    theirs = hf.DeepseekV32Attention(config, 0)
    mixer = build_mixer(MLAConfig(
        num_heads=heads, q_lora_rank=Q_RANK, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
        v_head_dim=VALUE, norm_eps=1e-6, rope=RopeConfig(kind="interleaved"),
        indexer=IndexerConfig(num_heads=INDEX_HEADS, head_dim=INDEX_DIM, topk=topk)), LayerContext(
            hidden_size=HIDDEN, layer_index=0, num_layers=1, max_position=length, norm=NormConfig()))
    names = {"kv_a_proj_with_mqa": "kv_a_proj", "a_layernorm": "a_norm", "indexer.wq_b": "indexer.q_proj",
             "indexer.wk": "indexer.k_proj"}
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    mixer.load_state_dict(weights)
    mixer.indexer.requires_grad_(False)  # type: ignore[union-attr]
    x, seq = torch.randn(1, length, HIDDEN), SequenceInfo.make(1, length, torch.device("cpu"))
    tables = hf.DeepseekV32RotaryEmbedding(config)(x, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]

    def ours(mode: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            mixer.attention_mode = mode  # type: ignore[assignment]
            return mixer(x, seq)[0]

        return run

    forms = {"sparse": ours("sparse"), "dense": ours("dense"),
             "transformers": lambda x: theirs(x, tables, mask)[0]}
    with torch.no_grad():
        away = (forms["sparse"](x) - forms["transformers"](x)).abs().amax(-1) > 1e-3
    if away.float().mean() > 0.05:  # a key at the threshold may round to the other side
        raise SystemExit(f"not the same layer: {away.float().mean():.0%} of the tokens differ")

    def step(form: Callable[[Tensor], Tensor]) -> None:
        form(x.clone().requires_grad_()).sum().backward()

    return {name: partial(step, form) for name, form in forms.items()}


def core_runs(heads: int, length: int, topk: int) -> dict[str, Callable[[], Any]]:
    """Selection and attention over the selected latents, against attention over the keys of every head."""
    torch.manual_seed(0)
    q, latent = torch.randn(1, length, heads, LATENT + ROPE), torch.randn(1, length, 1, LATENT + ROPE)
    index = (torch.randn(1, length, INDEX_HEADS, INDEX_DIM), torch.randn(1, length, INDEX_DIM),
             torch.rand(1, length, INDEX_HEADS))
    dense = [torch.randn(1, length, heads, dim) for dim in (NOPE + ROPE, NOPE + ROPE, VALUE)]
    for tensor in (q, latent, *dense):
        tensor.requires_grad_()

    def sparse() -> None:
        sparse_attention(q, latent, latent[..., :LATENT], indexer_topk(*index, topk)).sum().backward()

    return {"core_sparse": sparse, "core_dense": lambda: attention(*dense).sum().backward()}


def nsa_runs(kv_heads: int, length: int) -> dict[str, Callable[[], Any]]:
    """A training step of a layer of NSA, and of dense attention."""
    torch.manual_seed(0)
    options = {"kind": "nsa", "num_heads": 16, "num_kv_heads": kv_heads, "head_dim": 64, "branch_keys": True}
    context = LayerContext(hidden_size=HIDDEN, layer_index=0, num_layers=1, max_position=length, norm=NormConfig())
    configs = {"nsa": NSAConfig(**NSAConfig.fill_sizes(options, ModelSizes(HIDDEN, length))),
               "dense": AttentionConfig(num_heads=16, num_kv_heads=kv_heads, head_dim=64)}
    x = torch.randn(1, length, HIDDEN)

    def step(mixer: SequenceMixer) -> None:
        seq = SequenceInfo.make(1, length, torch.device("cpu"))
        mixer(x.clone().requires_grad_(), seq)[0].sum().backward()

    runs = {}
    for name, config in configs.items():
        mixer = build_mixer(config, context)
        mixer.init_weights(0.05)
        runs[name] = partial(step, mixer)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=["dsa", "nsa"], default="dsa")
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[4, 16], help="of nsa and of its dense layer")
    parser.add_argument("--heads", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--topk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    about, rows = measure_nsa(args) if args.system == "nsa" else measure_dsa(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def measure_nsa(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure NSA: facts about the run, and a row per number of key heads."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
             "length": args.length}
    print(json.dumps(about))
    rows = []
    for kv_heads in args.kv_heads:
        runs = nsa_runs(kv_heads, args.length)
        rows.append({"kv_heads": kv_heads} | times_in_turn(runs, args.rounds, statistics.median))
        print("{kv_heads:>4} key heads  nsa {nsa:7.0f} ms, dense {dense:7.0f}".format(**rows[-1]), flush=True)
    return about, rows


def measure_dsa(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure DeepSeek sparse attention: facts about the run, and a row per number of heads."""
    import transformers

    about = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
             "threads": torch.get_num_threads(), "length": args.length, "topk": args.topk}
    print(json.dumps(about))
    rows = []
    for heads in args.heads:
        row: dict[str, Any] = {"heads": heads}
        for runs in (core_runs, layer_runs):
            row |= times_in_turn(runs(heads, args.length, args.topk), args.rounds, statistics.median)
        rows.append(row)
        print(("{heads:>4} heads  core {core_sparse:7.0f} ms, dense {core_dense:7.0f}  layer {sparse:7.0f} ms, dense "
               "{dense:7.0f}, transformers {transformers:7.0f}").format(**row), flush=True)
    return about, rows


if __name__ == "__main__":
    main()
