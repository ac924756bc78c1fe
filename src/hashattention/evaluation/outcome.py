"""One method on one batch that was read: answers and their log-probabilities, perplexity, agreement with dense."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hashattention.evaluation.meter import Meter
from hashattention.evaluation.prompt import encode
from hashattention.evaluation.reader import Reader
from hashattention.evaluation.tasks.base import Question

#: Tokens of a right answer that count for its log-probability.
TARGET_TOKENS = 64
#: How often a growing answer is graded, in tokens.
GRADE_EVERY = 8
#: How often a GPU's answers are looked at, in tokens: the host waits for it then.
HEAR_EVERY = 8
#: The requests that still answer go on alone where they are at most this share of all: a copy of their cache pays then.
NARROW = 0.25
#: Log-probabilities that are computed at once, of 4 bytes.
LOGITS = 1 << 29


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What becomes a row; fields as in `Row`."""

    score: float
    answer: str = ""
    logprob: float | None = None
    nll: float | None = None
    kl: float | None = None


def answer(
    reader: Reader,
    tokenizer: Any,
    questions: Sequence[Question],
    tokens: Sequence[Sequence[int]],
    meter: Meter,
    weigh: bool = True,
) -> list[Outcome]:
    """Read the questions' `tokens` (all of one length, perhaps 0) behind the contexts, then answer greedily; `weigh`
    the right answers too.
    """
    logits = reader.logits
    if tokens[0]:
        logits = reader.forward(torch.tensor([list(one) for one in tokens], device=logits.device))[:, -1]
    mark = reader.mark()
    texts = _say(reader, tokenizer, questions, logits, meter)
    reader.rewind(mark)
    meter.until = -1
    targets = [encode(tokenizer, question.target)[:TARGET_TOKENS] if weigh else [] for question in questions]
    logprobs = _weigh(reader, targets, logits)
    return [
        Outcome(question.grade(text), text.strip(), logprob)
        for question, text, logprob in zip(questions, texts, logprobs, strict=True)
    ]


def _say(reader: Reader, tokenizer: Any, questions: Sequence[Question], logits: Tensor, meter: Meter) -> list[str]:
    """Greedy answers; a request that has ended runs along unheard."""
    stops = torch.tensor(sorted(_stops(reader.model, tokenizer)), device=logits.device)
    everybody = [_Listener(question, tokenizer, set(stops.tolist())) for question in questions]
    listeners = everybody
    ended = torch.zeros(len(questions), dtype=torch.bool, device=logits.device)
    told: list[Tensor] = []
    every = HEAR_EVERY if logits.is_cuda else 1
    with contextlib.ExitStack() as stack:
        for step in itertools.count():
            best = logits.argmax(-1)
            told.append(best)
            ended = ended | torch.isin(best, stops)
            # Every answer has all the steps that are measured, whatever others are in its batch.
            if len(told) >= every and reader.slots >= meter.until:
                for listener, tokens in zip(listeners, torch.stack(told, 1).tolist(), strict=True):
                    listener.hear(tokens)
                told.clear()
                going = [place for place, listener in enumerate(listeners) if not listener.done]
                if not going:
                    break
                if len(going) <= NARROW * len(listeners) and reader.can_narrow(len(going)):
                    stack.enter_context(reader.narrowed(going))
                    best, ended, listeners = best[going], ended[going], [listeners[place] for place in going]
            # The first step counts for every request, so that each has been measured.
            meter.active = (~ended).float() if step else None
            logits = reader.forward(best[:, None])[:, -1]
    return [listener.text() for listener in everybody]


class _Listener:
    """One request's answer: what it said until its end, and what came behind is not heard."""

    def __init__(self, question: Question, tokenizer: Any, stops: set[int]) -> None:
        self.question, self.tokenizer, self.stops = question, tokenizer, stops
        self.said: list[int] = []
        self.done = False

    def hear(self, tokens: Sequence[int]) -> None:
        """The next tokens, one by one."""
        for token in tokens:
            if not self.done and token not in self.stops:
                self.said.append(token)
            self.done = self.done or token in self.stops or _ended(self.question, self.said, self.tokenizer)

    def text(self) -> str:
        """What it said, or the first line of it."""
        text = str(self.tokenizer.decode(self.said, skip_special_tokens=True))
        return text.lstrip("\n").split("\n")[0] if self.question.first_line else text


