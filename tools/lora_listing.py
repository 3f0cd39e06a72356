"""What `tools/lora.py show` says of a file of adapters, and how it is printed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ldm_train.interchange import AdapterFile
from ldm_train.nn.low_rank import LowRank
from ldm_train.nn.low_rank_algebra import singular_values


def count_parameters(adapters: Mapping[str, LowRank]) -> int:
    """Numbers in A, B and m of all layers."""
    parts = (part for each in adapters.values() for part in (each.down, each.up, each.magnitude) if part is not None)
    return sum(part.numel() for part in parts)


def description(file: AdapterFile, path: Path) -> dict[str, Any]:
    """What `show` says of a file, of plain values."""
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
    layers = []
    for key, adapter in file.adapters.items():
        values = singular_values(adapter)
        layers.append(
            {
                "key": key,
                "weight_shape": list(adapter.weight_shape),
                "rank": adapter.rank,
                "scale": adapter.alpha,
                "dora": adapter.magnitude is not None,
                "norm": float(values.norm()),
                "singular_values": values.tolist(),
            }
        )
    return {
        "layout": file.layout,
        "bytes": sum(each.stat().st_size for each in files),
        "parameters": count_parameters(file.adapters),
        "types": sorted({str(adapter.down.dtype).removeprefix("torch.") for adapter in file.adapters.values()}),
        "base_digest": file.metadata.base_digest,
        "trigger_words": list(file.metadata.trigger_words),
        "assumed_scales": file.assumed_scales,
        "notes": dict(file.metadata.notes),
        "layers": layers,
    }


def print_description(content: Mapping[str, Any], console: Console) -> None:
    """As a table of the layers, and a line for all else."""
    table = Table(Column("layer", overflow="fold"), "weight", "rank", "scale", "norm", "largest singular values")
    for layer in content["layers"]:
        values = ", ".join(f"{value:.3g}" for value in layer["singular_values"][:4])
        rank = f"{layer['rank']} (DoRA)" if layer["dora"] else str(layer["rank"])
        shape = " x ".join(map(str, layer["weight_shape"]))
        table.add_row(layer["key"], shape, rank, f"{layer['scale']:.4g}", f"{layer['norm']:.4g}", values)
    console.print(table)
    for key in ("layout", "bytes", "parameters", "types", "base_digest", "trigger_words", "assumed_scales", "notes"):
        console.print(f"{key}: {content[key]}", markup=False, highlight=False, soft_wrap=True)
