"""Sources of a user's own file: a reader for files with a new ending, and a source that is made of no files."""

from unittest.mock import patch

import pytest

from hybridlm.config.schema import DataConfig, DataSourceConfig
from hybridlm.data import prepare
from hybridlm.errors import ConfigError, DataError
from hybridlm.kind_registry import KindError
from hybridlm.sources import contract, open_source, register_file_reader, register_source
from hybridlm.user_code import import_user_code

SOURCES_FILE = '''
import itertools
from hybridlm.sources import Document, Source, Unit, register_file_reader, register_source


@register_file_reader("lines", ".lines")
def read_lines(path, options, skip):
    with path.open("rb") as file:
        for line in itertools.islice(file, skip, None):
            yield Document(line.rstrip(b"\\n"))


@register_source("numbers")
def open_numbers(options):
    def documents(skip):
        for number in range(skip, 50):
            yield Document(f"{options.path} number {number}".encode())

    return Source("numbers", [Unit("numbers", 500, ("numbers", 50), documents)])
'''


@pytest.fixture
def user_file(tmp_path):
    """A file with sources, imported; the formats are forgotten again at the end."""
    file = tmp_path / "my_sources.py"
    file.write_text(SOURCES_FILE)
    with patch.dict(contract.FILE_READERS), patch.dict(contract.SOURCES):
        import_user_code([str(file)])
        yield file


def texts(source, skip=0):
    return [document.text.decode() for _, _, document in source.documents(0, skip)]


def test_a_reader_serves_its_ending_and_its_format(user_file, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.lines").write_text("one\ntwo\nthree\n")
    (tmp_path / "corpus" / "b.txt").write_text("four\nfive\n")
    (tmp_path / "c.log").write_text("six\nseven\n")
    source = open_source(DataSourceConfig(path=str(tmp_path / "corpus")))
    assert texts(source) == ["one", "two", "three", "four\nfive\n"]
    assert texts(source, 2) == ["three", "four\nfive\n"]
    assert texts(open_source(DataSourceConfig(path=str(tmp_path / "c.log"), format="lines"))) == ["six", "seven"]


def test_a_source_without_files_is_prepared(user_file, tmp_path):
    config = DataConfig(path="my", format="numbers", cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    prepared = prepare(config, progress=False)
    stores = [*prepared.train, prepared.validation]
    found = {prepared.tokenizer.decode(ids[:-1]) for store in stores for ids in store.documents()}
    assert found == {f"my number {number}" for number in range(50)}


def test_tokens_are_made_anew_when_the_file_changes(user_file):
    config = DataSourceConfig(path="my", format="numbers")
    before = open_source(config).fingerprint()
    assert before == open_source(config).fingerprint()
    assert before != open_source(DataSourceConfig(path="other", format="numbers")).fingerprint()
    opener = contract.SOURCES["numbers"].open
    user_file.write_text(SOURCES_FILE.replace("50", "40"))
    register_source("numbers")(opener)  # what a new process does
    assert open_source(config).fingerprint() != before


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"format: unknown value; got 'josnl'; expected one of auto, dataset, jsonl, "
                                          r"parquet, stdlib, text; did you mean 'jsonl'\?"):
        DataSourceConfig(format="josnl")
    with pytest.raises(ConfigError, match="a source of your own is registered with --import FILE"):
        DataSourceConfig(format="xyz")


def test_names_and_endings_that_are_taken_are_refused(user_file):
    with pytest.raises(KindError, match=r"data format 'text' is taken by hybridlm\.sources\.text\.read_text"):
        register_file_reader("text", ".text")(texts)
    with pytest.raises(KindError, match="data format 'auto' is taken"):
        register_source("auto")(texts)
    with pytest.raises(KindError, match=r"files that end in \.md are read by 'text'"):
        register_file_reader("markdown", ".md")(texts)


def test_wrong_results_of_a_user_function_are_named(user_file, tmp_path):
    register_source("nothing")(lambda options: None)
    with pytest.raises(DataError, match="returns NoneType; expected"):
        open_source(DataSourceConfig(format="nothing"))
    register_file_reader("raw", ".raw")(lambda path, options, skip: iter(["text"]))
    (tmp_path / "a.raw").write_text("a")
    with pytest.raises(DataError, match=r"a\.raw: its reader yields str"):
        texts(open_source(DataSourceConfig(path=str(tmp_path / "a.raw"))))
