r"""What `tools/sample.py` is asked for: a list of images, numbered, each with everything that is its own.

Image i of the list has the seed `--seed` + i unless its own is given, so it is the same in every batch and for every
number of processes, of which process r of R makes the images r, r + R, ... A file of prompts is plain text, one a line,
or JSON lines:

    {"prompt": "red apple, a fruit food emoji", "negative": "a face", "count": 4}
    {"prompt": "a flag emoji", "seed": 7}
    {"label": 3}

where `seed` is that of the line's first image; the others count on from it.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ldm_train.conditioning import (
    Conditioner,
    DegradedImageConditioner,
    LabelConditioner,
    MaskConditioner,
    SemanticMapConditioner,
)
from ldm_train.stages import refuse_if_cut

Item = TypeVar("Item")
KEYS: dict[str, type] = {"prompt": str, "negative": str, "seed": int, "count": int, "label": int}
"""Of a line of JSON, and their types."""
_SEEDS = 1 << 63


class Line(NamedTuple):
    """A line of a file of prompts, or its like from the command line; see `KEYS`."""

    prompt: str = ""
    negative: str | None = None
    seed: int | None = None
    count: int | None = None
    label: int | None = None

    def seeds(self, number: int, arguments: Namespace) -> list[int]:
        """Those of its images, of which the first is image `number` of the list."""
        if self.seed is None and self.count is None and arguments.seeds:
            return list(arguments.seeds)
        first = arguments.seed + number if self.seed is None else self.seed
        return [first + i for i in range(self.count or arguments.per_prompt)]


@dataclass(frozen=True)
class Request:
    """One image to make.

    Attributes:
        number: its place in the list, which names its file.
        prompt: what it shows.
        seed: of its noise.
        label: its class, where there are classes.
        negative: what it is guided away from, if anything but the empty condition.
    """

    number: int
    prompt: str
    seed: int
    label: int | None = None
    negative: str | None = None

    @property
    def caption(self) -> str:
        """What the image is of, for people."""
        return self.prompt if self.label is None else f"class {self.label} {self.prompt}".strip()

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.number:05d}.png"


class Share(NamedTuple):
    """Which of the images are a process's own: the `index`-th of every `count`."""

    index: int
    count: int

    @classmethod
    def of(cls, arguments: Namespace) -> "Share":
        """That of a task of an array job, and in it of a process that torchrun has started.

        Raises:
            ValueError: if there is no such task.
        """
        index, count = arguments.task_index, arguments.num_tasks
        if not 0 <= index < count:
            raise ValueError(f"--task-index is {index}; allowed are 0 to {count - 1}, one below --num-tasks")
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        return cls(index * world + rank, count * world)

    def own(self, entries: Sequence[Item]) -> list[Item]:
        """The own part of a list."""
        return list(entries[self.index :: self.count])


def requests_of(arguments: Namespace) -> list[Request]:
    """All images that the command line asks for, of all processes.

    Raises:
        ValueError: if the file of prompts cannot be used, or a seed has more than 64 bits.
    """
    plain = [*arguments.prompt] or ([""] if arguments.label and arguments.prompts_file is None else [])
    labels = arguments.label or [None]
    lines = [Line(prompt, label=label) for prompt in plain for label in labels]
    lines += [
        line if line.label is not None else line._replace(label=label)
        for line in read_prompts(arguments.prompts_file)
        for label in ([line.label] if line.label is not None else labels)
    ]
    requests = list(_numbered(lines, arguments))
    if others := [request.seed for request in requests if not -_SEEDS <= request.seed < _SEEDS]:
        raise ValueError(
            f"the seed of an image is {others[0]}; allowed are {-_SEEDS} to {_SEEDS - 1}; change --seed, --seeds or "
            "--prompts-file"
        )
    return requests


def _numbered(lines: Sequence[Line], arguments: Namespace) -> Iterator[Request]:
    number = 0
    for line in lines:
        negative = arguments.negative if line.negative is None else line.negative
        for seed in line.seeds(number, arguments):
            yield Request(number, line.prompt, seed, line.label, negative)
            number += 1


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Requests in order, some at a time; those with a negative prompt apart from those without."""
    for _, alike in groupby(requests, key=lambda request: request.negative is None):
        part = list(alike)
        yield from (part[begin : begin + size] for begin in range(0, len(part), size))


def read_prompts(path: Path | None) -> list[Line]:
    """The lines of a UTF-8 file that are not empty.

    Raises:
        ValueError: if there is none, or one is not understood.
    """
    if path is None:
        return []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed is a UTF-8 text; change --prompts-file") from error
    lines = [_line(text.strip(), f"{path}:{number}") for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; allowed is one a line; change --prompts-file")
    return lines


def _line(text: str, where: str) -> Line:
    if not text.startswith("{"):
        return Line(text)
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{where} begins with a brace and is no JSON ({error}); allowed is one object a line, or plain text; "
            "change --prompts-file"
        ) from error
    wrong = [key for key, value in found.items() if key not in KEYS or type(value) is not KEYS[key]]
    if wrong or found.get("count", 1) < 1:
        key = wrong[0] if wrong else "count"
        allowed = ", ".join(f"{name} ({kind.__name__})" for name, kind in KEYS.items())
        raise ValueError(
            f"{where} has {key} {found[key]!r}; allowed are {allowed}, with a count from 1; change --prompts-file"
        )
    return Line(**found)


def check_conditions(conditioner: Conditioner, requests: Sequence[Request], arguments: Namespace) -> None:
    """Raises ValueError if the model is conditioned on what was not given, or not on what was."""
    kinds = {type(part) for part in conditioner.modules()}
    for request in requests:
        if (LabelConditioner in kinds) != (request.label is not None):
            found = "the model takes no class"
            if request.label is None:
                found = f"no class is given to a class-conditional model for image {request.number}"
            raise ValueError(f"{found}; allowed is --label with models that were trained on classes; change --label")
    if (SemanticMapConditioner in kinds) != (arguments.segmentation is not None):
        found = "is conditioned on semantic maps and none is given"
        if arguments.segmentation is not None:
            found = "takes no semantic map"
        raise ValueError(
            f"the model {found}; allowed is --segmentation with models that were trained on maps; change --segmentation"
        )
    if {DegradedImageConditioner, MaskConditioner} & kinds and arguments.image is None:
        raise ValueError(
            "the model is conditioned on an image; allowed is one to degrade or to fill; give --image, with "
            "--strength 1 or --mask"
        )
    for prompt in dict.fromkeys(text for request in requests for text in (request.prompt, request.negative) if text):
        refuse_if_cut(conditioner, prompt, "--prompt")
