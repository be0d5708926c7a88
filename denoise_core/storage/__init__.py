"""Files and objects: list, read, read a range, write atomically, on local disk and on S3.

Owns every byte that enters or leaves the project, and the sentences for what can go wrong with it.
Knows no images. A local URI is a path (`file://` is accepted and percent-decoded); an S3 URI is
`s3://bucket/key` with the key taken as it is. Storages are plain values: they hold options, never a
client or a credential, so a pickle of one is safe to keep in Ray's object store. Credentials come
from the environment, the AWS profile or the instance role, in the process that needs them.
A folder or prefix whose name ends in `.zarr` is one thing: one entry of a list, `publish`ed whole.

    storage = storage_for("s3://photos/2024")
    for entry in storage.list("s3://photos/2024"):
        storage.write(join("/data/copy", entry.path), storage.read(entry.uri))

`base.py` has the interface, `local.py` and `s3.py` one backend each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from denoise_core.errors import ObjectNotFound, UsageError
from denoise_core.storage.base import (
    BUNDLE_SUFFIX,
    MAGIC,
    Entry,
    Found,
    Selection,
    Storage,
    StorageOptions,
    bundle_above,
    is_bundle,
    is_hidden,
    path_problem,
    printable,
)
from denoise_core.storage.local import LocalStorage, cache_folder, to_path
from denoise_core.storage.s3 import S3Storage

__all__ = [
    "BUNDLE_SUFFIX",
    "Entry",
    "Found",
    "LocalStorage",
    "S3Storage",
    "Selection",
    "Storage",
    "StorageOptions",
    "absolute",
    "cache_folder",
    "expand",
    "is_bundle",
    "is_hidden",
    "join",
    "path_problem",
    "printable",
    "storage_for",
    "to_path",
]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def storage_for(uri: str, options: StorageOptions | None = None) -> Storage:
    """Choose the backend of a URI; another scheme than `s3://` and `file://` is a `UsageError`."""
    scheme = _SCHEME.match(uri)
    if scheme is None or scheme[1].lower() == "file":
        return LocalStorage()
    if scheme[1] == "s3":
        return S3Storage(options or StorageOptions())
    raise UsageError(f"{uri}: got {scheme[0]}; expected a local path, file:// or s3://")


def join(root: str, *parts: str) -> str:
    """Append relative, '/'-separated parts to a URI; a part that could leave the root, or that no
    file system and table can hold (control characters, broken UTF-8), is a `UsageError`."""
    for part in parts:
        if problem := path_problem(part):
            raise UsageError(f"{printable(part)!r} cannot be put below {root}: {problem}")
    root = to_path(root) if root.startswith("file://") else root
    return "/".join((root.rstrip("/"), *parts)) or "/"


def absolute(uri: str) -> str:
    """Return a local URI as an absolute path, since workers have other working directories.

    Other URIs come back as they are.
    """
    return os.path.abspath(to_path(uri)) if isinstance(storage_for(uri), LocalStorage) else uri


def expand(
    inputs: Sequence[str],
    options: StorageOptions | None = None,
    *,
    recursive: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[Found]:
    """Stream what INPUTs stand for: files, folders, globs ('**' crosses folders), S3 likewise.

    Paths are relative to the folder, or to the part of a glob before its first wildcard. What a
    name says literally goes before what it means as a glob. A tuple tells of a file or sub-folder
    that cannot be listed; an INPUT that stands for nothing at all raises `ObjectNotFound`.
    """
    selection = Selection(recursive=recursive, include=tuple(include), exclude=tuple(exclude))
    for text in inputs:
        storage, uri = storage_for(text, options), to_path(text)
        path = uri.removeprefix("s3://").partition("/")[2] if "://" in uri else uri
        if top := bundle_above(path.rstrip("/")):
            raise UsageError(
                f"INPUT {uri} lies inside {top}, which is one image: name that folder itself"
            )
        try:
            yield from storage.walk(uri, selection)
            continue
        except ObjectNotFound:
            if not MAGIC.search(uri):
                raise
        yield from _walk_glob(storage, uri, selection)


def _walk_glob(storage: Storage, uri: str, selection: Selection) -> Iterator[Found]:
    root, slash, _ = MAGIC.split(uri, maxsplit=1)[0].rpartition("/")
    pattern = tuple(uri[len(root + slash) :].strip("/").split("/"))
    nothing = True
    for found in storage.walk(root or slash or ".", replace(selection, pattern=pattern)):
        nothing = False
        yield found
    if nothing:
        raise ObjectNotFound(f"{uri}: no file matches; check the pattern, --include and --exclude")
