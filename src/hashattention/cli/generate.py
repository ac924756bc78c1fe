"""``hashattention generate``: continue a prompt, attending to few tokens, and say what it cost."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashattention.cli.model import load, parse_device, parse_dtype
from hashattention.cli.output import console, emit, progress, read_prompt
from hashattention.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

    from hashattention.config import BaseModel, Budget, MapsConfig
    from hashattention.evaluation.observe import Tally
    from hashattention.maps import HashMaps


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, .gguf file or packaged name.")],
    maps: Annotated[str | None, typer.Option(help="A maps folder, shipped name or hub id.")] = None,
    prompt_file: Annotated[Path, typer.Option(help="The prompt; - is stdin.")] = Path("-"),
    density: Annotated[float, typer.Option(help="Attended tokens over all causal tokens, in (0, 1].")] = 0.0625,
    top_p: Annotated[
        float | None,
        typer.Option(help="Take only the heavy tokens that hold this share of the estimated attention, in (0, 1]."),
    ] = None,
    remainder: Annotated[
        bool, typer.Option(help="Let the mean value stand for the tokens left out, where the maps know how.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 128,
    min_context: Annotated[int, typer.Option(min=0, help="Shorter contexts are attended densely.")] = 1024,
    dense: Annotated[bool, typer.Option("--dense", help="The model's own attention; needs no maps.")] = False,
    both: Annotated[
        bool, typer.Option("--compare", help="Dense and hash attention in turn from one prefill: tokens/s of both.")
    ] = False,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat format; by default if the model has one.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on a CPU), bfloat16 or float16; else as stored.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with one JSON object, the text inside it.")
    ] = False,
) -> None:
    """Continue a prompt greedily; the text goes to stdout as it comes."""
    if maps is None and not dense:
        raise ConfigError("generate needs trained maps: give --maps DIR, or --dense for the model's own attention.")
    if both and (dense or maps is None):
        raise ConfigError("--compare decodes both ways: give --maps DIR and leave --dense out.")
    from hashattention import Budget, HashMaps, provenance
    from hashattention.evaluation.observe import Tally
    from hashattention.models.describe import describe
    from hashattention.selectors.hash import HashSelector

    budget = Budget(density=density, top_p=top_p)
    tally = Tally() if budget.estimated else None
    prompt = read_prompt(prompt_file)
    loaded_maps = None if dense or maps is None else HashMaps.from_pretrained(maps)
    if loaded_maps is not None:
        HashSelector(loaded_maps).check_budget(budget)
        if not remainder:
            loaded_maps.remainder = None
    where = parse_device(device)
    kind = parse_dtype(dtype, where)
    with progress(console()) as report:
        loaded = load(model, where, kind, report)
    base = describe(loaded.model)
    ids = _encode(loaded, prompt, chat, max_new_tokens)
    if both and loaded_maps is not None:
        found = _compare(loaded, loaded_maps, budget, min_context, ids, max_new_tokens, tally, quiet=as_json)
        if as_json:
            emit(
                {
                    "bench": "generate",
                    "model": Path(model).name,
                    "maps": Path(str(maps)).name,
                    **found,
                    "origin": provenance.origin(where),
                }
            )
        return
    said = _continue(loaded, loaded_maps, budget, min_context, ids, max_new_tokens, tally, quiet=as_json)
    length = ids.shape[1] + said["new_tokens"]
    sparse = loaded_maps is not None and length >= min_context
    config = loaded_maps.config if loaded_maps is not None and sparse else None
    cost = traffic(base, config, budget, length, loaded.model.dtype.itemsize, tally)
    found = {**said, "prompt_tokens": ids.shape[1], "attention": "hash" if sparse else "dense", **cost}
    _show(found, None if loaded_maps is None or sparse else min_context)
    if as_json:
        emit(found | {"origin": provenance.origin(where)})


def _encode(loaded: Any, prompt: str, chat: bool | None, new_tokens: int) -> torch.Tensor:
    """Prompt tokens int64 ``[1, T]``, refused where the model has no room for them and the answer."""
    from hashattention.models.describe import text_config

    tokenizer = loaded.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise InputError("this model's tokenizer has no chat format; leave --chat out.")
    if chat or (chat is None and template):
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", verbose=False)
    else:
        encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids: torch.Tensor = encoded["input_ids"].to(loaded.model.device)
    room = getattr(text_config(loaded.model), "max_position_embeddings", None)
    if room is not None and ids.shape[1] + new_tokens > room:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens and {new_tokens} new ones were asked for, but this model's "
            f"context is {room}; shorten the prompt or lower --max-new-tokens."
        )
    return ids


def _continue(
    loaded: Any,
    maps: Any,
    budget: Budget,
    min_context: int,
    ids: torch.Tensor,
    new_tokens: int,
    tally: Tally | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    import torch

    from hashattention import attach
    from hashattention.cli.stream import Stream

    parts: list[str] = []

    def write(text: str) -> None:
        parts.append(text)
        if not quiet:
            typer.echo(text, nl=False)

    stream = Stream(loaded.tokenizer, write)
    served: Any = contextlib.nullcontext()
    if maps is not None:
        served = attach(loaded.model, maps, budget, min_context=min_context, observer=tally)
    with served, torch.inference_mode():
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=stream
        )
    if not quiet:
        typer.echo()
    times = stream.times
    steps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    return {
        "text": "".join(parts),
        "new_tokens": out.shape[1] - ids.shape[1],
        "prefill_seconds": times[1] - times[0],
        "tokens_per_second": 1 / statistics.median(steps) if steps else None,
    }


def _compare(
    loaded: Any,
    maps: HashMaps,
    budget: Budget,
    min_context: int,
    ids: torch.Tensor,
    new_tokens: int,
    tally: Tally | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Both ways from one prefill, said on stderr; the row of ``--json``."""
    import torch

    from hashattention.cli.compare import compare
    from hashattention.models.describe import describe

    found = compare(loaded, maps, budget, min_context, ids, new_tokens, tally)
    base, length = describe(loaded.model), ids.shape[1] + new_tokens
    for name, config in (("dense", None), ("hash", maps.config)):
        found[name] |= traffic(base, config, budget, length, loaded.model.dtype.itemsize, tally)
        rate = found[name]["tokens_per_second"]
        console().print(f"{name}: {rate:.2f} tokens/s" if rate else f"{name}: one token is too few to time")
        if not quiet:
            typer.echo(f"{name}: {found[name]['text']}")
    rates = [found[name]["tokens_per_second"] for name in ("dense", "hash")]
    found["speedup"] = rates[1] / rates[0] if all(rates) else None
    return {
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **found,
    }


