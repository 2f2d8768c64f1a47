"""Two process groups that the tests of this folder share, and a text to train on."""

import json
from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    pool = RankPool(2, tmp_path_factory.mktemp("two_ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory):
    pool = RankPool(4, tmp_path_factory.mktemp("four_ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def data_words(tmp_path_factory):
    """Words of a run that say where its text is; the tokens are prepared once."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.py"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    return [f"data.path={text}", f"data.cache_dir={folder / 'cache'}"]
