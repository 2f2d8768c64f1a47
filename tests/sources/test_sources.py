import bz2
import gzip
import json
import lzma
import os
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hybridlm.config.schema import DataSourceConfig
from hybridlm.errors import DataError
from hybridlm.sources import open_source


def texts(path, **options):
    return [document.text.decode() for _, _, document in open_source(config(path, **options)).documents()]


def config(path, **options):
    return DataSourceConfig(path=str(path), **options)


def write(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_standard_library():
    source = open_source(config("stdlib"))
    names = [unit.name for unit in source.units]
    assert names == sorted(names)
    assert any(name.endswith("textwrap.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name or "idle_test" in name for name in names)
    assert 5e6 < sum(unit.size for unit in source.units) < 5e7
    assert source.fingerprint() == open_source(config("stdlib")).fingerprint()


def test_folder_in_order_with_what_was_passed_over(tmp_path):
    for name, content in {"b.txt": "two", "a/z.md": "one", "c.py": "three", ".hidden.txt": "no", ".git/x.txt": "no",
                          "image.png": "no", "d.jsonl": jsonl({"text": "four"}), "empty.txt": ""}.items():
        write(tmp_path, name, content)
    source = open_source(config(tmp_path))
    assert texts(tmp_path) == ["one", "two", "three", "four", ""]
    assert source.ignored == 1
    assert texts(tmp_path, format="text") == ["one", "two", "three", ""]


def test_what_a_run_wrote_is_no_text(tmp_path):
    for name in ("a.txt", "runs/a/run.json", "runs/a/config.yaml", "runs/a/log.txt", "runs/a/metrics.jsonl",
                 "runs/notes.txt"):
        write(tmp_path, name, name)
    assert texts(tmp_path) == ["a.txt", "runs/notes.txt"]


def test_links_are_followed_once(tmp_path):
    write(tmp_path, "data/a.txt", "a")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "link").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "all") == ["a"]


def test_patterns(tmp_path):
    for name in ("x/1.txt", "x/y/2.txt", "x/3.tex"):
        write(tmp_path, name, name)
    assert texts(f"{tmp_path}/**/*.txt") == ["x/1.txt", "x/y/2.txt"]
    assert texts(f"{tmp_path}/x/*.tex", format="text") == ["x/3.tex"]
    with pytest.raises(DataError, match=r"3\.tex: unknown kind of file.*data\.format=text"):
        open_source(config(f"{tmp_path}/x/*"))
    with pytest.raises(DataError, match="no file matches this pattern"):
        open_source(config(f"{tmp_path}/*.doc"))


def test_separator_cuts_files(tmp_path):
    file = write(tmp_path, "a.txt", "one\nmore\n<|end|>\r\ntwo\n<|end|>\n\n<|end|>three<|end|>\n")
    source = open_source(config(file, document_separator="<|end|>"))
    found = [document.text.decode() for _, _, document in source.documents()]
    assert found == ["one\nmore", "two", "", "three"]
    for skip in range(5):
        assert [d.text.decode() for _, _, d in source.documents(0, skip)] == found[skip:]


def test_lines_are_kept_as_they_are(tmp_path):
    assert texts(write(tmp_path, "a.txt", b"a\r\nb\r\xef\xbb\xbfc")) == ["a\r\nb\r\ufeffc"]


def test_jsonl_plain_and_compressed(tmp_path):
    content = jsonl({"body": "one"}, {"body": ""}, {"body": "zwei ä", "n": 3}) + "\n" + jsonl({"body": None})
    plain = write(tmp_path, "a.jsonl", content)
    packed = write(tmp_path, "a.jsonl.gz", gzip.compress(content.encode()))
    for file in (plain, packed):
        source = open_source(config(file, text_field="body"))
        found = [document.text.decode() for _, _, document in source.documents()]
        assert found == ["one", "", "zwei ä", "", ""]
        assert [(u, n) for u, n, _ in source.documents(0, 2)] == [(0, 2), (0, 3), (0, 4)]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match="gzip file is damaged or cut short"):
        texts(packed, text_field="body")


