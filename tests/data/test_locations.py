import pytest

from ldm_train.data.locations import expand_shards, folders_above, in_folder, is_url, relative_to, shown


def test_urls_with_braces_become_one_location_each():
    assert expand_shards("s3://bucket/{00..02}.tar") == tuple(f"s3://bucket/{n:02d}.tar" for n in range(3))
    assert expand_shards(["https://host/a.tar?x=*", "hf://datasets/o/d/a.tar"]) == (
        "https://host/a.tar?x=*",
        "hf://datasets/o/d/a.tar",
    )


def test_globs_are_asked_of_the_store():
    assert expand_shards("gs://b/*.tar", list_remote=lambda _: ["gs://b/1.tar", "gs://b/0.tar"]) == (
        "gs://b/0.tar",
        "gs://b/1.tar",
    )
    with pytest.raises(FileNotFoundError, match=r"no shard matches 'gs://b/\*.tar'.*`data.shards`"):
        expand_shards("gs://b/*.tar", list_remote=lambda _: [])


@pytest.mark.parametrize(
    "url", ["pipe:cat x", "ftp://h/a.tar", "file:///etc/passwd", "S3://b/a.tar", "simplecache::s3://b"]
)
def test_other_protocols_are_refused(url):
    with pytest.raises((ValueError, FileNotFoundError), match=r"`data\.val_shards`"):
        expand_shards(url, "data.val_shards")


@pytest.mark.parametrize("shards", [["s3://b/0.tar"] * 2, "http://h/*.tar", "s3://b/*.tar"])
def test_what_cannot_be_listed_or_comes_twice_is_refused(shards):
    with pytest.raises(ValueError, match=r"`data\.shards`"):
        expand_shards(shards)


def test_shown_leaves_secrets_out():
    assert shown("see https://me:pw@host/a.tar?sig=S, s3://b/a.tar") == "see https://host/a.tar?... s3://b/a.tar"
    assert is_url("s3://b/a")
    assert not is_url("/data/a:b.tar")


def test_folders_and_files_of_paths_and_urls():
    assert folders_above("/a/b/0.tar") == ["/a/b", "/a", "/"]
    assert folders_above("s3://bucket/a/0.tar") == ["s3://bucket/a", "s3://bucket"]
    assert folders_above("https://host/a/0.tar?key=a/b") == ["https://host/a", "https://host"]
    for location in ("/a/b/0.tar", "/0.tar", "s3://bucket/a/0.tar", "https://host/a/0.tar?key=a/b"):
        for folder in folders_above(location):
            assert in_folder(folder, relative_to(location, folder), location) == location
    assert in_folder("https://host", "m.json") == "https://host/m.json"
