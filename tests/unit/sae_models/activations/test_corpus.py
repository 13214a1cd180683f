"""Every corpus format yields the same documents; anything that is not text is refused with its path."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import CorpusError, Document
from rudder.sae_models.optional import MissingPackage, import_optional

RECORDS: list[dict[str, Any]] = [
    {"book": "a", "module": "m1", "title": "Cells", "text": "Cells divide.\nThey grow.", "complexity": None},
    {"book": "b", "module": "m2", "text": "Kings reign.", "complexity": 2.5},
    {"book": "b", "module": "m3", "text": "  "},
]
DOCUMENTS = [Document("a", "m1", "Cells\nCells divide.\nThey grow."), Document("b", "m2", "Kings reign.", 2.5)]
JSON_LINES = "\n".join(map(json.dumps, RECORDS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", JSON_LINES),
        ("c.jsonl.xz", lzma.compress(JSON_LINES)),
        ("c.jsonl.gz", gzip.compress(JSON_LINES, mtime=0)),
        ("c.jsonl.bz2", bz2.compress(JSON_LINES)),
    ],
)
def test_json_lines_are_read_under_every_compression(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert corpus.read(tmp_path / name) == DOCUMENTS


def test_document_without_a_name_is_named_by_its_line_number(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two", "book": null, "module": null}\n')
    assert corpus.read(tmp_path / "c.jsonl") == [Document("", "1", "one"), Document("", "2", "two")]


def test_text_files_of_a_folder_are_named_by_folder_and_file(tmp_path: Path) -> None:
    for book, name, text in (("b", "two.txt", "Kings\nreign."), ("a", "one.txt", "Cells divide.\n")):
        (tmp_path / book).mkdir()
        (tmp_path / book / name).write_text(text)
    assert corpus.read(tmp_path) == [
        Document("a", "one.txt", "Cells divide."),
        Document("b", "two.txt", "Kings\nreign."),
    ]


def test_parquet_reads_known_columns_and_refuses_a_truncated_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.Table.from_pylist([record | {"other": 1} for record in RECORDS]), tmp_path / "c.parquet"
    )
    assert corpus.read(tmp_path / "c.parquet") == DOCUMENTS
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:100])
    with pytest.raises(CorpusError, match=f"^corpus: {tmp_path / 'cut.parquet'}: "):
        corpus.read(tmp_path / "cut.parquet")


def test_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    assert corpus.read(tmp_path / "saved") == DOCUMENTS


def test_missing_package_is_named() -> None:
    with pytest.raises(MissingPackage, match=r"^corpus: needs the package no_such: pip install no_such"):
        import_optional("no_such.part", "corpus:")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.jsonl", None, "No such file"),
        ("missing", None, "no such file"),
        ("other.csv", b"a,b", r"is not \.txt, \.jsonl"),
        ("zstd.jsonl.zst", b"\x28\xb5\x2f\xfd", r"is not \.txt, \.jsonl"),
        ("empty.jsonl", b"", "holds no text"),
        ("blank.jsonl", b'{"text": " "}\n', "holds no text"),
        ("empty.txt", b"", "holds no text"),
        ("binary.jsonl", bytes(range(256)), "line 1"),
        ("binary.txt", bytes(range(128, 256)), "line 1"),
        ("nul.txt", b"text\nthen \0 junk", "line 2 holds a NUL"),
        ("binary.jsonl.xz", bytes(range(256)), "line 1: Input format"),
        ("binary.jsonl.gz", bytes(range(256)), "line 1: Not a gzipped file"),
        ("cut.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 1000)[:40], "line 1"),
        ("list.jsonl", b'["text"]\n', "line 1: not an object with a `text`"),
        ("number.jsonl", b'{"text": 3}\n', "line 1: not an object with a `text`"),
        ("word.jsonl", b'{"text": "a", "complexity": "high"}\n', "line 1: complexity 'high' is not a number"),
        ("null.jsonl", b'{"text": "a"}\nnull\n', "line 2: not an object"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: Expecting"),
    ],
)
def test_damaged_corpus_is_refused_with_its_path(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"^corpus: {tmp_path / name}:? .*{problem}"):
        corpus.read(tmp_path / name)


def test_overlong_line_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_CHARACTERS", 1000)
    (tmp_path / "long.txt").write_text("x" * 2000)
    with pytest.raises(CorpusError, match=r"long\.txt: line 1 is longer than 1000 characters"):
        corpus.read(tmp_path / "long.txt")


def test_hash_of_a_folder_depends_on_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = corpus.sha256(tmp_path)
    assert corpus.sha256(tmp_path) == first
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = corpus.sha256(tmp_path)
    (tmp_path / "b.txt").write_text("two")
    assert len({first, renamed, corpus.sha256(tmp_path), corpus.sha256(tmp_path / "b.txt")}) == 4


CHAT = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]}


def test_a_chat_stands_in_the_template_and_only_its_contents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"book": "instructions", "module": "chat-0", **CHAT}))
    (document,) = corpus.read(tmp_path / "chats.jsonl")
    assert document.text == "Hello.\nGood day."
    tokenizer = harvest.load_tokenizer(PRETRAINED / "textbook-lm")
    windows = corpus.windows([document], tokenizer, 32)
    ids = windows.tokens[0][: windows.size[0]]
    rendered = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(ids) == rendered
    assert tokenizer.decode(windows.tokens[0][windows.counted[0]]) == "Hello.Good day."
    assert len(corpus.windows([document], tokenizer, 5)) == -(-len(ids) // 5)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": "Hello."}, "`messages` is not a list"),
        ({"messages": [{"role": "user"}]}, "a message is not an object with a `role` and a `content`"),
        ({"text": "x", "glossary": {"cell": "a unit"}}, "`glossary` is not a list"),
        ({"text": "x", "glossary": ["cell"]}, r"`glossary` is not a list of \[term, meaning\]"),
    ],
)
def test_bad_chats_and_glossaries_are_refused_with_their_line(
    tmp_path: Path, record: dict[str, Any], problem: str
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    with pytest.raises(CorpusError, match=f"line 1: {problem}$"):
        corpus.read(tmp_path / "c.jsonl")
