"""The demo's page: one self-contained HTML file, for phone and desktop, light and dark."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from hashattention.errors import MissingDependencyError
from hashattention.evaluation.demo import DemoResult
from hashattention.evaluation.needle import FACTS
from hashattention.report import plots, table


def check_dependencies() -> None:
    """Raise `MissingDependencyError` unless the packages that make a page are installed."""
    check_packages("jinja2", "plotly")


def check_packages(*packages: str) -> None:
    """Raise `MissingDependencyError` unless `packages` are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f'a report needs {" and ".join(missing)}: pip install "hashattention[report]"')


def render(result: DemoResult) -> str:
    """The whole page; it loads nothing from elsewhere.

    Raises
    ------
    MissingDependencyError
        Without jinja2 or plotly.
    """
    check_dependencies()
    import jinja2
    from plotly.offline import get_plotlyjs

    source = files("hashattention").joinpath("report/demo.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    mass = plots.by_layer(result.settings, "mass", percent=True)
    error = plots.by_layer(result.settings, "error")
    return template.render(
        result=result,
        columns=table.COLUMNS,
        rows=table.rows(result),
        facts=FACTS,
        tokens=len(result.prompt.tokens),
        conditions=table.conditions(result),
        speed_note=table.speed_note(result),
        picture=picture(result),
        plotlyjs=get_plotlyjs(),
        mass=plots.to_html(mass),
        error=plots.to_html(error),
    )


def picture(result: DemoResult) -> dict[str, Any]:
    """What the page's script draws: the document's tokens, its facts, and who attended to what.

    Returns
    -------
    dict
        `pieces` (text of every document token), `facts` (``[first, end)`` in document tokens), `subjects`, `densities`
        (their names) and `weights` ``[density][question][token]``, attention in whole per mille.
    """
    first, end = result.prompt.document
    sparse = [setting for setting in result.settings if setting.density is not None]
    return {
        "pieces": flow(result.prompt.pieces[first:end]),
        "facts": [[start - first, stop - first] for start, stop in result.prompt.facts],
        "subjects": [fact.subject for fact in FACTS],
        "densities": [table.density_text(setting.density or 0.0) for setting in sparse],
        "weights": [
            [[round(1000 * weight) for weight in answer.attention[first:end]] for answer in setting.answers]
            for setting in sparse
        ],
    }


def flow(pieces: Sequence[str]) -> list[str]:
    r"""The same pieces with line ends inside paragraphs made spaces, so that the text fits any width.

    Examples
    --------
    >>> flow(["A\n", "line", "\n", "\nB"])
    ['A ', 'line', '\n', '\nB']
    """
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", "".join(pieces))
    borders = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]