@pytest.mark.parametrize(("line", "message"), [
    ('{"txt": "a", "id": 1}', r"a\.jsonl, line 2: no field 'text'; it has: txt, id;.*did you mean 'txt'"),
    ('{"text": 5}', "line 2: field 'text' holds a number; expected text"),
    ('{"text": "a"', r"line 2: not JSON \(.* at character 14\); expected one object per line"),
    ('"a"', "line 2: holds a text; expected an object"),
    ('["a"]', "line 2: holds a list; expected an object"),
    ('{"text": "a", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: its lists or objects are nested too"),
    ('{"text": "\\ud800"}', r"line 2: field 'text' holds half a character \(\\ud800\)")])
def test_jsonl_mistakes(tmp_path, line, message):
    file = write(tmp_path, "a.jsonl", jsonl({"text": "fine"}) + line + "\n")
    with pytest.raises(DataError, match=message):
        texts(file)


def test_numbers_of_any_size_are_passed_over(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"text": "a", "id": ' + "7" * 5000 + '}\n{"text": "b", "x": [NaN, -1e999]}\n')
    assert texts(file) == ["a", "b"]


def test_json_array_is_read_element_by_element(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"text": "zwei ä"}]
    file = write(tmp_path, "a.json", json.dumps(rows, indent=1))
    source = open_source(config(file))
    assert [d.text.decode() for _, _, d in source.documents()] == ["one", "", "zwei ä"]
    assert [(n, d.text.decode()) for _, n, d in source.documents(0, 2)] == [(2, "zwei ä")]
    assert texts(write(tmp_path, "lines.json", jsonl(*rows))) == ["one", "", "zwei ä"]
    for content, message in (('[{"text": "a"}, {"id": 3}]', "element 2: no field 'text'"),
                             ('[{"text": "a"}, ', "not JSON .*; expected an array of objects, or one object per line")):
        with pytest.raises(DataError, match=message):
            texts(write(tmp_path, "bad.json", content))


def zstd_frames(data):
    """The content in two frames, as `cat a.zst b.zst` makes, with one between that says nothing to a reader."""
    half = len(data) // 2
    compressor = zstandard.ZstdCompressor()
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"extra"
    return compressor.compress(data[:half]) + skippable + compressor.compress(data[half:])


PACK = {".gz": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]) + bytes(512), ".zst": zstd_frames,
        ".bz2": lambda data: bz2.compress(data[:99]) + bz2.compress(data[99:]), ".xz": lzma.compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".md"])
def test_compressed_files_are_read_as_plain_ones(suffix, packed, tmp_path):
    draw = random.Random(0)
    documents = ["".join(chr(draw.randrange(32, 0x3000)) for _ in range(draw.randrange(400))) for _ in range(500)]
    rows = suffix.startswith(".json")
    content = (jsonl(*({"text": text} for text in documents)) if rows else "<end>".join(documents)).encode()
    plain = write(tmp_path, f"a{suffix}", content)
    file = write(tmp_path / "packed", f"a{suffix}{packed}", PACK[packed](content))
    nameless = write(tmp_path, "archive", PACK[packed](content))
    options = {} if rows else {"document_separator": "<end>"}
    found = texts(plain, **options)
    assert len(found) == 500
    assert texts(file, **options) == texts(tmp_path / "packed", **options) == found
    assert texts(nameless, format="jsonl" if rows else "text", **options) == found
    source = open_source(config(file, **options))
    assert [d.text.decode() for _, _, d in source.documents(0, 490)] == found[490:]
    if not rows:
        assert "".join(texts(file)) == content.decode()


