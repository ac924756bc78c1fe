"""Text and times of a generation, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


class Stream(TextStreamer):
    """Hands finished text to `write`, and notes when each token came; `times` holds seconds (perf_counter)."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """A token came (the first call brings the prompt)."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Some whole words are ready."""
        self.write(text)