def traffic(
    base: BaseModel,
    config: MapsConfig | None,
    budget: Budget,
    length: int,
    itemsize: int,
    tally: Tally | None = None,
) -> dict[str, Any]:
    """Tokens attended and bytes read by one new token at context `length`; `config` None is dense.

    Where the budget is the most that may be attended, a `tally` of the steps says what was, on average.
    Where every query head selects for itself, K and V bytes are the most that they can be: heads of a group may agree.
    """
    row = 2 * base.head_dim * itemsize
    attended, per_head, signatures, density = float(length), float(length), 0.0, 1.0
    if config is not None:
        attended = sum(budget.counts(length))
        density = attended / length
        if tally is not None and tally.steps:
            attended, density = tally.means()
        per_head = min(length, attended * config.selection_heads(base) / base.num_key_value_heads)
        signatures = length * config.bits / 8 * config.signature_heads(base) * len(base.layers)
    sparse = len(base.layers) if config is not None else 0
    rows = base.num_key_value_heads * (sparse * per_head + (base.num_hidden_layers - sparse) * length)
    return {
        "context": length,
        "attended": int(attended) if attended == int(attended) else round(attended, 2),
        "density": density,
        "kv_bytes_per_token": rows * row,
        "signature_bytes_per_token": signatures,
    }


def _show(found: dict[str, Any], min_context: int | None) -> None:
    rate = found["tokens_per_second"]
    out = console()
    if min_context is not None:
        out.print(f"the context stayed under --min-context {min_context}, so attention was dense")
    out.print(
        f"prefill {found['prompt_tokens']:,} tokens in {found['prefill_seconds']:.2f} s; "
        f"{found['new_tokens']} new tokens" + (f", {rate:.1f} tokens/s" if rate else ""),
        soft_wrap=True,
    )
    out.print(
        f"{found['attention']} attention: {found['attended']:,} of {found['context']:,} tokens "
        f"(density {found['density']:.4f}); read per new token: K and V {found['kv_bytes_per_token'] / 1e6:,.2f} MB, "
        f"signatures {found['signature_bytes_per_token'] / 1e6:,.2f} MB",
        soft_wrap=True,
    )
