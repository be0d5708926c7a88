"""Files of a local or mounted file system: whole, on the disk, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from denoise_core.errors import (
    AccessDenied,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
    UsageError,
)
from denoise_core.storage.base import (
    Bundle,
    Entry,
    Found,
    Selection,
    Storage,
    is_bundle,
    path_problem,
    printable,
)

_COPY = 1 << 20  # bytes held while a large file is copied

_REFUSED_NAME = (
    "this file system refuses the name; rename the file (without ':' and the like) or choose "
    "another output"
)
_OS_ERRORS: dict[int, tuple[type[StorageError], str]] = {
    errno.ENOENT: (ObjectNotFound, "there is no such file or folder"),
    errno.ENOTDIR: (ObjectNotFound, "a part of this path is a file; expected a folder"),
    errno.EEXIST: (StorageError, "a part of this path is a file; expected a folder"),
    errno.EISDIR: (StorageError, "is a folder; expected a file"),
    errno.ELOOP: (ObjectNotFound, "is a symbolic link that leads back to itself"),
    errno.ENAMETOOLONG: (StorageError, "the name is longer than this file system allows"),
    errno.EINVAL: (StorageError, _REFUSED_NAME),
    errno.EILSEQ: (StorageError, _REFUSED_NAME),
    errno.EFBIG: (
        StorageError,
        "larger than this file system allows a file to be; choose another output",
    ),
    errno.EACCES: (AccessDenied, "permission denied; give this user the right, or choose another"),
    errno.EPERM: (AccessDenied, "not permitted; give this user the right, or choose another"),
    errno.EROFS: (AccessDenied, "the file system is read-only; choose another output"),
    errno.ENOSPC: (StorageUnavailable, "no space is left on this disk; free some and run again"),
    errno.EDQUOT: (StorageUnavailable, "the disk quota is used up; free some and run again"),
}
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class LocalStorage(Storage):
    """Files of this machine, or of a shared file system that all machines mount alike."""

    def walk(self, root: str, selection: Selection) -> Iterator[Found]:
        """See `Storage.walk`. Links to folders are followed, but never back to a folder above."""
        root = os.path.abspath(to_path(root))
        with os_errors(root):
            info = os.stat(root)
        name = os.path.basename(root)
        if stat.S_ISDIR(info.st_mode) and is_bundle(name) and not selection.pattern:
            if selection.takes(name):
                yield _bundle(root, name)
        elif stat.S_ISDIR(info.st_mode):
            yield from _walk_folder(root, selection)
        elif not stat.S_ISREG(info.st_mode):
            raise StorageError(f"{root}: is a pipe, socket or device; expected a file or a folder")
        elif selection.takes(name):
            yield _local_entry(root, name, info)

    def tree(self, root: str) -> Iterator[Entry]:
        """See `Storage.tree`."""
        root = os.path.abspath(to_path(root))
        nothing = True
        for found in _walk_folder(root, Selection(), whole=True):
            if isinstance(found, Entry):
                nothing = False
                yield found
            elif os.path.lexists(found[0]) or not isinstance(found[1], ObjectNotFound):
                raise found[1]
        if nothing:
            raise ObjectNotFound(f"{root}: there is no file in this folder")

    def stat(self, uri: str) -> Entry | None:
        """See `Storage.stat`."""
        path = os.path.abspath(to_path(uri))
        with os_errors(path), suppress(FileNotFoundError, NotADirectoryError):
            info = os.stat(path)
            if stat.S_ISREG(info.st_mode):
                return _local_entry(path, os.path.basename(path), info)
        return None

    def read(self, uri: str) -> bytes:
        """See `Storage.read`."""
        with os_errors(uri), open(to_path(uri), "rb") as file:
            return file.read()

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """See `Storage.read_range`."""
        with os_errors(uri), open(to_path(uri), "rb") as file:
            file.seek(start)
            return file.read(max(0, length))

    def open(self, uri: str) -> BinaryIO:
        """See `Storage.open`."""
        with os_errors(uri):
            return open(to_path(uri), "rb")

    def write(self, uri: str, data: bytes | memoryview) -> None:
        """See `Storage.write`: a nameless file in the same folder, fsync, os.replace."""
        path = to_path(uri)
        with os_errors(uri), _staged(path, lambda file: file.write(data)) as temp:
            os.replace(temp, path)

    def upload(self, local_path: str | os.PathLike[str], uri: str) -> None:
        """See `Storage.upload`: a second name for the same blocks where that is possible."""
        path = to_path(uri)
        with os_errors(os.fspath(local_path)), open(local_path, "rb") as source, os_errors(uri):
            os.fsync(source.fileno())
            temp = _hidden_name(path)
            try:
                os.link(os.path.realpath(local_path), temp)
            except OSError:  # another file system, or one without hard links
                with _staged(path, lambda file: shutil.copyfileobj(source, file, _COPY)) as copy:
                    os.replace(copy, path)
                return
            with _removed_on_error(temp):
                # Temporary files are 0600; the folder's mode knows the umask.
                os.chmod(temp, os.stat(os.path.dirname(temp)).st_mode & 0o666)
                os.replace(temp, path)

    def publish(
        self, uri: str, files: Iterable[tuple[str, bytes]], *, last: Sequence[str] = ()
    ) -> None:
        """See `Storage.publish`: a hidden folder beside it, filled, then renamed.

        A process that is killed may leave a hidden folder, which the next `publish` of the same
        URI removes.
        """
        path = os.path.abspath(to_path(uri))
        # Two at a time, a lost machine's and its successor's, never share a folder.
        mark = f".tmp-{hashlib.sha256(os.path.basename(path).encode()).hexdigest()[:16]}-"
        with os_errors(uri):
            temp = os.path.join(_cleaned(os.path.dirname(path), mark), mark + uuid.uuid4().hex)
            try:
                os.mkdir(temp)
                for name, data in files:
                    _fill(temp, name, data)
                _swap(temp, path)
            except BaseException:
                shutil.rmtree(temp, ignore_errors=True)
                raise

    def create(self, uri: str, data: bytes) -> bool:
        """See `Storage.create`: link(2) refuses a name that is taken, also on NFS."""
        path = to_path(uri)
        with os_errors(uri), _staged(path, lambda file: file.write(data)) as temp:
            try:
                os.link(temp, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_exclusively(path, data)
            finally:
                os.unlink(temp)
        return True

    def delete(self, uri: str) -> None:
        """See `Storage.delete`."""
        with os_errors(uri), suppress(FileNotFoundError):
            os.unlink(to_path(uri))

    def clear(self, root: str, path: str) -> None:
        """See `Storage.clear`: links in the folder go; one on the way to it is left alone."""
        top = os.path.abspath(to_path(root))
        folder = os.path.join(top, path)
        steps = [path, *map(str, PurePosixPath(path).parents)][:-1]  # without '.', which is `root`
        with os_errors(folder):
            if not any(os.path.islink(os.path.join(top, step)) for step in steps):
                shutil.rmtree(folder, onerror=_tell_unless_gone)


def _tell_unless_gone(_: object, __: str, raised: tuple[object, BaseException, object]) -> None:
    """Let `rmtree` go on where another process deletes or writes in the folder as well."""
    error = raised[1]
    if not (isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTEMPTY)):
        raise error


def _explain_os(error: OSError, uri: str) -> StorageError:
    kind, text = _OS_ERRORS.get(error.errno or 0, (StorageUnavailable, error.strerror or "failed"))
    return kind(f"{printable(uri)}: {text}")


@contextmanager
def os_errors(uri: str) -> Iterator[None]:
    """Turn the operating system's errors into one sentence about `uri`."""
    try:
        yield
    except OSError as error:
        raise _explain_os(error, uri) from None


