"""Tasks by name: ``"needle"``, ``"ruler:vt"``, ``"longbench:*"``, ``"perplexity:tail=64"``, ``"agreement"``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from hashattention.errors import ConfigError
from hashattention.evaluation.tasks.base import Task

GROUPS = ("needle", "ruler", "longbench", "perplexity", "agreement")


def parse(texts: Iterable[str], folder: Path | None = None) -> tuple[Task, ...]:
    """The tasks that `texts` name; ``ruler`` and ``ruler:*`` are all of RULER, ``longbench`` likewise.

    Parameters
    ----------
    texts : iterable of str
    folder : Path, optional
        Where their data lies (see `data.find`).

    Raises
    ------
    ConfigError
        For an unknown name (the nearest is named) or a bad option.

    Examples
    --------
    >>> [task.name for task in parse(["ruler:qa_*", "needle:distractors=3"])]
    ['ruler:qa_1', 'ruler:qa_2', 'needle:distractors=3']
    """
    found: dict[str, Task] = {}
    for text in texts:
        group, _, which = text.strip().partition(":")
        for task in _group(_known(group, GROUPS, "task"), which, folder):
            found.setdefault(task.name, task)
    if not found:
        raise ConfigError(f"no task was named; known: {', '.join(GROUPS)}.")
    return tuple(found.values())


def _group(group: str, which: str, folder: Path | None) -> Sequence[Task]:
    from hashattention.evaluation.tasks.longbench import DATASETS, LongBenchTask
    from hashattention.evaluation.tasks.needle import NeedleTask
    from hashattention.evaluation.tasks.passages import PassageTask
    from hashattention.evaluation.tasks.ruler import TASKS, RulerTask

    if group == "ruler":
        return [RulerTask(name, folder) for name in _matching(which, tuple(TASKS), group)]
    if group == "longbench":
        return [LongBenchTask(name, folder) for name in _matching(which, DATASETS, group)]
    if group == "needle":
        return [NeedleTask(_option(which, "distractors", group), folder)]
    return [PassageTask("perplexity" if group == "perplexity" else "agreement", _option(which, "tail", group), folder)]


def _matching(which: str, names: Sequence[str], group: str) -> Sequence[str]:
    import fnmatch

    if found := fnmatch.filter(names, which or "*"):
        return found
    return [_known(which, names, f"{group} task")]


def _option(text: str, name: str, group: str) -> int:
    if not text:
        return 0
    key, _, value = text.partition("=")
    _known(key, (name,), f"option of {group}")
    if not value.isdigit():
        raise ConfigError(f"{group}: {name} must be a whole number; given {value!r}.")
    return int(value)


def _known(name: str, known: Sequence[str], what: str) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
    raise ConfigError(f"unknown {what} {name!r}; {hint}")
