"""Patterns in, locations out: a location is the path of a shard on a mounted disk, or its URL.

URLs come from lists that others wrote, so they are data: only the protocols below are opened, and a URL never runs a
program, as `pipe:` does elsewhere. What is remote is listed only for a glob; a URL without one is believed until it is
read.

A URL may carry secrets: a name and password before its host, a signature in its query. Nothing that is written or said
holds them. What is kept of a URL is its `lasting` form, which a new signature does not change.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from braceexpand import braceexpand

PROTOCOLS = ("s3", "gs", "hf", "http", "https")
_SCHEME = re.compile(r"([A-Za-z][\w+.-]*)://")
_MAGIC = re.compile(r"[*?\[]")
# Name and password before a host, where a slash in the password is told from a port and a path; what may hold secrets
# behind a path: query, fragment and parameters. `_IN_TEXT`: the same in a text, which goes on behind it.
_USER = re.compile(r"[^/?#]*@|[^/:@?#\[]+:(?!\d*(?:[/?#]|$)).*@", re.DOTALL)
_QUERY = re.compile(r"\?")
_BEHIND = re.compile(r"\?|[#;](?=[\w.~-]+=)")
_URL_ENDS = re.compile(r"['\"\n]")
_USER_IN_TEXT = re.compile(r"(\w://)(?:[^/?#\s'\"]*@|[^/:@?#\[\s'\"]+:(?!\d*(?:[/?#\s'\"]|$))[^\s'\"]*@)")
_BEHIND_IN_TEXT = re.compile(
    r"((?:(['\"])[A-Za-z][\w+.-]*|\w)://(?:(?!\?|[#;][\w.~-]+=)[^'\"\n])*)([?#;])(?(2)[^'\"\n]*|[^\s'\"]*)"
)
# Parameters that sign a request and say nothing of what is asked for: of AWS, Google, Alibaba and CloudFront, and
# tokens under their usual names; and what means that only beside a signature, as Azure's do.
_SIGNING = re.compile(
    r"x-(amz|goog|oss)-.*|(aws|google|oss)accesskeyid|googleaccessid|key-pair-id|.*token|.*signature|"
    r"(.*[-_])?(sig|password|secret|api[-_]?key|auth|authorization|credentials?)|.*session_?id"
)
_OFTEN_SECRET = {"key", "code", "jwt"}  # names that may as well say what is asked for
_BESIDE_SIGNATURE = {"expires", "policy", "sv", "ss", "srt", "sp", "se", "st", "sr", "spr", "sip", "sdd", "ses", "scid"}
_BESIDE_SIGNATURE |= {"skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid"}
_SHORT = 5  # letters of a text that stands in messages for other reasons too


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return _SCHEME.match(location) is not None


def protocol_of(location: str) -> str:
    """What stands before `://`; ValueError if that is not one of `PROTOCOLS`."""
    scheme = _SCHEME.match(location)
    if scheme is None or scheme[1] not in PROTOCOLS:
        raise ValueError(
            f"the protocol of {shown(location)!r} is unknown; allowed are paths and {', '.join(PROTOCOLS)} URLs: "
            "change `data.shards`."
        )
    return scheme[1]


class _Url(NamedTuple):
    """The parts of a URL: what stands before `@`, host and path, and what comes behind the path, with its mark."""

    protocol: str
    user: str
    place: str
    behind: str

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Name and value of all that comes behind the path."""
        parts = [part for part in re.split("[?&;#]", self.behind) if part]
        return [(name, value) for name, _, value in (part.partition("=") for part in parts)]


def _is_http(url: str) -> bool:
    return url.partition("://")[0].lower() in ("http", "https")


def _parsed(url: str, behind_path: re.Pattern[str] = _BEHIND) -> _Url:
    protocol, _, rest = url.partition("://")
    user = _USER.match(rest)
    rest = rest[user.end() :] if user else rest
    cut = behind.start() if (behind := behind_path.search(rest)) else len(rest)
    return _Url(protocol, user[0][:-1] if user else "", rest[:cut], rest[cut:])


def shown(text: str) -> str:
    """A location, or a text with URLs in it, without their secrets: user and password, and what is behind the path."""
    if not is_url(text):
        return _BEHIND_IN_TEXT.sub(r"\1\3...", _USER_IN_TEXT.sub(r"\1", text))
    url = _parsed(text)
    ending = f"{url.behind[0]}..." if url.behind else ""
    return _USER_IN_TEXT.sub(r"\1", f"{url.protocol}://{url.place}") + ending


def lasting(location: str) -> str:
    """What may be kept of a location: the same for every signature of one file, and another for each file.

    A path is kept as it is. Of a URL the signature is left out, a name and password for an http server too; what else
    its query says, which may be secret under a name of its own, is hashed.
    """
    if not is_url(location):
        return location
    url = _parsed(location, _BEHIND if _is_http(location) else _QUERY)  # a store's keys may have any letter
    names = {name.lower() for name, _ in url.parameters}
    signing = {name for name in names if _SIGNING.fullmatch(name)}
    signing |= _BESIDE_SIGNATURE if names & {"sig", "signature"} else set()
    asked = [part for part in re.split("[?&;#]", url.behind) if part]
    kept = [part for part in asked if part.partition("=")[0].lower() not in signing]
    kept += [url.user] if url.user and not _is_http(url.protocol) else []  # a store's own way to name a file
    ending = f"?{hashlib.sha256('&'.join(kept).encode()).hexdigest()[:16]}" if kept else ""
    return f"{url.protocol}://{url.place}{ending}"


