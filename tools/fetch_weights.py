"""Fetch published weights that metrics, losses and text encoders need and that nothing else here ever downloads.

    python tools/fetch_weights.py --list
    python tools/fetch_weights.py vgg16                            # into torch's cache, where LPIPS looks
    python tools/fetch_weights.py inception clip_l14 --directory weights
    python tools/fetch_weights.py experiment=ldm_512 --list        # all that a run with these overrides needs
    python tools/fetch_weights.py experiment=ldm_512               # and what of it is missing, to where the run looks

A file is checked against the SHA-256 prefix in its name and appears under that name only when it is whole. Machines
without a network: run this where there is one, and copy the files into the same folder.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ldm_train.checkpoint import atomic_write
from ldm_train.config import conf_dir, register
from ldm_train.dry_run import NeededWeights, needed_weights
from ldm_train.metrics.features import INCEPTION_FILE
from ldm_train.nn.perceptual import VGG16_FILE, cached_backbone

CHUNK = 1 << 20  # bytes
TIMEOUT = 30.0  # seconds without an answer
DIGEST = re.compile(r"-([0-9a-f]{8,})\.(?:pth|bin|safetensors)$")


@dataclass(frozen=True)
class Weights:
    """One published file.

    Attributes:
        file: its name here and in mirrors, which ends in the first eight hexadecimal digits of its SHA-256.
        address: where it is published, under that name or another.
        megabytes: its size.
        reader: what reads it, and the config key that names its path.
    """

    file: str
    address: str
    megabytes: float
    reader: str


WEIGHTS = {
    "vgg16": Weights(
        VGG16_FILE,
        f"https://download.pytorch.org/models/{VGG16_FILE}",
        553.4,
        "LPIPS: perceptual.backbone (null: torch's cache)",
    ),
    "inception": Weights(
        INCEPTION_FILE,
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}",
        95.6,
        "FID: inception_weights of callbacks.samples.extractor, callbacks.reconstruction_distance.extractor",
    ),
    "clip_l14": Weights(
        "clip-vit-l-14-openai-a2bf730a.safetensors",
        "https://huggingface.co/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
        1710.5,
        "the text encoder of conditioner=clip_l14: conditioner.encoder.weights",
    ),
    "openclip_h14": Weights(
        "clip-vit-h-14-laion2b-9a78ef8e.bin",
        "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K/resolve/main/open_clip_pytorch_model.bin",
        3944.7,
        "the text encoder of conditioner=openclip_h14: conditioner.encoder.weights",
    ),
}


@dataclass(frozen=True)
class Wanted:
    """A file that a run needs.

    Attributes:
        needed: which key names it, where it is looked for.
        weights: what is published of it; `None` for what a run of ours or a person has made.
    """

    needed: NeededWeights
    weights: Weights | None

    @property
    def state(self) -> str:
        """Whether it is there."""
        if not self.needed.is_there:
            return "not there"
        is_whole = self.weights is None or is_published(self.needed.path, self.weights.file)
        return "there" if is_whole else "damaged, or another one"


def wanted(overrides: list[str]) -> list[Wanted]:
    """The files of weights that a run with these overrides of its config needs.

    Raises:
        ValueError: if there is no such config.
    """
    register()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", overrides, return_hydra_config=True)
        option = cfg.hydra.runtime.choices.get("conditioner")
        return [Wanted(needed, published(needed, option)) for needed in needed_weights(cfg)]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{error}; allowed are overrides as of python -m ldm_train; change {overrides}") from error


def published(needed: NeededWeights, conditioner: str | None) -> Weights | None:
    """What to fetch for a file: by its name, else by what it is for; not for a name that says another digest."""
    by_name = {weights.file: weights for weights in WEIGHTS.values()}
    if needed.path.name in by_name:
        return by_name[needed.path.name]
    if DIGEST.search(needed.path.name) or needed.path.is_dir():
        return None
    return WEIGHTS.get(str(conditioner) if needed.kind == "text encoder" else needed.kind)


def fetch(weights: Weights, path: Path, mirror: str | None, console: Console) -> Path:
    """Put one file into its place, unless it is there and whole.

    Args:
        weights: what to fetch.
        path: where to; folders are made if need be.
        mirror: address of a folder with the same files under the names they have here, instead of the published one.
        console: shows the progress.

    Returns:
        The file's path.

    Raises:
        ValueError: if it cannot be fetched, or what arrives is not the published file.
        OSError: if it cannot be written.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(
            f"{path.parent} is a file; allowed is a folder, there or not; change --directory or the config"
        )
    if path.is_file() and is_published(path, weights.file):
        console.print(f"{path} is there and whole", markup=False, highlight=False, soft_wrap=True)
        return path
    address = f"{mirror.rstrip('/')}/{weights.file}" if mirror else weights.address
    with atomic_write(path) as temporary:
        try:
            download(address, temporary, console)
        except (URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            raise ValueError(_unreachable(address, path, error)) from error
        if not is_published(temporary, weights.file):
            raise ValueError(
                f"what {address} sent ({temporary.stat().st_size:,} bytes) is not the published file, whose SHA-256 "
                f"begins with the digits in its name; allowed is that file of {weights.megabytes} MB; run this again, "
                "or change --mirror"
            )
    console.print(f"{path} is ready for {weights.reader}", markup=False, highlight=False, soft_wrap=True)
    return path


def download(address: str, target: Path, console: Console) -> None:
    """Write what an address sends to a file, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        urlopen(address, timeout=TIMEOUT) as response,
        target.open("wb") as file,
        Progress(*columns, console=console) as progress,
    ):
        length = response.headers.get("Content-Length")
        task = progress.add_task(address.rpartition("/")[2], total=int(length) if length else None)
        for chunk in _chunks(response):
            file.write(chunk)
            progress.advance(task, len(chunk))


def is_published(path: Path, name: str) -> bool:
    """Whether the SHA-256 of a file begins with the digits at the end of a published name."""
    return sha256(path).startswith(digest_of(name))


def digest_of(name: str) -> str:
    """The first digits of a published file's SHA-256, as its name says them."""
    prefix = DIGEST.search(name)
    if prefix is None:
        raise ValueError(f"the name {name} says no digest; allowed are names like vgg16-397923af.pth; see WEIGHTS")
    return prefix[1]


def sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _chunks(response: BinaryIO) -> Iterator[bytes]:
    while chunk := response.read(CHUNK):
        yield chunk


def _unreachable(address: str, path: Path, error: Exception) -> str:
    reason = f"the server answers {error.code}" if isinstance(error, HTTPError) else getattr(error, "reason", error)
    return (
        f"{address} cannot be fetched ({reason}); allowed is a machine that reaches it, or the address of a folder "
        f"that has the file with --mirror; without either, fetch it elsewhere and copy it to {path}"
    )


def torch_cache() -> Path:
    """Where torch, and LPIPS here, look for published weights."""
    return cached_backbone().parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "names", nargs="*", metavar="name",
        help=f"what to fetch: {', '.join(WEIGHTS)}; or overrides of a run, key=value: all that it needs",
    )  # fmt: skip
    add(
        "--directory",
        type=Path,
        default=torch_cache(),
        help="where named files go (default: torch's cache, %(default)s)",
    )
    add("--mirror", help="address of a folder that has the same files, http(s):// or file://")
    add("--list", action="store_true", help="say what can be fetched and what is there already, then stop")
    arguments = parser.parse_args(argv)
    arguments.overrides = [name for name in arguments.names if "=" in name]
    if arguments.overrides and len(arguments.overrides) < len(arguments.names):
        parser.error("names and overrides are mixed; allowed are names, or key=value of a run; give one kind")
    if not arguments.overrides and (unknown := [name for name in arguments.names if name not in WEIGHTS]):
        parser.error(f"unknown: {', '.join(unknown)}; allowed are {', '.join(WEIGHTS)}; change the name")
    if not arguments.names and not arguments.list:
        parser.error(f"no name; allowed are {', '.join(WEIGHTS)}; give one, or --list")
    return arguments


