"""``hashattention eval``: methods side by side on long-context tasks, as rows in a folder."""

from __future__ import annotations

import dataclasses
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashattention.cli.model import load, parse_device, parse_dtype
from hashattention.cli.output import console, emit, grid, progress
from hashattention.errors import ConfigError, InputError

if TYPE_CHECKING:
    from hashattention.evaluation.plan import Plan
    from hashattention.evaluation.result import Row
    from hashattention.evaluation.summary import Summary
    from hashattention.models.source import LoadedModel

COLUMNS = ("tasks", "method", "density", "score", "to dense ± 95 %", "rows", "bits", "error")


def eval_(
    model: Annotated[str | None, typer.Argument(help="A model folder, hub id, .gguf file or packaged name.")] = None,
    out: Annotated[Path | None, typer.Option(help="The result folder; rows that it has are kept.")] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated: dense,oracle,hash,quest:page=16,bits=4.")
    ] = "dense,hash",
    density: Annotated[str, typer.Option(help="Attended tokens over all, comma-separated: 1/8,1/16.")] = "1/16",
    tasks: Annotated[
        str, typer.Option(help="Comma-separated: needle, ruler:*, longbench:qasper, perplexity, agreement.")
    ] = "needle",
    length: Annotated[str, typer.Option(help="Tokens of a sample, comma-separated.")] = "4096",
    samples: Annotated[int, typer.Option(help="For each task and length.")] = 25,
    maps: Annotated[str | None, typer.Option(help="A maps folder, shipped name or hub id.")] = None,
    other_maps: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: more maps for the method hash, by that name; may be repeated."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Where the tasks' data lies.")] = None,
    protocol: Annotated[str, typer.Option(help="question: it and the answer are sparse; generation: the answer.")] = (
        "question"
    ),
    question_tokens: Annotated[int, typer.Option(help="Last tokens of a prompt that are sparse.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    sink: Annotated[int, typer.Option(help="First tokens that are always attended.")] = 16,
    local: Annotated[int, typer.Option(help="Last tokens that are always attended.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat format.")] = True,
    errors: Annotated[bool, typer.Option("--errors/--no-errors", help="Measure every layer's output error.")] = True,
    logprobs: Annotated[bool, typer.Option("--logprobs/--no-logprobs", help="Weigh the right answers too.")] = True,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no method after so many minutes; the same command goes on.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Run samples together up to that many tokens; by default what a GPU takes.")
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: each n-th sample alone, from the i-th; n processes share --out.")] = (
        "0/1"
    ),
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Keep the rows that --out has.")] = True,
    fetch: Annotated[bool, typer.Option("--fetch", help="First fetch RULER's data (into --data, if given).")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on a CPU), bfloat16 or float16; else as stored.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Compare methods of selecting tokens; run it again to continue an interrupted evaluation."""
    if fetch:
        _fetch(data)
    if model is None or out is None:
        if fetch and model is None:
            return
        raise InputError("eval takes a model and --out FOLDER, as in: hashattention eval MODEL --out results/eval.")
    from hashattention.evaluation.plan import Plan

    where = parse_device(device)
    plan = Plan(
        tasks=_words(tasks),
        methods=_methods(methods),
        densities=parse_densities(density),
        lengths=tuple(_whole(word) for word in _words(length)),
        samples=samples,
        seed=seed,
        protocol=protocol,  # type: ignore[arg-type]
        maps=Path(maps).name if maps else "",
        data=data,
        sink=sink,
        local=local,
        chat=chat,
        errors=errors,
        logprobs=logprobs,
        batch_tokens=batch_tokens,
        shard=_shard(shard),
        question_tokens=question_tokens,
    )
    until = None if minutes is None else time.monotonic() + 60 * minutes
    rows = _run(model, plan, out, maps, _named(other_maps or []), where, dtype, resume, until)
    _show(rows, out)
    if as_json:
        from hashattention.evaluation.summary import summarise

        emit({"out": str(out), "rows": len(rows), "summary": [vars(found) for found in summarise(rows)]})


def _run(
    model: str,
    plan: Plan,
    out: Path,
    maps: str | None,
    others: dict[str, str],
    device: str,
    dtype: str | None,
    resume: bool,
    until: float | None,
) -> tuple[Row, ...]:
    from hashattention import HashMaps
    from hashattention.evaluation.result import ROWS
    from hashattention.evaluation.runner import run
    from hashattention.evaluation.tasks import parse

    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder, new or of an interrupted run.")
    if not resume and (out / ROWS).exists():
        raise InputError(f"--out {out} has rows already; give another folder, or leave --no-resume out.")
    parse(plan.tasks, plan.data)
    kind = parse_dtype(dtype, device)
    named = {"": maps, **others} if maps is not None else dict(others)
    held = {name: HashMaps.from_pretrained(folder) for name, folder in named.items()}
    with progress(console()) as report:
        loaded = load(model, device, kind, report)
        held = {name: each.to(device).requires_grad_(False) for name, each in held.items()}
        plan, first = dataclasses.replace(plan, model=_name(loaded)), held.pop("", None)
        options: dict[str, Any] = {"maps": first, "others": held, "until": until, "progress": report}
        return run(loaded.model, loaded.tokenizer, plan, out, **options)


def _named(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in found:
            raise ConfigError(f"--other-maps must be NAME=FOLDER, each name once; given {text!r}.")
        found[name] = folder
    return found


def _name(loaded: LoadedModel) -> str:
    """The hub id, or the name of the file or folder."""
    source = loaded.source
    return source.hub_id or (Path(source.gguf_file).stem if source.gguf_file else Path(source.name).name)


def _fetch(data: Path | None) -> None:
    from hashattention.evaluation.tasks.data import fetch

    with progress(console()) as report:
        folder = fetch(data, progress=report)
    console().print(f"RULER's data is in {folder}", soft_wrap=True)


def _show(rows: tuple[Row, ...], out: Path) -> None:
    from hashattention.evaluation.summary import summarise

    to = console()
    to.print(grid([_cells(found) for found in summarise(rows)], COLUMNS, left=2))
    to.print(f"{len(rows)} rows in {out.absolute()}; hashattention report {out} shows them", soft_wrap=True)


def _cells(found: Summary) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    # Half the bootstrap interval; the rows and --json have its two ends.
    half = "" if found.low is None or found.high is None else f" ± {(found.high - found.low) / 2:.3f}"
    return (
        found.group,
        found.name,
        f"{found.density:.4f}",
        f"{found.score:.3f}",
        number(found.difference, "+.3f") + half,
        number(found.rows, ".0f"),
        f"{found.auxiliary_bits:g}",
        number(found.error, ".3f"),
    )


def parse_densities(text: str) -> tuple[float, ...]:
    """Comma-separated numbers or fractions."""
    try:
        return tuple(float(Fraction(word)) for word in _words(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"density must be a number or a fraction, as 1/16; given {text!r}.") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _methods(text: str) -> tuple[str, ...]:
    """Methods; a word that is an option alone belongs to the one before."""
    found: list[str] = []
    for word in _words(text):
        if found and "=" in word and ":" not in word.partition("=")[0]:
            found[-1] += f",{word}"
        else:
            found.append(word)
    return tuple(found)


def _shard(text: str) -> tuple[int, int]:
    first, _, number = text.partition("/")
    if not (first.isdigit() and number.isdigit() and int(first) < int(number)):
        raise ConfigError(f"shard must be i/n with i from 0 to n - 1, as 0/4; given {text!r}.")
    return int(first), int(number)


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"length must be a whole number of tokens; given {text!r}.")
    return int(text)
