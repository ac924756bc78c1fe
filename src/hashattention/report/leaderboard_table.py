"""The leaderboard as cells: one set for the page, the terminal and Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from hashattention.evaluation.summary import DENSE, Summary, summarise
from hashattention.report.leaderboard import Board, Entry, is_perplexity
from hashattention.report.table import density_text

#: Columns before and after those of the groups.
FIRST = ("method", "density")
LAST = ("attended", "K, V rows read", "of all rows", "of all bytes", "aux. bits", "error")
#: What each of these columns holds, for the page.
MEANINGS = {
    "density": "asked for: sink, local and heavy tokens over all causal tokens",
    "attended": "attended tokens over all causal tokens, as recorded",
    "K, V rows read": "rows of K (and of V) read per KV head, each counted once, mean",
    "of all rows": "the same over all causal tokens: methods read equal bytes of K and V where this is equal",
    "of all bytes": "K and V rows and auxiliary bits, over the bytes that dense attention reads",
    "aux. bits": "bits read beside K and V, per token and KV head",
    "error": "|output - dense| / |dense| of the attention output, mean over layers",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is written, below it in small, whether that is significant, and what to sort by."""

    text: str
    note: str = ""
    verdict: Literal["", "worse", "better"] = ""
    order: float | None = None

    @property
    def short(self) -> str:
        """Without the interval."""
        change, bracket, _ = self.note.partition(" [")
        return f"{self.text} {change}{'*' if self.verdict else ''}" if bracket else self.text

    def __str__(self) -> str:
        """On one line; a star says that the interval leaves out 0."""
        return f"{self.text} ({self.note}{'*' if self.verdict else ''})" if self.note else self.text


def columns(board: Board) -> list[str]:
    """Headings of the leaderboard."""
    return [*FIRST, *(heading(group) for group in board.groups), *LAST]


def heading(group: str) -> str:
    """A group's name with its unit, where that is no percentage."""
    return f"{group}, %" if not is_perplexity(group) else group


def rows(board: Board) -> list[list[Cell]]:
    """The cells of every entry, in the order of `columns`."""
    return [
        [
            Cell(entry.name),
            Cell("1" if entry.dense else density_text(entry.density), order=entry.density),
            *(score(group, entry.scores.get(group)) for group in board.groups),
            *_costs(entry),
        ]
        for entry in board.entries
    ]


def _costs(entry: Entry) -> list[Cell]:
    read = entry.read
    return [
        _cell(entry.attended, f"{entry.attended:.1%}"),
        Cell("all" if entry.dense else "-", order=math.inf) if read is None else _cell(read, f"{read:,.0f}"),
        _cell(entry.read_share, f"{entry.read_share or 0:.1%}"),
        _cell(entry.bytes_share, f"{entry.bytes_share or 0:.1%}"),
        _cell(entry.auxiliary_bits, f"{entry.auxiliary_bits:g}"),
        Cell("0", order=0.0) if entry.dense else _cell(entry.error, f"{entry.error or 0:.3f}"),
    ]


def value(group: str, found: float) -> float:
    """A score as people read it: per cent, or perplexity."""
    return math.exp(-found) if is_perplexity(group) else 100 * found


def score(group: str, summary: Summary | None) -> Cell:
    """The score of a group, and below it the difference to dense with its interval.

    Examples
    --------
    >>> str(score("ruler", Summary("m", "ruler", "hash", "hash", 0.125, 0.9, 25, -0.05, -0.08, -0.02)))
    '90.0 (−5.0 [−8.0, −2.0]*)'
    """
    if summary is None:
        return Cell("-")
    text = f"{value(group, summary.score):.{2 if is_perplexity(group) else 1}f}"
    order = value(group, summary.score)
    if summary.method == DENSE or summary.difference is None or summary.low is None or summary.high is None:
        return Cell(text, order=order)
    mean, *ends = (change(group, found) for found in (summary.difference, summary.low, summary.high))
    unit = " %" if is_perplexity(group) else ""
    verdict: Literal["", "worse", "better"] = "worse" if summary.high < 0 else "better" if summary.low > 0 else ""
    note = f"{signed(mean)}{unit} [{signed(min(ends))}, {signed(max(ends))}]"
    divergence = "" if summary.kl is None else f", KL {summary.kl:.3f}"
    return Cell(text, note + divergence, verdict, order)


def change(group: str, difference: float) -> float:
    """A difference of scores in percentage points; of perplexity in per cent of dense's."""
    return 100 * math.expm1(-difference) if is_perplexity(group) else 100 * difference


def signed(number: float) -> str:
    """One decimal, with a sign unless it is 0."""
    text = f"{number:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def matrix(board: Board, by: Literal["task", "length"]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows: the score of every entry on every task, or at every length."""
    found = {(row.group, row.method, row.density): row for row in summarise(board.rows, by)}
    names = [
        name for group in board.groups for name in dict.fromkeys(key[0] for key in found) if _family(name) == group
    ]
    cells = [
        [
            Cell(entry.name),
            Cell("1" if entry.dense else density_text(entry.density), order=entry.density),
            *(score(name, found.get((name, *entry.place))) for name in names),
        ]
        for entry in board.entries
    ]
    return [*FIRST, *names], cells


