"""Convert whole latent diffusion models between our files, the published layout and diffusers, in either direction.

    python tools/convert_model.py v1-5-pruned.ckpt sd15/                                    published -> ours
    python tools/convert_model.py stable-diffusion-v1-5/ sd15/                              diffusers -> ours
    python tools/convert_model.py sd15/ sd15.safetensors                                    ours -> published
    python tools/convert_model.py runs/ldm_512/default/checkpoints/last.ckpt model/         ours -> diffusers

Ours is a folder, of `unet.ckpt`, `autoencoder.ckpt` and `text_encoder.safetensors`, or the checkpoint of a run of
stage 2. Stable Diffusion 1 and 2 are recognised in the published layout; describe other models by --unet and
--autoencoder. Every tensor's name and shape is compared before anything is written; files are read without running
code from them. `tools/convert.py` converts autoencoders alone.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import convert
import torch
from convert import COMPVIS, DIFFUSERS, OURS
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from sources import AUTOENCODER, SCHEDULE, UNET, read_file, read_json, read_tensors, tensors_in
from torch import Tensor, nn

from ldm_train.checkpoint import atomic_write, read_checkpoint, strict_load
from ldm_train.conditioning import CLIPTextConditioner
from ldm_train.config import load_run, plain
from ldm_train.interchange import Imported, build_unet, compvis, diffusers, diffusers_model, latents, stable_diffusion
from ldm_train.interchange.model import PREDICTIONS, Average, DiffusionModel, Part, TextEncoder
from ldm_train.nn import Autoencoder

SUFFIXES = {OURS: ("",), COMPVIS: (".safetensors", ".ckpt"), DIFFUSERS: ("",)}
"""Formats, and the suffixes of what holds them."""
UNET_FILE, AUTOENCODER_FILE, TEXT_FILE = "unet.ckpt", "autoencoder.ckpt", "text_encoder.safetensors"
"""The files of our folder."""
PREFIX = "denoiser.network."
"""What our checkpoints put before the names of a U-Net's tensors."""
RECOGNISED = {(320, 768): "sd1", (320, 1024): "sd2"}
"""Options of conf/unet by the channels and the width of the context that a published file shows."""
RECOGNISED_AUTOENCODER = "kl_f8"
"""Option of conf/autoencoder that belongs to all of them."""
GROUPS = ("unet", "autoencoder", "schedule")
"""Of conf/, whose options describe a model."""
USUAL_DECAY = 0.9999
"""Of a run whose averages have a half-life in images instead."""


@dataclass(frozen=True)
class Source:
    """A model's file or folder, and what its reader has to be told; see `parse` for what it means.

    Attributes:
        path: the file or folder.
        unet: option of conf/unet; `None` where it describes itself or is recognised.
        autoencoder: option of conf/autoencoder, likewise.
        schedule: option of conf/schedule, likewise.
        overrides: changes to the options.
        prediction: what the U-Net predicts; `None` leaves what the source says.
        scale_factor: of the latents; `None` leaves what the source says.
    """

    path: Path
    unet: str | None = None
    autoencoder: str | None = None
    schedule: str | None = None
    overrides: tuple[str, ...] = ()
    prediction: str | None = None
    scale_factor: float | None = None

    def of(self, group: str) -> tuple[str, ...]:
        """The overrides of one group."""
        return tuple(text for text in self.overrides if text.lstrip("+~").startswith(f"{group}."))


def read_model(source: Source) -> tuple[DiffusionModel, str]:
    """Read a model of any format, compared strictly with the architecture it is said to have, and name the format.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, or holds another model.
    """
    model, source_format = _read(source)
    if source.schedule is not None:
        model = replace(model, schedule=SCHEDULE.compose(source.schedule, source.of("schedule")))
    check_fits(model.unet.node, model.unet.state)
    if model.average is not None:
        check_fits(model.unet.node, model.average.state)
    first_stage = convert.assembled(Imported(*model.autoencoder, ignored={}))
    if source.scale_factor is not None:
        scaled = latents.scaled(source.scale_factor, first_stage.latent_channels)
        first_stage.calibrate(scaled["latent_mean"], scaled["latent_std"])
    return replace(model, autoencoder=Part(model.autoencoder.node, first_stage.state_dict())), source_format


