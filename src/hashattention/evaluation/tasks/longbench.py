"""LongBench's 21 datasets (Bai et al., arXiv 2308.14508), with the official prompts, truncation and metrics."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from hashattention.errors import InputError, TextError
from hashattention.evaluation.prompt import encode, prompt_tokens
from hashattention.evaluation.tasks import data, scores
from hashattention.evaluation.tasks.base import Question, Task
from hashattention.evaluation.tasks.longbench_prompts import PROMPTS

#: The paper evaluates the first 175 samples of every dataset; later ones may be trained on.
EVALUATED = 175
#: Where the datasets live on the hub: an archive of `data/<name>.jsonl`.
HUB = "THUDM/LongBench"
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")
FETCH = (
    f"data.zip of huggingface.co/datasets/{HUB} holds it (unpack data/*.jsonl there); with the hub in reach it is "
    "fetched by itself"
)

Metric = Callable[[str, str], float]
_BY_METRIC: dict[Metric, tuple[str, ...]] = {
    scores.qa_f1: ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
    scores.qa_f1_zh: ("multifieldqa_zh",),
    scores.rouge: ("gov_report", "qmsum", "multi_news", "samsum"),
    scores.rouge_zh: ("dureader", "vcsum"),
    scores.retrieval: ("passage_retrieval_en",),
    scores.retrieval_zh: ("passage_retrieval_zh",),
    scores.count: ("passage_count",),
    scores.code_similarity: ("lcc", "repobench-p"),
}
METRICS: dict[str, Metric] = {name: metric for metric, names in _BY_METRIC.items() for name in names}
MAX_NEW_TOKENS = {
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"), 64),
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
}
DATASETS = tuple(PROMPTS)


@dataclasses.dataclass(frozen=True)
class LongBenchTask(Task):
    """One dataset; `length` cuts longer prompts in the middle, as LongBench does."""

    dataset: str
    folder: Path | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in the rows."""
        return f"longbench:{self.dataset}"

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Question]:
        """The first `count` of the evaluated part, whatever the seed."""
        rows = read(self.dataset, self.folder)[:count]
        return [self._fit(self._question(index, row), tokenizer, length) for index, row in enumerate(rows)]

    def _question(self, index: int, row: dict[str, Any]) -> Question:
        before, _, after = PROMPTS[self.dataset].partition("{context}")
        answers = tuple(map(str, row["answers"]))
        return Question(
            id=str(index),
            context=before + row["context"],
            question=after.replace("{input}", row["input"]),
            expected=answers,
            grade=functools.partial(grade, self.dataset, right=answers, classes=tuple(row.get("all_classes") or ())),
            max_new_tokens=MAX_NEW_TOKENS[self.dataset],
            target=f" {answers[0]}",
            chat=self.dataset not in NO_CHAT,
            first_line=self.dataset in FIRST_LINE,
        )

    def _fit(self, question: Question, tokenizer: Any, length: int) -> Question:
        """Cut the middle of a prompt that is too long: the first and the last half of what may stay."""
        over = prompt_tokens(question, tokenizer) - length
        if over <= 0:
            return question
        tokens = encode(tokenizer, question.context + question.question)
        half = (len(tokens) - over) // 2
        if half <= len(encode(tokenizer, question.question)):
            raise InputError(f"{self.name}: a prompt does not fit into {length} tokens; give a longer length.")
        kept = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:half], tokens[-half:]))
        return dataclasses.replace(question, context=kept.removesuffix(question.question))


def grade(dataset: str, answer: str, right: Sequence[str], classes: Sequence[str]) -> float:
    """The best of the metric against every right answer, as LongBench scores a prediction."""
    if dataset in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    if dataset in METRICS:
        return max((METRICS[dataset](answer, text) for text in right), default=0.0)
    return max((scores.classification(answer, text, classes) for text in right), default=0.0)


def read(
    dataset: str, folder: Path | None = None, part: Literal["evaluation", "training"] = "evaluation"
) -> list[dict[str, Any]]:
    """The rows of a dataset: the first 175, or (for training, as the paper split them) those behind.

    Raises
    ------
    TextError
        If the file is in none of the data folders and cannot come from the hub.
    """
    rows = _rows(dataset, folder)
    return rows[:EVALUATED] if part == "evaluation" else rows[EVALUATED:]


@functools.lru_cache(maxsize=32)
def _rows(dataset: str, folder: Path | None) -> list[dict[str, Any]]:
    try:
        path = data.find(f"{dataset}.jsonl", folder, FETCH)
    except TextError as missing:
        if importlib.util.find_spec("huggingface_hub") is None:
            raise
        path = _download(dataset, missing)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _download(dataset: str, missing: TextError) -> Path:
    """The dataset's file, out of the hub's archive."""
    import zipfile

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from hashattention.models.packaged import cache_folder

    target = cache_folder() / "data" / "longbench"
    try:
        archive = hf_hub_download(HUB, "data.zip", repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TextError(f"{missing} The hub cannot be reached ({type(error).__name__}).") from error
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as whole:
        (target / f"{dataset}.jsonl").write_bytes(whole.read(f"data/{dataset}.jsonl"))
    return target / f"{dataset}.jsonl"
