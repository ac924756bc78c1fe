"""RULER's question answering: one document that answers (SQuAD) or several (HotpotQA), among others."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Literal

from hashattention.evaluation.tasks import data
from hashattention.evaluation.tasks.ruler_draft import Draft

ONLY = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, its answers, the documents that hold them and those of the same article, by number."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Documents:
    """Questions of `dataset` in the order of the file."""

    dataset: Literal["squad", "hotpotqa"]
    folder: Path | None = None

    max_new_tokens = 32

    @property
    def smallest(self) -> int:
        """The documents that any question needs."""
        return 1 if self.dataset == "squad" else 10

    @property
    def largest(self) -> int:
        """All documents there are."""
        return len(_read(self.dataset, self.folder)[1])

    def draft(self, source: random.Random, size: int, index: int) -> Draft:
        """Question number `index` among `size` documents."""
        questions, documents = _read(self.dataset, self.folder)
        asked = questions[index % len(questions)]
        chosen = self._choose(source, asked, size, len(documents))
        source.shuffle(chosen)
        shown = "\n\n".join(f"Document {place}:\n{documents[number]}" for place, number in enumerate(chosen, 1))
        return Draft(
            context=f"{ONLY}The following are given documents.\n\n{shown}\n\n",
            question=f"{ONLY}Question: {asked.query}",
            answer_prefix=" Answer:",
            expected=asked.answers,
            target=f" {asked.answers[0]}",
        )

    def _choose(self, source: random.Random, asked: Asked, size: int, total: int) -> list[int]:
        if size >= total:
            return list(range(total))
        more = max(0, size - len(asked.gold))
        if more <= len(asked.related):
            return [*asked.gold, *source.sample(asked.related, more)]
        known = {*asked.gold, *asked.related}
        others = [number for number in range(total) if number not in known]
        return [*asked.gold, *asked.related, *source.sample(others, more - len(asked.related))]


@functools.lru_cache(maxsize=4)
def _read(dataset: str, folder: Path | None) -> tuple[list[Asked], list[str]]:
    path = data.find(f"{dataset}.json", folder)
    found = json.loads(path.read_text(encoding="utf-8"))
    return _squad(found["data"]) if dataset == "squad" else _hotpotqa(found)


def _squad(articles: list[dict[str, list[dict[str, object]]]]) -> tuple[list[Asked], list[str]]:
    documents = sorted({str(paragraph["context"]) for article in articles for paragraph in article["paragraphs"]})
    number = {text: place for place, text in enumerate(documents)}
    asked = []
    for article in articles:
        own = [number[str(paragraph["context"])] for paragraph in article["paragraphs"]]
        for paragraph, here in zip(article["paragraphs"], own, strict=True):
            for item in paragraph["qas"]:  # type: ignore[attr-defined]
                if not item["is_impossible"]:
                    answers = tuple(answer["text"] for answer in item["answers"])
                    related = tuple(other for other in own if other != here)
                    asked.append(Asked(item["question"], answers, (here,), related))
    return asked, documents


def _hotpotqa(items: list[dict[str, object]]) -> tuple[list[Asked], list[str]]:
    shown = [[f"{title}\n{''.join(parts)}" for title, parts in item["context"]] for item in items]  # type: ignore
    documents = sorted({text for texts in shown for text in texts})
    number = {text: place for place, text in enumerate(documents)}
    asked = [
        Asked(str(item["question"]), (str(item["answer"]),), tuple(number[text] for text in texts))
        for item, texts in zip(items, shown, strict=True)
    ]
    return asked, documents
