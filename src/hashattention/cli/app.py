"""App: the verbs, and how their errors are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from hashattention import __version__
from hashattention.cli.bench import bench
from hashattention.cli.demo import demo
from hashattention.cli.env import env
from hashattention.cli.eval import eval_
from hashattention.cli.generate import generate
from hashattention.cli.inspect import inspect
from hashattention.cli.lab import lab
from hashattention.cli.output import console
from hashattention.cli.report import report
from hashattention.cli.train import train
from hashattention.errors import (
    BackendError,
    CheckpointError,
    DownloadError,
    HashAttentionError,
    MissingDependencyError,
)

#: The request was fine, the world was not: exit code 1. Every other error of this library is the request's: 2.
WORLD = (BackendError, CheckpointError, DownloadError, MissingDependencyError)


class Verbs(TyperGroup):
    """Runs a verb and turns this library's errors into one readable message; ``--debug`` shows where they came from."""

    def invoke(self, context: Any) -> Any:
        """Run the verb that was asked for."""
        try:
            return super().invoke(context)
        except HashAttentionError as error:
            if context.params.get("debug"):
                raise
            console().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1 if isinstance(error, WORLD) else 2) from error


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    name="hashattention",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context decoding that reads only the tokens that matter.",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long-context decoding that reads only the tokens that matter."""


for verb in (demo, train, lab, generate, inspect, report, bench, env):
    app.command()(verb)
app.command("eval")(eval_)
