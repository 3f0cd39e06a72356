"""Folders of images as data, for sets of a few images that nobody wants to make shards of.

A folder becomes one shard the first time that a run looks at it, named by a hash of what is in it:

    <directory>/<hash>.tar, <hash>.parquet, <hash>_stats.json      hash of the names, captions and bytes of its images

From there on everything is as with other shards: order, index, fingerprint, exact resume. An image that is added,
changed or captioned anew gives another hash, so a run never goes on with other images than it began with. The tar
appears last, by renaming: whoever sees it sees all of it.

Captions stand beside the images, as `.txt` or in the field `caption` of a `.json`; the others get the prompt. A trigger
word is a rare word that a subject is learned under; captions without it get it in front.

The set is small and chosen by hand, so an image that cannot be read is an error. What is no image is named and left
out; so are hidden files, unnamed.
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, overload

from ldm_train.batch import WantedImages
from ldm_train.data.index_store import UnwritableError, locked
from ldm_train.data.sources import IMAGE_SUFFIXES, Source, UnusableSourceError, list_sources
from ldm_train.data.transforms import decode_rgb
from ldm_train.data.writing import MAX_SAMPLES_PER_SHARD, ShardSample, ShardWriter

_log = logging.getLogger(__name__)
_NAMED = 5
_WRITTEN = "00000"  # the writer's name of the only shard


class FolderShards(Sequence[str]):
    """The one shard of a folder, made when it is first asked for.

    Args:
        folder: holds the images, also in folders of its own.
        directory: where the shard is kept.
        prompt: the caption of images that have none; None: each must have one.
        trigger: a word or words that each caption must hold; None: none must.
        key: the config key that names the folder.
        prompt_key: the config key of the prompt.
        wanted: what a model puts into the folder before anybody looks; of more images the first so many are taken.

    Raises:
        ValueError: if the prompt or the trigger is empty.
    """

    def __init__(
        self,
        folder: str,
        directory: str,
        prompt: str | None = None,
        trigger: str | None = None,
        key: str = "data.shards.folder",
        prompt_key: str = "data.shards.prompt",
        wanted: WantedImages | None = None,
    ) -> None:
        self.folder, self.directory = Path(folder).expanduser(), Path(directory)
        self.trigger, self.key, self.prompt_key, self.wanted = trigger, key, prompt_key, wanted
        for name, text in ((prompt_key, prompt), (f"{prompt_key.rpartition('.')[0]}.trigger", trigger)):
            if text is not None and not text.strip():
                raise ValueError(f"`{name}` is {text!r}; allowed are words, and null for none; change `{name}`")
        self.prompt = None if prompt is None else self._with_trigger(prompt.strip())

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return (self.path,)[index]

    def __str__(self) -> str:
        return str(self.folder)

    @cached_property
    def path(self) -> str:
        """The shard.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds no images, too many, unreadable ones, or some without a caption.
        """
        digest = hashlib.sha256()
        for sample in self._samples():
            for part in (str(sample.metadata["source"]).encode(), sample.caption.encode(), sample.image):
                digest.update(len(part).to_bytes(8, "little") + part)
        path = self.directory / f"{digest.hexdigest()[:16]}.tar"
        if not path.is_file():
            self._write(path)
        return str(path)

    @cached_property
    def _sources(self) -> list[Source]:
        if not self.folder.is_dir():
            state = "a file" if self.folder.exists() else "not there"
            raise FileNotFoundError(f"{self.folder} is {state}; allowed is a folder of images; change `{self.key}`")
        if any(self.folder.glob("*.tar")):
            raise ValueError(
                f"{self.folder} holds tar files; allowed are images; name shards by `data=webdataset "
                f"'data.shards={self.folder}/*.tar'`, or change `{self.key}`"
            )
        sources, refusals = list_sources(self.folder, "image", None)
        sources = [source for source in sources if not _is_hidden(source.name)]
        for refusal in refusals:
            if not _is_hidden(refusal.source):
                _log.warning("%s in %s is left out: %s", refusal.source, self.folder, refusal.reason)
        if self.wanted is not None:
            sources = sources[: self.wanted.number]
        if not 1 <= len(sources) <= MAX_SAMPLES_PER_SHARD:
            raise ValueError(
                f"{self.folder} holds {len(sources)} images; allowed are 1 to {MAX_SAMPLES_PER_SHARD} of the kinds "
                f"{', '.join(IMAGE_SUFFIXES)}; change `{self.key}`, or make shards of many: python tools/make_shards.py"
            )
        return sources

    def _samples(self) -> Iterator[ShardSample]:
        """The images with their captions, in the order of their names."""
        broken: list[str] = []
        for source in self._sources:
            try:
                data, caption = source.image.read(), source.read_caption(source.read_metadata(), "caption")
            except UnusableSourceError as error:
                broken.append(f"{source.name} ({error})")
                continue
            extension = PurePosixPath(source.name).suffix.lower().removeprefix(".")
            yield ShardSample(data, extension, self._caption(source.name, caption), {"source": source.name})
        self._refuse(broken)

    def _caption(self, name: str, found: str) -> str:
        caption = found or self.prompt
        if not caption:
            raise ValueError(
                f"{name} in {self.folder} has no caption; allowed are images with a .txt beside them, or one prompt "
                f"for all that have none; write the .txt, or set `{self.prompt_key}`"
            )
        return self._with_trigger(caption)

    def _with_trigger(self, caption: str) -> str:
        return caption if self.trigger is None or holds(caption, self.trigger) else f"{self.trigger}, {caption}"

    def _refuse(self, broken: list[str]) -> None:
        if broken:
            shown = ", ".join(broken[:_NAMED]) + (", ..." if len(broken) > _NAMED else "")
            raise ValueError(
                f"{len(broken)} of {len(self._sources)} images in {self.folder} cannot be read: {shown}; allowed are "
                f"whole JPEG, PNG and WebP files; replace or remove them, or change `{self.key}`"
            )

    def _decode_all(self) -> None:
        """ValueError, with their names, if there are images that cannot be decoded."""
        broken: list[str] = []
        for sample in self._samples():
            try:
                decode_rgb(sample.image)
            except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises on damage
                broken.append(f"{sample.metadata['source']} ({error})")
        self._refuse(broken)

    def _write(self, path: Path) -> None:
        """Make the shard, unless another process has made it meanwhile."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with locked(self.directory / "folders.lock"):
                if path.is_file():
                    return
                self._decode_all()
                staging = Path(tempfile.mkdtemp(prefix=".folder-", dir=self.directory))
                try:
                    with ShardWriter(staging) as writer:
                        for sample in self._samples():
                            writer.write(sample)
                    for ending in (".parquet", "_stats.json", ".tar"):
                        (staging / f"{_WRITTEN}{ending}").replace(path.with_name(path.stem + ending))
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except UnwritableError as error:
            raise ValueError(
                f"{self.directory} cannot be written ({error}); allowed is a folder for the shard that is made of "
                f"{self.folder}; change `paths.root`"
            ) from error


def folders_of(shards: object, mixture: Mapping[str, Mapping[str, Any]] | None) -> list[FolderShards]:
    """The folders among the shards of a data set, or of a mixture: name -> `shards` and `weight`."""
    found = [shards, *(source["shards"] for source in (mixture or {}).values())]
    return [folder for folder in found if isinstance(folder, FolderShards)]


def holds(caption: str, words: str) -> bool:
    """Whether a caption holds words as words: "sks" is in "a sks dog", and not in "asks"."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE) is not None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
