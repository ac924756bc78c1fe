"""Text to token sequences of exactly the context length, with held-out sequences from other documents."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattention.errors import MissingDependencyError, TextError
from hashattention.models.packaged import Progress
from hashattention.train.facts import plant

#: The `datasets` name that is streamed when no text is given.
DEFAULT_TEXT = "Skylion007/openwebtext"
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
#: One document in this many of a streamed data set is held out.
HELD_OUT_EVERY = 10

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token sequences, int64 ``[context]`` each; `fingerprint` identifies all of their tokens, and `facts` holds the
    places int64 ``[F]`` of what was planted in a training sequence, by its number.
    """

    train: list[Tensor]
    held_out: list[Tensor]
    fingerprint: str
    facts: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)


def sequences(
    tokenizer: Any,
    texts: Texts | None,
    *,
    context: int,
    count: int,
    held_out: int,
    seed: int = 0,
    held_out_texts: Texts | None = None,
    lengths: Sequence[int] = (),
    asks: Callable[[int], bool] | None = None,
    progress: Progress | None = None,
) -> Sequences:
    """Cut `count` training and `held_out` held-out sequences of `context` tokens; the same call gives the same tokens.

    Training sequences take `lengths` in turn, if there are any, in place of `context`; those that `asks` names by
    their number ask for facts (`facts.plant`).

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; its BOS token, where it adds one, begins every sequence.
    texts : path, `datasets` name, or a list of either; None streams `DEFAULT_TEXT`
        Files and folders (``.txt .md .rst .py``, and ``.jsonl`` with a "text" field). Short documents are joined; of
        long ones, parts from all over the collection are taken. A file gives training or held-out tokens, never both;
        if there is one file only, different parts of it do.
    held_out_texts : likewise, optional
        Where held-out sequences come from instead of a share of `texts`.

    Raises
    ------
    TextError
        For a missing file, an empty folder, or too little text: how many tokens there are and how many are needed.
    MissingDependencyError
        For a `datasets` name without the `datasets` package.
    """
    sources = _as_list(DEFAULT_TEXT if texts is None else texts)
    cut = _Cutter(tokenizer, context, progress)
    if held_out_texts is not None or held_out == 0:
        other = _as_list(held_out_texts) if held_out_texts is not None else []
        held = cut(_documents(other, context, seed), held_out, "held-out")
        train = cut(_documents(sources, context, seed), count, "training", lengths)
    else:
        ours, theirs = _split(sources, context, held_out, seed)
        held = cut(theirs, held_out, "held-out")
        train = cut(ours, count, "training", lengths)
    facts = {}
    for number in filter(asks, range(count)) if asks is not None else ():
        train[number], facts[number] = plant(tokenizer, train[number], random.Random(f"{seed} facts {number}"))
    return Sequences(train, held, _fingerprint([*train, *held]), facts)


