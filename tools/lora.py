"""Low-rank adapters as files: put them into a model and take them out, add, extract, shrink, convert and show them.

    python tools/lora.py merge sd15/ merged/ style.safetensors person.safetensors --weight 0.8 --weight 0.5
    python tools/lora.py unmerge merged/ sd15_again/ style.safetensors person.safetensors --weight 0.8 --weight 0.5
    python tools/lora.py combine both.safetensors style.safetensors person.safetensors --weight 0.8 --weight 0.5 --exact
    python tools/lora.py combine both.safetensors style.safetensors person.safetensors --rank 16
    python tools/lora.py extract sd15/ tuned.safetensors difference.safetensors --rank 32
    python tools/lora.py resize style.safetensors small.safetensors --energy 0.98
    python tools/lora.py convert style.safetensors style_kohya.safetensors --to kohya --dtype float16
    python tools/lora.py show style.safetensors --json

Models are what `tools/convert_model.py` reads, and merged ones are written in any format that it writes. Adapters are
ours, kohya's, diffusers' or peft's; files of ours say their architecture, Stable Diffusion's are recognised, and others
are described by --unet. Files are read without running code from them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import convert
import convert_model
import torch
from convert_model import COMPVIS, OURS
from lora_listing import count_parameters, description, print_description
from lora_options import DTYPES, parse
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from sources import UNET
from torch import Tensor

from ldm_train.checkpoint import digest
from ldm_train.interchange import (
    AdapterBase,
    AdapterFile,
    AdapterMetadata,
    TextShape,
    build_unet,
    read_adapters,
    write_adapters,
)
from ldm_train.interchange.adapter_layouts import KOHYA, network_alphas
from ldm_train.interchange.adapter_metadata import PUBLISHED
from ldm_train.interchange.adapter_names import TEXT_ENCODER, layers_of
from ldm_train.interchange.adapter_names import UNET as UNET_PREFIX
from ldm_train.interchange.adapter_weights import Weighted, merged, place_of, unmerged
from ldm_train.interchange.model import DiffusionModel, Part
from ldm_train.nn.low_rank import LowRank
from ldm_train.nn.low_rank_algebra import concatenated, extracted, resized, summed_svd

Item = TypeVar("Item")
Change = Callable[[Mapping[str, Tensor], str, Sequence[Weighted]], dict[str, Tensor]]


def merge(arguments: argparse.Namespace, console: Console) -> None:
    """Write a base model with adapters in its weights."""
    _change_model(arguments, console, "merged", merged)


def unmerge(arguments: argparse.Namespace, console: Console) -> None:
    """Write a merged model without the adapters that were put into it."""
    _change_model(arguments, console, "taken out", unmerged)


def _change_model(arguments: argparse.Namespace, console: Console, done: str, change: Change) -> None:
    asked = convert_model.format_of(arguments.target, arguments.model_format)
    convert.check_target(arguments.target, "TARGET")
    weights = weights_of(arguments)
    model, source_format = _read_model(arguments.base, arguments)
    base = base_of(model)
    files = [_read(path, base, console) for path in arguments.adapters]
    if change is merged:
        _compare_digests(model, dict(zip(arguments.adapters, files, strict=True)), console)
    sets = [Weighted(file.adapters, weight) for file, weight in zip(files, weights, strict=True)]
    changed = replace(model, unet=Part(model.unet.node, change(model.unet.state, UNET_PREFIX, sets)))
    if model.text_encoder is not None:
        tensors = change(model.text_encoder.tensors, TEXT_ENCODER, sets)
        changed = replace(changed, text_encoder=replace(model.text_encoder, tensors=tensors))
    target_format = asked or (source_format if source_format != COMPVIS else OURS)
    convert_model.write_model(arguments.target, target_format, changed)
    count = len({key for file in files for key in file.adapters})
    console.print(f"{arguments.target}: {len(files)} sets of adapters {done}, {count} layers, as {target_format}")
    convert.tell_left_out(console, model.ignored, "having no place in it")


def combine(arguments: argparse.Namespace, console: Console) -> None:
    """Write the weighted sum of several sets of adapters as one."""
    _check_file(arguments.target)
    weights = weights_of(arguments)
    if arguments.exact == (arguments.rank is not None or arguments.energy is not None):
        raise ValueError(
            "the rank of the sum is not said once; allowed is --exact, the sum of ranks, or else --rank or --energy, "
            "the best approximation; choose one"
        )
    files = [_read(path, described(arguments), console) for path in arguments.adapters]
    metadata = files[0].metadata
    shapes = [{layer.key: layer.weight_shape for layer in layers_of(file.metadata.base)} for file in files]
    parts: dict[str, list[tuple[LowRank, float]]] = {}
    for file, own, weight in zip(files, shapes, weights, strict=True):
        for key, adapter in file.adapters.items():
            if shapes[0].get(key) != own[key]:
                raise ValueError(
                    f"{key} is {own[key]} in one base model and {shapes[0].get(key)} in the first; allowed are "
                    "adapters of one architecture; leave one of them out"
                )
            parts.setdefault(key, []).append((adapter, weight))
    result = {}
    for key, pairs in _tracked(parts.items(), "adding", console):
        adapters, own_weights = [adapter for adapter, _ in pairs], [weight for _, weight in pairs]
        result[key] = (
            concatenated(adapters, own_weights)
            if arguments.exact
            else summed_svd(adapters, own_weights, arguments.rank, arguments.energy)
        )
    digests = {file.metadata.base_digest for file in files}
    words = tuple(dict.fromkeys(word for file in files for word in file.metadata.trigger_words))
    digest_of_all = digests.pop() if len(digests) == 1 else None
    _write(arguments, result, AdapterMetadata(metadata.base, digest_of_all, words), console)


def extract(arguments: argparse.Namespace, console: Console) -> None:
    """Write adapters that turn one model into another, as well as their rank allows."""
    _check_file(arguments.target)
    if arguments.rank is None and arguments.energy is None:
        raise ValueError("no rank is said; allowed is --rank, --energy or both; choose one")
    (first, _), (second, _) = (_read_model(path, arguments) for path in (arguments.base, arguments.tuned))
    base, chosen = base_of(first), _pattern(arguments.layers)
    if base_of(second) != base and layers_of(base_of(second)) != layers_of(base):
        raise ValueError(
            f"{arguments.base} and {arguments.tuned} are of different architectures; allowed are two models of one; "
            "change BASE or TUNED"
        )
    result, share = {}, []
    keys = [layer.key for layer in layers_of(base) if chosen.fullmatch(layer.key)]
    for key in _tracked(keys, "extracting", console):
        before, after = (place_of(key).of(_state_of(model, key)) for model in (first, second))
        if not torch.equal(before.float(), after.float()):
            found = extracted(before, after, arguments.rank, arguments.energy, arguments.clamp_quantile)
            result[key] = found
            difference = after.float() - before.float()
            share.append(1 - float((found.delta() - difference).norm() / difference.norm()) ** 2)
    if not result:
        raise ValueError(
            f"none of {len(keys)} layers differs; allowed are two models of which one was trained on; change TUNED or "
            "--layers"
        )
    _write(arguments, result, AdapterMetadata(base, _digest(first)), console)
    _tell_rest(first, second, base, console)
    mean = sum(share) / len(share)
    console.print(f"they hold {mean:.1%} of the squared difference of a layer, {min(share):.1%} of the worst")


def resize(arguments: argparse.Namespace, console: Console) -> None:
    """Write adapters of smaller ranks."""
    _check_file(arguments.target)
    if arguments.rank is None and arguments.energy is None:
        raise ValueError("no rank is said; allowed is --rank, --energy or both; choose one")
    file = _read(arguments.source, described(arguments), console)
    items = _tracked(file.adapters.items(), "resizing", console)
    result = {key: resized(adapter, arguments.rank, arguments.energy) for key, adapter in items}
    _write(arguments, result, file.metadata, console)
    before, after = (count_parameters(adapters) for adapters in (file.adapters, result))
    console.print(f"{before:,} parameters became {after:,}")


def convert_layout(arguments: argparse.Namespace, console: Console) -> None:
    """Write adapters in another layout or type."""
    _check_file(arguments.target)
    file = _read(arguments.source, described(arguments), console)
    _write(arguments, file.adapters, file.metadata, console)


def show(arguments: argparse.Namespace, console: Console) -> None:
    """Print what is in a file, on stdout."""
    content = description(_read(arguments.source, described(arguments), console), arguments.source)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        print_description(content, Console())


def described(arguments: argparse.Namespace) -> AdapterBase | None:
    """The architecture that the command line describes, if it does."""
    if arguments.unet is None:
        return None
    known = PUBLISHED.get(arguments.unet)
    # What in conf/ other groups say: of a published model it is known, of others the overrides say it.
    keys = ("in_channels", "out_channels", "context_dim", "vector_dim")
    fixed = [] if known is None else [f"++unet.{key}={known.unet.get(key, 'null')}" for key in keys]
    node = UNET.compose(arguments.unet, (*fixed, *arguments.override))
    text = None if known is None else known.text_encoder
    if text is None and node.get("context_dim") is not None:
        text = TextShape(0, node["context_dim"])
    if text is not None and arguments.text_layers is not None:
        text = text._replace(num_layers=arguments.text_layers)
    return AdapterBase(node, text)


def base_of(model: DiffusionModel) -> AdapterBase:
    """What adapters of a model belong to."""
    text = model.text_encoder
    return AdapterBase(model.unet.node, None if text is None else TextShape(text.held_layers, text.width))


def weights_of(arguments: argparse.Namespace) -> list[float]:
    """A weight for each set of adapters: 1 where none is said.

    Raises:
        ValueError: if there are more or fewer than sets.
    """
    if arguments.weight and len(arguments.weight) != len(arguments.adapters):
        raise ValueError(
            f"{len(arguments.weight)} weights for {len(arguments.adapters)} sets of adapters; allowed is one for each, "
            "in their order, or none, which is 1; change --weight"
        )
    return arguments.weight or [1.0] * len(arguments.adapters)


def _read_model(path: Path, arguments: argparse.Namespace) -> tuple[DiffusionModel, str]:
    """A model with the weights that are used: the averaged ones where there are any."""
    groups = ("unet", "autoencoder", "schedule")
    options = {key: getattr(arguments, key) for key in groups}
    model, source_format = convert_model.read_model(
        convert_model.Source(path, overrides=tuple(arguments.override), **options)
    )
    if model.average is not None and not arguments.raw:
        model = replace(model, unet=Part(model.unet.node, model.average.state))
    return replace(model, average=None), source_format


def _read(path: Path, base: AdapterBase | None, console: Console) -> AdapterFile:
    file = read_adapters(path, base)
    if file.assumed_scales:
        convert.warn(
            console, f"{path}: {file.assumed_scales} adapters say no alpha; it is taken for their rank, a scale of 1"
        )
    return file


def _write(
    arguments: argparse.Namespace, adapters: Mapping[str, LowRank], metadata: AdapterMetadata, console: Console
) -> None:
    layout, target = arguments.layout, arguments.target
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    write_adapters(target, adapters, metadata, layout, dtype)
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    console.print(
        f"{target}: {len(adapters)} layers of rank {shown}, {count_parameters(adapters):,} parameters, "
        f"{target.stat().st_size / 1e6:.2f} MB as {layout}",
        highlight=False,
        soft_wrap=True,
    )
    if layout == KOHYA.name and len(network_alphas(adapters)) > 1:
        convert.warn(
            console,
            "its layers have several alphas, and diffusers takes one for all attentions; --to diffusers keeps each",
        )


def _compare_digests(model: DiffusionModel, files: Mapping[Path, AdapterFile], console: Console) -> None:
    own = _digest(model)
    for path, file in files.items():
        if file.metadata.base_digest not in (None, own):
            convert.warn(
                console,
                f"{path} was trained on another U-Net (sha256 {str(file.metadata.base_digest)[:12]}) than this one "
                f"({own[:12]}); the shapes fit, and the effect may differ",
            )


def _digest(model: DiffusionModel) -> str:
    """Identity of a U-Net in float32, the type in which it is trained and sampled, whatever its file's."""
    with torch.device("meta"):
        unet = build_unet(model.unet.node)
    state = {name: value.float() if value.is_floating_point() else value for name, value in model.unet.state.items()}
    unet.load_state_dict(state, strict=True, assign=True)
    return digest(unet)


