"""Look into shards before anything is trained on them: what there is, what is damaged, and what it looks like.

    python tools/inspect_shards.py 'shards/*.tar'
    python tools/inspect_shards.py '/data/{00000..01233}.tar' --decode 5000 --json facts.json --sheet sheet.png
    python tools/inspect_shards.py 'shards/*.tar' --decode all --image-size 512 --tokens

Every member is read once; images are decoded as in training if --decode asks for it. Which samples are decoded and
shown is decided by --seed and their keys alone, so the same command gives the same answer.
"""

import argparse
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inspect_samples import Facts, Wanted, gather, mixed_rows, pictures
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ldm_train.callbacks.drawing import Tile, captioned_grid
from ldm_train.data import RemoteFiles, Routed, ShardCache, ShardReadError
from ldm_train.data.index import IMAGE, ShardIndex, build_index
from ldm_train.data.locations import expand_shards
from ldm_train.data.storage import LOCAL_FILES
from ldm_train.data.transforms import center_square

QUANTILES = {"least": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1.0}
# Width by height: the edges between the shapes that cameras and screens have.
ASPECTS = (0.0, 0.45, 0.6, 0.7, 0.85, 1.18, 1.42, 1.66, 2.2, np.inf)
ON_SCREEN = 10
CONTEXT_TOKENS = 77
SHEET = (8, 4)
TILE = 192


def quantiles(values: "Sequence[int] | array[int] | np.ndarray") -> dict[str, float]:
    """The `QUANTILES` of some numbers; empty for none."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values), list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def about_images(facts: Facts, image_size: int | None) -> dict[str, Any]:
    """Formats, sizes and shapes."""
    width, height = (np.array(sides, dtype=np.int64) for sides in (facts.widths, facts.heights))
    short, long = np.minimum(width, height), np.maximum(width, height)
    ratios = width / np.maximum(height, 1)
    counts, _ = np.histogram(ratios, ASPECTS)
    found: dict[str, Any] = {
        "formats": dict(facts.formats.most_common()),
        "short_side": quantiles(short),
        "megapixels": {name: round(value / 1e6, 3) for name, value in quantiles(width * height).items()},
        "aspect_ratios": {
            f"{low:g} to {high:g}": int(count)
            for low, high, count in zip(ASPECTS[:-1], ASPECTS[1:], counts, strict=True)
        },
    }
    if image_size is not None and len(short):
        found["smaller_than_image_size"] = float((short < image_size).mean())
        found["cut_off_by_square_crop"] = float(1 - (short / np.maximum(long, 1)).mean())
    return found


def about_captions(facts: Facts) -> dict[str, Any]:
    """Lengths, and what is missing, empty or said twice."""
    hashes = facts.caption_hashes
    found: dict[str, Any] = {
        "missing": facts.without_caption,
        "empty": facts.lengths.count(0),
        "duplicates": 1 - len(set(hashes)) / len(hashes) if hashes else 0.0,
        "characters": quantiles(facts.lengths),
    }
    if facts.tokens:
        found["tokens"] = quantiles(facts.tokens)
        found[f"more_than_{CONTEXT_TOKENS}_tokens"] = float((np.array(facts.tokens) > CONTEXT_TOKENS).mean())
    return found


def about_metadata(facts: Facts) -> dict[str, Any]:
    """How many samples have each field, and of which types."""
    fields: dict[str, dict[str, int]] = {}
    for (name, kind), count in facts.metadata_types.items():
        fields.setdefault(name, {})[kind] = count
    shares = {
        name: {"share": sum(kinds.values()) / facts.samples, "types": dict(Counter(kinds).most_common())}
        for name, kinds in sorted(fields.items())
    }
    return {"missing": facts.without_metadata, "fields": shares}


def about_damage(index: ShardIndex) -> dict[str, Any]:
    """What the index left out, by reason without names and numbers, and each."""
    reasons = Counter(re.sub(r"\d+", "N", re.sub(r"^\S+: |member \S+ ", "", reason)) for _, reason in index.damage)
    return {"reasons": dict(reasons.most_common()), "damage": [entry._asdict() for entry in index.damage]}


def about_shards(index: ShardIndex) -> list[dict[str, Any]]:
    """Name, bytes, samples and damages of each shard."""
    damaged = Counter(damage.shard for damage in index.damage)
    samples = np.diff(index.starts).tolist()
    return [
        {"shard": name, "bytes": size, "samples": count, "damage": damaged[name]}
        for name, size, count in zip(index.names, index.file_sizes, samples, strict=True)
    ]


def report(index: ShardIndex, facts: Facts, image_size: int | None) -> dict[str, Any]:
    """Everything that was found, ready for JSON."""
    return {
        "samples": facts.samples,
        "bytes": sum(index.file_sizes),
        "shards": about_shards(index),
        "left_out": about_damage(index),
        "images": about_images(facts, image_size),
        "captions": about_captions(facts),
        "metadata": about_metadata(facts),
        "decoded": facts.decoded,
        "failures": {
            "kinds": dict(Counter(failure.kind for failure in facts.failures).most_common()),
            "samples": [failure._asdict() for failure in facts.failures],
        },
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The report for people."""
    shown = [_shards_table(found["shards"]), _facts_table(found), _quantiles_table(found), _aspects_table(found)]
    if found["metadata"]["fields"]:
        shown.append(_metadata_table(found["metadata"]["fields"]))
    damage = [(entry["shard"], entry["reason"]) for entry in found["left_out"]["damage"]]
    failures = [(entry["key"], f"{entry['kind']}: {entry['error']}") for entry in found["failures"]["samples"]]
    for title, lines in (("left out by the index", damage), ("bad samples", failures)):
        if lines:
            shown.append(_list_table(title, lines))
    return shown


