"""Shards whose members nobody should write: hostile names, sizes, kinds, records, images, captions, metadata.

The cases have the form of `tests.data.damaged`, and like those are functions of (kind, number).
"""

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from PIL import Image

from tests.data.conftest import encode
from tests.data.damaged import BLOCK, FORMATS, Case, Entry, key_of, located, moved, pixels, sample_of, tar_of, truths

NAMES = (
    "../../etc/passwd", "/etc/shadow", "a/../../b", "//double", "tr\nap", "tab\tkey", "-rf *", "$(touch pwned)", "%s%n",
    "pipe:cat x", "s3://bucket/x", "con", "~/x", "a" * 99, "b/" * 60 + "c", "d" * 5000, "\u202eevil", "\ud83d\ude00",
    "\udcff\udcfe", "e\u0301", "\x7f", "'\"", "\\x", " ", "nul\x00byte", "__key__", "0" * 300,
)  # fmt: skip
SIZES = (
    b"-0000001000\0", b"77777777777\0", b"99999999999\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"0x10\0" + bytes(7),
    b"\x80" + bytes(3) + (2**63 - 1).to_bytes(8, "big"), b"\x80" + bytes(3) + (2**63 - 512).to_bytes(8, "big"),
    b"\x80" + bytes(3) + (2**31).to_bytes(8, "big"), bytes(12), b" " * 12, b"00000000001\0", b"00000001000\0",
    b"00000007777\0", b"+0000001000\0", b"0000_000100\0", b"\xb2\xb3" * 6,
)  # fmt: skip
KINDS = (b"1", b"2", b"3", b"4", b"6", b"S", b"M", b"Z", b"V")
RECORDS = (
    b"0 path=x\n", b"-9 path=x\n", b"x path=y\n", b"path", b"", b"12 path", b"99 path=z.png\n", b"13 path=z.pn\n",
    b"9" * 5000 + b" path=x\n", b"10 path=\n", b"20 size=99999999999\n", b"30 GNU.sparse.name=000000.png\n",
    b"27 GNU.sparse.realsize=100\n", b"\xff\xfe 9", b"16 path=\x00\x00\x00\x00\x00\x00\x00\n", b" " * 600,
    b"18 path=../../up\n\n", b"1 \n" * 200, b"11 mtime=x\n" * 3000,
)  # fmt: skip


