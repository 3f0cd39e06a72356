"""Index shards ahead of training: one process pool, no GPU waiting; the runs open what is here by `data.index_dir`.

    python tools/index_shards.py '/data/{00000..01233}.tar' --output index/ --workers 16
    python tools/index_shards.py '/data/*.tar' --output index/ --filter 'punsafe<=0.5' --filter 'similarity>=0.3'

Shards that an earlier index in --output holds unchanged are not scanned again. The members that a run needs must be
those asked for here, or it makes an index of its own beside this one: give --caption-field or --label for metadata,
--segmentation for maps, --dimensions for aspect ratio buckets. --filter tells how many samples a filter would leave;
it changes nothing in the index.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ldm_train.data import RemoteFiles, Routed, ShardCache, ShardReadError
from ldm_train.data.filters import Filter, Maximum, Minimum
from ldm_train.data.index import CAPTION, IMAGE, METADATA, ShardIndex, build_index
from ldm_train.data.locations import expand_shards
from ldm_train.data.remote import options_of
from ldm_train.data.storage import LOCAL_FILES, explained

NAMED_ON_SCREEN = 10
FILTER = re.compile(r"(?P<field>[^<>=\s]+)\s*(?P<sign><=|>=)\s*(?P<value>[-+.eE\d]+)")


def filter_of(text: str) -> Filter:
    """The filter that a comparison such as `punsafe<=0.5` means."""
    match = FILTER.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: FIELD<=NUMBER or FIELD>=NUMBER")
    kind = Maximum if match["sign"] == "<=" else Minimum
    try:
        return kind(match["field"], float(match["value"]))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{match['value']!r} is given; allowed: a number after <= or >=") from None


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", nargs="+", help="tar files: paths, URLs, globs and brace patterns")
    add("--output", type=Path, required=True, help="the folder that keeps indices, `data.index_dir` of the runs")
    add("--cache-dir", metavar="DIR", help="where copies of remote shards lie, `data.cache_dir` of the runs")
    add("--cache-bytes", type=positive, default=100 << 30, help="its size at most (default: %(default)s)")
    add("--storage-options", default="{}", metavar="JSON", help="as `data.storage_options`, for shards behind URLs")
    add("--workers", type=positive, default=1, help="processes (default: %(default)s)")
    add("--segmentation", metavar="EXT", help="index segmentation maps with this extension, such as seg.png")
    add("--caption-field", metavar="FIELD", help="captions come from this field of the .json: it is required, no .txt")
    add("--label", action="store_true", help="the .json is required beside the caption, for class labels")
    add("--dimensions", action="store_true", help="index width and height: a read for each image")
    add("--filter", type=filter_of, action="append", default=[], metavar="CONDITION", help="such as 'punsafe<=0.5'")
    add("--strict", action="store_true", help="exit with 1 if damage was found")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


def facts_of(index: ShardIndex, arguments: argparse.Namespace) -> dict[str, Any]:
    """What there is to say about an index."""
    facts: dict[str, Any] = {
        "shards": len(index.paths),
        "samples": len(index),
        "bytes": sum(index.file_sizes),
        "damage": len(index.damage),
        "fingerprint": index.fingerprint,
        "index": None if index.columns.folder is None else str(index.columns.folder.parent),
        "first_damage": [f"{shard}: {reason}" for shard, reason in index.damage[:NAMED_ON_SCREEN]],
    }
    if arguments.filter:
        kept = index.filtered(arguments.filter, arguments.workers)
        facts |= {"kept": len(kept), "refused": dict(kept.refused.most_common())}
    return facts


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the facts as a table."""
    table = Table("what", "found", show_header=False)
    for name in ("shards", "samples", "bytes", "damage", "kept", "fingerprint", "index"):
        if name in facts:
            value = facts[name]
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    for reason, number in facts.get("refused", {}).items():
        table.add_row(f"refused, {reason}", f"{number:,}")
    console.print(table, soft_wrap=True)
    for line in facts["first_damage"]:
        console.print(f"damage {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """0 if there is an index, 1 with --strict and damage, 2 if the shards cannot be read or the index not be kept."""
    arguments = parse(argv)
    console = Console(stderr=True)
    required = {IMAGE, CAPTION if arguments.caption_field is None else METADATA}
    required |= {METADATA} if arguments.label else set()
    try:
        remote = RemoteFiles(options_of(arguments.storage_options))
        cache = ShardCache(arguments.cache_dir, arguments.cache_bytes, remote)
        arguments.output.mkdir(parents=True, exist_ok=True)
        index = build_index(
            expand_shards(arguments.shards, "shards", cache.glob),
            sorted(required),
            arguments.segmentation and arguments.segmentation.lower(),
            directory=arguments.output,
            workers=arguments.workers,
            storage=Routed(LOCAL_FILES, cache),
            dimensions=arguments.dimensions,
        )
        facts = facts_of(index, arguments)
    except (ValueError, OSError, ShardReadError) as error:
        said = explained(error, "change --output, --cache-dir or the shards")
        console.print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console())
    return 1 if arguments.strict and index.damage else 0


if __name__ == "__main__":
    sys.exit(main())
