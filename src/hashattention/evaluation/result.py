"""Results of an evaluation: one JSON row for every sample, method and density, in a folder that grows and resumes."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hashattention.config import from_mapping
from hashattention.errors import ConfigError, InputError

#: The file of rows in a result folder, and what may hold those that came before, packed by `xz`.
ROWS, PACKED = "rows.jsonl", "rows.jsonl.xz"

#: Bytes of a number of K or V.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """How one method did on one sample.

    Parameters
    ----------
    task : str
        ``"needle"``, ``"ruler:vt"``, ``"longbench:qasper"``, ``"perplexity"``, ``"agreement"``.
    length : int
        The length that was asked for, in tokens (0: the sample's own).
    sample : str
        Which sample of the task; the same for every method.
    method, name : str
        The registry's text (``"quest:page=16"``, ``"dense"``), and what to call it in a table.
    density : float
        As asked for; 1.0 for dense.
    budget : (int, int, int)
        Sink and local as asked for, and the heavy tokens this comes to at the prompt's end, in tokens.
    score : float
        The task's own, 0..1, more is better. Perplexity: the geometric mean of the tokens' probabilities, exp(-nll).
        Agreement: the share of tokens that are dense's.
    answer : str
        What the model said.
    expected : tuple of str
        What it should have said.
    logprob : float or None
        Mean log-probability per token of the (first) expected answer, teacher-forced, in nats.
    attended : float or None
        Tokens per index set, mean over sparse layers and steps; None if nothing was recorded.
    rows : float or None
        K (and V) rows read per KV head, each counted once; mean likewise.
    tokens : int
        Causal tokens at the prompt's end.
    auxiliary_bits : float
        Read beside K and V, per token and KV head.
    head_dim : int
        Channels of a K (or V) row; 0 where it was not recorded.
    error : tuple of float
        Relative output error against dense of every layer (0 where it stays dense), mean over heads and steps; empty
        if nothing was recorded.
    depth : float or None
        Where the needle lies, in 0..1 of the document (needle rows).
    nll : float or None
        Mean negative log-likelihood per token, in nats (perplexity rows).
    kl : float or None
        Mean KL divergence from dense's next-token distribution, in nats (agreement rows).
    protocol : str
        ``"question"``: question and generation are sparse; ``"generation"``: generation alone.
    sparse_prompt : int
        Last tokens of the prompt that were sparse (0 for passages, and by ``"generation"``).
    chat : bool
        Whether the prompt is in the model's chat format.
    seed : int
        Of the samples.
    model, maps, dtype : str
        What was served; `maps` is empty for a method without them.
    seconds : float
        Of this row: the question and the generation, without the shared prefill.
    origin : dict
        Version, commit, command, libraries, device and time (`hashattention.provenance.origin`).
    """

    task: str
    length: int
    sample: str
    method: str
    density: float
    score: float
    name: str = ""
    budget: tuple[int, int, int] = (0, 0, 0)
    answer: str = ""
    expected: tuple[str, ...] = ()
    logprob: float | None = None
    attended: float | None = None
    rows: float | None = None
    tokens: int = 0
    auxiliary_bits: float = 0.0
    head_dim: int = 0
    error: tuple[float, ...] = ()
    depth: float | None = None
    nll: float | None = None
    kl: float | None = None
    protocol: str = "question"
    sparse_prompt: int = 0
    chat: bool = False
    seed: int = 0
    model: str = ""
    maps: str = ""
    dtype: str = ""
    seconds: float = 0.0
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> str:
        """The task's family: ``"ruler"`` of ``"ruler:vt"``."""
        return self.task.partition(":")[0]

    @property
    def pair(self) -> Key:
        """What rows of different methods have in common when they may be compared."""
        served = self.model, self.dtype, self.protocol, self.chat, self.seed
        return (*served, self.task, self.length, self.sample)

    @property
    def key(self) -> Key:
        """Equal for two rows that measure the same thing."""
        return (*self.pair, self.method, self.density, *self.budget[:2], self.maps)

    @property
    def bytes_read(self) -> float | None:
        """Bytes a step reads per KV head: K and V rows, each once, and the auxiliary bits of every token; None where
        rows, the head's size or the dtype were not recorded.
        """
        if self.rows is None or not self.head_dim or self.dtype not in ITEM_BYTES:
            return None
        return self.rows * 2 * self.head_dim * ITEM_BYTES[self.dtype] + self.tokens * self.auxiliary_bits / 8

    @property
    def bytes_share(self) -> float | None:
        """`bytes_read` over what dense attention reads."""
        read = self.bytes_read
        return read / (self.tokens * 2 * self.head_dim * ITEM_BYTES[self.dtype]) if read and self.tokens else None

    def outcome(self) -> dict[str, Any]:
        """The row without what differs from run to run: its seconds and its origin."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("seconds", "origin")}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one method read of a document: `attention` holds, for every piece, the weight it got, 0..1."""

    method: str
    name: str
    density: float
    answer: str
    score: float
    attention: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Marked:
    """One document with the tokens that each method attended to: a file ``marked-<n>.json``.

    Parameters
    ----------
    model, task, length, sample
        As in the rows of this sample.
    pieces : tuple of str
        The document's tokens as text; joined they give the document.
    question : str
        What was asked about it.
    expected : tuple of str
    readings : tuple of Reading
        One for every method and density, in the order of the run.
    """

    model: str
    task: str
    length: int
    sample: str
    pieces: tuple[str, ...]
    question: str
    expected: tuple[str, ...]
    readings: tuple[Reading, ...] = ()

    @property
    def document(self) -> Key:
        """What names the document."""
        return self.model, self.task, self.length, self.sample


class Results:
    """The rows in a folder, to be added to.

    Parameters
    ----------
    folder : Path
        Made if it is not there. A line that an interrupted run left unfinished is cut off.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / ROWS
        _cut_torn_line(self.path)
        self.rows = list(read(folder)) if self.path.exists() or (folder / PACKED).exists() else []
        self._keys = {row.key for row in self.rows}

    def __contains__(self, key: Key) -> bool:
        """Whether a row of this key is there."""
        return key in self._keys

    def append(self, row: Row) -> None:
        """Write one row to the end of the file, and to the disk, at once."""
        self.extend([row])

    def extend(self, rows: Sequence[Row]) -> None:
        """Write rows to the end of the file in one piece, so that several processes may share it."""
        lines = "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while lines:
                lines = lines[os.write(handle, lines) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        self.rows += rows
        self._keys.update(row.key for row in rows)

    def mark(self, marked: Marked) -> Path:
        """Write a marked document; readings that are there already, of other methods, stay."""
        held = {other.document: (path, other) for path, other in _numbered(self.folder)}
        path, other = held.get(marked.document, (self.folder / f"marked-{len(held)}.json", None))
        if other is not None:
            new = {(reading.method, reading.density) for reading in marked.readings}
            kept = tuple(reading for reading in other.readings if (reading.method, reading.density) not in new)
            marked = dataclasses.replace(marked, readings=kept + marked.readings)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(marked), ensure_ascii=False), encoding="utf-8")
        partial.replace(path)
        return path


def read(folder: Path) -> tuple[Row, ...]:
    """The rows in a result folder, in the order they were written; of two with one key the later.

    Raises
    ------
    InputError
        If there is no such file, it is damaged, or a line in it is not a row; the line is named.
    """
    paths = [path for name in (PACKED, ROWS) if (path := folder / name).is_file()]
    if not paths:
        raise InputError(f"no {ROWS} in {folder}; give the --out folder of hashattention eval.")
    return tuple({row.key: row for path in paths for row in _read_file(path)}.values())


def _read_file(path: Path) -> Iterator[Row]:
    lines = (_unpack(path) if path.name == PACKED else path.read_bytes()).split(b"\n")
    # What an interrupted run left after the last line's end is no row.
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        try:
            yield from_mapping(Row, json.loads(line), f"{path.name}, line {number}")
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise InputError(f"{path}, line {number} is not a row ({error}); remove the line.") from error


def _unpack(path: Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except lzma.LZMAError as error:
        raise InputError(f"{path} is damaged ({error}); pack the rows again with `xz`.") from error


def read_marked(folder: Path) -> tuple[Marked, ...]:
    """The marked documents of a result folder, by number."""
    return tuple(marked for _, marked in _numbered(folder))


def _numbered(folder: Path) -> list[tuple[Path, Marked]]:
    paths = sorted(folder.glob("marked-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    found = []
    for path in paths:
        marked = from_mapping(Marked, json.loads(path.read_text(encoding="utf-8")), path.name)
        readings: Sequence[Any] = marked.readings
        found.append(
            (path, dataclasses.replace(marked, readings=tuple(from_mapping(Reading, r, path.name) for r in readings)))
        )
    return found


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with path.open("r+b") as file:
            file.truncate(end)


def pairs(rows: Iterable[Row], base: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Each of `rows` with the one of `base` on the same sample, where there is one."""
    held = {row.pair: row for row in base}
    return [(row, held[row.pair]) for row in rows if row.pair in held]