def _shards_table(shards: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("shard", title="shards", title_justify="left")
    for column in ("samples", "MB", "damage"):
        table.add_column(column, justify="right")
    for shard in shards[:ON_SCREEN]:
        table.add_row(shard["shard"], f"{shard['samples']:,}", f"{shard['bytes'] / 1e6:,.1f}", str(shard["damage"]))
    if len(shards) > ON_SCREEN:
        table.add_row(f"... and {len(shards) - ON_SCREEN} more", "", "", "")
    table.add_section()
    sums = {column: sum(shard[column] for shard in shards) for column in ("samples", "bytes", "damage")}
    total = f"{len(shards):,} in all"
    table.add_row(total, f"{sums['samples']:,}", f"{sums['bytes'] / 1e6:,.1f}", f"{sums['damage']:,}")
    return table


def _facts_table(found: Mapping[str, Any]) -> Table:
    images, captions, samples = found["images"], found["captions"], max(1, found["samples"])

    def share(count: int) -> str:
        return f"{count:,} ({count / samples:.1%})"

    facts = {"formats": ", ".join(f"{count:,} {name}" for name, count in images["formats"].items()) or "-"}
    if "smaller_than_image_size" in images:
        facts["smaller than --image-size"] = f"{images['smaller_than_image_size']:.1%}, which are enlarged"
        facts["cut off by a square crop"] = f"{images['cut_off_by_square_crop']:.1%} of the pixels"
    facts["without caption"] = share(captions["missing"])
    facts["empty captions"] = share(captions["empty"])
    facts["captions said before"] = f"{captions['duplicates']:.1%}"
    if (long := captions.get(f"more_than_{CONTEXT_TOKENS}_tokens")) is not None:
        facts[f"over {CONTEXT_TOKENS} tokens"] = f"{long:.1%}"
    facts["without metadata"] = share(found["metadata"]["missing"])
    facts["images decoded"] = f"{found['decoded']:,}"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["failures"]["kinds"].items())
    facts["bad samples"] = kinds or "none found"
    table = Table(title="samples", title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _quantiles_table(found: Mapping[str, Any]) -> Table:
    table = Table("", title="distributions", title_justify="left")
    for name in QUANTILES:
        table.add_column(name, justify="right")
    for title, part, key in (
        ("short side, pixels", "images", "short_side"),
        ("megapixels", "images", "megapixels"),
        ("caption, characters", "captions", "characters"),
        ("caption, tokens", "captions", "tokens"),
    ):
        if values := found[part].get(key):
            table.add_row(title, *(f"{value:,.3f}".rstrip("0").rstrip(".") for value in values.values()))
    return table


def _aspects_table(found: Mapping[str, Any]) -> Table:
    table = Table("width by height", title="shapes", title_justify="left")
    table.add_column("images", justify="right")
    table.add_column("")
    counts = found["images"]["aspect_ratios"]
    most = max(1, *counts.values())
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", "█" * round(30 * count / most))
    return table


def _metadata_table(fields: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("field", title="metadata", title_justify="left")
    table.add_column("of samples", justify="right")
    table.add_column("types")
    for name, about in fields.items():
        kinds = about["types"]
        words = [kind if len(kinds) == 1 else f"{kind} ({count:,})" for kind, count in kinds.items()]
        table.add_row(name, f"{about['share']:.1%}", ", ".join(words))
    return table


def _list_table(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=f"{title}: {len(lines):,}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for where, what in lines[:ON_SCREEN]:
        table.add_row(where, what)
    if len(lines) > ON_SCREEN:
        table.add_row("...", "--json lists all")
    return table


def contact_sheet(wanted: Wanted, seed: int, title: str) -> Image.Image:
    """Some pictures as training would crop them, with their captions beneath."""
    columns, rows = SHEET
    chosen = pictures(wanted, mixed_rows(wanted.index, f"sheet {seed}"), columns * rows)
    tiles = [Tile(center_square(image, TILE), caption) for image, caption in chosen]
    return captioned_grid(tiles, title, columns) if tiles else Image.new("RGB", (TILE, TILE), "white")


def inspect(arguments: argparse.Namespace, console: Console) -> tuple[Wanted, Facts]:
    """Look at all samples under a progress bar.

    Raises:
        ValueError, OSError, ShardReadError: if the shards cannot be found or read.
    """
    cache = ShardCache(arguments.cache_dir, arguments.cache_bytes, RemoteFiles())
    paths = expand_shards(arguments.shards, "SHARDS", cache.glob)
    index = build_index(paths, (IMAGE,), storage=Routed(LOCAL_FILES, cache))
    count = len(index) if arguments.decode == "all" else arguments.decode
    decode = np.zeros(len(index), dtype=bool)
    decode[mixed_rows(index, f"decode {arguments.seed}")[:count]] = True
    count_tokens = None
    if arguments.tokens:
        from open_clip import SimpleTokenizer  # slow to import

        encode = SimpleTokenizer().encode
        count_tokens = lambda caption: len(encode(caption)) + 2  # noqa: E731 (and the marks around them)
    wanted = Wanted(index, decode, arguments.max_pixels, arguments.caption_field, count_tokens)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    facts = Facts()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("samples", total=len(index))
        for some in gather(wanted, np.arange(len(index)), arguments.workers):
            facts += some
            progress.update(bar, advance=some.samples, description=f"samples, {len(facts.failures)} bad")
    return wanted, facts


def number(least: int, words: str, *names: str) -> Any:  # noqa: ANN401 (argparse calls it)
    """An option's type: a whole number from `least` on, or one of some names."""

    def read(text: str) -> int | str:
        if text in names:
            return text
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is given; allowed: {words}")
        return value

    return read


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive = parser.add_argument, number(1, "1 or more")
    add("shards", nargs="+", metavar="SHARDS", help="tar files: paths, URLs, globs and brace patterns")
    add("--json", type=Path, metavar="FILE", help="write everything that is found")
    add("--sheet", type=Path, metavar="FILE.png", help="draw a contact sheet")
    add(
        "--decode",
        type=number(0, "0 or more, or `all`", "all"),
        default=1000,
        metavar="N|all",
        help="decode so many images, chosen by their keys (default: %(default)s)",
    )
    add("--image-size", type=positive, metavar="PIXELS", help="say how many images are smaller, and what a crop cuts")
    add("--caption-field", help="a metadata field with the captions, instead of the .txt")
    add("--tokens", action="store_true", help="count the captions' tokens too (CLIP's vocabulary)")
    add("--max-pixels", type=positive, default=1 << 26, help="larger images are bad (default: %(default)s)")
    add("--cache-dir", metavar="DIR", help="where copies of remote shards lie (default: under TMPDIR)")
    add("--cache-bytes", type=positive, default=100 << 30, help="their size at most (default: %(default)s)")
    add("--seed", type=number(0, "0 or more"), default=0, help="chooses other samples (default: %(default)s)")
    add("--workers", type=positive, default=4, help="threads (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 if there is a sample, 1 if there is none, 2 if the shards cannot be used."""
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        wanted, facts = inspect(arguments, console)
    except (ValueError, OSError, ShardReadError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    found = report(wanted.index, facts, arguments.image_size)
    for table in tables(found):
        Console().print(table)
    for path in filter(None, (arguments.json, arguments.sheet)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.sheet is not None:
        title = f"{facts.samples:,} samples in {len(wanted.index.paths):,} shards"
        contact_sheet(wanted, arguments.seed, title).save(arguments.sheet, "PNG")
    if not facts.samples:
        console.print(
            f"error: no whole sample in {' '.join(arguments.shards)}; allowed: shards with at least one .jpg, .png or "
            ".webp image; see the damages above, and name other SHARDS.",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