def to_path(uri: str) -> str:
    """Return the path that a local URI stands for."""
    if not uri.lower().startswith("file://"):
        return uri
    parts = urlsplit(uri, allow_fragments=False)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{uri}: got the host {parts.netloc}; expected file:///path")
    return unquote(parts.path)


def cache_folder(name: str) -> Path:
    """Return this user's folder for what can be fetched or made again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "denoise-jobs" / name


def _local_entry(uri: str, path: str, info: os.stat_result) -> Entry:
    return Entry(uri, path, info.st_size, str(info.st_mtime_ns))


def _walk_folder(root: str, selection: Selection, *, whole: bool = False) -> Iterator[Found]:
    """Depth first, without recursion and without sorting: memory grows with folders, not files.

    `whole`: hidden files too, and those of bundles one by one.
    """
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        below, above = pending.pop()
        here = os.path.join(root, below) if below else root
        try:
            info = os.stat(here)
            if (info.st_dev, info.st_ino) in above:
                continue  # a link back: all below it is listed under its own name
            above |= {(info.st_dev, info.st_ino)}
            with os.scandir(here) as items:
                for item in items:
                    path = f"{below}/{item.name}" if below else item.name
                    if item.name.startswith(".") and not whole:
                        continue
                    if _is_folder(item):
                        if is_bundle(path) and not whole:
                            if selection.takes(path):
                                yield _bundle(item.path, path)
                        elif selection.enters(path):
                            pending.append((path, above))
                    elif selection.takes(path):
                        yield _look_at(item, path)
        except OSError as error:
            if not below:
                raise _explain_os(error, here) from None
            yield printable(here), _explain_os(error, here)


def _bundle(folder: str, path: str) -> Found:
    """The one entry of a bundle; a part of it that cannot be listed spoils all of it."""
    uri = printable(folder)
    if problem := path_problem(path):
        return uri, StorageError(f"{uri}: {problem}")
    bundle = Bundle()
    try:
        for found in _walk_folder(folder, Selection(), whole=True):
            if not isinstance(found, Entry):
                return uri, found[1]
            bundle.add(found)
    except StorageError as error:
        return uri, error
    return bundle.entry(folder, path)


def _is_folder(item: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # _look_at will meet it again and say so
        return item.is_dir()
    return False


def _look_at(item: os.DirEntry[str], path: str) -> Found:
    uri = printable(item.path)
    if problem := path_problem(path):
        return uri, StorageError(f"{uri}: {problem}")
    try:
        info = item.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and item.is_symlink():
            return uri, ObjectNotFound(f"{uri}: is a link to something that is not there")
        return uri, _explain_os(error, uri)
    if not stat.S_ISREG(info.st_mode):
        return uri, StorageError(f"{uri}: is a pipe, socket or device; expected a file")
    return _local_entry(item.path, path, info)


def _hidden_name(path: str) -> str:
    """Return an unused name in the folder of `path`, which is made where it is missing."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f".tmp-{uuid.uuid4().hex}")


