"""`list_sources`: every member of a tar is a source, a source's sidecar, or refused."""

import io
import tarfile

import pytest

from ldm_train.data.sources import Blob, Source, UnusableSourceError, list_sources


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)


def test_members_are_read_where_they_lie(tmp_path):
    contents = {"1.jpg": b"one", "1.txt": b" first ", "1.json": b'{"a": 1}', "d/2.v1.png": b"two", "d/2.v1.txt": b"2"}
    write_tar(tmp_path / "00000.tar", contents.items())
    sources, refusals = list_sources(tmp_path, "image", None)
    read = [(s.name, s.image.read(), s.read_caption(s.read_metadata(), "caption"), s.read_metadata()) for s in sources]
    assert read == [("00000.tar/1.jpg", b"one", "first", {"a": 1}), ("00000.tar/d/2.v1.png", b"two", "2", {})]
    assert refusals == []


def test_hostile_tar_members_are_refused(tmp_path):
    members = [
        ("x.png", b"first"),
        ("x.png", b"second"),
        ("x.txt", b"caption"),
        ("y.png", (tarfile.SYMTYPE, "/etc/passwd")),
        ("z.png", (tarfile.FIFOTYPE, "")),
        ("bell\a.png", b"image"),
        ("bell\a.md", b"text"),
        ("folder", (tarfile.DIRTYPE, "")),
    ]
    write_tar(tmp_path / "00000.tar", members)
    sources, refusals = list_sources(tmp_path, "image", None)
    assert [(source.name, source.image.read()) for source in sources] == [("00000.tar/x.png", b"first")]
    assert dict(refusals) == {
        "00000.tar/x.png": "a second member of this name",
        "00000.tar/y.png": "not a plain file",
        "00000.tar/z.png": "not a plain file",
        r"'00000.tar/bell\x07.png'": "name has characters that cannot be printed",
        r"'00000.tar/bell\x07.md'": "name has characters that cannot be printed",
    }


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        (lambda data: data, 4),
        (lambda data: data[:2048] + b"\xff" * 12 + data[2060:], 2),  # the third member's header
        (lambda data: b"\xff" * 12 + data[12:], 0),
        (lambda data: data[:3072], 3),  # between two members
        (lambda data: data[:3072] + b"4.png", 3),
        (lambda data: b"", 0),
    ],
)
def test_tarfile_skips_damage_in_silence_but_we_do_not(tmp_path, spoil, kept):
    write_tar(tmp_path / "00000.tar", [(f"{i}.png", b"image") for i in range(4)])
    (tmp_path / "00000.tar").write_bytes(spoil((tmp_path / "00000.tar").read_bytes()))
    sources, refusals = list_sources(tmp_path, "image", None)
    assert [source.name for source in sources] == [f"00000.tar/{i}.png" for i in range(kept)]
    reported = [reason.startswith(f"damaged after {kept} members: ") for _, reason in refusals]
    assert reported == ([True] if kept < 4 else [])


def test_the_txt_wins_over_the_metadata(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffÄ text\n".encode())
    both = Source("a", Blob(tmp_path / "a"), Blob(tmp_path / "a.txt"), {"caption": "other"})
    assert both.read_caption(both.read_metadata(), "caption") == "Ä text"
    alone = Source("a", Blob(tmp_path / "a"), None, {"caption": " other ", "TEXT": None})
    assert alone.read_caption(alone.read_metadata(), "caption") == "other"
    assert alone.read_caption(alone.read_metadata(), "TEXT") == ""


def test_what_is_cut_or_gone_says_so(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert Blob(tmp_path / "a", 1, 3).read() == b"234"
    with pytest.raises(UnusableSourceError, match="cut short: 2 of 9 bytes"):
        Blob(tmp_path / "a", 3, 9).read()
    with pytest.raises(UnusableSourceError, match="cannot be read: No such file"):
        Blob(tmp_path / "b").read()
