"""``hashattention inspect``: what a maps folder holds and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from hashattention.cli.output import console, emit, grid


def inspect(
    maps: Annotated[str, typer.Argument(help="A maps folder, shipped name or hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Show whose maps these are, how they were trained, how good they are and what they cost."""
    from hashattention import HashMaps, artifact
    from hashattention.report import maps as rows

    folder = artifact.locate(maps)
    loaded = HashMaps.from_pretrained(folder)
    found = {
        "folder": str(folder),
        "base_model": dataclasses.asdict(loaded.model),
        "maps": dataclasses.asdict(loaded.config),
        "cost": rows.cost(loaded),
        "holds": [name for name in ("shares", "temperatures", "remainder") if getattr(loaded, name) is not None],
        "files": {name: (folder / name).stat().st_size for name in (artifact.CONFIG_FILE, artifact.WEIGHTS_FILE)},
        "training": loaded.training_info,
    }
    metrics = loaded.training_info.get("metrics") or {}
    out = console()
    out.print(grid(rows.fields(found), title=str(folder)))
    out.print(grid(rows.methods(metrics), rows.METHOD_COLUMNS, "held-out quality, mean over layers", left=2))
    columns, cells = rows.layers(metrics)
    out.print(grid(cells, columns, "held-out quality of every layer"))
    if as_json:
        emit(found)
