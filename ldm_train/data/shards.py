"""Shards as bytes: what the headers of a tar say, and members read by their offset.

A tar is a chain: a 512-byte header holding a member's name and size, the data padded to 512 bytes, the next header;
two zero blocks end it. Reading headers alone lists a shard without touching its images. Readers that stream a tar lose
everything behind the first bad header without a word; here each header's checksum is verified, the chain is picked up
again at the next good header, and everything that was lost is named.

Formats: POSIX.1-1988 (ustar), POSIX.1-2001 (pax `path` records), GNU tar (long names, base-256 sizes).
"""

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_train.data.locations import shown
from ldm_train.data.storage import LOCAL_FILES, ShardReadError, Storage

_BLOCK = 512
_READ_AHEAD = 4096  # one read usually covers the headers of a caption, its metadata and the next image
_CHAIN = 1024  # headers followed before their checksums are verified together
_SCAN = 1 << 20
_MAX_NAME_RECORD = 1 << 16
_REGULAR = (b"0", b"\0", b"7")
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: no data follow, whatever size they say
_SILENT = (b"5", b"g", b"K")  # folders and what describes other members
_LABEL = b"V"  # names a volume, and has no data (GNU)
_LONGEST_END = 1024 + 10240  # the mark, and what fills the last record of twenty blocks
_CHECKSUM = slice(148, 156)


class Member(NamedTuple):
    """A file in a shard: its data are `size` bytes from byte `offset` on."""

    name: str
    offset: int
    size: int


def _number(field: bytes) -> int:
    """A header's number: octal digits, or base 256 behind a set top bit (GNU); ValueError if it is neither."""
    if field[:1] >= b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits and not digits.isdigit():  # int() would also take a sign, and a negative size never ends the chain
        raise ValueError(f"not a number: {field!r}")
    return int(digits or b"0", 8)


def _checksums(blocks: np.ndarray) -> np.ndarray:
    """The sum of each 512-byte block with the eight bytes of the checksum itself counted as blanks."""
    fields = blocks[:, _CHECKSUM].sum(axis=1, dtype=np.int64)
    return blocks.sum(axis=1, dtype=np.int64) - fields + 8 * ord(" ")


def _stored_checksum(header: bytes) -> int:
    try:
        return _number(header[_CHECKSUM])
    except ValueError:
        return -1


def _follow(fd: int, offset: int, file_size: int) -> tuple[list[tuple[int, bytes]], int]:
    """Headers of the chain from `offset`, taken at their word, and where the chain stands after them."""
    headers: list[tuple[int, bytes]] = []
    buffer, start = b"", offset
    while len(headers) < _CHAIN:
        header = buffer[offset - start : offset - start + _BLOCK]
        if len(header) < _BLOCK:
            buffer, start = os.pread(fd, _READ_AHEAD, offset), offset
            header = buffer[:_BLOCK]
        try:
            size = 0 if header[156:157] in _EMPTY else _number(header[124:136])
        except ValueError:
            break
        if len(header) < _BLOCK or not header.rstrip(b"\0"):
            break
        headers.append((offset, header))
        offset += _BLOCK
        if offset + size <= file_size:  # a size beyond the file says nothing about where the next header is
            offset += size + -size % _BLOCK
    return headers, offset


def _count_valid(headers: list[tuple[int, bytes]]) -> int:
    """How many of the headers come before the first with a wrong checksum."""
    if not headers:
        return 0
    blocks = np.frombuffer(b"".join(header for _, header in headers), np.uint8).reshape(-1, _BLOCK)
    wrong = _checksums(blocks) != [_stored_checksum(header) for _, header in headers]
    return int(wrong.argmax()) if wrong.any() else len(headers)


