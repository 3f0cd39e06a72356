"""A cache in an object store or behind a web server gives the batches of the same cache on a disk."""

import json
from pathlib import Path

import pytest
import torch

from ldm_train.data import ImageTextDataModule, LatentCache, RemoteFiles, Routed, ShardCache, ShardReadError
from ldm_train.data.latent_records import location_of
from ldm_train.data.latent_writing import shard_names
from ldm_train.data.storage import LOCAL_FILES
from tests.data.conftest import sample, write_tar
from tests.data.faulty_server import serving
from tests.data.test_latents import cached
from tests.data.test_remote import s3

__all__ = ["s3"]

OPTIONS = {"image_size": 8, "batch_size": 2, "seed": 3, "val_fraction": 0.3, "max_bad_fraction": 1.0}


@pytest.fixture
def here(tmp_path):
    """A cache of three shards in two folders of the disk, one image being damaged; the glob of its shards."""
    first = 0
    for name, count in {"a/00000": 4, "a/00001": 5, "b/00002": 3}.items():
        members = [sample(number) for number in range(first, first + count)]
        if name == "a/00001":
            members[1][0] = (members[1][0][0], b"no image")
        write_tar(tmp_path / f"shards/{name}.tar", [member for group in members for member in group])
        first += count
    cached(sorted(map(str, (tmp_path / "shards").rglob("*.tar"))), tmp_path / "latents")
    return str(tmp_path / "latents" / "*" / "*.tar")


def module_of(shards, tmp_path, **options):
    settings = OPTIONS | {"latents": LatentCache(), "cache_dir": str(tmp_path / "cache")} | options
    return ImageTextDataModule(shards, settings.pop("image_size"), **settings)


def batches(module):
    """What two epochs and the validation show, and the real images that are compared with."""
    loaders = (module.train_dataloader, module.train_dataloader, module.val_dataloader)
    return [batch for loader in loaders for batch in loader()], list(module.reference_batches(4, 2))


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"key"}:
                assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name
    return sum(map(len, found)) > 8


def filled(store, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(str(path), f"bucket/{prefix}/{path.relative_to(folder)}")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_a_cache_on_s3_gives_what_it_gives_on_a_disk(here, s3, tmp_path, workers):
    store, options = s3
    filled(store, tmp_path / "latents", "cache")
    local = module_of(here, tmp_path)
    remote = module_of("s3://bucket/cache/*/*.tar", tmp_path, storage_options={"s3": options}, num_workers=workers)
    assert remote.latent_facts[1:] == local.latent_facts[1:]
    assert remote.latent_facts.folder == "s3://bucket/cache"
    assert same(batches(remote), batches(local))


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_a_cache_made_of_shards_on_s3_is_that_of_the_same_shards_here(here, s3, tmp_path):
    store, options = s3
    filled(store, tmp_path / "shards", "images")
    urls = [f"s3://bucket/images/{name}.tar" for name in ("a/00000", "a/00001", "b/00002")]
    storage = Routed(LOCAL_FILES, ShardCache(tmp_path / "cache", 1 << 24, RemoteFiles({"s3": options})))
    cached(urls, tmp_path / "from_s3", storage=storage)
    ours, theirs = tmp_path / "from_s3", tmp_path / "latents"
    for path in theirs.rglob("*.tar"):
        assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes()
    manifest, other = (json.loads((folder / "manifest.json").read_text()) for folder in (ours, theirs))
    assert manifest["source"].pop("root") == "s3://bucket/images"
    assert other["source"].pop("root") == str(tmp_path / "shards")
    assert manifest == other
    elsewhere = module_of(str(ours / "*" / "*.tar"), tmp_path, storage_options={"s3": options})
    assert same(batches(elsewhere), batches(module_of(here, tmp_path)))  # real images come from the store


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_behind_a_web_server_gives_what_it_gives_on_a_disk(here, tmp_path, workers):
    pytest.importorskip("aiohttp")
    with serving(tmp_path / "latents") as server:
        urls = [f"{server.url}/{name}.tar?signature=S" for name in ("a/00000", "a/00001", "b/00002")]
        remote = module_of(urls, tmp_path, num_workers=workers)
        assert remote.latent_facts.folder == server.url
        found = batches(remote)
    assert same(found, batches(module_of(here, tmp_path)))
    assert server.requests["GET", "manifest.json"] == 1


def test_what_is_wrong_with_a_remote_cache_is_said(here, tmp_path):
    pytest.importorskip("aiohttp")
    manifest = tmp_path / "latents" / "manifest.json"
    content = json.loads(manifest.read_text())
    with serving(tmp_path / "latents") as server:
        urls = [f"{server.url}/{name}.tar?signature=S" for name in ("a/00000", "a/00001", "b/00002")]
        manifest.rename(tmp_path / "away.json")
        with pytest.raises(ValueError, match=r"no manifest.json in http://\S+/a .*404.*copy its manifest beside"):
            _ = module_of(urls, tmp_path).latent_facts
        server.version = "2"
        content["shards"][1]["size"] += 1
        manifest.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"a/00001.tar\?... has \d+ bytes, its cache's manifest.json says \d+"):
            _ = module_of(urls, tmp_path).latent_facts
        server.version = "3"
        content["shards"].pop(1)
        manifest.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"a/00001.tar\?... is there, its cache's manifest.json says nothing"):
            _ = module_of(urls, tmp_path).latent_facts


def test_names_of_shards_are_relative_to_the_folder_of_all():
    assert shard_names(["s3://b/x/a/0.tar", "s3://b/x/1.tar"]) == ("s3://b/x", ["a/0.tar", "1.tar"])
    assert shard_names(["https://me:pw@h/x/0.tar?key=K"]) == ("https://h/x", ["0.tar"])
    assert shard_names(["/x/a/0.tar", "/x/b/0.tar"]) == ("/x", ["a/0.tar", "b/0.tar"])
    for paths in (["s3://b/0.tar", "/x/0.tar"], ["s3://b/0.tar", "gs://b/0.tar"]):
        with pytest.raises(ValueError, match=r"no folder holds all shards.*change --data"):
            shard_names(paths)
    assert Path(shard_names(["0.tar"])[0]) == Path.cwd()


def test_a_signed_url_and_the_same_without_signature_are_one_location():
    signed = [f"https://h/a.tar?X-Amz-Expires=9&X-Amz-Signature={signature}" for signature in ("S", "T")]
    assert {location_of(url) for url in (*signed, "https://h/a.tar")} == {"https://h/a.tar"}
    assert location_of("https://h/get?id=1") != location_of("https://h/get?id=2")


def test_images_that_need_a_signature_are_asked_for_under_their_key(here, tmp_path):
    pytest.importorskip("aiohttp")
    manifest = tmp_path / "latents" / "manifest.json"
    content = json.loads(manifest.read_text())
    with serving(tmp_path / "nothing") as server:  # as a server answers where no signature is given
        content["source"]["root"] = server.url
        manifest.write_text(json.dumps(content))
        with pytest.raises(ShardReadError, match=r"404.*set `data.latents.reference_shards`"):
            list(module_of(here, tmp_path).reference_batches(4, 2))
