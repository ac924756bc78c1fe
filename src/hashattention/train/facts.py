"""Facts planted in training text, among rivals of the same form, and asked for at its end.

Text seldom makes a model look far back for one thing among many alike, so maps learn little of the heads that do. In
these sequences it must. The forms are none of those that `evaluation.tasks` asks for.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Facts of one form that lie in a text together.
RIVALS = 4
#: Where the text goes in a conversation.
MARK = "@@document@@"
#: Tokens behind a chosen place among which a line's end is looked for.
REACH = 64

Chance = random.Random


class Kind(NamedTuple):
    """A form of fact: what is said of `name`, how it is asked for, and what the answer is."""

    said: str
    asked: str
    name: Callable[[Chance], str]
    value: Callable[[Chance], str]


class Fact(NamedTuple):
    """A sentence, the question that asks for it, and the answer."""

    said: str
    asked: str
    answer: str


_FIRST = "Ada Boris Clara David Elena Farid Greta Henry Irene Jonas Katya Luis Maria Nadia Oscar Paula Rana Simon Tessa"
_LAST = "Abel Berg Costa Duarte Evans Fischer Grant Hansen Ito Jensen Keller Lopez Meyer Novak Okoye Perez Rossi Tanaka"
_PLACE = (
    "Bergen Cadiz Dover Essen Fargo Genoa Hobart Izmir Jena Kyoto Lima Malmo Nancy Oslo Porto Quito Riga Siena Tartu"
)
_NOUN = "bakery bridge harbour library mill museum orchard school station tower theatre tunnel windmill workshop"
_WORD = "anchor basil cobalt dune ember falcon garnet hazel indigo juniper kelp lemon maple nectar olive pepper quartz"
_PART = "batch cache client epoch frame index limit line max merge min node offset page poll queue retry shard size"


def _one(*lists: str, by: str = " ") -> Callable[[Chance], str]:
    """One word of each list, joined."""
    chosen = [each.split() for each in lists]
    return lambda chance: by.join(chance.choice(each) for each in chosen)


def _number(low: int, high: int) -> Callable[[Chance], str]:
    return lambda chance: str(chance.randint(low, high))


def _hexadecimal(chance: Chance) -> str:
    return f"{chance.getrandbits(32):08x}"


def _constant(chance: Chance) -> str:
    return "_".join(chance.sample(_PART.split(), 3)).upper()


def _function(chance: Chance) -> str:
    return "_".join(chance.sample(_PART.split(), 2)) + f"_{chance.choice(_WORD.split())}"


_PERSON, _HOUSE, _PAIR = _one(_FIRST, _LAST), _one(_PLACE, _NOUN), _one(_WORD, _NOUN)
_YEAR, _FOUR, _FIVE, _SIX = _number(1500, 1999), _number(1000, 9999), _number(10000, 99999), _number(100000, 999999)

KINDS = (
    Kind("{name} can be reached at extension {value}.", "At which extension can {name} be reached?", _PERSON, _FOUR),
    Kind("{name} was born in {value}.", "Where was {name} born?", _PERSON, _one(_PLACE)),
    Kind("{name} keeps a {value} in the office.", "What does {name} keep in the office?", _PERSON, _one(_WORD)),
    Kind("The {name} opened in {value}.", "In which year did the {name} open?", _HOUSE, _YEAR),
    Kind("Last year {value} people saw the {name}.", "How many people saw the {name} last year?", _HOUSE, _FIVE),
    Kind("Parcel {name} is on its way to {value}.", "Where is parcel {name} on its way to?", _SIX, _one(_PLACE)),
    Kind("Invoice {name} amounts to {value} euros.", "To how many euros does invoice {name} amount?", _FIVE, _FOUR),
    Kind("{name} = {value}", "What is {name} set to?", _constant, _FOUR),
    Kind('    "{name}": "{value}",', 'Which string has the key "{name}"?', _one(_WORD, _PART, by="-"), _hexadecimal),
    Kind("def {name}(): return {value}", "What does {name}() return?", _function, _FIVE),
    Kind("| {name} | {value} |", "What does the table list beside {name}?", _PAIR, _one(_PLACE, _WORD)),
    Kind("Host {name} has the fingerprint {value}.", "What is the fingerprint of host {name}?", _PAIR, _hexadecimal),
)


def room(length: int) -> int:
    """Tokens at the end of a sequence of `length` tokens in which it asks."""
    return min(1024, length // 8)


def plant(tokenizer: Any, tokens: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
    """A sequence of the same length that gives facts and asks for them.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; with a chat format the text is a user's, and the answers are the assistant's.
    tokens : Tensor, int64 ``[T]``
        Text, whose last tokens give way.
    chance : random.Random
        Draws the facts and their places.

    Returns
    -------
    tokens : Tensor, int64 ``[T]``
        The questions and answers are in the last `room` tokens. Text too short for any stays as it is.
    facts : Tensor, int64 ``[F]``
        The places of the facts' tokens, ascending.
    """
    special = list(tokenizer("")["input_ids"])
    begin = special[:1] if special[:1] == tokens[:1].tolist() else []
    facts = _draw(tokenizer, begin, room(len(tokens)), chance)
    head, tail = _converse(tokenizer, facts, begin)
    chance.shuffle(facts)
    said = [_encode(tokenizer, f"\n{fact.said}\n") for fact in facts]
    left = len(tokens) - len(head) - len(tail) - sum(map(len, said))
    if not facts or left < len(tokens) // 2:
        return tokens, torch.zeros(0, dtype=torch.int64)
    text = tokens[len(begin) :][:left].tolist()
    places = sorted(_line_end(tokenizer, text, chance.randrange(len(text))) for _ in said)
    parts, last, marks = list(head), 0, list[int]()
    for place, fact in zip(places, said, strict=True):
        parts += text[last:place]
        marks += range(len(parts), len(parts) + len(fact))
        parts += fact
        last = place
    return torch.tensor([*parts, *text[last:], *tail]), torch.tensor(marks, dtype=torch.int64)


def _draw(tokenizer: Any, begin: list[int], most: int, chance: Chance) -> list[Fact]:
    """As many facts as can be asked for in `most` tokens, whole families of rivals but for the last; shuffled."""
    facts: list[Fact] = []
    for kind in chance.sample(KINDS, len(KINDS)):
        for name in dict.fromkeys(kind.name(chance) for _ in range(RIVALS)):
            value = kind.value(chance)
            facts.append(Fact(kind.said.format(name=name, value=value), kind.asked.format(name=name), value))
    counts = range(len(facts) + 1)
    count = bisect.bisect(counts, most, key=lambda some: len(_converse(tokenizer, facts[:some], begin)[1])) - 1
    return chance.sample(facts[:count], count)


def _converse(tokenizer: Any, facts: list[Fact], begin: list[int]) -> tuple[list[int], list[int]]:
    """The tokens before and after the text of a conversation that asks for `facts`."""
    if not facts:
        return begin, []
    whole = ""
    if getattr(tokenizer, "chat_template", None):
        turns: list[dict[str, str]] = []
        for fact in facts:
            before = "" if turns else f"{MARK}\n\n"
            turns += [{"role": "user", "content": before + fact.asked}, {"role": "assistant", "content": fact.answer}]
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    head, found, tail = whole.partition(MARK)
    if found:
        return _encode(tokenizer, head), _encode(tokenizer, tail)
    asked = "\n".join(f"Question: {fact.asked}\nAnswer: {fact.answer}" for fact in facts)
    return begin, _encode(tokenizer, f"\n\n{asked}\n")


def _line_end(tokenizer: Any, text: list[int], place: int) -> int:
    """The first place from `place` on behind a line's end, or `place` itself if none is near."""
    for at in range(place, min(place + REACH, len(text))):
        if str(tokenizer.decode(text[at : at + 1])).endswith("\n"):
            return at + 1
    return place


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