def _next_header(fd: int, offset: int) -> int | None:
    """The first block from `offset` on that is a header with a right checksum."""
    while data := os.pread(fd, _SCAN, offset):
        blocks = np.frombuffer(data[: len(data) // _BLOCK * _BLOCK], np.uint8).reshape(-1, _BLOCK)
        field = blocks[:, _CHECKSUM]
        digits = (((field >= ord("0")) & (field <= ord("7"))) | (field == ord(" ")) | (field == 0)).all(axis=1)
        for block in np.flatnonzero(digits & blocks.any(axis=1)):
            if _stored_checksum(blocks[block].tobytes()) == _checksums(blocks[block : block + 1])[0]:
                return offset + int(block) * _BLOCK
        offset += _SCAN
    return None


def _is_padding(fd: int, offset: int) -> bool:
    """Whether nothing but zeros follows: two blocks of them end a tar, and writers often add more."""
    while data := os.pread(fd, _SCAN, offset):
        if data.strip(b"\0"):
            return False
        offset += _SCAN
    return True


def _headers(fd: int, size: int, damage: list[str]) -> list[tuple[int, bytes]]:
    """All valid headers of a tar with their offsets; what lies between two stretches of chain goes to `damage`."""
    headers: list[tuple[int, bytes]] = []
    offset = 0
    while offset < size:
        chain, after = _follow(fd, offset, size)
        valid = _count_valid(chain)
        headers += chain[:valid]
        if valid == _CHAIN:
            offset = after
            continue
        broken = chain[valid][0] if valid < len(chain) else after
        if broken >= size:
            break
        following = _next_header(fd, broken + _BLOCK)
        if following is None and _is_padding(fd, broken):
            if size - broken > _LONGEST_END:
                damage.append(f"nothing but zeros from byte {broken} to the end of the shard at byte {size}")
            return headers
        until = "the end of the shard" if following is None else f"byte {following}"
        damage.append(f"no header at byte {broken}: nothing could be read up to {until}")
        if following is None:
            return headers
        offset = following
    damage.append("no end-of-archive mark: the shard was probably cut")
    return headers


def _pax_path(data: bytes) -> str | None:
    """The `path` among the records of a pax header, which are lines `<length> <keyword>=<value>`."""
    path = None
    while data:
        length = int(data.partition(b" ")[0])
        keyword, _, value = data[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
        if length <= 0 or data[length - 1 : length] != b"\n":
            raise ValueError("a pax record of another length than it says")
        if keyword == b"path":
            path = _text(value)
        data = data[length:]
    return path


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace").removeprefix("./")


def _plain_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def scan_shard(path: str | Path, storage: Storage = LOCAL_FILES) -> tuple[list[Member], list[str]]:
    """List the files in a tar by its headers.

    Args:
        path: an uncompressed tar file: where the storage has it.
        storage: what opens it.

    Returns:
        The members that lie in the file as a whole, in their order, and a line for each damage that was found.
    """
    members: list[Member] = []
    damage: list[str] = []
    fd = storage.open(str(path))
    try:
        file_size = os.fstat(fd).st_size
        long_name: str | None = None
        named = -1  # where the header must lie that the long name belongs to
        for offset, header in _headers(fd, file_size, damage):
            kind, size, data = header[156:157], _number(header[124:136]), offset + _BLOCK
            if kind in (b"L", b"x"):
                long_name, named = _long_name(fd, kind, data, size, damage), data + size + -size % _BLOCK
                continue
            name, long_name = (long_name if offset == named else None) or _plain_name(header), None
            if kind in _REGULAR and data + size > file_size:
                damage.append(f"member {name} is cut by the end of the file")
            elif kind in _REGULAR:
                members.append(Member(name, data, size))
            elif kind not in _SILENT and (kind != _LABEL or size):
                damage.append(f"member {name} is a link, a device or of another kind ({kind!r}), and no file")
    finally:
        os.close(fd)
    return members, damage


def _long_name(fd: int, kind: bytes, offset: int, size: int, damage: list[str]) -> str | None:
    """The name that an extra header gives to the member after it."""
    data = os.pread(fd, min(size, _MAX_NAME_RECORD), offset)
    try:
        if len(data) < size:
            raise ValueError(f"{size} bytes of name")
        return _text(data.rstrip(b"\0")) if kind == b"L" else _pax_path(data)
    except ValueError as error:
        damage.append(f"unreadable name record at byte {offset}: {error}")
        return None


class ShardReader:
    """Reads members of many shards by offset; safe to copy into worker processes.

    File descriptors are opened on first use by the process that uses them. Those that were idle for a while are closed
    when another is opened, for a cache keeps what is open.
    A failed or short read is tried again on a fresh descriptor, for file servers recover; then it is fatal.

    Args:
        paths: the shards' locations, numbered as in the index.
        storage: what opens them.
        max_open: open files at a time.
        attempts: reads of a member before giving up.
        delay: seconds before the second attempt; doubles with each.
        idle: seconds without a read after which a file may be closed.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        storage: Storage = LOCAL_FILES,
        max_open: int = 64,
        attempts: int = 5,
        delay: float = 0.2,
        idle: float = 60.0,
    ) -> None:
        self.paths, self.storage, self.max_open, self.idle = paths, storage, max_open, idle
        self.attempts, self.delay = attempts, delay
        self._open: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._owner = os.getpid()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The `size` bytes from byte `offset` of shard number `shard`."""
        for attempt in range(self.attempts):
            try:
                data = os.pread(self._descriptor(shard), size, offset)
                if len(data) == size:
                    return data
                failure = OSError(
                    f"{len(data)} of {size} bytes at byte {offset}: the shard is shorter than when indexed"
                )
            except OSError as error:
                failure = error
            self._close(shard)
            if attempt + 1 < self.attempts:
                time.sleep(self.delay * 2**attempt)
        raise ShardReadError(
            f"{shown(self.paths[shard])} could not be read in {self.attempts} attempts: {failure}. A shard must stay "
            "readable and unchanged during a run: check the storage behind `data.shards`, then start the same command "
            "again."
        ) from failure

    def _descriptor(self, shard: int) -> int:
        if self._owner != os.getpid():  # after a fork the descriptors belong to the parent
            self._open, self._owner = OrderedDict(), os.getpid()
        if shard not in self._open:
            self._close_idle()
            self._open[shard] = self.storage.open(self.paths[shard]), 0.0
        fd = self._open[shard][0]
        self._open[shard] = fd, time.monotonic()
        self._open.move_to_end(shard)
        return fd

    def _close_idle(self) -> None:
        """Close what has not been read for long, and the longest unread if too many are open."""
        oldest = time.monotonic() - self.idle
        while self._open:
            shard, (_, last_read) = next(iter(self._open.items()))
            if last_read >= oldest and len(self._open) < self.max_open:
                return
            self._close(shard)

    def _close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard)[0])

    def close(self) -> None:
        """Close every file this process opened."""
        if self._owner == os.getpid():
            for shard in list(self._open):
                self._close(shard)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict(), "_owner": 0}
