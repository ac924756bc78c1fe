from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.tiny import build

from hashattention.errors import InputError, TextError
from hashattention.evaluation import outcome
from hashattention.evaluation.plan import Plan
from hashattention.evaluation.reader import Reader
from hashattention.evaluation.result import ROWS, read, read_marked
from hashattention.evaluation.runner import run
from hashattention.evaluation.summary import summarise

METHODS = ("dense", "oracle", "hash")


@pytest.fixture(scope="module")
def plan(data_folder: Path) -> Plan:
    return Plan(
        tasks=("needle", "perplexity:tail=8", "agreement:tail=6"),
        methods=METHODS,
        densities=(1 / 4, 1 / 8),
        lengths=(700,),
        samples=2,
        maps="small",
        model="tiny",
        data=data_folder,
        question_tokens=12,
        marked=1,
    )


@pytest.fixture(scope="module")
def done(plan: Plan, small_model, byte_tokenizer, small_maps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    return folder, run(small_model, byte_tokenizer, plan, folder, maps=small_maps)


def test_one_row_for_each_sample_method_and_density(done) -> None:
    folder, rows = done
    assert len(rows) == 3 * 2 * (1 + 2 * 2)
    assert len({row.key for row in rows}) == len(rows)
    assert {row.key: row for row in read(folder)} == {row.key: row for row in rows}
    for row in rows:
        assert (row.model, row.dtype, row.protocol, row.seed) == ("tiny", "float32", "question", 0)
        assert row.maps == ("small" if row.method == "hash" else "")
        assert row.origin["libraries"]["torch"] == torch.__version__
        assert 0 <= row.score <= 1
        if row.method == "dense":
            assert row.attended == row.rows == row.tokens
            assert row.error == ()
            continue
        assert row.budget[:2] == (16, 64)
        assert row.attended == pytest.approx(row.density * row.tokens, rel=0.05)
        assert row.rows == pytest.approx(row.attended)
        assert len(row.error) == 2
        assert all(error > 0 for error in row.error)


def test_rows_of_each_kind(done) -> None:
    _, rows = done
    for row in rows:
        if row.group == "needle":
            assert row.depth in (0.0, 0.25)
            assert row.logprob < 0
            assert row.expected[0].isdigit()
            assert row.nll is row.kl is None
        elif row.group == "perplexity":
            assert row.nll == pytest.approx(-torch.tensor(row.score).log().item(), rel=1e-4)
        else:
            assert (row.kl == 0 and row.score == 1) if row.method == "dense" else row.kl > 0


def test_more_tokens_err_less(done) -> None:
    found = {(one.group, one.method, one.density): one for one in summarise(done[1])}
    for group in ("needle", "perplexity", "agreement"):
        for method in ("oracle",):
            assert found[group, method, 1 / 4].error < found[group, method, 1 / 8].error
        assert found[group, "oracle", 1 / 4].error < found[group, "hash", 1 / 4].error
        assert found[group, "hash", 1 / 4].difference is not None
    assert found["agreement", "oracle", 1 / 4].kl < found["agreement", "hash", 1 / 4].kl


def test_two_runs_give_the_same_rows(done, plan, small_model, byte_tokenizer, small_maps, tmp_path: Path) -> None:
    again = run(small_model, byte_tokenizer, plan, tmp_path, maps=small_maps)
    assert [row.outcome() for row in again] == [row.outcome() for row in done[1]]


def test_a_batch_gives_the_rows_of_single_samples(
    done, plan, small_model, byte_tokenizer, small_maps, tmp_path: Path
) -> None:
    together = run(small_model, byte_tokenizer, dataclasses.replace(plan, batch_tokens=5000), tmp_path, maps=small_maps)
    for row, other in zip(done[1], together, strict=True):
        assert row.key == other.key
        assert row.answer == other.answer
        assert row.score == pytest.approx(other.score, rel=1e-3, abs=1e-6)
        assert (row.logprob or 0.0) == pytest.approx(other.logprob or 0.0, rel=1e-3)
        assert row.error == pytest.approx(other.error, rel=1e-2)
        assert row.rows == other.rows
    for one, other in zip(read_marked(done[0]), read_marked(tmp_path), strict=True):
        assert one.pieces == other.pieces
        for alone, batched in zip(one.readings, other.readings, strict=True):
            assert alone.attention == pytest.approx(batched.attention, abs=2e-3)


def test_an_interrupted_run_goes_on(done, plan, small_model, byte_tokenizer, small_maps, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(text: str, count: int, total: int) -> None:
        if count >= 8:
            raise Stop

    with pytest.raises(Stop):
        run(small_model, byte_tokenizer, plan, tmp_path, maps=small_maps, progress=stop)
    path = tmp_path / ROWS
    kept = path.read_bytes()
    held = len(read(tmp_path))
    assert 0 < held < len(done[1])
    path.write_bytes(kept + b'{"task": "nee')
    told = []
    rows = run(small_model, byte_tokenizer, plan, tmp_path, maps=small_maps, progress=lambda *words: told.append(words))
    assert path.read_bytes().startswith(kept)
    assert [row.outcome() for row in rows] == [row.outcome() for row in done[1]]
    assert next(words[1] for words in told if words[2]) == held
    told.clear()
    size = path.stat().st_size
    run(small_model, byte_tokenizer, plan, tmp_path, maps=small_maps, progress=lambda *words: told.append(words))
    assert path.stat().st_size == size
    assert not [words for words in told if "reading" in words[0]]


def test_more_methods_join_the_same_samples(done, plan, small_model, byte_tokenizer, tmp_path: Path) -> None:
    one = dataclasses.replace(plan, methods=("dense",), tasks=("needle",))
    run(small_model, byte_tokenizer, one, tmp_path)
    run(small_model, byte_tokenizer, dataclasses.replace(one, methods=("streaming",)), tmp_path)
    rows = read(tmp_path)
    assert len({row.pair for row in rows}) == 2
    assert [row.method for row in rows] == ["dense", "dense", "streaming", "streaming", "streaming", "streaming"]
    # The picture has what was attended: sink and the most recent tokens alone.
    (marked,) = read_marked(tmp_path)
    for reading in marked.readings[1:]:
        end = len(reading.attention) - int(reading.density * 700)
        assert sum(reading.attention[:16]) > 0
        assert sum(reading.attention[16:end]) == 0
        assert sum(reading.attention[end:]) > 0


def test_a_document_is_kept_with_what_was_attended(done, byte_tokenizer) -> None:
    folder, rows = done
    (marked,) = read_marked(folder)
    first = rows[0]
    assert (marked.task, marked.sample, marked.expected) == ("needle", "0", first.expected)
    assert first.expected[0] in "".join(marked.pieces)
    assert len(marked.readings) == 5
    for reading in marked.readings:
        if reading.method == "dense":
            assert reading.attention == ()
            continue
        assert len(reading.attention) == len(marked.pieces)
        assert 0 < max(reading.attention) <= 1


def test_only_the_answer_is_sparse_by_generation(plan, small_model, byte_tokenizer, tmp_path: Path) -> None:
    one = dataclasses.replace(plan, tasks=("needle",), methods=("dense", "streaming"), protocol="generation")
    rows = run(small_model, byte_tokenizer, one, tmp_path)
    dense = {row.sample: row for row in rows if row.method == "dense"}
    question = {row.sample: row for row in rows if row.method == "streaming" and row.density == 1 / 8}
    for sample, row in question.items():
        assert row.tokens == dense[sample].tokens
        # Dense attention gives the first token of the answer.
        assert row.answer[:1] == dense[sample].answer[:1]
    assert len(rows) == 6


def test_answers_end_where_they_should(small_model, byte_tokenizer) -> None:
    from hashattention.evaluation.meter import Meter
    from hashattention.evaluation.tasks.base import Question

    limits = (5, 9, 12)
    questions = [
        Question(str(place), "", "", (), lambda answer: float(len(answer) >= 3), limit, growing=place == 2)
        for place, limit in enumerate(limits)
    ]
    reader = Reader(small_model, [list(range(3, 60))] * 3)

    class Letters:
        eos_token_id = None

        @staticmethod
        def decode(tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(65 + token % 26) for token in tokens)

    texts = outcome._say(reader, Letters(), questions, reader.logits, Meter(0, 0))
    # The third is graded every eight tokens, and its grade is full then.
    assert [len(text) for text in texts] == [5, 9, 8]
    assert texts[1].startswith(texts[0])
    first = int(reader.logits[0].argmax())
    reader.forget()
    Letters.eos_token_id = first
    assert outcome._say(reader, Letters(), questions, reader.logits, Meter(0, 0)) == ["", "", ""]


def test_the_last_answers_go_on_alone(small_model, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashattention import Budget
    from hashattention.evaluation.meter import Meter
    from hashattention.evaluation.tasks.base import Question
    from hashattention.selectors.h2o import H2oSelector

    contexts = [list(range(first, first + 30 + 7 * first)) for first in (3, 5, 2, 6)]
    questions = [Question(str(most), "", "", (), float, most) for most in (3, 9, 5, 20)]

    class Letters:
        eos_token_id = None

        @staticmethod
        def decode(tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(65 + token % 26) for token in tokens)

    def say(share: float) -> tuple[list[str], list[int]]:
        monkeypatch.setattr(outcome, "NARROW", share)
        reader = Reader(small_model, contexts)
        sizes: list[int] = []
        forward = reader.forward
        reader.forward = lambda tokens: sizes.append(len(tokens)) or forward(tokens)
        with reader.serve(H2oSelector(), Budget(density=0.25, sink=2, local=4)):
            texts = outcome._say(reader, Letters(), questions, reader.logits, Meter(0, 0))
            assert len(reader.padding) == reader.cache.layers[0].keys.shape[0] == 4
        return texts, sizes

    together, apart = say(0.0), say(0.8)
    assert together[0] == apart[0]
    assert set(together[1]) == {4}
    assert apart[1] == [4] * 2 + [3] * 2 + [2] * 4 + [1] * 11


def test_an_answer_may_end_with_its_line(small_model, byte_tokenizer) -> None:
    from hashattention.evaluation.tasks.base import Question

    question = Question("0", "", "", (), float, 9, first_line=True)
    letters = byte_tokenizer("\nab\nc")["input_ids"]
    assert [outcome._ended(question, letters[:end], byte_tokenizer) for end in range(1, 6)] == [0, 0, 0, 1, 1]


def test_a_request_that_ends_at_once_is_measured(small_model, byte_tokenizer) -> None:
    """Its first step counts, whatever else is in its batch."""
    from hashattention import Budget
    from hashattention.evaluation.meter import Meter
    from hashattention.evaluation.tasks.base import Question
    from hashattention.selectors.streaming import StreamingSelector

    contexts = [list(range(3, 60)), list(range(40, 70))]
    questions = [Question(str(place), "", "", (), float, 3) for place in range(2)]

    def measure(places: tuple[int, ...], stop: int | None):
        reader = Reader(small_model, [contexts[place] for place in places])

        class Letters:
            eos_token_id = stop

            @staticmethod
            def decode(tokens: list[int], skip_special_tokens: bool) -> str:
                return "x" * len(tokens)

        meter = Meter(reader.width + 1, reader.width + 8)
        with reader.serve(StreamingSelector(), Budget(density=0.25, sink=2, local=4), meter):
            texts = outcome._say(reader, Letters(), [questions[place] for place in places], reader.logits, meter)
        return texts, meter.readings()

    first = int(Reader(small_model, contexts[:1]).logits[0].argmax())
    (text, other), (ended, going) = measure((0, 1), first)
    assert text == ""
    assert other
    (alone,), (reading,) = measure((0,), first)
    assert alone == ""
    assert reading.rows == ended.rows
    # Two steps of a growing cache against one: the mean budget differs.
    assert measure((0,), None)[1][0].error != pytest.approx(reading.error)
    assert going.rows == measure((1,), first)[1][0].rows


def test_nothing_begins_after_its_time(plan, small_model, byte_tokenizer, small_maps, done, tmp_path: Path) -> None:
    import time

    told = []
    rows = run(
        small_model,
        byte_tokenizer,
        plan,
        tmp_path,
        maps=small_maps,
        until=time.monotonic() - 1,
        progress=lambda *words: told.append(words[0]),
    )
    assert rows == ()
    assert "out of time" in told[-1]
    assert not (tmp_path / ROWS).exists()


def test_right_answers_need_not_be_weighed(plan, small_model, byte_tokenizer, tmp_path: Path) -> None:
    one = dataclasses.replace(plan, methods=("dense",), tasks=("needle",), samples=1)
    weighed = run(small_model, byte_tokenizer, one, tmp_path / "weighed")
    plain = run(small_model, byte_tokenizer, dataclasses.replace(one, logprobs=False), tmp_path / "plain")
    assert [row.logprob for row in plain] == [None]
    assert weighed[0].logprob < 0
    assert plain[0].answer == weighed[0].answer


def test_shards_do_the_whole_together(plan, small_model, byte_tokenizer, tmp_path: Path, done) -> None:
    one = dataclasses.replace(plan, methods=("dense", "streaming"), tasks=("needle",), samples=3)
    for shard in (0, 1):
        rows = run(small_model, byte_tokenizer, dataclasses.replace(one, shard=(shard, 2)), tmp_path)
        assert {int(row.sample) % 2 for row in rows} == {shard}
    together = read(tmp_path)
    assert len(together) == 3 * 3
    whole = run(small_model, byte_tokenizer, one, tmp_path / "whole")
    assert {row.key: row.outcome() for row in whole} == {row.key: row.outcome() for row in together}


def test_more_maps_are_another_method(plan, small_model, byte_tokenizer, small_maps, tmp_path: Path) -> None:
    one = dataclasses.replace(plan, methods=("hash",), tasks=("needle",), samples=1, densities=(1 / 8,))
    rows = run(small_model, byte_tokenizer, one, tmp_path, maps=small_maps, others={"paper": small_maps})
    assert [(row.method, row.maps) for row in rows] == [("hash", "small"), ("hash", "paper")]
    assert rows[0].answer == rows[1].answer
    assert rows[0].head_dim == 16
    assert rows[0].sparse_prompt == 12
    assert set(rows[0].origin["data"]) >= {"squad.json", "PaulGrahamEssays.json"}


def test_a_length_over_the_context_is_refused(plan, small_model, byte_tokenizer, small_maps, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this model's context is 4096"):
        run(small_model, byte_tokenizer, dataclasses.replace(plan, lengths=(700, 5000)), tmp_path, maps=small_maps)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_say_where_to_put_them(
    plan, small_model, byte_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))
    empty = dataclasses.replace(plan, data=tmp_path / "none", tasks=("ruler:qa_1",), methods=("dense",))
    with pytest.raises(TextError, match=r"squad.json is not there: put it into .*none or .*hashattention eval --fetch"):
        run(small_model, byte_tokenizer, empty, tmp_path / "out")


def test_sliding_layers_stay_dense(data_folder: Path, byte_tokenizer, tmp_path: Path) -> None:
    model = build("gemma3", vocab_size=len(byte_tokenizer), max_position_embeddings=4096)
    plan = Plan(
        ("needle",), ("dense", "quest"), (1 / 4,), (500,), samples=1, data=data_folder, batch_tokens=4000, marked=0
    )
    dense, quest = run(model, byte_tokenizer, plan, tmp_path)
    assert dense.tokens == quest.tokens
    assert [error > 0 for error in quest.error] == [False, False, False, False, False, True]
