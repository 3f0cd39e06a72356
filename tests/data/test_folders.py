"""A folder is the shard that would have been made of it, named by what is in it."""

import json
import logging
import multiprocessing
import os

import numpy as np
import pytest

from ldm_train.data import FolderShards, ImageTextDataModule
from ldm_train.data.folders import folders_of, holds
from ldm_train.data.shards import scan_shard

from .conftest import encode, picture


@pytest.fixture
def folder(tmp_path):
    """Eight images of every kind that is taken, in folders too, two with captions of their own."""
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for i, kind in enumerate(["JPEG", "PNG", "WEBP", "JPEG", "PNG", "PNG", "PNG"]):
        suffix = {"JPEG": "JPG", "PNG": "png", "WEBP": "webp"}[kind]
        (photos / f"{i}.{suffix}").write_bytes(encode(np.full((8, 8, 3), 30 * i, np.uint8), kind))
    (photos / "more" / "7.png").write_bytes(picture(7))
    (photos / "0.txt").write_text(" a zwx dog on a chair\n")
    (photos / "1.json").write_text(json.dumps({"caption": "a dog"}))
    return photos


def shards(folder, tmp_path, prompt="a photo of zwx dog", trigger=None, **changes):
    return FolderShards(str(folder), str(tmp_path / "made"), prompt, trigger, **changes)


def batches(folder_shards, **changes):
    module = ImageTextDataModule(folder_shards, 8, 8, 0, **changes)
    module.setup("fit")
    return list(module.train_dataloader()), module


def captions_of(folder_shards):
    (batch,), _ = batches(folder_shards)
    order = np.argsort(batch["sample_id"].numpy())
    return [batch["caption"][i] for i in order]


def test_a_folder_trains_with_its_captions_and_pixels(folder, tmp_path):
    (batch,), module = batches(shards(folder, tmp_path))
    assert sorted(batch["sample_id"].tolist()) == list(range(8))
    of = dict(zip(batch["sample_id"].tolist(), zip(batch["image"], batch["caption"], strict=True), strict=True))
    assert of[0][1] == "a zwx dog on a chair"
    assert of[1][1] == "a dog"
    assert {of[i][1] for i in range(2, 8)} == {"a photo of zwx dog"}
    for i in range(1, 7):
        assert (of[i][0].int() - 30 * i).abs().max() <= 2
    assert not module.corpus.damage


def test_the_name_is_that_of_the_content_wherever_the_folder_lies(folder, tmp_path):
    first = shards(folder, tmp_path).path
    moved = folder.rename(tmp_path / "elsewhere")
    assert shards(moved, tmp_path).path == first
    assert len(list((tmp_path / "made").glob("*.tar"))) == 1


@pytest.mark.parametrize("change", ["pixels", "caption", "prompt", "added", "renamed"])
def test_another_content_has_another_name_and_fingerprint(folder, tmp_path, change):
    before = shards(folder, tmp_path)
    fingerprint = batches(before)[1].train_index.fingerprint
    if change == "pixels":
        (folder / "4.png").write_bytes(picture(99))
    elif change == "caption":
        (folder / "0.txt").write_text("a zwx dog on a table")
    elif change == "added":
        (folder / "8.png").write_bytes(picture(8))
    elif change == "renamed":
        (folder / "4.png").rename(folder / "9.png")
    after = shards(folder, tmp_path, prompt="other" if change == "prompt" else "a photo of zwx dog")
    assert after.path != before.path
    assert batches(after)[1].train_index.fingerprint != fingerprint


def test_a_shard_that_is_there_is_not_made_again(folder, tmp_path):
    path = shards(folder, tmp_path).path
    os.utime(path, ns=(1, 1))
    assert shards(folder, tmp_path).path == path
    assert os.stat(path).st_mtime_ns == 1


def _path_in(queue, start, arguments):
    start.wait()
    queue.put(FolderShards(*arguments).path)


def test_many_processes_make_it_once(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    queue, start, arguments = context.Queue(), context.Barrier(4), (str(folder), str(tmp_path / "made"), "a dog")
    processes = [context.Process(target=_path_in, args=(queue, start, arguments)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1
    assert sorted(path.suffix for path in (tmp_path / "made").iterdir()) == [".json", ".lock", ".parquet", ".tar"]
    members, damage = scan_shard(paths.pop())
    assert (len(members), damage) == (3 * 8, [])


@pytest.mark.parametrize("text", ["", " "])
def test_empty_words_are_refused(folder, tmp_path, text):
    with pytest.raises(ValueError, match=r"allowed are words, and null for none; change `data.shards.prompt`"):
        shards(folder, tmp_path, prompt=text, trigger="zwx")
    with pytest.raises(ValueError, match=r"allowed are words, and null for none; change `data.shards.trigger`"):
        shards(folder, tmp_path, trigger=text)


def test_the_trigger_is_put_where_it_is_missing(folder, tmp_path):
    found = captions_of(shards(folder, tmp_path, prompt="a photo of a dog", trigger="zwx"))
    assert found == ["a zwx dog on a chair", "zwx, a dog", *["zwx, a photo of a dog"] * 6]


def test_a_word_is_held_as_a_word():
    assert holds("A photo of SKS dog", "sks")
    assert holds("sks, a dog", "sks")
    assert not holds("it asks me", "sks")
    assert holds("a <new1> dog", "<new1>")


def test_hidden_files_are_left_out_and_strangers_named(folder, tmp_path, caplog):
    plain = shards(folder, tmp_path).path
    (folder / "._0.JPG").write_bytes(b"of a Mac")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "0.png").write_bytes(picture(0))
    (folder / "IMG_1.HEIC").write_bytes(b"of a telephone")
    with caplog.at_level(logging.WARNING):
        assert shards(folder, tmp_path).path == plain
    assert [record.getMessage().count("IMG_1.HEIC") for record in caplog.records] == [1]


def test_every_broken_image_is_named_and_nothing_is_left_behind(folder, tmp_path):
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 8 images .* 1\.png .* 5\.png .* change `data.shards.folder`"):
        _ = shards(folder, tmp_path).path
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["folders.lock"]


def test_refusals_name_the_key(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there; allowed is a folder .* change `data.x`"):
        _ = shards(tmp_path / "nowhere", tmp_path, key="data.x").path
    with pytest.raises(FileNotFoundError, match=r"is a file"):
        _ = shards(folder / "0.txt", tmp_path).path
    with pytest.raises(ValueError, match=r"more/7.png|2.webp .* no caption.* set `data.shards.prompt`"):
        _ = shards(folder, tmp_path, prompt=None).path
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds 0 images; allowed are 1 to 10000"):
        _ = shards(tmp_path / "empty", tmp_path).path
    (folder / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds tar files; .* `data=webdataset"):
        _ = shards(folder, tmp_path).path


def test_folders_are_found_among_shards_and_mixtures(folder, tmp_path):
    one = shards(folder, tmp_path)
    assert folders_of(one, None) == [one]
    assert folders_of("/data/*.tar", None) == []
    assert folders_of(None, {"a": {"shards": one, "weight": 1}, "b": {"shards": "*.tar", "weight": 1}}) == [one]
