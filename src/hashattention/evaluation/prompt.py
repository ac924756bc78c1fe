"""A question in a model's chat format, as tokens, cut where the document ends."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from hashattention.errors import TextError
from hashattention.evaluation.tasks.base import Question

_MARK = "@@question@@"


@dataclasses.dataclass(frozen=True)
class CutPrompt:
    """`context` is read densely, `question` (everything behind it, up to the answer) follows; `text` is the
    context's.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    text: str

    def __len__(self) -> int:
        """Tokens in all."""
        return len(self.context) + len(self.question)


def cut(question: Question, tokenizer: Any, *, chat: bool = True, longest: int | None = None) -> CutPrompt:
    """The tokens of a question.

    Parameters
    ----------
    question : Question
    tokenizer
        A transformers tokenizer; one without a chat template gives plain text.
    chat : bool
        False: plain text in any case.
    longest : int, optional
        Tokens of the question at most; what stands before them is read with the context.

    Raises
    ------
    TextError
        If the chat template changes the text, so that it cannot be cut.
    """
    chat = chat and question.chat and bool(getattr(tokenizer, "chat_template", None))
    before, after = question.context, ""
    if chat:
        turn = [{"role": "user", "content": question.context + _MARK}]
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, found, after = whole.partition(_MARK)
        if not found or question.context.strip() not in before:
            raise TextError("this tokenizer's chat template rewrites the user's text; the document is not in it.")
    tail = encode(tokenizer, question.question + after + question.answer_prefix)
    # A chat template writes the special tokens itself.
    context = encode(tokenizer, before, special=not chat)
    over = 0 if longest is None else max(0, len(tail) - longest)
    return CutPrompt((*context, *tail[:over]), tuple(tail[over:]), before)


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Tokens of `text`."""
    return list(_encode(tokenizer, text, special))


@functools.lru_cache(maxsize=64)
def _encode(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    """Kept for a while: a sample is measured before it is read."""
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prompt_tokens(question: Question, tokenizer: Any) -> int:
    """Tokens of the prompt and of the longest answer."""
    return len(cut(question, tokenizer)) + question.max_new_tokens


def pieces(prompt: CutPrompt, tokenizer: Any) -> tuple[str, ...]:
    """The context's tokens as text; joined they give `prompt.text` (special tokens in front are empty).

    A tokenizer without offsets (a slow one) gives each token's own text instead.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tuple(tokenizer.convert_ids_to_tokens(list(prompt.context)))
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    borders = [0, *starts[1:], len(prompt.text)]
    found = [prompt.text[start:end] for start, end in itertools.pairwise(borders)]
    front = len(prompt.context) - len(found)
    # A question longer than allowed has its first tokens here, behind the text.
    return (
        tuple(found + [""] * front)
        if prompt.context[: len(found)] == tuple(encoded["input_ids"])
        else tuple([""] * front + found)
    )
