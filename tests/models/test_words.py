from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hashattention.errors import DownloadError, UnsupportedModelError
from hashattention.models import source
from hashattention.models.recipes import RECIPES
from hashattention.models.words import LEAST, keeps_words

WORDS = ["".join(letters) for letters in itertools.islice(itertools.product("abcdef", repeat=6), 500)]


class Tokenizer:
    """Words of `vocabulary` behind `mark` are one token where they are among the `whole` ones, else a letter each."""

    def __init__(self, vocabulary: list[str], whole: set[str], mark: str = "\u2581") -> None:
        self.vocabulary, self.whole, self.mark = vocabulary, whole, mark

    def get_vocab(self) -> dict[str, int]:
        entries = [self.mark + word for word in self.vocabulary] + ["x", self.mark, self.mark + "Upper", "noise"]
        return {entry: place for place, entry in enumerate(entries)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [0] if text.removeprefix(" ") in self.whole else [1] * len(text)


@pytest.mark.parametrize("mark", ["\u2581", "\u0120"])
def test_words_stay_whole_or_fall_apart(mark: str) -> None:
    assert keeps_words(Tokenizer(WORDS, set(WORDS), mark))
    assert not keeps_words(Tokenizer(WORDS, set(), mark))
    # Some merges of a sound vocabulary cannot be reached.
    assert keeps_words(Tokenizer(WORDS, set(WORDS[::3]) | set(WORDS[1::3]), mark))


def test_without_words_nothing_is_said() -> None:
    assert keeps_words(Tokenizer(WORDS[: LEAST - 1], set()))
    assert keeps_words(Tokenizer([], set()))


def test_a_packaged_model_that_is_misread_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = source.LoadedModel(None, Tokenizer(WORDS, set()), source.ModelSource("gguf", "model.gguf", tmp_path))
    monkeypatch.setattr(source, "fetch", lambda *_, **__: tmp_path / "model.gguf")
    monkeypatch.setattr(source, "load_model", lambda _: broken)
    with pytest.raises(UnsupportedModelError, match=r"misreads the tokenizer of gemma-3-270m.*5\.23 or newer"):
        source._unpacked(RECIPES["gemma-3-270m"], tmp_path, True, None)
    assert not (tmp_path / "models").exists()


def test_a_tokenizer_in_the_cache_is_read_rightly() -> None:
    try:
        found = source.resolve("smollm2-135m-instruct", offline=True)
    except DownloadError:
        pytest.skip("the model is not in the cache")
    assert keeps_words(AutoTokenizer.from_pretrained(found.location))
