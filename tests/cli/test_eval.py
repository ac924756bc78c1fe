from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hashattention.cli import eval as verb
from hashattention.evaluation.result import ROWS, read


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "text").mkdir(parents=True)
    source = random.Random(3)
    words = ["ro", "sa", "lim", "te", "nu", "vak"]
    (folder / "text" / "long.txt").write_text(" ".join(source.choices(words, k=3000)))
    return folder


@pytest.fixture
def words(tiny_model_folder: Path, tiny_maps_folder: Path, data: Path) -> tuple[object, ...]:
    tasks = "--tasks", "perplexity:tail=4", "--length", "400,500", "--samples", 2
    return tiny_model_folder, "--maps", tiny_maps_folder, "--data", data, *tasks


def test_rows_table_and_json(invoke, last_json, words, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = "--methods", "dense,hash,quest:page=8,bits=4", "--density", "1/4,0.125"
    done = invoke("eval", *words, *methods, "--out", out, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    rows = read(out)
    assert len(rows) == 2 * 2 * (1 + 2 * 2)
    assert {row.method for row in rows} == {"dense", "hash", "quest:page=8,bits=4"}
    assert {row.density for row in rows} == {1.0, 0.25, 0.125}
    found = last_json(done)
    assert found["rows"] == 20
    first = found["summary"][0]
    assert (first["method"], first["count"]) == ("dense", 4)
    assert "HashAttention" in done.stderr
    size = (out / ROWS).stat().st_size
    again = invoke("eval", *words, *methods, "--out", out)
    assert again.exit_code == 0
    assert (out / ROWS).stat().st_size == size
    assert all(str(tmp_path) not in line for line in (out / ROWS).read_text().splitlines())
    assert json.loads((out / ROWS).read_text().splitlines()[0])["maps"] == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--density", "1/0"), "density must be a number or a fraction, as 1/16; given '1/0'"),
        (("--density", "3"), "density must be in (0, 1]"),
        (("--shard", "2/2"), "shard must be i/n with i from 0 to n - 1, as 0/4; given '2/2'"),
        (("--question-tokens", "0"), "question_tokens must be at least 1"),
        (("--shard", "half"), "given 'half'"),
        (("--other-maps", "folder"), "--other-maps must be NAME=FOLDER"),
        (("--length", "4k"), "length must be a whole number of tokens; given '4k'"),
        (("--length", "9000"), "this model's context is 2048"),
        (("--tasks", "rular"), "unknown task 'rular'; did you mean 'ruler'"),
        (("--methods", "qest"), "unknown method 'qest'; did you mean 'quest'"),
        (("--methods", "double_sparsity:channels=99"), "its heads have 16 channels"),
        (("--protocol", "none"), "protocol must be question or generation"),
        (("--tasks", "ruler:fwe", "--length", "300"), "ruler:fwe needs at least"),
    ],
)
def test_what_cannot_be_done(refused, words, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    out = tmp_path / "out"
    assert message in refused("eval", *words, "--out", out, *more)
    assert not (out / ROWS).exists()


def test_rows_that_are_there_are_not_mixed_without_leave(refused, words, tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text("")
    assert "has rows already" in refused("eval", *words, "--out", tmp_path, "--no-resume")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("eval", *words, "--out", tmp_path / "file")
    assert "eval takes a model and --out" in refused("eval")


def test_missing_data_say_how_to_fetch_them(refused, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))
    said = refused("eval", *words, "--out", tmp_path / "out", "--tasks", "ruler:qa_1", "--length", "2000")
    assert "squad.json is not there" in said
    assert "hashattention eval --fetch" in said


def test_fetching_alone(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashattention.evaluation.tasks import data as place

    asked = []
    monkeypatch.setattr(place, "fetch", lambda folder, progress: asked.append(folder) or folder)
    done = invoke("eval", "--fetch", "--data", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert asked == [tmp_path]


def test_options_stay_with_their_method() -> None:
    found = verb._methods("dense, quest:page=16,bits=4,hash,oracle+sampled:fraction=0.5,seed=1")
    assert found == ("dense", "quest:page=16,bits=4", "hash", "oracle+sampled:fraction=0.5,seed=1")


def test_a_run_that_is_out_of_time_goes_on(invoke, words, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("eval", *words, "--out", out, "--minutes", "0").exit_code == 0
    assert not (out / ROWS).exists()
    assert invoke("eval", *words, "--out", out, "--minutes", "60", "--no-logprobs").exit_code == 0
    assert len(read(out)) == 8


def test_other_maps_have_rows_of_their_own(invoke, words, tiny_maps_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = "--methods", "hash", "--other-maps", f"twin={tiny_maps_folder}"
    done = invoke("eval", *words, *more, "--out", out)
    assert done.exit_code == 0, (done.stderr, done.exception)
    rows = read(out)
    assert {row.maps for row in rows} == {tiny_maps_folder.name, "twin"}
    scores = {(row.maps, row.length, row.sample): row.score for row in rows}
    assert all(score == scores["twin", length, sample] for (_, length, sample), score in scores.items())
