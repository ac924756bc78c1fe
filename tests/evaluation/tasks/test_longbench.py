from __future__ import annotations

import json
from pathlib import Path

import pytest

from hashattention.errors import InputError, TextError
from hashattention.evaluation.prompt import prompt_tokens
from hashattention.evaluation.tasks import longbench
from hashattention.evaluation.tasks.longbench import DATASETS, MAX_NEW_TOKENS, METRICS, LongBenchTask, grade, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("longbench")
    (made / "data").mkdir()
    for dataset in ("hotpotqa", "trec"):
        rows = [
            {
                "input": f"Which {{name}} is {number}?",
                "context": f"It is {number}. " * (20 + number),
                "answers": [str(number), f"number {number}"],
                "all_classes": ["Date", "Food"] if dataset == "trec" else None,
            }
            for number in range(200)
        ]
        lines = [json.dumps(row) for row in rows]
        (made / "data" / f"{dataset}.jsonl").write_text("\n".join(lines) + "\n")
    return made


def test_all_21_datasets_have_a_prompt_a_metric_and_a_length() -> None:
    assert len(DATASETS) == 21
    assert set(MAX_NEW_TOKENS) == set(DATASETS)
    assert set(DATASETS) - set(METRICS) == {"trec", "lsht"}
    assert all("{context}" in prompt for prompt in longbench.PROMPTS.values())
    assert {name for name, prompt in longbench.PROMPTS.items() if "{input}" not in prompt} == {
        "gov_report", "multi_news", "vcsum", "passage_count", "lcc",
    }  # fmt: skip


def test_the_paper_evaluates_the_first_175_and_trains_on_the_last_25(folder: Path) -> None:
    assert [row["answers"][0] for row in read("hotpotqa", folder)] == [str(number) for number in range(175)]
    assert [row["answers"][0] for row in read("hotpotqa", folder, "training")] == [str(n) for n in range(175, 200)]


def test_a_prompt(folder: Path, byte_tokenizer) -> None:
    first, second = LongBenchTask("hotpotqa", folder).samples(byte_tokenizer, 4000, 2, seed=0)
    only = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    assert first.context == f"{only}\n\nThe following are given passages.\n" + "It is 0. " * 20
    assert second.question == f"\n\n{only}\n\nQuestion: Which {{name}} is 1?\nAnswer:"
    assert second.expected == ("1", "number 1")
    assert (second.max_new_tokens, second.chat, second.first_line) == (32, True, False)
    assert second.grade("It is number 1.") == pytest.approx(2 * 0.5 * 1 / 1.5)
    (sample,) = LongBenchTask("trec", folder).samples(byte_tokenizer, 4000, 1, seed=0)
    assert (sample.chat, sample.first_line) == (False, True)


def test_a_long_prompt_loses_its_middle(folder: Path, byte_tokenizer) -> None:
    (whole,) = LongBenchTask("hotpotqa", folder).samples(byte_tokenizer, 4000, 1, seed=0)
    needed = prompt_tokens(whole, byte_tokenizer)
    (cut,) = LongBenchTask("hotpotqa", folder).samples(byte_tokenizer, needed - 11, 1, seed=0)
    assert prompt_tokens(cut, byte_tokenizer) in (needed - 11, needed - 12)
    assert cut.question == whole.question
    text, shorter = whole.context + whole.question, cut.context + cut.question
    half = len(shorter) // 2
    assert shorter[:half] == text[:half]
    assert shorter[-half:] == text[-half:]
    with pytest.raises(InputError, match="does not fit into 300 tokens"):
        LongBenchTask("hotpotqa", folder).samples(byte_tokenizer, 300, 1, seed=0)


def test_grades_take_the_best_answer_and_a_first_line() -> None:
    assert grade("hotpotqa", "Paris", ["Rome", "Paris"], ()) == 1.0
    assert grade("triviaqa", "\nParis\nQuestion: more", ["paris"], ()) == 1.0
    assert grade("trec", "Food\nDate", ["Food"], ("Date", "Food")) == 1.0
    assert grade("passage_count", "", ["3"], ()) == 0.0


def test_a_missing_dataset_says_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer) -> None:
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(longbench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TextError, match=r"qasper.jsonl is not there: put it into .*THUDM/LongBench"):
        LongBenchTask("qasper", tmp_path).samples(byte_tokenizer, 4000, 1, 0)


def test_a_hub_out_of_reach_says_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer) -> None:
    import huggingface_hub

    def fail(*words: object, **more: object) -> str:
        raise OSError("no network")

    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(TextError, match=r"put it into .* The hub cannot be reached"):
        LongBenchTask("musique", tmp_path).samples(byte_tokenizer, 4000, 1, 0)
