"""Colours that colour-blind people tell apart, on light and on dark ground."""

from itertools import combinations

import numpy as np
import pytest

from hybridlm.report.palette import ACCENT, GROUND, INK, MIXERS, MUTED, SYMBOLS, Palette

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]])}
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                   [0.0193339, 0.1191920, 0.9503041]])


def linear(colour):
    value = np.array([int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    value = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(value > 0.008856, np.cbrt(value), 7.787 * value + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a, b):
    low, high = sorted(float(linear(colour) @ TO_XYZ[1]) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_mixers_stand_out_from_the_ground_and_from_each_other(theme):
    for pair in (*MIXERS.values(), ACCENT, INK, MUTED):
        assert contrast(pair[theme], GROUND[theme]) >= 3
    for name, seen in VISIONS.items():
        for a, b in combinations(MIXERS, 2):
            distance = np.linalg.norm(lab(seen @ linear(MIXERS[a][theme])) - lab(seen @ linear(MIXERS[b][theme])))
            assert distance >= 15, (name, a, b)


def test_text_can_be_read():
    for theme in (0, 1):
        assert contrast(INK[theme], GROUND[theme]) >= 7
        assert contrast(MUTED[theme], GROUND[theme]) >= 4.5


def test_a_name_looks_the_same_wherever_it_stands():
    assert Palette(["kda", "full"])["kda"] == Palette(["mine", "gdn", "kda"])["kda"]
    assert Palette(["mine", "kda"])["mine"].colour not in (MIXERS["kda"], MIXERS["mla"])


def test_more_names_than_colours_differ_in_their_symbol():
    names = [f"mixer{index}" for index in range(len(MIXERS) * 2)]
    palette = Palette(names)
    assert len({(palette[name].colour, palette[name].symbol) for name in names}) == len(names)
    assert {palette[name].symbol for name in names} == set(SYMBOLS)