def _header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _signed(header: bytes) -> bytes:
    """The header with its right checksum."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + f"{sum(blank):06o}\0 ".encode() + blank[156:]


def _samples(rng: np.random.Generator, count: int = 4) -> list[Entry]:
    return [entry for number in range(count) for entry in sample_of(f"{number:06d}", rng, int(rng.integers(3)))]


def _case(rng: np.random.Generator, entries: list[Entry], sound: Iterable[Entry], *suffer: str, kind: int = -1) -> Case:
    """A tar of all `entries` that should hold the samples of the `sound` ones, of which some may suffer."""
    kind = FORMATS[rng.integers(3)] if kind < 0 else kind
    return Case(tar_of(entries, kind), truths(sound), frozenset(suffer), frozenset(suffer))


def _key(rng: np.random.Generator) -> str:
    return f"{rng.integers(4):06d}"


def twice(rng: np.random.Generator) -> Case:
    """A member comes again, here or far away, the same or another."""
    entries, key = _samples(rng), _key(rng)
    own = [entry for entry in entries if key_of(entry.name) == key]
    again = own[rng.integers(len(own))]
    if rng.integers(2):
        again = replace(again, data=rng.bytes(100))
    added = entries.copy()
    added.insert(rng.integers(len(entries) + 1), again)
    return _case(rng, added, entries, key)


def missing(rng: np.random.Generator) -> Case:
    """A member of a sample is not there."""
    entries = _samples(rng)
    gone = rng.integers(len(entries))
    return _case(rng, entries[:gone] + entries[gone + 1 :], entries, key_of(entries[gone].name))


def apart(rng: np.random.Generator) -> Case:
    """Members in any order, extensions in any case, in folders: nothing may be lost."""
    entries = _samples(rng) + [entry for folder in ("a/", "b/", "A/") for entry in sample_of(f"{folder}000001", rng)]
    entries = [replace(e, name=e.name[:-3] + e.name[-3:].upper() if rng.integers(2) else e.name) for e in entries]
    return _case(rng, [entries[i] for i in rng.permutation(len(entries))], entries)


def strange_names(rng: np.random.Generator) -> Case:
    """Names that would do harm as paths, commands or text: keys like any other, or named as damage."""
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:3]]
    entries = _samples(rng, 2)
    for name in names:
        entries += sample_of(name, rng)
    order = rng.permutation(len(entries))
    # Only pax records hold any name whatever; others would be cut by the writer, not by the reader.
    buffer = b"".join(_pax_member(entries[i]) for i in order) + bytes(1024)
    found = {_readable(key): truth for key, truth in truths(entries).items()}
    return Case(buffer, found)


def _readable(key: str) -> str:
    return key.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace").removeprefix("./")


def _pax_member(entry: Entry) -> bytes:
    value = entry.name.encode("utf-8", "surrogatepass")
    length = len(value) + 7
    while len(f"{length} path=") + len(value) + 1 != length:
        length = len(f"{length} path=") + len(value) + 1
    record = f"{length} path=".encode() + value + b"\n"
    parts = [_header("pax", b"x", len(record)), record, bytes(-len(record) % BLOCK)]
    return b"".join([*parts, _header("member", b"0", len(entry.data)), entry.data, bytes(-len(entry.data) % BLOCK)])


def dotted_keys(rng: np.random.Generator) -> Case:
    """Keys with dots are no keys; whoever wrote them must hear of it."""
    entries, dotted = _samples(rng, 2), sample_of(f"photo.v{rng.integers(9)}", rng)
    dotted = dotted if rng.integers(2) else [replace(entry, name=f"folder.1/{entry.name}") for entry in dotted]
    key = dotted[0].name.rpartition(".")[0]
    case = _case(rng, entries + dotted, entries)
    suffers = frozenset({key})
    return replace(case, samples=case.samples | {key: next(iter(truths(dotted).values()))}, losable=suffers)


def other_kinds(rng: np.random.Generator) -> Case:
    """Links, devices, pipes, sparse and unknown kinds in the place of files: one member of a sample, or all."""
    entries, key, kind = _samples(rng), _key(rng), KINDS[rng.integers(len(KINDS))]
    own = [i for i, entry in enumerate(entries) if key_of(entry.name) == key]
    made = entries.copy()
    for i in own if rng.integers(2) else [own[rng.integers(len(own))]]:
        if kind in b"12346":  # some writers give links the size of the file
            made[i] = replace(entries[i], kind=kind, data=b"", size=int(rng.integers(2)) * len(entries[i].data))
        else:
            made[i] = replace(entries[i], kind=kind)
    return _case(rng, made, entries, key, kind=FORMATS[rng.integers(2)])


def forged_sizes(rng: np.random.Generator) -> Case:
    """A header with a right checksum and a hostile size, which may swallow what follows: only a count can tell."""
    entries = _samples(rng)
    data = bytearray(tar_of(entries, FORMATS[0]))
    samples = located(bytes(data), truths(entries))
    truth = samples[key := _key(rng)]
    place = truth.headers[rng.integers(len(truth.headers))][1]
    size = SIZES[rng.integers(len(SIZES))] if rng.integers(2) else f"{rng.integers(20000):011o}\0".encode()
    data[place : place + BLOCK] = _signed(bytes(data[place : place + 124] + size + data[place + 136 : place + BLOCK]))
    return Case(bytes(data), samples, frozenset({key}), frozenset(samples), is_counted=True)


def hostile_records(rng: np.random.Generator) -> Case:
    """A name record of nonsense before a member, or a hundred of them."""
    entries, key = _samples(rng), _key(rng)
    record = RECORDS[rng.integers(len(RECORDS))]
    size = [len(record), len(record), 1 << 30, 0][rng.integers(4)]
    extra = _header("record", b"xLgK"[(i := rng.integers(4)) : i + 1], size) + record + bytes(-len(record) % BLOCK)
    extra *= int([1, 1, 100][rng.integers(3)])
    data = tar_of(entries, FORMATS[0])
    samples = located(data, truths(entries))
    place = samples[key].headers[rng.integers(3)][0]
    return Case(data[:place] + extra + data[place:], samples, frozenset({key}), frozenset({key}), None)


def nested(rng: np.random.Generator) -> Case:
    """An image that is a tar of samples, or ends with one: what is in it is data."""
    entries, key = _samples(rng), _key(rng)
    inner = tar_of([e for number in range(9) for e in sample_of(f"inner{number}", rng)])
    made = entries.copy()
    i = next(i for i, entry in enumerate(entries) if key_of(entry.name) == key)
    if rng.integers(2):
        whole = entries[i].data + bytes(-len(entries[i].data) % BLOCK) + inner
        made[i] = replace(entries[i], data=whole)
        return _case(rng, made, made, *([] if entries[i].name.endswith("png") else [key]))
    made[i] = replace(entries[i], data=inner)
    return _case(rng, made, entries, key)


def _png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [head, *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _jpeg(rng: np.random.Generator, **options: object) -> bytes:
    return encode(pixels(rng), "JPEG", **options)


IMAGES: tuple[Callable[[np.random.Generator], bytes], ...] = (
    lambda rng: _png(100_000, 100_000),
    lambda rng: _png(2**31 - 1, 2**31 - 1),
    lambda rng: _png(0, 0),
    lambda rng: _png(0, 8),
    lambda rng: _png(1024, 1024, rows=bytes(1024 * 3073)),  # within max_pixels: 3 MB of pixels from 3 kB
    lambda rng: _png(8, 8, rows=bytes(1 << 24)),
    lambda rng: _png(8, 8, rows=b"short"),
    lambda rng: _png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 24))), rows=bytes(8 * 25)),
    lambda rng: _png(8, 8, (b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 24))), rows=bytes(8 * 25)),
    lambda rng: _png(8, 8, (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(1 << 24))), rows=bytes(8 * 25)),
    lambda rng: _png(8, 8, (b"acTL", b"\xff" * 8), rows=bytes(8 * 25)),
    lambda rng: _png(8, 8, (b"tRNS", b"\0"), rows=bytes(8 * 25)),
    lambda rng: _png(8, 8, (b"eXIf", rng.bytes(64)), rows=bytes(8 * 25)),
    lambda rng: b"",
    lambda rng: rng.bytes(500),
    lambda rng: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
    lambda rng: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    lambda rng: b"%PDF-1.4",
    lambda rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
    lambda rng: encode(pixels(rng), "GIF"),
    lambda rng: encode(pixels(rng), "TIFF"),
    lambda rng: encode(pixels(rng), "BMP"),
    lambda rng: encode(pixels(rng), "PNG")[:-20],
    lambda rng: (lambda d: d[: rng.integers(20, len(d))])(_jpeg(rng)),
    lambda rng: _jpeg(rng).replace(b"\x00\x08\x00\x08", b"\xff\xff\xff\xff"),  # 65535 x 65535
    lambda rng: _jpeg(rng).replace(b"\x00\x08\x00\x08", b"\x00\x00\x00\x08"),
    lambda rng: _jpeg(rng, exif=b"Exif\0\0" + rng.bytes(80)),
    lambda rng: _jpeg(rng, exif=b"Exif\0\0II*\0\x08\0\0\0" + b"\x12\x01" * 200),
    lambda rng: b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff" * 6,
    lambda rng: (lambda d: d[: rng.integers(12, len(d))])(encode(pixels(rng), "WEBP")),
    lambda rng: encode(Image.new("CMYK", (8, 8)), "JPEG"),
    lambda rng: encode(Image.new("I;16", (8, 8)), "PNG"),
    lambda rng: encode(Image.new("1", (1, 700)), "PNG"),
)


def bombs(rng: np.random.Generator) -> Case:
    """Images that claim to be huge, swell when unpacked, or are none."""
    entries, key = _samples(rng), _key(rng)
    i = next(i for i, entry in enumerate(entries) if key_of(entry.name) == key)
    made = entries.copy()
    made[i] = replace(entries[i], data=IMAGES[rng.integers(len(IMAGES))](rng))
    return _case(rng, made, entries, key)


CAPTIONS = (
    b"\xff\xfe\xfa", b"", bytes(1000), b"x" * (2 << 20), "\u202e\u0000".encode(), b"\xed\xa0\x80", b"\xc0\x80",
    b"\n" * 99, b"\xef\xbb\xbfmark",
)  # fmt: skip


def captions(rng: np.random.Generator) -> Case:
    """Captions that are no text, or far too much of it."""
    entries, key = _samples(rng), _key(rng)
    caption = CAPTIONS[rng.integers(len(CAPTIONS))]
    made = [replace(e, data=caption) if e.name == f"{key}.txt" else e for e in entries]
    return _case(rng, made, entries, key)


METADATA = (
    b"[" * 100_000, b'{"a":' * 100_000, b'{"text": ' + b"9" * 10_000 + b"}", b'{"text": 1e999}', b'{"text": NaN}',
    b'{"text": null}', b'{"text": ["x"]}', b"{}", b"[]", b"", b"\xff\xfe{", b'{"text": "\\ud800"}',
    b'{"text": "a" "b"}', b'{"text": "\xff"}', '{"text": "x"}'.encode("utf-16"), b'{"text": "a", "text": 5}', b'"text"',
    b'{"text": "x"',
    b'{"text": "' + b"x" * (17 << 20) + b'"}', b"nan", b"-", b"\0" * 50,
)  # fmt: skip


def metadata(rng: np.random.Generator) -> Case:
    """JSON that is deep, huge, of other types, or none; the caption is read from it."""
    entries, key = _samples(rng), _key(rng)
    hostile = METADATA[rng.integers(len(METADATA))]
    made = [replace(e, data=hostile) if e.name == f"{key}.json" else e for e in entries]
    return _case(rng, made, entries, key)


def no_tar(rng: np.random.Generator) -> Case:
    """Files that are no tar, and a tar behind other bytes."""
    entries = _samples(rng)
    data = tar_of(entries)
    samples, zipped = located(data, truths(entries)), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("000000.png", data)
    files = (b"", gzip.compress(data), zipped.getvalue(), rng.bytes(5000), bytes(30_000), b"text\n" * 999, data[:100],
             json.dumps({"shard": 1}).encode(), encode(pixels(rng)), rng.bytes(700) + data, data + data)  # fmt: skip
    index = rng.integers(len(files) + 1)
    if index == len(files):
        return Case(rng.bytes(3 * BLOCK) + data, moved(samples, 0, 3 * BLOCK))
    return Case(files[index], samples, frozenset(), frozenset(samples))


MEMBERS: dict[Callable[[np.random.Generator], Case], int] = {
    twice: 80,
    missing: 60,
    apart: 40,
    strange_names: 80,
    dotted_keys: 20,
    other_kinds: 80,
    forged_sizes: 150,
    hostile_records: 120,
    nested: 40,
    bombs: 120,
    captions: 40,
    no_tar: 40,
}
"""How many cases of each kind; `metadata` reads captions from the json."""
METADATA_CASES = 60
