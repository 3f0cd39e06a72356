"""Remote files through fsspec: their identity, their bytes, and what a failure means.

fsspec gives every object store one interface, but each backend raises exceptions of its own. They fall in two classes:
*transient* ones (time-outs, lost connections, status 408, 425, 429 and 5xx, a body shorter than announced) are worth
another attempt after a wait of

    delay 2^attempt u,  u uniform in [1/2, 1],

and all others (404, 403, no credentials, a missing package) are final. File systems are made by the process that uses
them, for fsspec's event loop is a thread, and threads do not survive a fork.
"""

import errno
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fsspec

from ldm_train.data.locations import protocol_of, secrets_of, shown
from ldm_train.data.storage import Identity, ShardReadError

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface-hub", "http": "aiohttp", "https": "aiohttp"}
_TRANSIENT_STATUS = (408, 425, 429)
_FINAL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Exceptions of the backends that are no OSError; looked up only where the backend was imported.
_BACKEND_FAILURES = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx2", "HTTPError"),
    ("httpx", "HTTPError"),
)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GoogleAuthError", "InvalidURL")
_VERSION_FIELDS = ("ETag", "etag", "generation", "blob_id", "xet_hash", "Last-Modified", "LastModified", "mtime")
_Result = TypeVar("_Result")


class ShortBodyError(OSError):
    """A file arrived with fewer or more bytes than announced."""


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions that a backend in use may raise."""
    found = [getattr(sys.modules[module], name) for module, name in _BACKEND_FAILURES if module in sys.modules]
    return (OSError, ImportError, ValueError, *found)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, in the way of aiohttp, gcsfs, httpx or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((error, "status"), (error, "code"), (response, "status_code")):
        if isinstance(value := getattr(holder, name, None), int):
            return value
    return None


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, (ImportError, ValueError)) or type(error).__name__ in _FINAL_NAMES:
        return False
    return not (isinstance(error, OSError) and error.errno in _FINAL_ERRNO) and not isinstance(
        error, (FileNotFoundError, PermissionError)
    )


class RemoteFiles:
    """Files behind URLs; safe to copy into worker processes.

    Args:
        storage_options: what fsspec passes to a backend, by protocol: `{s3: {endpoint_url: ...}}`.
        attempts: tries before giving up.
        delay: seconds before the second try; doubles with each.
        timeout: seconds without a byte after which an http server counts as lost.
    """

    def __init__(
        self,
        storage_options: Mapping[str, Mapping[str, Any]] | None = None,
        attempts: int = 6,
        delay: float = 0.5,
        timeout: float = 60.0,
    ) -> None:
        self.storage_options = {name: dict(options) for name, options in (storage_options or {}).items()}
        self.attempts, self.delay, self.timeout = attempts, delay, timeout
        self._systems: dict[str, Any] = {}
        self._owner = os.getpid()

    def identity(self, url: str) -> Identity:
        """Size and version (entity tag, generation or time of change) of a file."""
        return self._tried(url, lambda: self._identity(url))

    def download(self, url: str, path: str, size: int) -> None:
        """Write a file of `size` bytes to a path of this machine.

        Raises:
            OSError: if the disk is full.
            ShardReadError: if the file cannot be had.
        """
        self._tried(url, lambda: self._download(url, path, size))

    def glob(self, pattern: str) -> list[str]:
        """The URLs that a pattern matches."""
        protocol = protocol_of(pattern)
        return [f"{protocol}://{name}" for name in self._tried(pattern, lambda: self._system(pattern).glob(pattern))]

    def _identity(self, url: str) -> Identity:
        system = self._system(url)
        system.invalidate_cache()  # else a listing from before would hide a change
        info = system.info(url)
        if info.get("size") is None:
            raise ValueError("the server does not say how large the file is, so that a cut one could not be told")
        known = (f"{field}={info[field]}" for field in _VERSION_FIELDS if info.get(field))
        return Identity(int(info["size"]), next(known, ""))

    def _download(self, url: str, path: str, size: int) -> None:
        self._system(url).get_file(url, path)
        found = os.path.getsize(path)
        if found != size:
            raise ShortBodyError(f"{found} bytes arrived where {size} were announced")
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _tried(self, url: str, action: Callable[[], _Result]) -> _Result:
        protocol_of(url)
        for attempt in range(self.attempts):
            try:
                return action()
            except _failures() as error:
                # fsspec calls every failure of an http server "not found", and keeps the true one as its cause.
                is_wrapped = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, _failures())
                failure = error.__cause__ if is_wrapped and error.__cause__ is not None else error
            if isinstance(failure, OSError) and failure.errno in _DISK_FULL:
                raise failure
            if not is_transient(failure):
                raise self._final(url, failure) from None  # the cause may name credentials
            if attempt + 1 < self.attempts:
                time.sleep(self.delay * 2**attempt * random.uniform(0.5, 1.0))
        raise ShardReadError(
            f"{shown(url)} could not be read in {self.attempts} attempts: {self._described(url, failure)}. A shard "
            "must stay readable during a run: check the network and the store behind `data.shards`, then start the "
            "same command again."
        ) from None

    def _final(self, url: str, failure: BaseException) -> ShardReadError:
        if isinstance(failure, ImportError):
            package = _PACKAGES[protocol_of(url)]
            return ShardReadError(
                f"{shown(url)} needs the package {package}, which is not installed. Allowed are paths, and URLs whose "
                f'package is there: pip install {package} (or "ldm-train[remote]"), or change `data.shards`.'
            )
        return ShardReadError(
            f"{shown(url)} could not be read: {self._described(url, failure)}. A shard must exist and be readable "
            "with the credentials of the environment or of `data.storage_options`: check these and `data.shards`."
        )

    def _described(self, url: str, failure: BaseException) -> str:
        text = shown(f"{type(failure).__name__}: {failure}")
        for secret in (*secrets_of(url), *_texts(self.storage_options)):
            text = text.replace(secret, "...")
        return text

    def _system(self, url: str) -> Any:  # noqa: ANN401 (fsspec has no types)
        if self._owner != os.getpid():
            self._systems, self._owner = {}, os.getpid()
        protocol = protocol_of(url)
        if protocol not in self._systems:
            options = self._options(protocol)
            self._systems[protocol] = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        return self._systems[protocol]

    def _options(self, protocol: str) -> dict[str, Any]:
        options = dict(self.storage_options.get(protocol, {}))
        if protocol in ("http", "https"):
            import aiohttp  # of the extra `remote`

            # aiohttp would end every download after five minutes, and unpack what a server compressed on its way.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
            options["client_kwargs"] = {"timeout": limits, **options.get("client_kwargs", {})}
            options["headers"] = {"Accept-Encoding": "identity", **options.get("headers", {})}
        return options

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_systems": {}, "_owner": 0}


def options_of(text: str) -> dict[str, dict[str, Any]]:
    """The options of stores that a command line gives as JSON, for `RemoteFiles`.

    Raises:
        ValueError: if they are no such thing.
    """
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise ValueError(
            "--storage-options is no JSON object of objects; allowed are the options of each protocol, such as "
            '{"s3": {"endpoint_url": "https://..."}}; change --storage-options'
        )
    return options


def _texts(value: object) -> list[str]:
    """Every text or number in the options that may be a secret: all but addresses and names of a few letters."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [text for part in value for text in _texts(part)]
    text = str(value)
    return [text] if not isinstance(value, bool) and len(text) > 5 and "://" not in text else []