def check_fits(node: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse weights of another U-Net, with a `ValueError` that lists the difference; no memory is taken for it."""
    with torch.device("meta"):
        network = build_unet(node)
    strict_load(network, {name: torch.empty_like(value, device="meta") for name, value in state.items()})


def _read(source: Source) -> tuple[DiffusionModel, str]:
    path = source.path
    if not path.exists():
        raise FileNotFoundError(
            f"nothing at {path}; allowed are a .ckpt, a .safetensors, a folder of diffusers and one that this tool "
            "wrote; change SOURCE"
        )
    if (path / UNET_FILE).is_file():
        return _from_folder(source), OURS
    if path.is_dir():
        return diffusers_model.import_diffusers_model(_diffusers_folder(path), source.prediction), DIFFUSERS
    content = read_file(path)
    if stable_diffusion.is_whole(compvis.state_of(content) if "config" not in content else ()):
        return _from_published(content, source), COMPVIS
    if "config" in content:
        return _from_run(source), OURS
    raise ValueError(
        f"{path} holds no whole model; allowed are published ones (model.diffusion_model. ...), folders, and "
        "checkpoints of stage 2; change SOURCE, or convert an autoencoder by tools/convert.py"
    )


def _diffusers_folder(path: Path) -> diffusers_model.Folder:
    """What a pipeline's folder holds of the parts that are read."""
    configs, tensors = {}, {}
    for part in (diffusers_model.UNET, diffusers_model.AUTOENCODER, diffusers_model.TEXT_ENCODER):
        if (path / part / diffusers.CONFIG).is_file():
            is_text = part == diffusers_model.TEXT_ENCODER
            names = diffusers_model.TEXT_TENSORS_READ if is_text else diffusers.TENSORS_READ
            configs[part] = read_json(path / part / diffusers.CONFIG)
            tensors[part] = read_tensors(tensors_in(path / part, names))[0]
    scheduler = path / diffusers_model.SCHEDULER / diffusers_model.SCHEDULER_CONFIG
    if scheduler.is_file():
        configs[diffusers_model.SCHEDULER] = read_json(scheduler)
    return diffusers_model.Folder(configs, tensors, {})


def _from_published(content: Mapping[str, Any], source: Source) -> DiffusionModel:
    state, record = compvis.state_of(content), compvis.contents(content).record
    widths = stable_diffusion.widths_of(state)
    recognised = RECOGNISED.get((widths.channels, widths.context_dim or 0))
    option = source.autoencoder or (None if "autoencoder" in record else recognised and RECOGNISED_AUTOENCODER)
    autoencoder = AUTOENCODER.described(option, source.of("autoencoder"), record, source.path)
    latent_channels = autoencoder["latent_channels"]
    seen = {
        "in_channels": latent_channels,
        "out_channels": widths.out_channels,
        "concat_channels": widths.in_channels - latent_channels,
        "context_dim": widths.context_dim,
        "vector_dim": widths.vector_dim,
    }
    overrides = [f"++unet.{key}={'null' if value is None else value}" for key, value in seen.items()]
    option = source.unet or (None if "unet" in record else recognised)
    unet = UNET.described(option, (*overrides, *source.of("unet")), record, source.path)
    model = stable_diffusion.import_stable_diffusion(content, unet, autoencoder, source.prediction)
    if recognised and source.scale_factor is None and latents.statistics(model.autoencoder.state) is None:
        scaled = latents.scaled(latents.SCALE_FACTOR, latent_channels)
        model = replace(model, autoencoder=Part(autoencoder, model.autoencoder.state | scaled))
    return model


def _from_folder(source: Source) -> DiffusionModel:
    content = read_checkpoint(source.path / UNET_FILE, "SOURCE")
    unet = UNET.checked(content.get("unet"), str(source.path / UNET_FILE))
    first_stage = convert.read(convert.Source(source.path / AUTOENCODER_FILE))
    text_encoder = None
    if (source.path / TEXT_FILE).is_file():
        tensors, _ = read_tensors(source.path / TEXT_FILE)
        text_encoder = TextEncoder.of(tensors, content.get("text_encoder"), is_openai=True)
    return DiffusionModel(
        unet=Part(unet, _network(content["state_dict"], source.path)),
        average=_average(content, content.get("ema_decay"), source.path),
        autoencoder=Part(first_stage.node, first_stage.autoencoder.state_dict()),
        text_encoder=text_encoder,
        schedule=content.get("schedule"),
        prediction=source.prediction or content.get("prediction", PREDICTIONS[0]),
        ignored={},
    )


def _from_run(source: Source) -> DiffusionModel:
    """The model of a run of stage 2, with the frozen parts that its config names."""
    content = read_checkpoint(source.path, "SOURCE")
    network = _network(content["state_dict"], source.path)
    stage, cfg = load_run(source.path)
    config = plain(cfg)
    conditioner, first_stage = stage.conditioner, stage.autoencoder
    if not isinstance(first_stage, Autoencoder):
        raise ValueError(f"{source.path} is a model of pixels; allowed are models with an autoencoder; change SOURCE")
    decay = ((config.get("callbacks") or {}).get("ema") or {}).get("decay")
    assert isinstance(conditioner, nn.Module)
    is_clip = isinstance(conditioner, CLIPTextConditioner)
    lost = sum(1 for name in content["state_dict"] if name.startswith("conditioner."))
    return DiffusionModel(
        unet=Part(config["unet"], network),
        average=_average(content, decay, source.path),
        autoencoder=Part(config["autoencoder"], first_stage.state_dict()),
        text_encoder=_text_encoder_of(conditioner) if is_clip else None,
        schedule=config["schedule"],
        prediction=source.prediction or config["stage"]["denoiser"]["prediction"],
        ignored={"conditioner": lost} if lost else {},
    )


def _text_encoder_of(conditioner: CLIPTextConditioner) -> TextEncoder:
    encoder = conditioner.encoder
    tensors = {name: value.float() for name, value in encoder.tower.state_dict().items()}
    used = len(encoder.tower.transformer.resblocks)
    layer = "last" if used == encoder.num_layers else "penultimate"
    return TextEncoder(tensors, encoder.num_layers, encoder.num_heads, encoder.activation, layer)


def _network(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    network = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not network:
        raise ValueError(
            f"{path} holds no tensor under {PREFIX!r}; allowed is a checkpoint of stage 2 (one of stage 3 holds "
            "adapters alone); change SOURCE"
        )
    return network


def _average(content: Mapping[str, Any], decay: float | None, path: Path) -> Average | None:
    if not content.get("ema"):
        return None
    averaged = {name: value for name, value in content["ema"]["average"].items() if name.startswith(PREFIX)}
    return Average(_network(averaged, path), int(content["ema"]["num_updates"]), decay or USUAL_DECAY)


def write_model(target: Path, target_format: str, model: DiffusionModel) -> None:
    """Write a model in a format.

    Raises:
        ValueError: if the format cannot hold it.
    """
    if target_format == OURS:
        _write_ours(target, model)
    elif target_format == DIFFUSERS:
        _write_diffusers(target, diffusers_model.export_diffusers_model(model))
    else:
        tensors, record = stable_diffusion.export_stable_diffusion(model)
        with atomic_write(target) as temporary:
            if target.suffix == ".safetensors":
                save_file(tensors, temporary, metadata=compvis.as_metadata(record))
            else:
                torch.save({"state_dict": tensors, "global_step": 0, compvis.RECORD: record}, temporary)


def _write_ours(target: Path, model: DiffusionModel) -> None:
    content: dict[str, Any] = {
        "state_dict": _prefixed(model.unet.state),
        "unet": model.unet.node,
        "schedule": model.schedule,
        "prediction": model.prediction,
        "global_step": 0,
    }
    if model.average is not None:
        count = torch.tensor(model.average.num_updates)
        content["ema"] = {"num_updates": count, "average": _prefixed(model.average.state)}
        content["ema_decay"] = model.average.decay
    if model.text_encoder is not None:
        content["text_encoder"] = model.text_encoder.settings()
        with atomic_write(target / TEXT_FILE) as temporary:
            tensors = {name: value.contiguous() for name, value in model.text_encoder.tensors.items()}
            save_file(tensors, temporary, metadata={"format": "pt"})
    first_stage = convert.assembled(Imported(*model.autoencoder, ignored={}))
    convert.write(target / AUTOENCODER_FILE, OURS, model.autoencoder.node, first_stage)
    with atomic_write(target / UNET_FILE) as temporary:  # last: by it the folder is recognised
        torch.save(content, temporary)


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": value.contiguous() for name, value in state.items()}


def _write_diffusers(target: Path, folder: diffusers_model.Folder) -> None:
    for part, tensors in folder.tensors.items():
        name = diffusers_model.TEXT_TENSORS if part == diffusers_model.TEXT_ENCODER else diffusers.TENSORS
        with atomic_write(target / part / name) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    for name, text in folder.documents().items():
        with atomic_write(target / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Run the tool.

    Raises:
        FileNotFoundError: if a file is not there.
        OSError: if the disk refuses the target.
        ValueError: if something cannot be read, or not be written as asked.
    """
    meant = format_of(arguments.target, arguments.target_format)
    convert.check_target(arguments.target, "TARGET")
    model, source_format = read_model(source_of(arguments, arguments.source))
    target_format = meant or (DIFFUSERS if source_format == OURS else OURS)
    write_model(arguments.target, target_format, chosen(model, arguments) if arguments.weights else model)
    _tell(model, arguments.target, target_format, console)


def chosen(model: DiffusionModel, arguments: argparse.Namespace) -> DiffusionModel:
    """A model with the one kind of weights that is asked for."""
    if arguments.weights == "raw":
        return replace(model, average=None)
    if model.average is None:
        raise ValueError(f"{arguments.source} holds no averaged weights; allowed is --raw; leave --averaged out")
    return replace(model, unet=model.unet._replace(state=model.average.state), average=None)


def _tell(model: DiffusionModel, target: Path, target_format: str, console: Console) -> None:
    say = partial(console.print, highlight=False, soft_wrap=True)
    parts = [f"a U-Net of {sum(map(Tensor.numel, model.unet.state.values())):,} parameters", "an autoencoder"]
    parts += ["a text encoder"] if model.text_encoder is not None else []
    say(f"{target}: {', '.join(parts)}, as {target_format}; it predicts {model.prediction}")
    convert.tell_left_out(console, model.ignored, "having no place in it")
    if model.schedule is None:
        convert.warn(console, "its betas are those of no schedule in conf/schedule; train on with one of your own")
    if latents.statistics(model.autoencoder.state) is None:
        convert.warn(console, "its latents have no mean and standard deviation; give --scale-factor")


def format_of(target: Path, asked: str | None) -> str | None:
    """The format that a target's name means, the one asked for, if any; `None` for a folder that may be of two kinds.

    Raises:
        ValueError: if the name contradicts it, or means none.
    """
    meant = [name for name, suffixes in SUFFIXES.items() if target.suffix in suffixes and asked in (None, name)]
    if not meant:
        raise ValueError(
            f"{target} ends in {target.suffix!r}; allowed are names in .ckpt and .safetensors for {COMPVIS}, and those "
            f"of folders, without a suffix, for {OURS} and {DIFFUSERS}; change TARGET or --to"
        )
    return meant[0] if len(meant) == 1 else None


def source_of(arguments: argparse.Namespace, path: Path) -> Source:
    """What the command line says of a source.

    Raises:
        ValueError: if there are overrides of other things.
    """
    allowed = tuple(f"{group}." for group in GROUPS)
    if strangers := [text for text in arguments.override if not text.lstrip("+~").startswith(allowed)]:
        raise ValueError(
            f"--override {strangers[0]} is no part of the model; allowed are KEY=VALUE with a KEY in "
            f"{', '.join(allowed)}; change --override"
        )
    options = {key: getattr(arguments, key) for key in (*GROUPS, "prediction", "scale_factor")}
    return Source(path, overrides=tuple(arguments.override), **options)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Source`: what a file of others does not say."""
    add = parser.add_argument
    for group in GROUPS:
        add(f"--{group}", metavar="OPTION", help=f"of conf/{group}, where the source does not say")
    add("--override", metavar="GROUP.KEY=VALUE", action="append", default=[], help="a change; may be repeated")
    add("--prediction", choices=PREDICTIONS, help="what the U-Net predicts (default: what the source says, or epsilon)")
    add("--scale-factor", type=float, help="scale of the latents (default: what the source says)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="a .ckpt, a .safetensors, or a folder")
    add("target", metavar="TARGET", type=Path, help="a file or folder that is not there yet")
    help_text = "format of TARGET (default: a file is compvis; a folder ldm_train, or diffusers if SOURCE is ldm_train)"
    add("--to", dest="target_format", choices=SUFFIXES, help=help_text)
    add_source_options(parser)
    for name, which in (("raw", "the weights as trained"), ("averaged", "the averaged weights")):
        help_text = f"{which} alone, where there are both (default: both; in a folder of diffusers averaged ones)"
        add(f"--{name}", dest="weights", action="store_const", const=name, help=help_text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if something cannot be used."""
    console = Console(stderr=True)
    try:
        run(parse(argv), console)
    except (ValueError, OSError, SafetensorError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