class _Cutter:
    """Joins documents and cuts them into sequences."""

    def __init__(self, tokenizer: Any, context: int, progress: Progress | None) -> None:
        self.tokenizer, self.context, self.progress = tokenizer, context, progress
        bos = getattr(tokenizer, "bos_token_id", None)
        begins = list(tokenizer("")["input_ids"])[:1]
        self.prefix = begins if bos is not None and begins == [bos] else []

    def __call__(self, documents: Iterable[str], count: int, which: str, lengths: Sequence[int] = ()) -> list[Tensor]:
        turns = lengths or (self.context,)
        rooms = [turns[index % len(turns)] - len(self.prefix) for index in range(count)]
        found: list[Tensor] = []
        held: list[int] = []
        for document in documents if count else ():
            held += self.tokenizer(document + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            while len(found) < count and len(held) >= rooms[len(found)]:
                room = rooms[len(found)]
                found.append(torch.tensor([*self.prefix, *held[:room]], dtype=torch.int64))
                held = held[room:]
                if self.progress is not None:
                    self.progress(f"reading {which} text", len(found), count)
            if len(found) == count:
                break
        if len(found) < count:
            tokens = sum(rooms[: len(found)]) + len(held)
            size = " and ".join(map(str, dict.fromkeys(turns)))
            raise TextError(
                f"the {which} text holds {tokens} tokens, but {count} sequences of {size} need {sum(rooms)}; "
                "give more text, or lower `context`, `sequences` or `held_out` in the recipe."
            )
        return found


def _as_list(texts: Texts) -> list[str]:
    return [os.fspath(texts)] if isinstance(texts, str | os.PathLike) else [os.fspath(text) for text in texts]


def _documents(sources: list[str], context: int, seed: int) -> Iterator[str]:
    names = [name for name in sources if _is_dataset(name)]
    files = _files([name for name in sources if name not in names])
    return itertools.chain(_interleave(files, context, seed), *(_stream(name) for name in names))


def _split(sources: list[str], context: int, held_out: int, seed: int) -> tuple[Iterator[str], Iterator[str]]:
    """Documents for training and, of other documents, for the held-out side."""
    names = [name for name in sources if _is_dataset(name)]
    files = _files([name for name in sources if name not in names])
    if not files:
        streams = [enumerate(itertools.chain(*(_stream(name) for name in names))) for _ in range(2)]
        training = (text for index, text in streams[0] if index % HELD_OUT_EVERY)
        return training, (text for index, text in streams[1] if index % HELD_OUT_EVERY == 0)
    if len(files) == 1:
        parts = list(_parts(files[0], context))
        random.Random(f"{seed} split").shuffle(parts)
        kept = min(_enough([len(part) for part in parts], context, held_out), max(1, len(parts) // 2))
        return itertools.chain(parts[kept:], *(_stream(name) for name in names)), iter(parts[:kept])
    random.Random(f"{seed} split").shuffle(files)
    # Room for every sequence even where a token is six characters, but never more than half of the files.
    kept = min(_enough([path.stat().st_size for path in files], context, held_out), len(files) // 2)
    ours = itertools.chain(_interleave(files[kept:], context, seed), *(_stream(name) for name in names))
    return ours, _interleave(files[:kept], context, seed)


def _enough(sizes: list[int], context: int, held_out: int) -> int:
    reached = itertools.accumulate(sizes)
    return next((index + 1 for index, size in enumerate(reached) if size >= 6 * context * held_out), len(sizes))


def _interleave(files: list[Path], context: int, seed: int) -> Iterator[str]:
    """One part of every file, then another of every file, ...: few sequences still see many documents."""
    order = list(files)
    chance = random.Random(f"{seed} order")
    chance.shuffle(order)
    queues = []
    for path in order:
        parts = list(_parts(path, context))
        chance.shuffle(parts)
        queues.append(parts)
    for parts_of_a_round in itertools.zip_longest(*queues):
        yield from (part for part in parts_of_a_round if part is not None)


def _parts(path: Path, context: int) -> Iterator[str]:
    """The documents of a file, cut at line ends into parts of about four characters per token of the context."""
    for document in _read(path):
        held, size = [], 0
        for line in document.splitlines(keepends=True):
            held.append(line)
            size += len(line)
            if size >= 4 * context:
                yield "".join(held)
                held, size = [], 0
        if held:
            yield "".join(held)


def _read(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(
                f'{path}, line {number}: expected a JSON object with a "text" field ({error!r}).'
            ) from error


def _files(sources: list[str]) -> list[Path]:
    found: list[Path] = []
    for name in sources:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not inside:
                raise TextError(f"the folder {name} holds no text; expected files ending in {' '.join(SUFFIXES)}.")
            found += inside
        else:
            found.append(path)
    return found


def _is_dataset(name: str) -> bool:
    path = Path(name)
    if path.exists():
        return False
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in SUFFIXES or name.count("/") > 1:
        raise TextError(
            f"no text file or folder at {name}; give an existing one, or the name of a data set (owner/name)."
        )
    return True


def _stream(name: str) -> Iterator[str]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependencyError(
            f"streaming {name!r} needs the datasets package: pip install 'hashattention[train]'"
        )
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        yield from (str(row["text"]) for row in rows)
    except KeyError as error:
        raise TextError(f"data set {name!r} has no field {error}; a text data set has the field 'text'.") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TextError(
            f"data set {name!r} could not be streamed ({reason}); check the name and the network, or give files."
        ) from error


def _fingerprint(found: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for sequence in found:
        digest.update(sequence.numpy().tobytes())
    return digest.hexdigest()[:16]
