"""``hashattention bench``: measure the kernels of this machine against dense attention."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashattention.cli.output import check_folder, console, emit, grid
from hashattention.errors import ConfigError

if TYPE_CHECKING:
    from hashattention.bench.cases import Case


class Bench(enum.StrEnum):
    """What to measure: the whole attention step against baselines, or each op against the reference."""

    attention = "attention"
    ops = "ops"


COLUMNS = ("batch x context", "density", "method", "p20 ms", "p50 ms", "p80 ms", "x dense", "roofline")


def bench(
    what: Annotated[Bench, typer.Argument(help="attention or ops.")],
    suite: Annotated[
        str | None,
        typer.Option(
            help="targets, contexts, batches, densities, bits, shapes or shipped (two codes): a list of cases."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="A model's shape; may be repeated.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Cached tokens; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Requests; may be repeated.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Attended over all tokens; may be repeated.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of a signature; may be repeated.")] = None,
    mixture: Annotated[list[int] | None, typer.Option(help="Codes of a query; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each method.")] = 30,
    seconds: Annotated[float, typer.Option(help="Time limit of a case.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file to append the rows to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Check the kernels against the reference, then time them against dense attention in the same process."""
    from hashattention.bench.run import run
    from hashattention.cli.model import parse_dtype

    kind: Any = parse_dtype(dtype)
    axes = {"shape": shape, "context": context, "batch": batch, "density": density, "bits": bits, "mixture": mixture}
    given = {name: values for name, values in axes.items() if values}
    cases = _product(given) if suite is None else _suite(suite, given)
    if out is not None:
        check_folder(out)
    rows = []
    for row in run(what.value, [dataclasses.replace(case, dtype=kind) for case in cases], device, rounds, seconds):
        rows.append(row)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    console().print(grid([_cells(row) for row in rows], COLUMNS, f"{what.value} on {device}", left=0))
    if as_json:
        emit({"rows": rows})


def _suite(name: str, given: dict[str, Any]) -> list[Case]:
    from hashattention.bench.cases import SUITES

    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; known: {', '.join(SUITES)}.")
    if given:
        named = ", ".join(f"--{axis}" for axis in given)
        raise ConfigError(f"--suite {name} is a list of cases; leave out {named}, or leave out --suite.")
    return SUITES[name]


def _product(given: dict[str, Any]) -> list[Case]:
    from hashattention.bench.cases import SHAPES, Case

    axes: dict[str, list[Any]] = {
        "shape": ["llama-3.1-8b"],
        "context": [4096, 16384, 131072],
        "batch": [1],
        "density": [1 / 16],
        "bits": [64],
        "mixture": [1],
    }
    axes |= given
    for name in axes["shape"]:
        if name not in SHAPES:
            raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}.")
    return [Case(**dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values())]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    case = f"{row['batch']} x {row['context']:,}", f"{row['density']:.4f}"
    if "refusal" in row:
        return (*case, f"{row['method']} ({row['refusal']})", "", "", "", "", "")
    speedup = f"{row['speedup']:.2f}" if row["speedup"] else ""
    times = (f"{row[name]:.3f}" for name in ("p20_ms", "p50_ms", "p80_ms"))
    return (*case, row["method"], *times, speedup, f"{row['roofline']:.0%}")
