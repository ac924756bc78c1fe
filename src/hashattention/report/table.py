"""The demo's table: one set of rows for the terminal, Markdown and the page."""

from __future__ import annotations

from fractions import Fraction

from hashattention.evaluation.demo import Answer, DemoResult, Setting
from hashattention.evaluation.needle import FACTS

COLUMNS = (
    "attention",
    "answers",
    "tokens attended",
    "K and V read per token",
    "signatures read",
    "output error",
    "ms per token",
)
#: Longest wrong answer shown whole.
SHOWN = 44


def name(setting: Setting) -> str:
    """What one row is called.

    Examples
    --------
    >>> name(Setting("hash", 0.0625, (), 256.0, 1e6, 1e5, {}, {}, 20.0))
    'hash, density 1/16'
    """
    return setting.name if setting.density is None else f"{setting.name}, density {density_text(setting.density)}"


def density_text(density: float) -> str:
    """``1/16`` where it is a simple fraction, else a decimal.

    Examples
    --------
    >>> density_text(0.125), density_text(0.3)
    ('1/8', '0.3')
    """
    fraction = Fraction(density).limit_denominator(256)
    return f"1/{fraction.denominator}" if fraction.numerator == 1 and float(fraction) == density else f"{density:g}"


def verdict(answer: Answer, expected: str) -> str:
    """A right answer by its word, a wrong one by what was said."""
    said = answer.text if len(answer.text) <= SHOWN else answer.text[: SHOWN - 1].rstrip() + "…"
    return f"✓ {expected}" if answer.right else f"✗ {said or 'nothing'}"


def rows(result: DemoResult) -> list[list[str]]:
    """The cells of every setting, in the order of `COLUMNS`; answers are separated by newlines."""
    return [
        [
            name(setting),
            "\n".join(verdict(answer, fact.answer) for answer, fact in zip(setting.answers, FACTS, strict=True)),
            f"{setting.attended:,.0f}",
            f"{setting.kv_bytes / 1e6:,.1f} MB",
            f"{setting.signature_bytes / 1e6:,.1f} MB" if setting.density is not None else "-",
            f"{setting.mean_error:.3f}" if setting.density is not None else "0",
            f"{setting.milliseconds:,.0f}",
        ]
        for setting in result.settings
    ]


def conditions(result: DemoResult) -> str:
    """One sentence that says where the numbers hold."""
    backends = ", ".join(sorted(set(result.backends.values())))
    return (
        f"{result.model}, {result.dtype}, {len(result.prompt.tokens):,} tokens of context, "
        f"{result.origin['device']}; hash attention runs on the backend: {backends}."
    )


def speed_note(result: DemoResult) -> str:
    """What the speed column does and does not show."""
    dense = result.settings[0].kv_bytes / 1e6
    note = (
        f"Speed: the median of a few single steps. At this length each token reads {dense:,.0f} MB of K and V and "
        f"{result.weight_bytes / 1e6:,.0f} MB of weights, so the weights and the interpreter set the pace, not attention."
    )
    if "reference" in result.backends.values():
        note += " The reference backend is plain PyTorch, written to be read and not to be fast."
    return note


def markdown(result: DemoResult) -> str:
    """The table with its conditions, for a README."""
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows(result)]
    aligned = [":--" if column in ("attention", "answers") else "--:" for column in COLUMNS]
    lines = [f"| {' | '.join(row)} |" for row in ([*COLUMNS], aligned, *cells)]
    made = f"Made by `{result.origin['command']}` at {result.origin['commit'] or result.origin['version']}."
    return "\n".join([*lines, "", conditions(result), speed_note(result), made]) + "\n"
