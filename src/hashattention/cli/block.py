"""A block of a Markdown file, between two marker lines, that a command writes again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hashattention.errors import InputError


@dataclasses.dataclass(frozen=True)
class Block:
    """The lines that begin and end the block."""

    begin: str
    end: str

    @classmethod
    def named(cls, name: str) -> Block:
        """The block of that name, in HTML comments."""
        return cls(f"<!-- {name}: begin -->", f"<!-- {name}: end -->")

    def read(self, path: Path) -> str:
        """What is in `path` already, or an empty block; a file without the markers is not overwritten."""
        if not path.exists():
            return f"{self.begin}\n{self.end}\n"
        text = path.read_text(encoding="utf-8")
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or text.index(self.end) < text.index(self.begin):
            raise InputError(
                f"{path} exists without the lines {self.begin!r} and {self.end!r}; add them, or give a new file."
            )
        return text

    def replace(self, document: str, content: str) -> str:
        """The document with `content` in the block."""
        before, _, rest = document.partition(self.begin)
        return f"{before}{self.begin}\n{content}{self.end}{rest.partition(self.end)[2]}"
