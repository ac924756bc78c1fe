"""The demo's table: one set of rows for the terminal, Markdown and the page."""

from __future__ import annotations

from fractions import Fraction

from hashattention.evaluation.demo import Answer, DemoResult, Setting
from hashattention.evaluation.needle import FACTS

COLUMNS = ("attention", "answers", "tokens attended", "K, V read", "signatures read", "output error", "ms/token")
#: Columns of words, aligned left.
LEFT = ("attention", "answers")
#: Longest wrong answer shown whole.
SHOWN = 44


def name(setting: Setting) -> str:
    """What one row is called.

    Examples
    --------
    >>> name(Setting("hash", 0.0625, (), 256.0, 1e6, 1e5, {}, {}, 20.0))
    'hash 1/16'
    """
    return setting.name if setting.density is None else f"{setting.name} {density_text(setting.density)}"


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
    """Where the numbers hold, and what the columns mean."""
    ops = ", ".join(f"{op} by {backend}" for op, backend in result.backends.items())
    return (
        f"{result.model}, {result.dtype}, {len(result.prompt.tokens):,} tokens of context, {result.origin['device']}; "
        f"ops: {ops}. `hash 1/16` attends to 1/16 of the context, sink and local included. Tokens, bytes and error "
        "are per new token, means over the three answers; the error is |output - dense| / |dense| of the attention "
        "output, mean over layers."
    )


def speed_note(result: DemoResult) -> str:
    """What the speed column does and does not show."""
    dense = result.settings[0].kv_bytes / 1e6
    note = (
        f"Speed is the median of a few single steps. Here a dense step reads {result.weight_bytes / 1e6:,.0f} MB of "
        f"weights and {dense:,.0f} MB of K and V: the weights set the pace, and attention is a small part of it."
    )
    if "reference" in result.backends.values():
        note += " The reference backend is plain PyTorch, written to be read, not to be fast."
    return note


def markdown(result: DemoResult) -> str:
    """The table with its conditions, for a README."""
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows(result)]
    aligned = [":--" if column in LEFT else "--:" for column in COLUMNS]
    lines = [f"| {' | '.join(row)} |" for row in ([*COLUMNS], aligned, *cells)]
    made = f"Made by `{result.origin['command']}` at {result.origin['commit'] or result.origin['version']}."
    return "\n".join([*lines, "", conditions(result), speed_note(result), made]) + "\n"
