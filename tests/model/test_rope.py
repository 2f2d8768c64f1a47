"""Rotary tables: shared within a forward, exact positions, YaRN."""

from __future__ import annotations

import torch

from hybridlm.model.rope import RopeConfig, YarnConfig, inverse_frequencies, rope_tables, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens

CPU = torch.device("cpu")


def test_rotation_follows_the_position_in_the_document():
    rope, x = RopeConfig(), torch.randn(1, 10, 2, 8)
    packed = rotate(x, rope, 8, SequenceInfo.make(1, 10, CPU, CuSeqlens([0, 4, 10])))
    alone = rotate(x[:, 4:], rope, 8, SequenceInfo.make(1, 6, CPU))
    assert torch.equal(packed[:, 4:], alone)
    assert torch.equal(packed[:, 4], x[:, 4])


def test_an_offset_continues_the_positions():
    rope, x = RopeConfig(kind="interleaved"), torch.randn(2, 10, 2, 8)
    whole = rotate(x, rope, 8, SequenceInfo.make(2, 10, CPU))
    rest = rotate(x[:, 7:], rope, 8, SequenceInfo.make(2, 3, CPU, offset=7))
    assert torch.equal(whole[:, 7:], rest)


def test_layers_that_rotate_alike_share_one_table():
    seq = SequenceInfo.make(2, 5, CPU)
    first = rope_tables(RopeConfig(), 8, seq)
    assert rope_tables(RopeConfig(kind="interleaved"), 8, seq)[0] is first[0]
    assert rope_tables(RopeConfig(theta=1e6), 8, seq)[0] is not first[0]
    assert first[0].shape == (5, 4)
    assert first[0].dtype == torch.float32


def test_without_rope_nothing_is_rotated():
    seq, x = SequenceInfo.make(1, 5, CPU), torch.randn(1, 5, 2, 8)
    assert rotate(x, RopeConfig(kind="none"), RopeConfig(kind="none").rotary_dim(8), seq) is x
    assert not seq.tables


def test_partial_rotation_leaves_the_last_dims():
    rope, x = RopeConfig(partial_rotary_factor=0.25), torch.randn(1, 5, 2, 16)
    y = rotate(x, rope, rope.rotary_dim(16), SequenceInfo.make(1, 5, CPU))
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert not torch.equal(y[..., :4], x[..., :4])


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    yarn = YarnConfig(factor=8.0, original_max_position=4096)
    plain = inverse_frequencies(RopeConfig(), 64)
    scaled = inverse_frequencies(RopeConfig(scaling=yarn), 64)
    turns = 4096 * plain / (2 * torch.pi)
    fast, slow = turns > 60, turns < 0.5
    assert fast.sum() > 5
    assert slow.sum() > 5
    torch.testing.assert_close(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    assert (scaled <= plain * 1.000001).all()
    assert (scaled >= plain / 8.000001).all()
    cos = rope_tables(RopeConfig(scaling=yarn), 64, SequenceInfo.make(1, 2, CPU))[0]
    torch.testing.assert_close(cos[0], torch.full((32,), yarn.table_scale()))


def test_a_stated_attention_factor_is_taken():
    assert YarnConfig(factor=8.0, original_max_position=64, attention_factor=1.0).table_scale() == 1.0