def _ended(question: Question, said: Sequence[int], tokenizer: Any) -> bool:
    if len(said) >= question.max_new_tokens:
        return True
    grade = question.growing and len(said) % GRADE_EVERY == 0
    if not (question.first_line or grade):
        return False
    text = tokenizer.decode(said, skip_special_tokens=True)
    return (question.first_line and "\n" in text.lstrip("\n")) or (grade and question.grade(text) == 1.0)


def _weigh(reader: Reader, targets: Sequence[Sequence[int]], logits: Tensor) -> list[float | None]:
    """Mean log-probability of each target's tokens, given those before; None for an empty one."""
    longest = max(map(len, targets))
    if not longest:
        return [None] * len(targets)
    # What pads a shorter target lies behind it, where nothing that counts can see it.
    padded = torch.tensor([[*one, *[0] * (longest - len(one))] for one in targets], device=logits.device)
    parts = [logits.log_softmax(-1).gather(-1, padded[:, :1])]
    several = max(2, LOGITS // logits.numel())
    for first in range(0, longest - 1, several):
        tokens = padded[:, first : min(first + several, longest - 1)]
        after = padded[:, first + 1 : first + 1 + tokens.shape[1]]
        told = reader.forward(tokens, keep=tokens.shape[1]).log_softmax(-1)
        parts.append(told.gather(-1, after[..., None])[..., 0])
    found = torch.cat(parts, 1).tolist()
    return [
        sum(one[: len(target)]) / len(target) if target else None for one, target in zip(found, targets, strict=True)
    ]


def predict(reader: Reader, tails: Sequence[Sequence[int]]) -> list[Outcome]:
    """Perplexity of the tails: every token but the first, which dense predicts."""
    tokens = torch.tensor([list(tail) for tail in tails], device=reader.logits.device)
    logits = reader.forward(tokens[:, :-1], keep=tokens.shape[1] - 1)
    losses = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    return [Outcome(score=float((-loss).exp()), nll=float(loss)) for loss in losses.cpu().double()]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What dense says next: `tokens` int64 ``[B, T]``, and its log-probabilities behind each but the last, float32
    ``[B, T - 1, V]``.
    """

    tokens: Tensor
    logprobs: Tensor


def go_on(reader: Reader, tokens: int) -> Continuation:
    """Dense's greedy continuation of the contexts; the reader forgets it again."""
    said, logits = [], reader.logits
    for _ in range(tokens):
        said.append(logits.argmax(-1, keepdim=True))
        if len(said) < tokens:
            logits = reader.forward(said[-1])[:, -1]
    reader.forget()
    told = torch.cat(said, 1)
    # Once more in one pass, as every method is compared: otherwise rounding alone would differ.
    logprobs = reader.forward(told[:, :-1], keep=tokens - 1).log_softmax(-1)
    reader.forget()
    return Continuation(told, logprobs)


def agree(reader: Reader, dense: Continuation) -> list[Outcome]:
    """Share of most likely tokens that are dense's, and the divergence from dense, along its continuation."""
    found = reader.forward(dense.tokens[:, :-1], keep=dense.logprobs.shape[1]).log_softmax(-1)
    match = (found.argmax(-1) == dense.logprobs.argmax(-1)).float().mean(1).tolist()
    # A token that dense gives no probability adds nothing.
    kl = (dense.logprobs.exp() * (dense.logprobs - found)).nan_to_num(0.0).sum(-1).mean(1).tolist()
    return [Outcome(score=score, kl=max(0.0, other)) for score, other in zip(match, kl, strict=True)]


def _stops(model: Any, tokenizer: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    return {token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None}