def show(directory: Path) -> None:
    """Print a line for each file that can be fetched."""
    for name, weights in WEIGHTS.items():
        path = directory / weights.file
        state = "not there" if not path.is_file() else "there" if is_published(path, path.name) else "damaged"
        print(f"{name}: {path} ({weights.megabytes} MB, {state}), {weights.reader}")


def show_wanted(files: list[Wanted]) -> None:
    """Print a line for each file that a run needs."""
    for file in files:
        path, weights = file.needed.path, file.weights
        size = (
            f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else f"{weights.megabytes} MB" if weights else "?"
        )
        digest = f"sha256 {sha256(path)}" if path.is_file() else "a folder" if path.is_dir() else "sha256 unknown"
        if weights is not None and not path.is_file():
            digest = f"sha256 {digest_of(weights.file)}..."
        print(f"{file.needed.key}: {path} ({size}, {digest}, {file.state})")
    if not files:
        print("no file of weights is needed")


def fetch_wanted(files: list[Wanted], mirror: str | None, console: Console) -> None:
    """Fetch what is missing and published.

    Raises:
        ValueError: with every file that is not there in the end.
    """
    missing = []
    for file in files:
        path = file.needed.path
        if file.weights is None:
            if not file.needed.is_there:
                missing.append(
                    f"`{file.needed.key}`: {path} is a {file.needed.kind} that nobody publishes: make it first"
                )
            continue
        try:
            fetch(file.weights, path, mirror, console)
        except (ValueError, OSError) as error:
            missing.append(f"`{file.needed.key}`: {error}")
    if missing:
        raise ValueError("; ".join(missing))


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if a file is not there in the end."""
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        if arguments.overrides:
            files = wanted(arguments.overrides)
            if not arguments.list:
                fetch_wanted(files, arguments.mirror, console)
            show_wanted(files)
        elif arguments.list:
            show(arguments.directory)
        else:
            for name in arguments.names:
                fetch(WEIGHTS[name], arguments.directory / WEIGHTS[name].file, arguments.mirror, console)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