@pytest.mark.parametrize("packed", PACK)
def test_damaged_archives_are_named(packed, tmp_path):
    content = jsonl(*({"text": f"document {i}"} for i in range(20_000))).encode()
    whole = PACK[packed](content).rstrip(b"\0")
    said = r"a\.jsonl\S+: the \w+ file is damaged or cut short \(.*\); get it again"
    start = PACK[packed](content[:99])
    for bad in (whole[:-30], whole + b"no archive", start + start[:9] + bytes(range(99, 199))):
        with pytest.raises(DataError, match=said):
            texts(write(tmp_path, f"a.jsonl{packed}", bad), invalid_utf8="replace")
    bad = whole[:len(whole) // 2] + bytes(range(200)) + whole[len(whole) // 2 + 200:]
    with pytest.raises(DataError, match=rf"{said}|line \d+: not JSON"):  # gzip finds it by the checksum, at the end
        texts(write(tmp_path, f"a.jsonl{packed}", bad), invalid_utf8="replace")
    assert texts(write(tmp_path, f"plain.jsonl{packed}", jsonl({"text": "not packed at all"}))) == ["not packed at all"]


def test_separators_are_found_where_chunks_meet(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridlm.sources.text.CHUNK_BYTES", 7)
    parts = ["one", "", "two and more of it", "3", "é" * 9, "last"]
    for separator in ("|", "<|end|>", "aab"):
        file = write(tmp_path, "a.txt", separator.join(parts) + separator + "\n")
        assert texts(file, document_separator=separator) == parts


def test_hints_lead_to_what_works(tmp_path):
    write(tmp_path, "meta/only.json", jsonl({"text": "a"}))
    write(tmp_path, "tex/a/b.tex", "some text")
    write(tmp_path, "bare/README", "some text")
    for folder, expected in (("meta", ["a"]), ("tex", ["some text"]), ("bare", ["some text"])):
        with pytest.raises(DataError, match="no file to read in this folder") as error:
            open_source(config(tmp_path / folder))
        words = dict(re.findall(r"data\.(path|format)=('[^']*'|\w+)", str(error.value)))
        path = words.get("path", str(tmp_path / folder)).strip("'")
        assert texts(path, format=words["format"]) == expected
    write(tmp_path, "mixed/a.txt", "text")
    write(tmp_path, "mixed/config.json", "{}")
    assert texts(tmp_path / "mixed") == ["text"]
    with pytest.raises(DataError, match="it holds zero bytes: this is not text"):
        texts(write(tmp_path, "image.txt", b"\x89PNG\0\0"))


def test_half_characters_can_be_replaced(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    (_, _, document), = open_source(config(file, invalid_utf8="replace")).documents()
    assert (document.text.decode(), document.replaced) == ("a\ufffdb 😀", True)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    rows = [f"text {i} ü" for i in range(2500)]
    rows[7] = None
    pq.write_table(pa.table({"id": list(range(2500)), "content": rows}), file, row_group_size=600)
    source = open_source(config(file, text_field="content"))
    found = [document.text.decode() for _, _, document in source.documents()]
    assert found == [row or "" for row in rows]
    for skip in (1, 599, 600, 1201, 2499, 2500):
        assert [d.text.decode() for _, _, d in source.documents(0, skip)] == found[skip:]
    with pytest.raises(DataError, match=r"no field 'text'; it has: id, content; set data\.text_field"):
        texts(file)
    with pytest.raises(DataError, match="field 'id' holds int64; expected text"):
        texts(file, text_field="id")
    with pytest.raises(DataError, match="not a parquet file"):
        texts(write(tmp_path, "b.parquet", "no"))


def test_parquet_with_invalid_utf8(tmp_path):
    file = tmp_path / "a.parquet"
    column = pa.array([b"fine", b"ab\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), file)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: not UTF-8 at byte 2 \(0xff\)"):
        texts(file)
    assert texts(file, invalid_utf8="replace") == ["fine", "ab\ufffd"]


def test_saved_dataset(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(1500)], "n": list(range(1500))})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(str(tmp_path / "both"))
    source = open_source(config(tmp_path / "one"))
    assert [d.text.decode() for _, _, d in source.documents()] == rows["text"]
    assert [d.text.decode() for _, _, d in source.documents(0, 1490)] == rows["text"][1490:]
    assert source.fingerprint() == open_source(config(tmp_path / "one")).fingerprint()
    assert texts(tmp_path / "both", split="test") == ["row 3"]
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        open_source(config(tmp_path / "both", split="dev"))
    with pytest.raises(DataError, match="no field 'body'; it has: text, n"):
        open_source(config(tmp_path / "one", text_field="body"))
    with pytest.raises(DataError, match="field 'n' holds int64"):
        texts(tmp_path / "one", text_field="n")


def test_dataset_by_name(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        if path == "owner/gone":
            raise FileNotFoundError("Couldn't find it\nmore")
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("owner/some-data", name="v2", split="train[:2]") == ["a", "b"]
    assert texts("plain", format="dataset") == ["a", "b"]
    assert asked == [("owner/some-data", "v2", "train[:2]"), ("plain", None, "train")]
    with pytest.raises(DataError, match=r"owner/gone: no such file.*\(FileNotFoundError: Couldn't find it; [^\n]*\)"):
        open_source(config("owner/gone"))


@pytest.mark.parametrize("path", ["corpus", "./owner/name", "/no/where", "data/corpus.txt", "a/b/c", "~/no-such-x"])
def test_missing_paths_ask_nobody(path, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(config(path))


def test_near_names_are_offered(tmp_path, monkeypatch):
    write(tmp_path, "corpus.txt", "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'corpus\.txt'"):
        open_source(config("corpsu.txt"))
    with pytest.raises(DataError, match="did you mean 'stdlib'"):
        open_source(config("sdtlib"))


def test_empty_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt: the file is empty"):
        open_source(config(write(tmp_path, "a.txt", "")))
    write(tmp_path, "b.txt", "")
    with pytest.raises(DataError, match="all 2 files are empty"):
        open_source(config(tmp_path))
    write(tmp_path, "only/a.pdf", "x")
    with pytest.raises(DataError, match=r"no file to read in this folder; expected \.jsonl \.md .*it holds \.pdf"):
        open_source(config(tmp_path / "only"))


def test_invalid_utf8_names_file_and_byte(tmp_path):
    file = write(tmp_path, "a.txt", b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 3 \(0xe9\).*data\.invalid_utf8=replace"):
        texts(file)
    assert texts(file, invalid_utf8="replace") == ["caf\ufffd au lait"]
    lines = write(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not UTF-8 at byte 24 "):
        texts(lines)
    pieces = write(tmp_path, "b.txt", b"fine##\nb\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 8 "):
        texts(pieces, document_separator="##")


def test_unreadable_files_are_named(tmp_path):
    file = write(tmp_path, "a.txt", "a")
    source = open_source(config(file))
    os.unlink(file)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(source.documents())


def test_fingerprint_follows_content_and_options(tmp_path):
    file = write(tmp_path, "a.txt", "abc")
    first = open_source(config(file)).fingerprint()
    assert first == open_source(config(file)).fingerprint()
    assert first != open_source(config(file, document_separator="b")).fingerprint()
    os.utime(file, ns=(1, 1))
    assert first != open_source(config(file)).fingerprint()


def test_files_of_validation_are_left_out(tmp_path):
    write(tmp_path, "a.txt", "a")
    held_out = os.path.realpath(write(tmp_path, "b.txt", "b"))
    source = open_source(config(tmp_path), frozenset([held_out]))
    assert ([unit.path for unit in source.units], source.left_out) == ([str(tmp_path / "a.txt")], 1)
    with pytest.raises(DataError, match="belong to validation_path"):
        open_source(config(held_out), frozenset([held_out]))