@contextmanager
def _removed_on_error(temp: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.unlink(temp)
        raise


@contextmanager
def _staged(path: str, fill: Callable[[BinaryIO], object]) -> Iterator[str]:
    """Give the hidden name, beside `path`, of a whole file that is safe on the disk."""
    temp = _hidden_name(path)
    with _removed_on_error(temp):
        with _new_file(temp) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_nlink == 0:
                # src_dir_fd is not used, but makes Python call linkat(2), which follows the link.
                os.link(f"/proc/self/fd/{file.fileno()}", temp, src_dir_fd=file.fileno())
        yield temp


def _new_file(temp: str) -> BinaryIO:
    """Open a file that has no name until it is whole (Linux): not even SIGKILL leaves a part."""
    try:
        number = os.open(os.path.dirname(temp), os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (OSError, AttributeError):  # NFS and some others cannot; macOS has no such flag
        number = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    return os.fdopen(number, "wb")


def _cleaned(folder: str, mark: str) -> str:
    """Make a folder and remove what killed processes left in it under this mark."""
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if name.startswith(mark):
            # Under another name first: one who is still at work on it, cut off as it was, fails.
            doomed = os.path.join(folder, mark + uuid.uuid4().hex)
            with suppress(OSError):
                os.rename(os.path.join(folder, name), doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return folder


def _fill(folder: str, name: str, data: bytes) -> None:
    """Put one new file, safe on the disk, into a folder that nobody sees yet."""
    if problem := path_problem(name):
        raise UsageError(f"{printable(name)!r} cannot be put below {folder}: {problem}")
    path = os.path.join(folder, name)
    for parent in reversed(PurePosixPath(name).parents[:-1]):
        with suppress(FileExistsError):
            os.mkdir(os.path.join(folder, parent))
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _swap(temp: str, path: str) -> None:
    """Put the folder `temp` in the place of what is at `path`, then delete that."""
    for _ in range(10):  # another process may publish the same at the same time
        old = f"{temp}-old"
        with suppress(FileNotFoundError):
            os.rename(path, old)
        try:
            os.rename(temp, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                with suppress(OSError):
                    os.rename(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
            continue
        if os.path.isdir(old) and not os.path.islink(old):
            shutil.rmtree(old, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                os.unlink(old)
        return
    raise StorageUnavailable(f"{path}: is replaced by others all the time; run again")


def _create_exclusively(path: str, data: bytes) -> bool:
    """For file systems without hard links: exclusive, but seen half written for a moment."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True
