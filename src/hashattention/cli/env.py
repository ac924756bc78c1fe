"""``hashattention env``: versions, devices, which backend runs where and why, and what the cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hashattention.cli.output import console, emit, grid

OPS = ("encode_signature", "encode_query", "score_select", "attend")


def env(
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Show what an issue report needs: versions, devices, backends and the cache."""
    import torch

    from hashattention import provenance

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found: dict[str, Any] = {
        "origin": provenance.origin(),
        "devices": {device: provenance.device_name(device) for device in devices},
        "backends": {device: backends(device) for device in devices},
        "cache": cache(),
    }
    _show(found)
    if as_json:
        emit(found)


def backends(device: str) -> dict[str, dict[str, str]]:
    """For each op and backend: "runs", or why it does not run there."""
    import torch

    from hashattention.ops import dispatch

    tensor = torch.zeros(1, device=device)
    return {op: {name: dispatch.refusal(name, op, tensor, {}) or "runs" for name in dispatch.MODULES} for op in OPS}


def cache() -> dict[str, Any]:
    """The cache folder, the bytes it takes, and which packaged models it holds whole."""
    from hashattention.models.packaged import cache_folder
    from hashattention.models.recipes import RECIPES

    folder = cache_folder()
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()] if folder.is_dir() else []
    held = {
        name: (folder / "models" / recipe.file).is_file() or (folder / "models" / name / "config.json").is_file()
        for name, recipe in RECIPES.items()
    }
    shown = str(folder).replace(str(Path.home()), "~", 1)
    return {"folder": shown, "bytes": sum(file.stat().st_size for file in files), "models": held}


def _show(found: dict[str, Any]) -> None:
    origin, held = found["origin"], found["cache"]
    version = f"{origin['version']} ({origin['commit'] or 'no checkout'})"
    rows = [["hashattention", version], ["python", origin["python"]]]
    rows += [[name, version] for name, version in origin["libraries"].items()]
    rows += [[device, name] for device, name in found["devices"].items()]
    rows.append(["cache", f"{held['folder']}, {held['bytes'] / 1e6:,.0f} MB"])
    rows += [[f"model {name}", "in the cache" if there else "not fetched"] for name, there in held["models"].items()]
    cells = [
        [device, op, name, said]
        for device, ops in found["backends"].items()
        for op, reasons in ops.items()
        for name, said in reasons.items()
    ]
    out = console()
    out.print(grid(rows))
    out.print(grid(cells, ["device", "op", "backend", ""], left=4))
