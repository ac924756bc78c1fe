from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from tests.train.bytes_model import ByteTokenizer, write_texts

from hashattention.errors import MissingDependencyError, TextError
from hashattention.train.text import sequences


def cut(texts, tokenizer=None, **changes):
    options = {"context": 256, "count": 4, "held_out": 2, **changes}
    return sequences(tokenizer or ByteTokenizer(), texts, **options)


def lines(found):
    """The whole lines in some sequences, as bytes."""
    return {line for tokens in found for line in bytes(tokens.tolist()).split(b"\n")[1:-1] if line}


def test_sequences_have_exactly_the_context(tmp_path):
    found = cut(write_texts(tmp_path))
    assert [len(tokens) for tokens in (*found.train, *found.held_out)] == [256] * 6


def test_the_same_call_gives_the_same_tokens(tmp_path):
    one, two = cut(write_texts(tmp_path)), cut(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.train + one.held_out, two.train + two.held_out, strict=True))
    assert one.fingerprint == two.fingerprint != cut(tmp_path, seed=1).fingerprint


@pytest.mark.parametrize("files", [1, 2, 5])
def test_held_out_comes_from_other_documents(tmp_path, files):
    found = cut(write_texts(tmp_path, files))
    assert lines(found.train) and lines(found.held_out)
    assert not lines(found.train) & lines(found.held_out)


def test_few_sequences_see_many_files(tmp_path):
    found = cut(write_texts(tmp_path, 8), context=128, count=16, held_out=1)  # a part is four sequences of bytes
    assert len({line.split(b",")[0] for line in lines(found.train)}) >= 4


def test_held_out_texts_are_taken_instead(tmp_path):
    train, other = write_texts(tmp_path / "a", 1), tmp_path / "other.md"
    other.write_text("another voice speaks here\n" * 100)
    found = cut(train, held_out_texts=other)
    assert lines(found.held_out) == {b"another voice speaks here"}


def test_a_beginning_token_begins_every_sequence(tmp_path):
    found = cut(write_texts(tmp_path), ByteTokenizer(bos=1))
    assert all(tokens[0] == 1 and len(tokens) == 256 and 1 not in tokens[1:] for tokens in found.train)


def test_json_lines_and_lists_of_sources(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {n} " * 40}) for n in range(20)))
    assert len(cut([path, write_texts(tmp_path / "more")]).train) == 4
    path.write_text('{"txt": "x"}')
    with pytest.raises(TextError, match=r"rows.jsonl, line 1: .*\"text\" field"):
        cut(path)


def test_a_text_shorter_than_the_context(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only this")
    with pytest.raises(TextError, match="holds 11 tokens, but 4 sequences of 256 need 1024"):
        cut(path, held_out=0)


@pytest.mark.parametrize("name", ["/nowhere/book.txt", "book.txt", "./folder", "a/b/c"])
def test_a_missing_file(name):
    with pytest.raises(TextError, match="no text file or folder"):
        cut(name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(TextError, match="holds no text"):
        cut(tmp_path)


def test_progress_is_told(tmp_path):
    told = []
    cut(write_texts(tmp_path), progress=lambda *what: told.append(what))
    assert ("reading held-out text", 2, 2) in told and told[-1] == ("reading training text", 4, 4)


def fake_datasets(rows):
    module = types.ModuleType("datasets")
    module.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module.asked = []

    def load_dataset(name, split, streaming):
        module.asked.append((name, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    module.load_dataset = load_dataset
    module.__spec__ = types.SimpleNamespace(name="datasets")
    return module


def test_openwebtext_is_streamed_by_default(monkeypatch):
    rows = [{"text": f"document {n} says {n * n}.\n" * 5} for n in range(400)]
    module = fake_datasets(rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = cut(None)
    assert module.asked == [("Skylion007/openwebtext", "train", True)] * 2
    assert lines(found.train) and lines(found.held_out) and not lines(found.train) & lines(found.held_out)


@pytest.mark.parametrize(("rows", "message"), [(OSError("no network"), "no network"), ([{"txt": "x"}], "field 'text'")])
def test_a_data_set_that_does_not_come(monkeypatch, rows, message):
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows))
    with pytest.raises(TextError, match=message):
        cut("owner/name")


def test_datasets_is_optional(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="hashattention\\[train\\]"):
        cut("owner/name")