def _tell_rest(first: DiffusionModel, second: DiffusionModel, base: AdapterBase, console: Console) -> None:
    """Warn of what differs and is no weight of a layer, such as biases and norms, which adapters cannot hold."""
    differing = []
    for prefix in (UNET_PREFIX, TEXT_ENCODER):
        if prefix == TEXT_ENCODER and None in (first.text_encoder, second.text_encoder):
            continue
        held = {place_of(layer.key).name for layer in layers_of(base) if layer.key.startswith(prefix)}
        before, after = (_state_of(model, prefix) for model in (first, second))
        differing += [
            f"{prefix}{name}"
            for name, value in before.items()
            if name not in held and name in after and not torch.equal(value.float(), after[name].float())
        ]
    if differing:
        convert.warn(
            console,
            f"{len(differing)} other tensors differ, such as {differing[0]}; they are weights of no layer, and are "
            "not in the adapters",
        )


def _state_of(model: DiffusionModel, key: str) -> Mapping[str, Tensor]:
    if key.startswith(UNET_PREFIX):
        return model.unet.state
    assert model.text_encoder is not None
    return model.text_encoder.tensors


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(
            f"--layers {text} is no regular expression ({error}); allowed is one that fits whole keys, as `show` lists "
            "them; change --layers"
        ) from error


def _check_file(target: Path) -> None:
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} ends in {target.suffix!r}; allowed is a name in .safetensors; change TARGET")
    convert.check_target(target, "TARGET")


def _tracked(items: Iterable[Item], title: str, console: Console) -> Iterable[Item]:
    known: Sequence[Item] = list(items)
    return track(known, title, console=console, transient=True)


RUN = {
    "merge": merge,
    "unmerge": unmerge,
    "combine": combine,
    "extract": extract,
    "resize": resize,
    "convert": convert_layout,
    "show": show,
}
"""What the commands do, by name."""


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if something cannot be used."""
    console = Console(stderr=True)
    arguments = parse(argv, __doc__)
    try:
        RUN[arguments.command](arguments, console)
    except (ValueError, OSError, SafetensorError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
