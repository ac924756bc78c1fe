"""``hashattention demo``: three facts in a novel, dense and hashed, as a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashattention.cli.block import Block
from hashattention.cli.model import load, parse_device, parse_dtype
from hashattention.cli.output import check_folder, console, emit, grid, progress, write

if TYPE_CHECKING:
    from hashattention.evaluation.demo import DemoResult

NAME = "smollm2-135m-instruct"
#: A file that holds these lines gets the table between them.
BLOCK = Block.named("demo table")
BEGIN, END = BLOCK.begin, BLOCK.end


def demo(
    model: Annotated[str, typer.Option(help="A model folder, hub id, .gguf file or packaged name.")] = NAME,
    maps: Annotated[str, typer.Option(help="A maps folder, shipped name or hub id.")] = NAME,
    density: Annotated[list[float] | None, typer.Option(help="Attended tokens over all; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Context in tokens.")] = 4096,
    report: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table there, or between the demo markers of that file.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on a CPU), bfloat16 or float16; else as stored.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Ask a small model for three facts hidden in a novel: dense, and attending to few tokens."""
    for path in (report, markdown):
        if path is not None:
            check_folder(path)
    document = "" if markdown is None else BLOCK.read(markdown)
    result = _run(model, maps, density, tokens, device, dtype)
    from hashattention.report import page, table

    write(report, page.render(result))
    if markdown is not None:
        write(markdown, BLOCK.replace(document, table.markdown(result)))
    _show(result, report)
    if as_json:
        emit(result.as_dict() | {"report": str(report)})


def _run(
    model: str, maps: str, density: list[float] | None, tokens: int, device: str | None, dtype: str | None
) -> DemoResult:
    from hashattention import HashMaps
    from hashattention.evaluation.demo import DemoConfig, run
    from hashattention.report.page import check_dependencies

    check_dependencies()
    config = DemoConfig(tuple(density), tokens) if density else DemoConfig(tokens=tokens)
    where = parse_device(device)
    kind = parse_dtype(dtype, where)
    loaded_maps = HashMaps.from_pretrained(maps)
    with progress(console()) as report:
        loaded = load(model, where, kind, report)
        return run(loaded, loaded_maps, config, progress=report)


def _show(result: DemoResult, report: Path) -> None:
    from hashattention.report import table

    out = console()
    out.print(grid(table.rows(result), table.COLUMNS, left=2))
    out.print(table.conditions(result), style="dim")
    out.print(table.speed_note(result), style="dim")
    out.print(f"report: {report.absolute()}", soft_wrap=True)
