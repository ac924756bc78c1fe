"""Output: people read stderr, programs read the last line of stdout; a file gets its name only when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hashattention.errors import InputError
from hashattention.models.packaged import Progress as Report


def console() -> Console:
    """Where people read: stderr."""
    return Console(stderr=True, highlight=False)


def emit(document: Any) -> None:
    """Write one JSON object as the last line of stdout."""
    typer.echo(json.dumps(document, default=str))


@contextlib.contextmanager
def progress(to: Console) -> Iterator[Report]:
    """A function ``report(text, done, total)`` that moves a bar on a terminal, or says each new text once elsewhere."""
    if not to.is_terminal:
        said = ""

        def say(text: str, done: int, total: int) -> None:
            nonlocal said
            if text != said:
                to.print(text, soft_wrap=True)
            said = text

        yield say
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=to, transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total or None)


def grid(cells: Sequence[Sequence[str]], columns: Sequence[str] = (), title: str = "", left: int = 1) -> Any:
    """Rows as a plain table; the first `left` columns (all, without headings) are aligned left. Nothing for no rows."""
    if not cells:
        return ""
    table = Table(
        title=escape(title) or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=bool(columns),
    )
    table.show_edge = table.pad_edge = False
    for index, column in enumerate(columns or [""] * len(cells[0])):
        words = " ".join([column, *(row[index] for row in cells)]).split()
        # A number is never broken, a long path may be.
        width = min(12, max(map(len, words), default=0))
        table.add_column(escape(column), overflow="fold", min_width=width)
        table.columns[-1].justify = "right" if columns and index >= left else "left"
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    return table


def check_folder(path: Path) -> None:
    """Raise `InputError` unless a file can be written at `path`: better before the work than after it."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: give a file name in a folder that exists and can be written.")


def write(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) under its name only once it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_prompt(path: Path) -> str:
    """A prompt file, or stdin for ``-``.

    Raises
    ------
    InputError
        If the file is missing, is no text, or holds nothing but white space.
    """
    try:
        text = typer.get_text_stream("stdin").read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read the prompt {path} ({error.strerror}); give a text file, or - for stdin."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt {path} is not UTF-8 text ({error.reason}); give a text file.") from error
    if not text.strip():
        raise InputError(
            "the prompt is empty; give some text with --prompt-file FILE, or on stdin with --prompt-file -."
        )
    return text
