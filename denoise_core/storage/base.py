"""The interface of a storage, and the values that go through it. Owns no file and no request."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import chain, product
from typing import BinaryIO
from urllib.parse import urlsplit

from denoise_core.errors import StorageError, UsageError

MAGIC = re.compile(r"[*?\[]")
_BAD_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
BUNDLE_SUFFIX = ".zarr"
"""A folder whose name ends so, in any case, is one thing: listed, skipped and published whole."""
_BUNDLE = re.compile(r"(?:^|/)[^/]+\.zarr(?=/)", re.IGNORECASE)
_ANY_FOLDERS = re.compile(r"(?:^|(?<=/))\*\*/")
_BAD_PART = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or object: its URI, its '/'-separated path below the listed root (for a single file
    its name), its size in bytes and its stamp (S3: the etag; local: the mtime in nanoseconds).

    Of a bundle, a folder that is one thing: the sum of its files' sizes, a hash of their names,
    sizes and stamps, and in `about` the names of the hidden and JSON files that lie directly in it.
    """

    uri: str
    path: str
    size: int
    stamp: str
    about: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """Changes whenever the content does, as far as that shows without reading it."""
        return f"{self.size}-{self.stamp}"


@dataclass(slots=True)
class Bundle:
    """Adds up the files of a bundle, in any order, in a few bytes of memory."""

    files: int = 0
    size: int = 0
    digest: int = 0
    about: set[str] = field(default_factory=set)

    def add(self, entry: Entry) -> None:
        """Take one file; its `path` is relative to the bundle."""
        text = f"{entry.path}\0{entry.fingerprint}".encode("utf-8", "surrogateescape")
        self.files += 1
        self.size += entry.size
        if "/" not in entry.path and (is_hidden(entry.path) or entry.path.endswith(".json")):
            self.about.add(entry.path)
        # A sum does not depend on the order, so that millions of chunks need no sorting.
        self.digest += int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")

    def entry(self, uri: str, path: str) -> Entry:
        """Describe the bundle as if it were a file."""
        stamp = f"{self.digest % (1 << 128):032x}"
        return Entry(uri, path, self.size, stamp, frozenset(self.about))


Found = Entry | tuple[str, StorageError]  # the tuple: what cannot be listed, and why


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How to reach S3; safe to pickle, log and compare, because it cannot hold a credential.

    `s3_endpoint` and `region` default to the usual AWS environment variables; `max_attempts` counts
    the first try too; the waits between tries grow to 20 s at most and are drawn at random, 75 s in
    all on average, so that next to none ends within 20 s; time-outs are in seconds.
    """

    s3_endpoint: str | None = None
    region: str | None = None
    max_attempts: int = 12
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise UsageError(f"max_attempts is {self.max_attempts}; expected at least 1")
        if self.s3_endpoint is not None:
            check_endpoint(self.s3_endpoint)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which paths below a root are wanted; every path is relative to that root.

    `pattern` is a glob, one component each ('*' stops at '/', '**' does not); what it matches may
    be a folder, which stands for its files: all of them if `recursive`, else the direct ones. An
    empty pattern matches the root itself. `include` and `exclude` are fnmatch patterns on the path
    or on the name alone, where the case of the suffix ('.PNG') does not matter and '**/' stands for
    no folder too.
    """

    recursive: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Whether the file at this path is wanted."""
        if (self.pattern or not self.recursive) and not self._fits(self.pattern, path.split("/")):
            return False
        if self.include and not _matches_any(path, self.include):
            return False
        return not (self.exclude and _matches_any(path, self.exclude))

    def enters(self, folder: str) -> bool:
        """Whether files below this folder may be wanted."""
        for depth, name in enumerate(folder.split("/")):
            if depth == len(self.pattern):
                return self.recursive
            if self.pattern[depth] == "**":
                return True
            if not fnmatchcase(name, self.pattern[depth]):
                return False
        return True

    def _fits(self, pattern: tuple[str, ...], names: Sequence[str]) -> bool:
        if not pattern:
            return self.recursive or len(names) <= 1
        if pattern[0] == "**":
            return any(self._fits(pattern[1:], names[skip:]) for skip in range(len(names) + 1))
        return (
            bool(names) and fnmatchcase(names[0], pattern[0]) and self._fits(pattern[1:], names[1:])
        )


class Storage(ABC):
    """One backend. Every method takes whole URIs and raises only `StorageError` or `UsageError`."""

    @abstractmethod
    def walk(self, root: str, selection: Selection) -> Iterator[Found]:
        """Stream the wanted files below a folder, or the one file that `root` is, in no set order.

        Files and folders below the root whose name begins with '.' are skipped. A folder whose
        name ends in '.zarr' is one entry, hidden files counted, the root as well. What exists but
        cannot be listed comes as a tuple; a missing root raises `ObjectNotFound`.
        """

    def list(self, root: str, *, recursive: bool = True) -> Iterator[Entry]:
        """Stream the files below `root` as `walk` does, but raise what cannot be listed."""
        for found in self.walk(root, Selection(recursive=recursive)):
            if not isinstance(found, Entry):
                raise found[1]
            yield found

    @abstractmethod
    def tree(self, root: str) -> Iterator[Entry]:
        """Stream every file below a folder, hidden ones and those of bundles too.

        One that is deleted while it is listed is left out.
        Raises what cannot be listed; nothing at all there is `ObjectNotFound`.
        """

    @abstractmethod
    def stat(self, uri: str) -> Entry | None:
        """Describe one file; None if there is none, or if it is a folder."""

    @abstractmethod
    def read(self, uri: str) -> bytes:
        """Return all bytes of a file."""

    @abstractmethod
    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length), fewer where the file ends earlier."""

    @abstractmethod
    def open(self, uri: str) -> BinaryIO:
        """Open a file for reading with `seek`; S3 objects are fetched in cached blocks."""

    @abstractmethod
    def write(self, uri: str, data: bytes | memoryview) -> None:
        """Publish bytes under a URI in one step, replacing what was there; folders are made."""

    @abstractmethod
    def upload(self, local_path: str | os.PathLike[str], uri: str) -> None:
        """Publish a large local file in one step. The file stays, but may share its disk blocks
        with the published one: delete it, do not change it."""

    @abstractmethod
    def publish(
        self, uri: str, files: Iterable[tuple[str, bytes]], *, last: Sequence[str] = ()
    ) -> None:
        """Publish a folder of (relative path, content) in one step, replacing what was there.

        Nothing is seen under `uri` before all of `files` is written. Where a backend has no such
        step, files whose name is in `last` make it: they are deleted first and written last, the
        deepest folder's before the root's, and in the order of `last`.
        """

    @abstractmethod
    def create(self, uri: str, data: bytes) -> bool:
        """Publish bytes only where nothing is yet; False if something is. Of several creators at
        one time one gets True, if their bytes differ: put an id in."""

    @abstractmethod
    def delete(self, uri: str) -> None:
        """Remove a file; one that is not there is fine."""

    @abstractmethod
    def clear(self, root: str, path: str) -> None:
        """Remove what lies at `path` below `root`, hidden files too; nothing there is fine.

        Nothing behind a link below `root` is touched: someone else may have put it there.
        """