def secrets_of(url: str) -> list[str]:
    """The texts of a URL that no message may hold: user and password, the query, each of its values."""
    parts = _parsed(url)
    values = [value for _, value in parts.parameters]
    found = [parts.behind[1:], *values, parts.user, parts.user.partition(":")[2]]
    return sorted({text for text in found if len(text) > _SHORT}, key=len, reverse=True)


def holds_secret(text: str) -> bool:
    """Whether a text has a URL with a password, a token or a signature in it."""
    if is_url(text):
        return _has_secret(_parsed(text))
    return any(_has_secret(_parsed(_URL_ENDS.split(text[match.start() :])[0])) for match in _SCHEME.finditer(text))


def _has_secret(url: _Url) -> bool:
    _, colon, password = url.user.partition(":")
    names = {name.lower() for name, value in url.parameters if value}
    is_signed = any(name in _OFTEN_SECRET or _SIGNING.fullmatch(name) for name in names)
    return is_signed or bool(password or (url.user and not colon and _is_http(url.protocol)))


def beside(location: str, ending: str) -> str:
    """The location of a file that stands beside a shard and is named after it: `.tar` gives way to the ending."""
    path, mark, query = location.partition("?") if is_url(location) else (location, "", "")
    return path.removesuffix(".tar") + ending + mark + query


def folders_above(location: str) -> list[str]:
    """The folders that a file lies in, the innermost first: absolute paths, or of a URL up to its host or bucket."""
    if not is_url(location):
        folder = os.path.dirname(os.path.abspath(location))
        found = [folder]
        while (folder := os.path.dirname(found[-1])) != found[-1]:
            found.append(folder)
        return found
    scheme, _, path = location.partition("?")[0].partition("://")
    parts = path.split("/")[:-1]
    return [f"{scheme}://{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)]


def in_folder(folder: str, name: str, query_of: str = "") -> str:
    """The location of a file in a folder; of a URL with the query, often a signature, of another one."""
    query = query_of.partition("?")[1:] if is_url(folder) and is_url(query_of) else ()
    return folder.rstrip("/") + "/" + name + "".join(query)


def relative_to(location: str, folder: str) -> str:
    """The name of a file relative to a folder that it lies in."""
    if is_url(location):
        return location.partition("?")[0].removeprefix(folder.rstrip("/") + "/")
    return os.path.relpath(location, folder)


def expand_shards(
    shards: str | Sequence[str], key: str = "data.shards", list_remote: Callable[[str], list[str]] | None = None
) -> tuple[str, ...]:
    """The locations that brace patterns (`{00000..00003}.tar`), globs (`*.tar`), paths and URLs name, in order.

    Args:
        shards: one pattern or a list of them.
        key: the config key they come from, for error messages.
        list_remote: the URLs that a glob in a URL matches, see `ShardCache.glob`; None refuses such globs.

    Raises:
        FileNotFoundError: if a path or a glob names nothing.
        ValueError: if there is none, one comes twice, or it is nothing that may be opened.
    """
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if pattern.startswith("pipe:") or (is_url(pattern) and _SCHEME.match(pattern)[1] not in PROTOCOLS):  # type: ignore[index]
            raise ValueError(
                f"`{key}` names {shown(pattern)!r}; allowed are files on a mounted disk and "
                f"{', '.join(PROTOCOLS)} URLs: copy the shards to one of these."
            )
        for name in braceexpand(os.path.expanduser(pattern)):
            found += _remote(name, key, list_remote) if is_url(name) else _local(name, pattern, key)
    if not found:
        raise ValueError(f"`{key}` is empty; it must name at least one tar file.")
    same = (lasting(location) if is_url(location) else os.path.realpath(location) for location in found)
    location, count = Counter(same).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"the shard {shown(location)} is named {count} times; each may take part once: shorten `{key}`."
        )
    return tuple(found)


def _local(name: str, pattern: str, key: str) -> list[str]:
    found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
    strange = [path for path in found if not os.path.isfile(path)]
    if strange:  # to open a named pipe would wait for ever
        if os.path.isdir(strange[0]):
            found_allowed = f"a folder; allowed are shards, such as '{os.path.join(strange[0], '*.tar')}'"
        else:
            found_allowed = "a pipe or a broken link; allowed are tar files"
        raise FileNotFoundError(f"{strange[0]} is {found_allowed}; `{key}` is {pattern!r}.")
    if not found:
        folder = os.path.dirname(os.path.abspath(name))
        state = "exists" if os.path.isdir(folder) else "does not exist"
        raise FileNotFoundError(
            f"no shard {os.path.basename(name)!r} in {folder} (the folder {state}). Allowed are paths, globs "
            f"and brace patterns of existing tar files; `{key}` is {pattern!r}."
        )
    return found


def _remote(name: str, key: str, list_remote: Callable[[str], list[str]] | None) -> list[str]:
    # A question mark in an http URL begins its query.
    if not _MAGIC.search(name.partition("?")[0] if name.startswith("http") else name):
        return [name]
    if list_remote is None or name.startswith("http"):
        raise ValueError(
            f"`{key}` has a glob in {shown(name)!r}; allowed are globs in paths and in URLs of stores that list files "
            "(s3, gs, hf): use a brace pattern such as {00000..00009}.tar."
        )
    found = sorted(list_remote(name))
    if not found:
        raise FileNotFoundError(
            f"no shard matches {shown(name)!r}. Allowed are globs that match a tar file: change `{key}`."
        )
    return found
