"""``hashattention train``: text to a maps folder."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashattention.cli.model import load, parse_device, parse_dtype
from hashattention.cli.output import console, emit, grid, progress
from hashattention.errors import InputError

if TYPE_CHECKING:
    from hashattention.models.packaged import Progress
    from hashattention.train.recipe import Recipe

#: Before the name of a data set, to tell it from a path.
DATASET = "datasets:"


def train(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, .gguf file or packaged name.")],
    out: Annotated[Path, typer.Option(help="The maps folder to write.")],
    text: Annotated[
        list[str] | None, typer.Option(help="A file, a folder or datasets:NAME; may be repeated. Default: OpenWebText.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text for the metrics, as --text. Default: other documents of --text.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="group, paper, or a TOML file.")] = "group",
    context: Annotated[int | None, typer.Option(help="Tokens of a training sequence.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Training sequences.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored, on a CPU float32.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Train hash maps for a model; run it again to continue. `torchrun -m hashattention train ...` uses every GPU."""
    from hashattention.report import maps as rows
    from hashattention.train import ranks
    from hashattention.train.recipe import Recipe
    from hashattention.train.run import train as run

    chosen = adjust(Recipe.named(recipe), context=context, steps=steps, sequences=sequences)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder, new or of an interrupted run.")
    texts, other = (given and [name.removeprefix(DATASET) for name in given] for given in (text, held_out))
    where = ranks.start(parse_device(device))
    kind = parse_dtype(dtype, where)
    with progress(console()) as report:
        loaded = load(model, where, kind, report)
        done = run(loaded, texts, out, chosen, held_out_texts=other, resume=resume, progress=with_rate(report))
    shown = console()
    shown.print(grid(rows.methods(done["metrics"]), rows.METHOD_COLUMNS, "held-out quality, mean over layers", left=2))
    shown.print(f"maps: {out}", soft_wrap=True)
    if as_json:
        emit(done)


def with_rate(report: Progress) -> Progress:
    """`report` with the steps a second behind "training", anew each tenth of the way: resumed steps do not count."""
    begun: tuple[float, int] | None = None
    said, tenth = "", -1

    def tell(text: str, done: int, total: int) -> None:
        nonlocal begun, said, tenth
        if text != "training":
            begun, said, tenth = None, "", -1
            report(text, done, total)
            return
        begun = begun or (time.monotonic(), done)
        since, first = begun
        if 10 * done // max(1, total) > tenth and done > first:
            tenth, rate = 10 * done // max(1, total), (done - first) / max(1e-9, time.monotonic() - since)
            said = f" ({rate:.3g} steps/s, {done} of {total})"
        report(text + said, done, total)

    return tell


def adjust(recipe: Recipe, **given: int | None) -> Recipe:
    """The recipe with what was given on the command line; a shorter context records no more queries than it has.
    A context replaces the recipe's `lengths`.

    Raises
    ------
    ConfigError
        For a value the recipe does not allow.
    """
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "context" in changes:
        changes |= {"lengths": ()}
        fewest = dataclasses.replace(recipe, context=changes["context"], lengths=(), queries=1, step_queries=1)
        queries = min(recipe.queries, max(1, len(fewest.positions_from())))
        changes |= {"queries": queries, "step_queries": min(recipe.step_queries, queries)}
    return dataclasses.replace(recipe, **changes)