def _family(name: str) -> str:
    return name.partition("@")[0].partition(":")[0]


def conditions(board: Board) -> str:
    """Where the numbers hold: what was served, and on how many samples."""
    tasks = dict.fromkeys(row.task for row in board.rows)
    lengths = sorted({row.length for row in board.rows if row.length})
    samples = {row.pair for row in board.rows}
    sparse = "question and generation are sparse" if board.protocol == "question" else "generation alone is sparse"
    parts = [
        board.model or "unnamed model",
        board.dtype,
        "chat format" if board.chat else "plain prompts",
        f"{sparse}, the context dense",
        f"{len(tasks)} task{'s' * (len(tasks) != 1)}, {len(samples):,} samples",
        f"lengths {', '.join(f'{length:,}' for length in lengths)}" if lengths else "",
        _listed("maps", (row.maps for row in board.rows if row.maps)),
        _listed("on", (str(row.origin.get("device", "")) for row in board.rows)),
    ]
    return "; ".join(part for part in parts if part) + "."


def reading(board: Board, where: str = "below each") -> str:
    """How the leaderboard is to be read, and what it lacks."""
    text = (
        "Scores are means over tasks and lengths of means over samples, in per cent; "
        f"{where} the difference to dense in percentage points (perplexity: per cent of dense's) on the same samples, "
        "with its 95 % bootstrap interval. At each density the best mean score comes first."
    )
    if not any(entry.dense for entry in board.entries):
        text += " These rows hold no dense run, so there are no differences; add dense to --methods."
    elif len(board.entries) == 1:
        text += " Only dense was run; add other methods to --methods."
    samples: dict[tuple[str, float], set[object]] = defaultdict(set)
    for row in board.rows:
        samples[row.method, row.density].add(row.pair)
    all_samples = set().union(*samples.values())
    lacking = [_place(entry) for entry in board.entries if samples[entry.place] != all_samples]
    if lacking:
        text += f" Not every sample has been run yet by {', '.join(lacking)}."
    return text


def _place(entry: Entry) -> str:
    return entry.name if entry.dense else f"{entry.name} at {density_text(entry.density)}"


def markdown(found: Sequence[Board]) -> str:
    """The leaderboards with their conditions, for a README."""
    return "\n".join(_markdown(board, heading=len(found) > 1) for board in found)


def _markdown(board: Board, heading: bool) -> str:
    made = f"Made by {_commands(board)}."
    star = "A star: the 95 % interval leaves out 0."
    title = [f"### {board.title}", ""] if heading else []
    notes = [conditions(board), reading(board, "in brackets"), star, made]
    lines = [*title, *_table(columns(board), rows(board)), ""]
    names, cells = _by_length(board)
    if names:
        lines += [*_table([*FIRST, *names], cells), ""]
    return "\n".join([*lines, *notes]) + "\n"


def _by_length(board: Board) -> tuple[list[str], list[list[Cell]]]:
    """The columns and rows of `matrix` for the groups that have several lengths."""
    names, cells = matrix(board, "length")
    several = Counter(map(_family, names))
    kept = [place for place, name in enumerate(names) if name not in FIRST and several[_family(name)] > 1]
    return [names[place] for place in kept], [[*row[: len(FIRST)], *(row[place] for place in kept)] for row in cells]


def _table(names: list[str], cells: list[list[Cell]]) -> list[str]:
    lines = [names, [":--", *("--:" for _ in names[1:])]]
    lines += [[str(cell).replace("|", "\\|").replace("*", "\\*") for cell in row] for row in cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def origins(board: Board) -> list[tuple[str, str]]:
    """Every command that made rows, with its version and commit."""
    held = (row.origin for row in board.rows if row.origin)
    return list(dict.fromkeys((str(origin.get("command", "?")), _version(origin)) for origin in held))


def _version(origin: dict[str, Any]) -> str:
    commit = f" at {origin['commit']}" if origin.get("commit") else ""
    return f"hashattention {origin.get('version', '?')}{commit}"


def _commands(board: Board) -> str:
    """The command that made most rows; the others by their number alone, since the rows name them."""
    found = Counter((str(row.origin.get("command", "?")), _version(row.origin)) for row in board.rows if row.origin)
    if not found:
        return "an unknown command"
    ((command, version), most), *others = found.most_common()
    rest = f"; {sum(found.values()) - most:,} of {sum(found.values()):,} rows by other commands, which they name"
    return f"`{command}`, {version}{rest if others else ''}"


def _listed(word: str, values: Iterable[str]) -> str:
    names = [value for value in dict.fromkeys(values) if value]
    return f"{word} {', '.join(names)}" if names else ""


def _cell(number: float | None, text: str) -> Cell:
    return Cell("-") if number is None else Cell(text, order=number)
