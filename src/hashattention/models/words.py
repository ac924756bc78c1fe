"""A tokenizer that was read from a GGUF file is tried on whole words: some releases of transformers read some of them
wrongly, without a word.
"""

from __future__ import annotations

from typing import Any

#: What stands for a space before a word, in SentencePiece's and in byte-level vocabularies.
MARKS = ("\N{LOWER ONE EIGHTH BLOCK}", "Ġ")
#: Words that are tried, at most and at least: with fewer nothing can be said.
MOST, LEAST = 200, 20


def keeps_words(tokenizer: Any) -> bool:
    """Whether most of the lower-case words of the vocabulary are one token each when they are encoded.

    A vocabulary of merges that is taken for one of probabilities falls apart: not one word in 200 stays whole then, and
    a text has 1.5 to 3 times as many tokens, which still decode to the text.
    """
    words = sorted(entry[1:] for entry in tokenizer.get_vocab() if entry.startswith(MARKS) and _is_word(entry[1:]))
    tried = words[:: max(1, len(words) // MOST)]
    whole = sum(len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1 for word in tried)
    return len(tried) < LEAST or 2 * whole >= len(tried)


def _is_word(text: str) -> bool:
    return 6 <= len(text) <= 11 and text.isascii() and text.isalpha() and text.islower()
