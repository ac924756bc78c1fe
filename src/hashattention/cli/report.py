"""``hashattention report``: the rows of an evaluation as a page, pictures and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashattention.cli.block import Block
from hashattention.cli.eval import parse_densities
from hashattention.cli.output import check_folder, console, emit, grid, progress, write

if TYPE_CHECKING:
    from hashattention.report.leaderboard import Board

#: A file that holds these lines gets the leaderboard between them.
BLOCK = Block.named("leaderboard")
NAME = "report.html"


def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of hashattention eval.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; by default report.html in the folder.")] = None,
    png: Annotated[bool, typer.Option(help="Also write the plots as PNGs beside the page.")] = True,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table there, or between the leaderboard markers of that file.")
    ] = None,
    density: Annotated[str | None, typer.Option(help="Only dense and these densities, comma-separated: 1/16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Show what an evaluation found: a leaderboard, plots, needle maps and marked documents on one page."""
    from hashattention.report import leaderboard, leaderboard_page, leaderboard_table

    leaderboard_page.check_dependencies()
    boards, documents = leaderboard.load(folder, None if density is None else parse_densities(density))
    page = folder / NAME if out is None else out
    for path in (page, markdown):
        if path is not None:
            check_folder(path)
    text = "" if markdown is None else BLOCK.read(markdown)
    written = []
    with progress(console()) as say:
        say("drawing", 0, 0)
        drawn = [leaderboard_page.figures(board) for board in boards]
        write(page, leaderboard_page.render(boards, drawn, documents))
        for name, picture in leaderboard_page.pictures(boards, drawn) if png else ():
            written.append(page.with_name(f"{page.stem}-{name}"))
            write(written[-1], picture)
            say(written[-1].name, len(written), sum(map(len, drawn)))
    if markdown is not None:
        write(markdown, BLOCK.replace(text, leaderboard_table.markdown(boards)))
    _show(boards, page)
    if as_json:
        emit({"boards": _plain(boards), "report": str(page), "pictures": [str(path) for path in written]})


def _show(boards: Sequence[Board], page: Path) -> None:
    from hashattention.report import leaderboard, leaderboard_table

    out = console()
    for board, title in zip(boards, leaderboard.titles(boards), strict=True):
        cells = [[cell.short for cell in row] for row in leaderboard_table.rows(board)]
        out.print(grid(cells, leaderboard_table.columns(board), title))
        out.print(leaderboard_table.conditions(board), style="dim")
        out.print(leaderboard_table.reading(board, "after each"), style="dim")
    out.print(f"report: {page.absolute()}", soft_wrap=True)


def _plain(boards: Sequence[Board]) -> list[dict[str, Any]]:
    """The boards as JSON values, without the rows they were made of."""
    kept = [dataclasses.replace(board, rows=()) for board in boards]
    return [dataclasses.asdict(board) for board in kept]
