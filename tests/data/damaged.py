"""Damaged shards, each with what is known about it: which samples were in it, and which of them may suffer.

A case is a function of (kind, number): a seeded generator draws the shard, the place and the harm. Kinds come in two
families. *Bytes*: a whole shard of which bytes are flipped, zeroed, overwritten, cut off, taken out or put in; only
samples that own a harmed byte may suffer, for a header's damage must not spread. *Members*: a well-formed shard with
members that nobody should write.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from tests.data.conftest import encode

BLOCK = 512
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS_OF_IMAGE = (("png", "PNG", {}), ("jpg", "JPEG", {"quality": 95}), ("webp", "WEBP", {"lossless": True}))
EVERYTHING = 1 << 62
Range = tuple[int, int]


@dataclass(frozen=True)
class Truth:
    """A sample that is in the shard.

    Attributes:
        image: the encoded image.
        caption: the text.
        headers: for each member the (first, last) offset of its headers: a name record's, if any, and its own.
        own: the bytes that say what the sample is: headers, names, data.
    """

    image: bytes
    caption: str
    headers: tuple[Range, ...] = ()
    own: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Case:
    """A damaged shard.

    Attributes:
        data: its bytes.
        samples: key -> what was in the shard before it was damaged.
        changed: keys of samples that may be delivered changed.
        losable: keys of samples that may be lost, if it is said.
        added: keys that the damage itself may make; None: any.
        is_counted: a stats file says how many samples there should be.
    """

    data: bytes
    samples: dict[str, Truth]
    changed: frozenset[str] = frozenset()
    losable: frozenset[str] = frozenset()
    added: frozenset[str] | None = frozenset()
    is_counted: bool = False


@dataclass
class Entry:
    """A member to write."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    size: int | None = None
    pax: dict[str, str] = field(default_factory=dict)


