"""``hashattention lab``: a study of training recipes on one model, as rows, a table and a page of plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashattention.cli.model import load, parse_device, parse_dtype
from hashattention.cli.output import console, emit, grid, progress
from hashattention.cli.train import with_rate
from hashattention.errors import ConfigError, InputError

if TYPE_CHECKING:
    from hashattention.train.sweep import Sweep


def lab(
    sweep: Annotated[Path, typer.Argument(help="The study: a TOML file with [recipe], [[variants]] or [grid].")],
    out: Annotated[Path, typer.Option(help="Where rows, maps and the page go; what is there is not done again.")],
    model: Annotated[str | None, typer.Option(help="A model folder, hub id, .gguf file or packaged name.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Training text, in place of the study's.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Held-out text, in place of the study's.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Draw the page of plots.")] = True,
    draw: Annotated[bool, typer.Option("--draw", help="Only draw the rows there are, without the model.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Train and measure every variant of a study; run it again to go on where it stopped."""
    from hashattention.report import lab as shown
    from hashattention.train.lab import Lab, read_rows
    from hashattention.train.sweep import Sweep

    if page:
        shown.check_dependencies()
    study = Sweep.from_toml(sweep)
    if draw:
        rows = read_rows(out)
    else:
        where = parse_device(device)
        with progress(console()) as report:
            loaded = load(_model(study, model), where, parse_dtype(dtype, where), report)
            options: dict[str, Any] = {"texts": text, "held_out_texts": held_out, "progress": with_rate(report)}
            rows = Lab(loaded, study, out, **options).run()
    if not rows:
        raise InputError(f"{out} holds no rows yet; leave out --draw to make them.")
    to = console()
    to.print(grid(shown.cells(rows), shown.columns(rows), "held-out output error (ratio to exact shared)", left=1))
    if page:
        to.print(f"page: {shown.write(rows, out / 'lab.html')}", soft_wrap=True)
    if as_json:
        emit({"out": str(out), "rows": rows})


def _model(study: Sweep, given: str | None) -> str:
    name = given or study.model
    if not name:
        raise ConfigError("no model: give --model, or `model` in the sweep file.")
    return name