def _matches_any(path: str, patterns: Sequence[str]) -> bool:
    spelled = [each for pattern in patterns for each in _spellings(pattern)]
    return any(_matches(each, one) for each in (path, path.rpartition("/")[2]) for one in spelled)


@lru_cache
def _spellings(pattern: str) -> tuple[str, ...]:
    """Return a pattern with and without each of its '**/', which stands for no folder too."""
    first, *rest = _ANY_FOLDERS.split(pattern)
    choices = product(("", "**/"), repeat=len(rest))
    return tuple("".join((first, *chain(*zip(choice, rest, strict=True)))) for choice in choices)


def _matches(path: str, pattern: str) -> bool:
    stem, suffix = posixpath.splitext(path)
    if fnmatchcase(path, pattern) or fnmatchcase(stem + suffix.lower(), pattern):
        return True
    # '*.Png' as well. 'Dr.Smith*' has no such suffix: what it names goes on behind.
    stems, suffixes = posixpath.splitext(pattern)
    return fnmatchcase(stem, stems) and fnmatchcase(suffix.lower(), suffixes.lower())


def is_bundle(path: str) -> bool:
    """Whether a folder of this name, path or URI is one thing."""
    name = path.rstrip("/").rpartition("/")[2]
    return name.lower().endswith(BUNDLE_SUFFIX) and len(name) > len(BUNDLE_SUFFIX)


def bundle_above(path: str) -> str | None:
    """Return the bundle that a path lies in, the outermost one; None where it lies in none."""
    found = _BUNDLE.search(path)
    return path[: found.end()] if found else None


def is_hidden(path: str) -> bool:
    """Whether a part of this relative path begins with '.'."""
    return path.startswith(".") or "/." in path


def path_problem(path: str) -> str | None:
    """Say why a relative path cannot be an output's name too; None where it can."""
    if _BAD_CHARACTER.search(path):
        return "it has control characters or is not UTF-8; rename it"
    if _BAD_PART.search(path):
        return "it has an empty, '.' or '..' part; expected a relative path"
    return None


def printable(text: str) -> str:
    """Escape what cannot be printed in one line or stored as UTF-8."""
    return _BAD_CHARACTER.sub(lambda found: ascii(found[0])[1:-1], text)


def check_endpoint(url: str) -> str:
    """Return the URL of an S3 server, or raise `UsageError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in url or parts.query:
        # Not quoted: people do write keys into such URLs.
        raise UsageError("the S3 endpoint is not valid; expected http(s)://host[:port], no keys")
    return url
