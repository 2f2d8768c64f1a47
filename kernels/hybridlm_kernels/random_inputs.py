"""Random inputs of recurrences and of sparse attention, for the doctor, the benchmark and the tests.

Legend: B rows, T tokens per row, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hybridlm_kernels.cases import Inputs, MakeInputs, Shape, randn
from hybridlm_kernels.recurrence.gates import Gate

GATE_PARAMETERS = ("A_log", "dt_bias")


def recurrence_inputs(decay: str, *, B: int = 1, T: int = 65, H: int = 1, HV: int = 1, K: int = 16, V: int = 16,
                      documents: int | None = None, beta: bool = False, raw: bool = False, gate: str | None = None,
                      strength: float = 1.0, dtype: torch.dtype = torch.float64, device: str = "cpu",
                      seed: int = 0) -> dict[str, Tensor]:
    """Random q, k, v and initial_state, with g and beta where they are wanted, by the names of the parameters.

    Args:
        decay: "none", "constant" (g [HV]), "scalar" (g [B, T, HV]) or "channel" (g [B, T, HV, K]).
        documents: number of initial states N, by default B; 0 for no initial_state.
        beta: whether to make write strengths [B, T, HV].
        raw: whether g, beta and the keys are the outputs of a projection. Otherwise g is uniform in [-strength, 0],
            beta in [0, 1], and keys have length one.
        gate: kind of a `Gate` whose parameters are made as well, under "A_log" (not of logsigmoid) and "dt_bias"; g is
            raw then.
        strength: largest decay of g, as a natural logarithm.
        dtype: of all tensors; g is float32 at least.
        seed: of the random numbers, which are the same for the same arguments.

    >>> inputs = recurrence_inputs("scalar", T=3, beta=True)
    >>> {name: tuple(x.shape) for name, x in inputs.items() if name in ("v", "g", "beta", "initial_state")}
    {'v': (1, 3, 1, 16), 'initial_state': (1, 1, 16, 16), 'beta': (1, 3, 1), 'g': (1, 3, 1)}
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype, device=device)

    q, k, v = randn(B, T, H, K), randn(B, T, H, K), randn(B, T, HV, V)
    inputs = {"q": q, "k": k if raw else normalize(k, dim=-1), "v": v}
    if documents != 0:
        inputs["initial_state"] = randn(documents or B, HV, K, V)
    if beta:
        inputs["beta"] = randn(B, T, HV) if raw else rand(B, T, HV)
    if decay == "none":
        return inputs
    shape = {"constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}[decay]
    g = randn(*shape) if raw or gate else -strength * rand(*shape)
    inputs["g"] = g.to(torch.promote_types(dtype, torch.float32))
    if gate:
        inputs["dt_bias"] = randn(*shape[2:])
        if gate != "logsigmoid":
            inputs["A_log"] = 0.3 * randn(HV)
    return inputs


def with_gate(inputs: dict[str, Tensor], gate: str | None, lower_bound: float = -5.0,
              normalizer: float = 4.0) -> dict[str, Tensor | Gate]:
    """The inputs with A_log and dt_bias put into a `Gate` of that kind; unchanged for None."""
    if gate is None:
        return dict(inputs)
    call: dict[str, Tensor | Gate] = {name: x for name, x in inputs.items() if name not in GATE_PARAMETERS}
    call["gate"] = Gate(gate, inputs.get("A_log"), inputs.get("dt_bias"), lower_bound, normalizer)  # type: ignore[arg-type]
    return call


def select_tokens(inputs: dict[str, Tensor], tokens: slice, leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
    """The inputs of some tokens of every row; tensors without a time dimension are kept as they are."""
    per_token = [name for name in ("q", "k", "v", "beta", "g") if name in inputs and inputs[name].dim() > 1]
    return {name: x[:, tokens] if name in per_token else x for name, x in inputs.items() if name not in leave_out}


def check_inputs(decay: str, delta: bool) -> Callable[[], Inputs]:
    """A maker of inputs without initial states, two rows of two full chunks and three tokens."""
    return lambda: recurrence_inputs(decay, B=2, T=131, H=2, HV=2, K=32, V=48, documents=0, beta=delta, strength=3.0)


def erase_inputs(decay: str, free: bool) -> Callable[[], Inputs]:
    """A maker of inputs as `check_inputs` makes them, with erase keys; with erase vectors for beta where `free`."""

    def make() -> Inputs:
        inputs = check_inputs(decay, not free)()
        shape = inputs["k"].shape
        generator = torch.Generator().manual_seed(1)
        key, vector = (normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1) for _ in "pb")
        return inputs | {"erase_key": key} | ({"erase_vector": -vector} if free else {})

    return make


def bench_erase_inputs(decay: str, free: bool) -> MakeInputs:
    """A maker of inputs as `bench_inputs` makes them; where `free` with erase keys and vectors in place of beta."""

    def make(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
        inputs = bench_inputs(decay, delta=not free)(s, dtype, device)
        return inputs | {"erase_key": inputs["k"], "erase_vector": -0.5 * inputs["k"]} if free else inputs

    return make


def bench_inputs(decay: str, delta: bool = False) -> MakeInputs:
    """A maker of inputs at the shape of a benchmark, without initial states."""
    return lambda s, dtype, device: recurrence_inputs(decay, B=s.B, T=s.T, H=s.H, HV=s.H, K=s.D, V=s.D, documents=0,
                                                      beta=delta, strength=0.1, dtype=dtype, device=device)


def bench_product_inputs(decay: str, steps: int) -> MakeInputs:
    """A maker of inputs as `bench_inputs` makes them, with `steps` keys, values and write strengths per token."""

    def make(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
        inputs = bench_inputs(decay, delta=True)(replace(s, T=s.T * steps), dtype, device)
        return inputs | {name: inputs[name][:, : s.T].contiguous() for name in ("q", "g")}

    return make


def random_selection() -> Tensor:
    """16 random visible keys of each of 2 x 70 queries, -1 where fewer are visible: int32 [2, 70, 16]."""
    T = 70
    scores = torch.rand(2, T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -1.0)
    top = scores.topk(16, dim=-1)
    return top.indices.masked_fill(top.values < 0, -1).int()


def random_index_inputs() -> Inputs:
    """Index queries, keys and weights of 2 x 70 tokens, and the main queries and keys that they are to follow."""
    made = randn(q=(2, 70, 4, 16), k=(2, 70, 16), w=(2, 70, 4), main_q=(2, 70, 4, 32), main_k=(2, 70, 2, 32))
    return made | {"w": made["w"] * 0.2}
