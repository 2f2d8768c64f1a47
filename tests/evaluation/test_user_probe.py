"""A probe of a user's own file."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest

from hybridlm.errors import ConfigError
from hybridlm.evaluation.probe_training import train_on_probe
from hybridlm.evaluation.probes import PROBES, Parity, Probe, make_probe, register_probe
from hybridlm.kind_registry import KindError
from hybridlm.user_code import import_user_code
from tests.support import tiny_lm

PROBE_FILE = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.evaluation.probes import Probe, register_probe


@dataclass(frozen=True, kw_only=True)
class Repeat(Probe):
    """A string of `period` random tokens that comes again and again; each token is asked after the first round."""

    task: ClassVar[str] = "repeat"
    in_context: ClassVar[bool] = True
    period: int = 3
    alphabet: int = 4

    @property
    def vocab_size(self):
        return self.alphabet

    @property
    def answer_ids(self):
        return range(self.alphabet)

    @property
    def min_length(self):
        return self.period + 1

    def make(self, rng, length):
        ids = np.resize(rng.integers(self.alphabet, size=self.period), length + 1)
        targets = ids[1:].copy()
        targets[:self.period - 1] = -100
        return ids[:-1], targets


register_probe("repeat", Repeat)
register_probe("repeat_5", Repeat, period=5)
'''


@pytest.fixture
def user_probes(tmp_path):
    """A file with two probes of one class, imported; they are forgotten again at the end."""
    file = tmp_path / "my_probe.py"
    file.write_text(PROBE_FILE)
    with patch.dict(PROBES):
        import_user_code([str(file)])
        yield


def test_a_probe_of_a_user_is_trained_on_by_name(user_probes):
    result = train_on_probe(tiny_lm.config(), "repeat_5", steps=2, length=8, eval_lengths=[8], examples=4, batch_size=4)
    assert (result.probe, result.parameters) == ("repeat_5", {"period": 5, "alphabet": 4})
    assert result.accuracy[8].tokens == 4 * 4
    assert make_probe("repeat", {"alphabet": 2}).chance == 0.5
    with pytest.raises(ConfigError, match=r"expected one of .*, repeat, repeat_5; did you mean 'repeat'\?"):
        make_probe("repaet")


def test_what_cannot_be_registered_is_refused(user_probes):
    @dataclass(frozen=True, kw_only=True)
    class Unfinished(Parity, Probe):
        vocab_size = Probe.vocab_size

    with pytest.raises(KindError, match="'half': Unfinished lacks vocab_size; see the docstrings"):
        register_probe("half", Unfinished)
    with pytest.raises(KindError, match=r"'repeat' is taken by .*Repeat; give Parity another name"):
        register_probe("repeat", Parity)
    with pytest.raises(KindError, match=r"needs hybridlm\.evaluation\.probes\.Probe as a base class"):
        register_probe("number", int)
