"""The parts of the conversion experiment that its numbers rest on."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens

FILE = Path(__file__).parents[2] / "scripts" / "experiments" / "dsa_conversion.py"


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("dsa_conversion", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_stand_in_the_context(experiment):
    text, answers = experiment.recall_document(3, 256)
    assert len(text) == 254
    assert len(answers) == len(text) // 2 - 12  # each of the 12 keys is new once
    for place in answers:
        key, value = text[place - 1], text[place]
        assert place % 2 == 1
        assert text.index(key + value) < place - 1
    assert experiment.recall_document(3, 256)[0] == text != experiment.recall_document(4, 256)[0]


@pytest.mark.parametrize("borders", [[0, 40], [0, 1, 17, 40]])
def test_controls_take_as_many_visible_keys_as_there_are(experiment, borders):
    seq = SequenceInfo.make(1, 40, torch.device("cpu"), CuSeqlens(borders))
    index = (torch.zeros(1, 40, 1, 4), None, None)
    for choose in (experiment.random_choice(6), experiment.window_choice(6)):
        chosen = choose(index, seq)[0]
        for t in range(40):
            start = max(b for b in borders[:-1] if b <= t)
            keys = [s for s in chosen[t].tolist() if s >= 0]
            assert len(set(keys)) == len(keys) == min(6, t - start + 1)
            assert all(start <= s <= t for s in keys)
    assert experiment.window_choice(3)(index, seq)[0, 39].tolist() == [39, 38, 37]


def test_the_table_and_figure_show_the_rows(experiment):
    row = {"loss": 1.0, "task_accuracy": 0.5, "indexer_recall": 0.9, "indexer_attainable": 0.95,
           "task_indexer_recall": 0.7, "task_indexer_attainable": 0.8}
    rows = {"dense": {"loss": 1.25, "task_accuracy": 0.5}, "random, after the warm-up": row,
            "sliding window, after the warm-up": row}
    text = experiment.table(rows, {"kl_first": 1.0, "kl_last": 0.1, "loss_ratio": 1.01, "seconds": 5.0,
                                   "cpu_seconds": 4.0})
    assert "| dense | 1.2500 | 0.500 |  |  |  |  |" in text
    assert "| random, after the warm-up | 1.0000 | 0.500 | 0.900 | 0.700 | 0.950 | 0.800 |" in text
    assert "(10.0 times less)" in text
    svg = experiment.figure([{"loss/indexer_kl": 1.0, "dsa/indexer_recall": 0.1}] * 3, rows)
    assert svg.startswith("<svg")
    assert svg.count("<polyline") == 2
