"""Where a number or an artifact came from: version, commit, command, libraries, device, time; no host, no home."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import hashattention

#: Names the commit where the package lies in no checkout (an image, a copied folder).
COMMIT = "HASHATTENTION_COMMIT"
#: Libraries whose version can change a result.
LIBRARIES = ("torch", "transformers", "safetensors", "triton", "vllm")


def origin(device: Any = "cpu", command: str | None = None) -> dict[str, Any]:
    """The origin of a result, as plain JSON values.

    Parameters
    ----------
    device : torch.device or str
        Where it was computed.
    command : str, optional
        The command that gives it again; by default the one that runs now, with absolute paths cut to their last part.

    Returns
    -------
    dict
        `version`, `commit` (None outside a checkout; ends in "+" with uncommitted changes), `command`, `python`,
        `libraries`, `device` and `time` (UTC, ISO 8601, seconds).

    Examples
    --------
    >>> sorted(origin(command="hashattention train"))
    ['command', 'commit', 'device', 'libraries', 'python', 'time', 'version']
    """
    return {
        "version": hashattention.__version__,
        "commit": commit(),
        "command": command_line(sys.argv) if command is None else command,
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "device": device_name(device),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line(arguments: list[str]) -> str:
    """`arguments` as one shell line; an absolute path is cut to its last part, so that no home folder is told, and
    ``python -m package`` is the package's name.
    """
    package = Path(arguments[0]).parent.name if arguments and Path(arguments[0]).name == "__main__.py" else ""
    return shlex.join([_public(word) for word in ([package, *arguments[1:]] if package else arguments)])


def commit(folder: Path | None = None) -> str | None:
    """The git commit of the package's own checkout, with "+" if tracked files differ; outside a checkout what
    `HASHATTENTION_COMMIT` says, or None.
    """
    home = folder or Path(__file__).resolve().parent
    head = _git(home, "rev-parse", "--short=12", "HEAD")
    # An installed package may lie inside somebody else's checkout: its files are not tracked there.
    if not head or not _git(home, "ls-files", "."):
        return os.environ.get(COMMIT)
    return head + ("+" if _git(home, "status", "--porcelain", "--untracked-files=no", ".") else "")


def device_name(device: Any) -> str:
    """The product name of a GPU, or of the processor's architecture with its number of usable cores."""
    import torch

    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"{kind.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _public(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and Path(value).is_absolute():
        return f"{option}={Path(value).name}"
    return Path(word).name if Path(word).is_absolute() else word


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
