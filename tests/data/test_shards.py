import io
import os
import pickle
import tarfile

import pytest

from ldm_train.data import ShardReader, ShardReadError, scan_shard
from tests.data.conftest import write_tar

MEMBERS = [
    (f"{number:05d}.{end}", bytes([65 + number]) * (37 * number)) for number in range(8) for end in ("png", "txt")
]


def read_back(path):
    members, damage = scan_shard(path)
    data = path.read_bytes()
    return [(name, data[offset : offset + size]) for name, offset, size in members], damage


def header_offsets(path):
    with tarfile.open(path) as tar:
        return [info.offset for info in tar]


def longest_name(kind):
    return {tarfile.USTAR_FORMAT: "d" * 90 + "/" + "f" * 90 + ".txt"}.get(kind, "ü/" * 150 + "n" * 120 + ".txt")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_equals_tarfile(tmp_path, kind):
    members = [*MEMBERS[:3], (longest_name(kind), b"long"), *MEMBERS[3:]]
    path = write_tar(tmp_path / "a.tar", members, kind)
    assert read_back(path) == (members, [])


def test_folders_links_and_leading_dots(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("./folder/a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    members, damage = read_back(path)
    assert members == [("folder/a.png", b"abc")]
    assert [line.partition(" is ")[0] for line in damage] == ["member link.png", "member hard.png"]


@pytest.mark.parametrize("harm", ["zeroed", "flipped"])
def test_a_bad_header_loses_its_own_member_and_no_other(tmp_path, harm):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    whole = path.read_bytes()
    for lost, offset in enumerate(header_offsets(path)):
        for byte in (0, 130, 150, 300, 511) if harm == "flipped" else [0]:
            data = bytearray(whole)
            if harm == "zeroed":
                data[offset : offset + 512] = bytes(512)
            else:
                data[offset + byte] ^= 0x15
            path.write_bytes(data)
            members, damage = read_back(path)
            assert members == MEMBERS[:lost] + MEMBERS[lost + 1 :], (lost, byte)
            assert len(damage) == 1
            assert f"byte {offset}" in damage[0]


def test_a_cut_shard_keeps_what_is_whole_and_says_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    whole = path.read_bytes()
    ends = [offset + size for _, offset, size in scan_shard(path)[0]]
    for length in range(0, ends[-1] + 1, 61):
        path.write_bytes(whole[:length])
        members, damage = read_back(path)
        kept = sum(
            end <= length and header + 512 <= length for end, header in zip(ends, header_offsets_of(ends), strict=True)
        )
        assert members == MEMBERS[:kept], length
        assert damage, length


def header_offsets_of(ends):
    return [end - len(data) - 512 for end, (_, data) in zip(ends, MEMBERS, strict=True)]


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"99999999999\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"0x10\0" + bytes(7)]
)
def test_hostile_sizes_end(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    data = bytearray(path.read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    members, damage = read_back(path)
    assert damage
    assert members == MEMBERS[1:]


def test_hostile_name_records_are_damage(tmp_path):
    for record in (b"0 path=x\n", b"-5 path=x\n", b"x path=y\n", b"path"):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            info = tarfile.TarInfo("extra")
            info.type, info.size = tarfile.XHDTYPE, len(record)
            tar.addfile(info, io.BytesIO(record))
        with open(path, "r+b") as file:
            file.truncate(1024)
            file.seek(1024)
            file.write(write_tar(tmp_path / "b.tar", MEMBERS).read_bytes())
        members, damage = read_back(path)
        assert members == MEMBERS
        assert "name record" in damage[0]


def test_reader_returns_the_members_in_any_process(tmp_path):
    paths = tuple(str(write_tar(tmp_path / f"{n}.tar", [(f"{n}.txt", f"shard {n}".encode())])) for n in range(5))
    reader = ShardReader(paths, max_open=2)
    places = [scan_shard(path)[0][0] for path in paths]
    before = len(os.listdir("/proc/self/fd"))
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        for shard in (0, 1, 2, 3, 4, 0, 4):
            assert copy.read(shard, *places[shard][1:]) == f"shard {shard}".encode()
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read(3, *places[3][1:]) == b"shard 3" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_failed_reads_are_tried_again_and_then_fatal(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"text")])
    (_, offset, size) = scan_shard(path)[0][0]
    failures = [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]
    real = os.pread

    def unreliable(*arguments):
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(os, "pread", unreliable)
    reader = ShardReader((str(path),), attempts=3, delay=0.0)
    assert reader.read(0, offset, size) == b"text"
    failures[:] = [OSError(5, "Input/output error")] * 3
    with pytest.raises(ShardReadError, match=r"3 attempts: .*Input/output.*`data.shards`"):
        reader.read(0, offset, size)
    with pytest.raises(ShardReadError, match="shorter than when indexed"):
        reader.read(0, offset, 10**6)