def key_of(name: str) -> str:
    """The key by the rule of WebDataset: all up to the first dot of the file's name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    return folder + slash + file.partition(".")[0]


def tar_of(entries: Iterable[Entry], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of the entries, also of those that `tarfile` would not read."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.pax_headers = entry.kind, entry.pax
            info.size = len(entry.data) if entry.size is None else entry.size
            info.linkname = "/etc/passwd" if entry.kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            header = info.tobuf(kind, "utf-8", "surrogateescape")
            tar.fileobj.write(header + entry.data + bytes(-len(entry.data) % BLOCK))
            tar.offset += len(header) + len(entry.data) + -len(entry.data) % BLOCK
    return buffer.getvalue()


def pixels(rng: np.random.Generator) -> np.ndarray:
    """(8, 8, 3) noise, so that no two images are alike."""
    return rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)


def sample_of(key: str, rng: np.random.Generator, image_kind: int = 0) -> list[Entry]:
    """The members of a whole sample."""
    extension, codec, options = KINDS_OF_IMAGE[image_kind]
    caption = f"{rng.integers(1 << 40)} {'x' * int(rng.integers(900))}"
    return [
        Entry(f"{key}.{extension}", encode(pixels(rng), codec, **options)),
        Entry(f"{key}.json", json.dumps({"text": caption, "key": key}).encode()),
        Entry(f"{key}.txt", caption.encode()),
    ]


def truths(entries: Iterable[Entry]) -> dict[str, Truth]:
    """What a reader should find among the entries: every key with an image and a caption."""
    found: dict[str, dict[str, bytes]] = {}
    for entry in entries:
        found.setdefault(key_of(entry.name), {})[entry.name.rpartition(".")[2].lower()] = entry.data
    return {
        key: Truth(next(parts[end] for end in ("png", "jpg", "webp") if end in parts), parts["txt"].decode().strip())
        for key, parts in found.items()
        if "txt" in parts and parts.keys() & {"png", "jpg", "webp"}
    }


def located(data: bytes, samples: dict[str, Truth]) -> dict[str, Truth]:
    """The samples with their places in a well-formed tar."""
    headers: dict[str, list[Range]] = {key: [] for key in samples}
    own: dict[str, list[Range]] = {key: [] for key in samples}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            headers[key_of(info.name)].append((info.offset, info.offset_data - BLOCK))
            own[key_of(info.name)].append((info.offset, info.offset_data + info.size))
    return {key: replace(truth, headers=tuple(headers[key]), own=tuple(own[key])) for key, truth in samples.items()}


def whole(rng: np.random.Generator, count: int = 5) -> tuple[bytes, dict[str, Truth]]:
    """A shard without damage: of any tar format and image codec, some names long, some not ASCII."""
    kind, image_kind = FORMATS[rng.integers(3)], int(rng.integers(3))
    keys = [f"{number:06d}" for number in range(count)]
    if kind != tarfile.USTAR_FORMAT:
        keys[1] = "d" * 90 + "/" + "long" * 20
        keys[3] = "ключ/" + "ü" * int(rng.integers(1, 80))
    entries = [entry for key in keys for entry in sample_of(key, rng, image_kind)]
    data = tar_of(entries, kind)
    return data, located(data, truths(entries))


def overlapping(samples: dict[str, Truth], harmed: list[Range]) -> frozenset[str]:
    """Keys of the samples that own a harmed byte."""
    return frozenset(
        key
        for key, truth in samples.items()
        if any(begin < until and start < end for begin, end in truth.own for start, until in harmed)
    )


def names_hit(samples: dict[str, Truth], harmed: list[Range]) -> bool:
    """Whether a name record, which no checksum protects, was harmed."""
    records = [(first, last) for truth in samples.values() for first, last in truth.headers if first != last]
    return any(begin < until and start < end for begin, end in records for start, until in harmed)


def harmed_case(before: bytes, after: bytes, samples: dict[str, Truth], harmed: list[Range]) -> Case:
    """A case of overwritten bytes."""
    hit = frozenset(key for key, truth in samples.items() if any(before[a:b] != after[a:b] for a, b in truth.own))
    return Case(after, samples, hit, hit, None if names_hit(samples, harmed) else frozenset())


# Bytes


def flipped(rng: np.random.Generator) -> Case:
    """One to three bits anywhere."""
    data, samples = whole(rng)
    after, harmed = bytearray(data), []
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(data)))
        after[place] ^= 1 << int(rng.integers(8))
        harmed.append((place, place + 1))
    return harmed_case(data, bytes(after), samples, harmed)


def flipped_in_header(rng: np.random.Generator) -> Case:
    """Bits in headers and name records, most often in the size and the checksum."""
    data, samples = whole(rng)
    after, harmed = bytearray(data), []
    headers = [header for truth in samples.values() for header in truth.headers]
    for _ in range(rng.integers(1, 3)):
        first, last = headers[rng.integers(len(headers))]
        low, high = [(0, 100), (124, 136), (148, 157), (0, BLOCK), (0, last - first + BLOCK)][rng.integers(5)]
        place = first + int(rng.integers(low, high))
        after[place] ^= 1 << int(rng.integers(8))
        harmed.append((place, place + 1))
    return harmed_case(data, bytes(after), samples, harmed)


def flipped_in_name_record(rng: np.random.Generator) -> Case:
    """Bits in pax and GNU name records."""
    while True:
        data, samples = whole(rng)
        records = [header for truth in samples.values() for header in truth.headers if header[0] != header[1]]
        if records:
            first, last = records[rng.integers(len(records))]
            after = bytearray(data)
            place = int(rng.integers(first + BLOCK, last))
            after[place] ^= 1 << int(rng.integers(8))
            return harmed_case(data, bytes(after), samples, [(place, place + 1)])


def zeroed_headers(rng: np.random.Generator) -> Case:
    """Whole headers gone."""
    data, samples = whole(rng)
    after, harmed = bytearray(data), []
    headers = [header for truth in samples.values() for header in truth.headers]
    for index in rng.permutation(len(headers))[: rng.integers(1, 5)]:
        place = headers[index][rng.integers(2)]
        after[place : place + BLOCK] = bytes(BLOCK)
        harmed.append((place, place + BLOCK))
    return harmed_case(data, bytes(after), samples, harmed)


def overwritten(rng: np.random.Generator) -> Case:
    """A stretch of zeros or noise: a lost write, a bad disk."""
    data, samples = whole(rng)
    begin = int(rng.integers(len(data)))
    end = int(min(len(data), begin + rng.integers(1, [700, 6000, 60000][rng.integers(3)])))
    filler = bytes(end - begin) if rng.integers(2) else rng.bytes(end - begin)
    case = harmed_case(data, data[:begin] + filler + data[end:], samples, [(begin, end)])
    return replace(case, is_counted=True)  # zeros up to the end can leave a sound, shorter archive


def zeroed_tail(rng: np.random.Generator) -> Case:
    """Zeros from some byte on: the file system gave the file its length and lost its content."""
    data, samples = whole(rng, count=10)
    begin = int(rng.integers(len(data)))
    case = harmed_case(data, data[:begin] + bytes(len(data) - begin), samples, [(begin, len(data))])
    return replace(case, is_counted=True)


def cut(rng: np.random.Generator) -> Case:
    """The file ends at any byte."""
    data, samples = whole(rng)
    length = int(rng.integers(len(data)))
    hit = overlapping(samples, [(length, EVERYTHING)])
    return Case(data[:length], samples, frozenset(), hit, None if names_hit(samples, [(length, length + 1)]) else hit)


def moved(samples: dict[str, Truth], place: int, shift: int) -> dict[str, Truth]:
    """The samples where everything from byte `place` on lies `shift` bytes further."""

    def move(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        return tuple((a + shift * (a >= place), b + shift * (b >= place)) for a, b in ranges)

    return {key: replace(truth, headers=move(truth.headers), own=move(truth.own)) for key, truth in samples.items()}


def claimed_until(before: bytes, after: bytes, samples: dict[str, Truth], place: int) -> int:
    """Where the member or name record around a byte ends by its header; the byte itself if no header claims it."""
    for truth in samples.values():
        for (first, last), (_, end) in zip(truth.headers, truth.own, strict=True):
            for start, stop in ((first, last), (last, end + -end % BLOCK)):
                is_sound = before[start : start + BLOCK] == after[start : start + BLOCK]
                if start <= place < stop and is_sound:
                    return stop
    return place


def taken_out(rng: np.random.Generator) -> Case:
    """Bytes are missing in the middle: all headers behind may be off the grid of 512, and are lost."""
    data, samples = whole(rng)
    begin = int(rng.integers(len(data) - 1))
    count = int(rng.integers(1, 2000)) if rng.integers(2) else BLOCK * int(rng.integers(1, 5))
    end = min(len(data), begin + count)
    rest = data[:begin] + data[end:]
    # By its header the member that lost data still has them all: it swallows what now lies there, whole headers where
    # blocks are lost. No reader may take them for headers again, for the data of a member may be a tar.
    swallowed = claimed_until(data, rest, samples, begin) + end - begin
    hit, behind = (overlapping(samples, [(begin, until)]) for until in (end, EVERYTHING))
    added = None if names_hit(samples, [(begin, swallowed)]) else frozenset()
    is_on_grid = (end - begin) % BLOCK == 0
    after = moved(samples, end, begin - end)
    losable = overlapping(samples, [(begin, swallowed)]) if is_on_grid else behind
    return Case(rest, after, hit, losable, added, is_counted=True)


def put_in(rng: np.random.Generator) -> Case:
    """Bytes too many in the middle."""
    data, samples = whole(rng)
    place = int(rng.integers(len(data)))
    count = int(rng.integers(1, 2000)) if rng.integers(2) else BLOCK * int(rng.integers(1, 5))
    hit, behind = (overlapping(samples, [(place, until)]) for until in (place + 1, EVERYTHING))
    added = None if names_hit(samples, [(place, place + 1)]) else frozenset()
    after = moved(samples, place, count)
    return Case(
        data[:place] + rng.bytes(count) + data[place:], after, hit, hit if count % BLOCK == 0 else behind, added
    )


BYTES: dict[Callable[[np.random.Generator], Case], int] = {
    flipped: 400,
    flipped_in_header: 300,
    flipped_in_name_record: 150,
    zeroed_headers: 150,
    overwritten: 200,
    zeroed_tail: 100,
    cut: 300,
    taken_out: 100,
    put_in: 100,
}
"""How many cases of each kind."""
