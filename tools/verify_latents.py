"""Whether a latent cache is what an autoencoder makes of the images: `tools/cache_latents.py --verify N`.

N samples are chosen by a hash of their keys. Each is decoded from its cached moments and from moments made now, by the
mode of the posterior, and both are compared with the image: PSNR = 10 log10(4 / mean squared error) for values in
[-1, 1]. Moments that differ by more than the rounding of their type are told apart by the faults that are usual.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldm_train.data.index import IMAGE, build_index
from ldm_train.data.latent_encoding import MomentsEncoder, SourceImages
from ldm_train.data.latent_member import DamagedSampleError, unpack
from ldm_train.data.latents import read_manifest
from ldm_train.data.shards import ShardReader
from ldm_train.data.storage import Storage
from ldm_train.data.transforms import to_signed_unit

PEAK_SQUARED = 4.0  # values lie in [-1, 1]
# The root mean square difference, in standard deviations of the moments, that counts as rounding: of the stored type,
# of batches of another size, of another device. Faults are of the order of 1.
TOLERANCE = 0.02
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "images in [0, 255] instead of [-1, 1]": lambda x: (x + 1.0) * 127.5,
    "images in [0, 1] instead of [-1, 1]": lambda x: (x + 1.0) / 2.0,
    "red and blue swapped": lambda x: x.flip(1),
    "mirrored images": lambda x: x.flip(-1),
    "images upside down": lambda x: x.flip(-2),
}


class Compared(NamedTuple):
    """One sample: PSNR in dB from the cache and from now, and what is wrong with its moments, if anything."""

    cached: float
    now: float
    fault: str | None


def verify(
    folder: Path, paths: Sequence[str], encoder: MomentsEncoder, number: int, console: Console, storage: Storage
) -> int:
    """Compare and report.

    Args:
        folder: a complete cache.
        paths: all its source shards.
        encoder: of the autoencoder and settings that it should be of.
        number: samples to compare.
        console: for the report.
        storage: where the source shards lie.

    Returns:
        0 if the cache is right, 1 if it is not.
    """

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    manifest = read_manifest(str(folder.absolute()))
    faults = [f"setting {text}" for text in manifest.settings.differences(encoder.settings)]
    low, high = manifest.image_range
    if low < -1.001 or high > 1.001:
        faults.append(f"images in [{low:g}, {high:g}] instead of [-1, 1], as the manifest says")
    sources = SourceImages(paths, encoder.settings, 1, storage)
    results = compare(folder, list(manifest.shards), sources, encoder, number, console)
    found = {key: result.fault for key, result in results.items() if result.fault is not None}
    figures = [result for result in results.values() if not math.isnan(result.cached)]
    if figures:
        cached, now = (sum(r[i] for r in figures) / len(figures) for i in (0, 1))
        worst = max(abs(r.cached - r.now) for r in figures)
        say(
            f"PSNR of {len(figures)} samples: {cached:.3f} dB from the cache, {now:.3f} dB encoded now; largest "
            f"difference {worst:.3f} dB"
        )
    for fault in faults + sorted({f"{fault}, such as {key}" for key, fault in list(found.items())[:3]}):
        say(f"the cache differs: {fault}", "red")
    if not results:
        say(
            f"nothing was compared: none of the first {number} chosen samples has an image that can be decoded; "
            "allowed are caches with latents; change --max-pixels or --data, or give --verify more samples",
            "red",
        )
        return 1
    if faults or found:
        say(
            f"{len(found)} of {len(results)} samples are not what this autoencoder makes of these images; allowed are "
            "differences of rounding; make the cache anew with --overwrite, or change --checkpoint or --data",
            "red",
        )
        return 1
    return 0


def compare(
    folder: Path, names: Sequence[str], sources: SourceImages, encoder: MomentsEncoder, number: int, console: Console
) -> dict[str, Compared]:
    """The chosen samples by their keys; those whose image cannot be decoded, then and now, are left out."""
    cache = build_index([str(folder / name) for name in names], (IMAGE,))
    if len(cache) != len(sources.index):
        raise ValueError(
            f"the cache has {len(cache)} samples, its source {len(sources.index)}; allowed are the shards it was "
            "made of; change --data, or make it anew with --overwrite"
        )
    reader = ShardReader(cache.paths)
    rows = np.argsort(cache.key_hash("verify"), kind="stable")[:number].tolist()
    results: dict[str, Compared] = {}
    columns = (TextColumn("verified"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for row in progress.track(rows, description="verified"):
            stored, picture = stored_moments(cache.read(reader, row, IMAGE)), sources.picture(row)
            if stored is not None and picture.pixels is not None:
                result = compared(stored, to_signed_unit(picture.pixels[None]), encoder)
            elif stored is not None:
                result = Compared(math.nan, math.nan, f"an image that is damaged now: {picture.failure}")
            elif picture.pixels is not None:
                result = Compared(math.nan, math.nan, "no latents, though the image can be decoded")
            else:
                continue
            results[cache.full_key(row)] = result
    return results


def stored_moments(member: bytes) -> Tensor | None:
    """The moments (V, k C, h, w) of a member; `None` if it says why it has none."""
    try:
        return unpack(member).moments
    except DamagedSampleError:
        return None


def compared(stored: Tensor, image: Tensor, encoder: MomentsEncoder) -> Compared:
    """One sample: its moments (V, k C, h, w) in the cache, and its image (1, 3, H, W)."""
    now = encoder(image)[0]
    shapes = tuple(stored.shape), tuple(now.shape)
    if shapes[0] != shapes[1]:
        return Compared(math.nan, math.nan, f"moments (V, k C, h, w) of {shapes[0]} instead of {shapes[1]}")
    figures = [psnr(reconstructed(moments[:1], encoder), image) for moments in (stored, now)]
    return Compared(*figures, fault_of(stored.float(), image, encoder))


def fault_of(stored: Tensor, image: Tensor, encoder: MomentsEncoder) -> str | None:
    """What explains moments that are not those of the image; `None` if they are."""

    def distance(candidate: Tensor) -> float:
        expected = encoder(candidate)[0].float()
        return float((stored - expected).square().mean().sqrt() / expected.std().clamp_min(1e-6))

    found = distance(image)
    if found <= TOLERANCE:
        return None
    for name, change in FAULTS.items():
        if distance(change(image)) <= TOLERANCE:
            return name
    return f"moments {found:.2g} standard deviations away: of another autoencoder, or of another image"


@torch.no_grad()
def reconstructed(moments: Tensor, encoder: MomentsEncoder) -> Tensor:
    """Moments (1, k C, h, w) to the image (1, 3, H, W) of the posterior's mode, on the host."""
    autoencoder = encoder.autoencoder
    z = autoencoder.regularizer.mode(moments.float().to(encoder.device))
    return autoencoder.decode_raw(autoencoder.regularizer.project(z)).clamp(-1.0, 1.0).cpu()


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return 10.0 * math.log10(PEAK_SQUARED / max(1e-12, float((image - reference).square().mean())))
