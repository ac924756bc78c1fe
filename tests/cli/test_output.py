from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from hashattention.cli.output import grid, progress, write


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "new \udc80")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_progress_in_a_log_says_each_thing_once() -> None:
    console = Console(file=io.StringIO())
    with progress(console) as report:
        for done in range(5):
            report("reading", done, 5)
        report("training", 0, 1)
    assert console.file.getvalue() == "reading\ntraining\n"


def test_progress_on_a_terminal_cleans_up() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with progress(console) as report:
        report("reading", 1, 2)
        report("fetching", 0, 0)
    assert console.file.getvalue().endswith("\x1b[2K")


def test_numbers_are_never_broken_and_markup_is_text() -> None:
    console = Console(file=io.StringIO(), width=40)
    console.print(grid([["[bold]a", "long words " * 9, "123,456,789"]], ["name", "said", "count"], left=2))
    text = console.file.getvalue()
    assert "123,456,789" in text
    assert "[bold]a" in text
    assert grid([], ["name"]) == ""
