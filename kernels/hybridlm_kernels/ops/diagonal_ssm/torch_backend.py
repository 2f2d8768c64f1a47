"""Diagonal state space model in chunks: products with the kernel of a channel, and states at the ends of chunks alone.

A document is cut into chunks of L tokens, its last one padded. Inside a chunk the outputs are the inputs times a
Toeplitz matrix of the kernel 2 Re sum_s c_s a_s^l. What a chunk adds to its states is one product with powers of a; a
scan over chunks carries them on, and the states before a chunk are read with powers of a as well.

Legend: B rows, T tokens, C channels, M inputs per channel, S pairs of modes, N documents, P chunks of all documents, L
tokens per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.linear_scan import torch_backend as linear_scan
from hybridlm_kernels.packing import CuSeqlens

CHUNK_TOKENS = 64  # tokens per chunk; a fixed number, so that results do not depend on how long a row is


@dataclass(frozen=True)
class _Chunks:
    """Places of the tokens of chunks, as indices into the flattened tokens and one zero behind them."""

    token_PL: Tensor
    last_NL: Tensor  # of the last chunk of every document, its tokens at the end
    last_N: Tensor  # index of that chunk
    length_N: Tensor  # its tokens
    place_X: Tensor  # [B T], place of every token among the P L
    first_P: Tensor  # whether a chunk is the first of its document
    document_P: Tensor
    borders: CuSeqlens  # of documents, counted in chunks


def diagonal_ssm(x_BTCM: Tensor, log_a_CS: Tensor, c_CS: Tensor, state_NCMS: Tensor | None,
                 borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    B, T, C, M = x_BTCM.shape
    S, dtype = log_a_CS.shape[1], log_a_CS.real.dtype
    L = 1 if T == 1 else CHUNK_TOKENS
    chunks = _find_chunks(B, T, L, borders, x_BTCM.device)
    P, N = chunks.token_PL.shape[0], chunks.last_N.shape[0]
    state_NCMS = None if state_NCMS is None else state_NCMS.to(log_a_CS.dtype)
    tokens_XCM = F.pad(x_BTCM.to(dtype).flatten(0, 1), (0, 0, 0, 0, 0, 1))
    powers_CSl = (log_a_CS[..., None] * torch.arange(L + 1, device=x_BTCM.device)).exp()  # of a, from 0 to L
    to_end_CLS = powers_CSl[..., :L].flip(-1).mT

    def chunk_inputs(token_XL: Tensor) -> Tensor:
        """The inputs [C, chunks M, L] of these tokens."""
        x_XLCM = tokens_XCM.index_select(0, token_XL.flatten()).unflatten(0, token_XL.shape)
        return x_XLCM.permute(2, 0, 3, 1).reshape(C, -1, token_XL.shape[1])

    x_CXL = chunk_inputs(chunks.token_PL)
    y_CXL = x_CXL @ _toeplitz(2.0 * (c_CS[..., None] * powers_CSl[..., :L]).sum(1).real)
    added_CXS = _real_times_complex(x_CXL, to_end_CLS)
    added_1PX = added_CXS.view(C, P, M, S).permute(1, 0, 2, 3).reshape(1, P, C * M * S)
    decay_1PX = powers_CSl[:, None, :, L].expand(C, M, S).reshape(1, 1, -1).expand(1, P, -1)
    start_NX = None if state_NCMS is None else state_NCMS.reshape(N, -1)
    ends_1PX, _ = linear_scan.linear_scan(added_1PX, decay_1PX, start_NX, chunks.borders, log_a_CS.dtype)
    first_PX = torch.zeros_like(ends_1PX[0]) if start_NX is None else start_NX.index_select(0, chunks.document_P)
    before_PX = torch.where(chunks.first_P[:, None], first_PX, F.pad(ends_1PX[0, :-1], (0, 0, 1, 0)))
    before_CXS = before_PX.view(P, C, M, S).permute(1, 0, 2, 3).reshape(C, P * M, S)
    read_CSL = 2.0 * c_CS[..., None] * powers_CSl[..., 1:]
    y_CXL = y_CXL + torch.cat([before_CXS.real, before_CXS.imag], -1) @ torch.cat([read_CSL.real, -read_CSL.imag], 1)
    y_XCM = y_CXL.view(C, P, M, L).permute(1, 3, 0, 2).reshape(P * L, C, M)
    y_BTCM = y_XCM.index_select(0, chunks.place_X).view(B, T, C, M)
    left_NC1S = (log_a_CS * chunks.length_N[:, None, None]).exp()[:, :, None]
    last_CXS = _real_times_complex(chunk_inputs(chunks.last_NL), to_end_CLS)
    last_NCMS = before_PX.index_select(0, chunks.last_N).view(N, C, M, S) * left_NC1S
    return y_BTCM, last_NCMS + last_CXS.view(C, N, M, S).permute(1, 0, 2, 3)


def _real_times_complex(x_CXL: Tensor, weight_CLS: Tensor) -> Tensor:
    """The product of real rows with complex weights, [C, X, S]."""
    real, imaginary = (x_CXL @ torch.cat([weight_CLS.real, weight_CLS.imag], -1)).chunk(2, -1)
    return torch.complex(real, imaginary)


def _toeplitz(kernel_CL: Tensor) -> Tensor:
    """The matrices [C, L, L] by which rows of L inputs become outputs: input s acts on output t by kernel[t - s].

    >>> _toeplitz(torch.tensor([[1.0, 0.5]]))
    tensor([[[1.0000, 0.5000],
             [0.0000, 1.0000]]])
    """
    L = kernel_CL.shape[1]
    place_L = torch.arange(L, device=kernel_CL.device)
    distance_LL = place_L - place_L[:, None]
    return torch.where(distance_LL >= 0, kernel_CL[:, distance_LL.clamp_min(0)], 0.0)


def _find_chunks(batch: int, length: int, chunk: int, borders: CuSeqlens | None, device: torch.device) -> _Chunks:
    if borders is None:
        return _chunks_of_rows(batch, length, chunk, device)
    key = ("diagonal_ssm", chunk, device)
    if key not in borders.cache:
        borders.cache[key] = _chunks_of(borders.host, chunk, device)
    return borders.cache[key]


@lru_cache(maxsize=64)
def _chunks_of_rows(batch: int, length: int, chunk: int, device: torch.device) -> _Chunks:
    return _chunks_of(tuple(range(0, batch * length + 1, length)), chunk, device)


def _chunks_of(host: tuple[int, ...], chunk: int, device: torch.device) -> _Chunks:
    with torch.inference_mode(False):  # kept tables may serve training after generation
        start_N, stop_N = torch.tensor(host[:-1]), torch.tensor(host[1:])
        count_N = (stop_N - start_N + chunk - 1) // chunk
        document_P = torch.arange(len(count_N)).repeat_interleave(count_N)
        chunk_ends_N = count_N.cumsum(0)
        step_P = torch.arange(len(document_P)) - (chunk_ends_N - count_N)[document_P]
        place_L = torch.arange(chunk)
        token_PL = (start_N[document_P] + step_P * chunk)[:, None] + place_L
        token_PL = torch.where(token_PL < stop_N[document_P][:, None], token_PL, host[-1])
        length_N = stop_N - start_N - (count_N - 1) * chunk
        last_NL = torch.where(place_L >= (chunk - length_N)[:, None], (stop_N - chunk)[:, None] + place_L, host[-1])
        place_X = (token_PL.flatten() < host[-1]).nonzero().flatten()  # tokens stand in chunks in their order
        tables = (token_PL, last_NL, chunk_ends_N - 1, length_N, place_X, step_P == 0, document_P)
        token_PL, last_NL, last_N, length_N, place_X, first_P, document_P = (table.to(device) for table in tables)
        return _Chunks(token_PL, last_NL, last_N, length_N, place_X, first_P, document_P,
                       CuSeqlens([0, *chunk_ends_N.tolist()], device))
