"""One contract for every storage, then what is special to local disk, to S3 and to INPUTs."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from flaky import FlakyProxy

from denoise_core.errors import (
    AccessDenied,
    ImageTimeout,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
    UsageError,
)
from denoise_core.storage import (
    Entry,
    LocalStorage,
    S3Storage,
    Selection,
    Storage,
    StorageOptions,
    expand,
    join,
    storage_for,
)
from denoise_core.storage import local as local_module
from denoise_core.storage import s3 as s3_module
from denoise_core.storage.arrow import FolderlessHandler, arrow_s3

ODD_NAMES = (
    "with space.png",
    "grüße-日本.png",
    "a#b?c=d.png",
    "100%25 + more.png",
    "<b>bold<_b>.png",
    "quote'\"&.png",
)
QUICK = StorageOptions(max_attempts=1, connect_timeout_s=2, read_timeout_s=10)


class StorageContract:
    """What every backend does; a subclass gives `root`, an empty place to write to."""

    @pytest.fixture
    def root(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def storage(self, root: str) -> Storage:
        return storage_for(root, StorageOptions(max_attempts=2))

    def fill(self, storage: Storage, root: str, *paths: str) -> None:
        for path in paths:
            storage.write(join(root, path), path.encode())

    def paths(self, found: Iterator[Any]) -> set[str]:
        return {entry.path for entry in found}

    def test_writes_and_reads(self, storage: Storage, root: str) -> None:
        uri = join(root, "new", "folders", "a.bin")
        storage.write(uri, b"first")
        storage.write(uri, memoryview(b"second one"))
        assert storage.read(uri) == b"second one"
        storage.write(uri, b"")
        assert storage.read(uri) == b""

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names_come_back(self, storage: Storage, root: str, name: str) -> None:
        path = f"folder {name}/{name}"
        storage.write(join(root, path), b"x")
        (entry,) = storage.list(root)
        assert entry.path == path
        assert storage.read(entry.uri) == b"x"
        assert storage.stat(entry.uri) == Entry(entry.uri, name, 1, entry.stamp)

    def test_list_streams(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png", "b.png")
        assert isinstance(storage.list(root), types.GeneratorType)

    def test_list_recursive_or_not(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png", "sub/b.png", "sub/deep/c.png")
        assert self.paths(storage.list(root)) == {"a.png", "sub/b.png", "sub/deep/c.png"}
        assert self.paths(storage.list(root, recursive=False)) == {"a.png"}
        assert self.paths(storage.list(join(root, "sub"))) == {"b.png", "deep/c.png"}
        assert self.paths(storage.list(join(root, "sub") + "/")) == {"b.png", "deep/c.png"}

    def test_list_skips_hidden(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png", ".b.png", ".state/c.png", "sub/.d.png")
        assert self.paths(storage.list(root)) == {"a.png"}
        assert self.paths(storage.list(join(root, ".state"))) == {"c.png"}

    def test_list_does_not_mix_up_prefixes(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "sub/a.png", "sub-2/b.png", "sub.png")
        assert self.paths(storage.list(join(root, "sub"))) == {"a.png"}

    def test_list_of_one_file(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "sub/a.png", "sub/a.png.txt")
        (entry,) = storage.list(join(root, "sub/a.png"))
        assert (entry.path, entry.size) == ("a.png", len("sub/a.png"))

    def test_folder_of_folders_is_not_missing(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "sub/deep/c.png")
        assert self.paths(storage.list(join(root, "sub"), recursive=False)) == set()

    def test_stat_and_list_agree_on_the_fingerprint(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png")
        (entry,) = storage.list(root)
        same = storage.stat(entry.uri)
        assert same is not None
        assert same.fingerprint == entry.fingerprint
        storage.write(entry.uri, b"other content")
        other = storage.stat(entry.uri)
        assert other is not None
        assert other.fingerprint != entry.fingerprint

    def test_what_is_not_there(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "sub/a.png")
        missing = join(root, "missing.png")
        assert storage.stat(missing) is None
        assert storage.stat(join(root, "sub")) is None
        calls: list[Callable[[], object]] = [
            lambda: storage.read(missing),
            lambda: storage.read_range(missing, 0, 1),
            lambda: storage.open(missing).read(),
            lambda: list(storage.list(missing)),
        ]
        for call in calls:
            with pytest.raises(ObjectNotFound, match=r"missing\.png: there is no such") as caught:
                call()
            assert_one_sentence(caught.value)

    def test_ranges(self, storage: Storage, root: str) -> None:
        uri = join(root, "a.bin")
        storage.write(uri, b"0123456789")
        assert storage.read_range(uri, 0, 10) == b"0123456789"
        assert storage.read_range(uri, 3, 4) == b"3456"
        assert storage.read_range(uri, 8, 100) == b"89"
        assert storage.read_range(uri, 10, 5) == b""
        assert storage.read_range(uri, 50, 5) == b""
        assert storage.read_range(uri, 5, 0) == b""

    def test_open_reads_like_a_file(
        self, storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_module, "BLOCK", 1000)
        monkeypatch.setattr(s3_module, "CACHED_BLOCKS", 3)
        chance = random.Random(7)
        data = chance.randbytes(20_500)
        uri = join(root, "a.bin")
        storage.write(uri, data)
        with storage.open(uri) as file:
            assert file.seekable()
            assert file.seek(0, io.SEEK_END) == len(data)
            assert file.read(5) == b""
            for _ in range(60):
                start, length = chance.randrange(len(data) + 50), chance.randrange(4000)
                file.seek(start)
                assert file.read(length) == data[start : start + length]
            file.seek(-100, io.SEEK_END)
            assert file.read() == data[-100:]
            file.seek(0)
            assert file.read() == data

    def test_upload(self, storage: Storage, root: str, tmp_path: Path) -> None:
        source = tmp_path / "large source.bin"
        source.write_bytes(b"abc" * 100_000)
        for _ in range(2):  # the second time over the first
            storage.upload(source, join(root, "sub/large.bin"))
            assert source.exists()
        source.unlink()
        assert storage.read(join(root, "sub/large.bin")) == b"abc" * 100_000
        assert self.paths(storage.list(root)) == {"sub/large.bin"}
        with pytest.raises(ObjectNotFound, match=r"large source\.bin"):
            storage.upload(source, join(root, "again.bin"))
        assert storage.stat(join(root, "again.bin")) is None

    def test_create_is_for_one(
        self, storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_module, "SETTLE_S", 5.0)
        uri = join(root, "state/lock")
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: storage.create(uri, b"run %d" % i), range(8)))
        assert won.count(True) == 1
        assert storage.read(uri) == b"run %d" % won.index(True)
        assert not storage.create(uri, b"run 9")
        storage.delete(uri)
        monkeypatch.setattr(s3_module, "SETTLE_S", 0.0)
        assert storage.create(uri, b"run 9")
        assert self.paths(storage.list(root)) == {"state/lock"}

    def test_delete(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png", "b.png")
        storage.delete(join(root, "a.png"))
        storage.delete(join(root, "a.png"))
        assert self.paths(storage.list(root)) == {"b.png"}

    def test_clear(self, storage: Storage, root: str) -> None:
        kept = {"work.png", "work-2/a", ".state/works", ".state/b"}
        gone = (".state/work/a", ".state/work/sub/.tmp-b", ".state/work/c.zarr/0/0")
        self.fill(storage, root, *kept, *gone)
        for _ in range(2):
            storage.clear(root, ".state/work")
            assert self.paths(storage.tree(root)) == kept

    def test_a_pickle_holds_no_secret(
        self, storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fill(storage, root, "a.png")  # the client exists now
        copied = pickle.loads(pickled := pickle.dumps(storage))
        assert copied == storage
        assert copied.read(join(root, "a.png")) == b"a.png"
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            if secret := os.environ.get(name):
                assert secret.encode() not in pickled
                assert secret not in repr(storage)

    def test_expand(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png", "B.PNG", "c.tif", "d1/a.png", "d2/a.png", "d2/e/f.png")

        def found(*inputs: str, **selection: Any) -> list[str]:
            uris = [join(root, each) if each else root for each in inputs]
            options = StorageOptions(max_attempts=2)
            return sorted(each.path for each in entries(expand(uris, options, **selection)))

        everything = ["B.PNG", "a.png", "c.tif", "d1/a.png", "d2/a.png", "d2/e/f.png"]
        assert found("") == everything
        assert found("", recursive=False) == ["B.PNG", "a.png", "c.tif"]
        assert found("", include=["*.png"]) == [each for each in everything if each != "c.tif"]
        assert found("", include=["*.png"], exclude=["d2/*", "B*"]) == ["a.png", "d1/a.png"]
        assert found("d?/a.png") == ["d1/a.png", "d2/a.png"]
        assert found("*.png") == ["a.png"]
        assert found("*.[pt][ni][gf]") == ["a.png", "c.tif"]
        assert found("**/a.png") == ["a.png", "d1/a.png", "d2/a.png"]
        assert found("d*") == ["d1/a.png", "d2/a.png", "d2/e/f.png"]
        assert found("d*", recursive=False) == ["d1/a.png", "d2/a.png"]
        assert found("d2/*") == ["a.png", "e/f.png"]
        assert found("a.png", "d1/a.png") == ["a.png", "a.png"]

    def test_expand_takes_names_literally_first(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "photo [1].png", "photo 1.png", "set [a]/x.png")
        for text, path in (("photo [1].png", "photo [1].png"), ("set [a]", "x.png")):
            assert [each.path for each in entries(expand([join(root, text)]))] == [path]

    def test_expand_of_nothing(self, storage: Storage, root: str) -> None:
        self.fill(storage, root, "a.png")
        for text in ("nothing", "*.jpg", "no?/*.png"):
            with pytest.raises(ObjectNotFound, match=r"there is no such|no file matches") as caught:
                list(expand([join(root, text)], QUICK))
            assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("*.png", "Dr.Smith 1.png v1.0/Raw/A.PNG"),
        ("*.Png", "Dr.Smith 1.png v1.0/Raw/A.PNG"),
        ("*png", "Dr.Smith 1.png v1.0/Raw/A.PNG"),
        ("*.TIF*", "Dr.smith 2.tif v1.0/raw.tiff"),
        ("Dr.Smith*", "Dr.Smith 1.png"),
        ("v1.0/Raw*", "v1.0/Raw/A.PNG"),
        ("**/*.png", "Dr.Smith 1.png v1.0/Raw/A.PNG"),
        ("v1.0/**/*.tif*", "v1.0/raw.tiff"),
        ("**/Raw/**/*.png", "v1.0/Raw/A.PNG"),
        ("v1.0**/*", "v1.0/Raw/A.PNG v1.0/raw.tiff"),
    ],
)
def test_patterns_on_paths(pattern: str, taken: str) -> None:
    """Seen: a capital behind the pattern's last dot chose the wrong files."""
    paths = ("Dr.Smith 1.png", "Dr.smith 2.tif", "v1.0/Raw/A.PNG", "v1.0/raw.tiff")
    expected = [path for path in paths if path in taken]
    assert list(filter(Selection(include=(pattern,)).takes, paths)) == expected
    assert [p for p in paths if not Selection(exclude=(pattern,)).takes(p)] == expected


def entries(found: Iterator[Any]) -> list[Entry]:
    everything = list(found)
    assert all(isinstance(each, Entry) for each in everything), everything
    return everything


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


class TestLocal(StorageContract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path / "root 1")

    @pytest.fixture(autouse=True)
    def _make_root(self, root: str) -> None:
        Path(root).mkdir()

    def test_umask_and_no_other_file(self, storage: Storage, root: str, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"x")
        (tmp_path / "source").chmod(0o600)
        storage.write(join(root, "a"), b"x")
        storage.upload(tmp_path / "source", join(root, "b"))
        storage.create(join(root, "c"), b"x")
        (Path(root) / "plain").write_bytes(b"x")
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in Path(root).iterdir()}
        assert modes == dict.fromkeys(("a", "b", "c", "plain"), modes["plain"])

    @pytest.mark.parametrize(
        ("number", "kind", "words"),
        [
            (errno.ENOSPC, StorageUnavailable, "no space is left"),
            (errno.EROFS, AccessDenied, "read-only"),
            (errno.EIO, StorageUnavailable, "Input/output error"),
            (errno.EINVAL, StorageError, "refuses the name; rename the file"),
            (errno.EILSEQ, StorageError, "refuses the name; rename the file"),
            (errno.EFBIG, StorageError, "choose another output"),
        ],
    )
    def test_a_failed_write_leaves_nothing(
        self,
        root: str,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        kind: type[StorageError],
        words: str,
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(number, os.strerror(number))

        storage = LocalStorage()
        storage.write(join(root, "a.png"), b"old")
        monkeypatch.setattr(local_module.os, "fsync", fail)
        for write in (storage.write, storage.create):
            with pytest.raises(kind, match=words) as caught:
                write(join(root, "a.png"), b"new")
            assert type(caught.value) is kind
            assert_one_sentence(caught.value)
        assert os.listdir(root) == ["a.png"]
        assert storage.read(join(root, "a.png")) == b"old"

    def test_a_killed_write_leaves_nothing(self, root: str) -> None:
        code = (
            "import os, sys; from denoise_core.storage import LocalStorage\n"
            "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
            "LocalStorage().write(sys.argv[1], bytes(100_000))"
        )
        done = subprocess.run([sys.executable, "-c", code, f"{root}/a.png"], check=False)
        assert done.returncode == -9
        assert os.listdir(root) == []

    def test_without_nameless_files(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(local_module.os, "O_TMPFILE")
        LocalStorage().write(join(root, "a"), b"x")
        assert LocalStorage().create(join(root, "b"), b"x")
        assert sorted(os.listdir(root)) == ["a", "b"]

    def test_without_hard_links(
        self, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EPERM, "no links here")

        (tmp_path / "source").write_bytes(b"x")
        monkeypatch.delattr(local_module.os, "O_TMPFILE")
        monkeypatch.setattr(local_module.os, "link", refuse)
        assert LocalStorage().create(join(root, "a"), b"x")
        assert not LocalStorage().create(join(root, "a"), b"y")
        LocalStorage().upload(tmp_path / "source", join(root, "b"))
        assert sorted(os.listdir(root)) == ["a", "b"]

    def test_names_that_a_path_cannot_be(self, root: str) -> None:
        (Path(root) / "file").write_bytes(b"x")
        storage = LocalStorage()
        with pytest.raises(StorageError, match="part of this path is a file"):
            storage.write(join(root, "file/a.png"), b"x")
        with pytest.raises(StorageError, match="longer than this file system allows"):
            storage.write(join(root, "n" * 300), b"x")
        with pytest.raises(StorageError, match="is a folder; expected a file"):
            storage.read(root)

    def test_links(self, root: str, tmp_path: Path) -> None:
        base = Path(root)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "x.png").write_bytes(b"x")
        (base / "sub").mkdir()
        (base / "a.png").write_bytes(b"x")
        (base / "linked").symlink_to(tmp_path / "elsewhere")
        (base / "sub" / "up").symlink_to(base)
        (base / "self").symlink_to("self")
        (base / "gone.png").symlink_to("nowhere")
        os.mkfifo(base / "pipe")
        (base / "line\nbreak.png").write_bytes(b"x")
        with open(os.fsencode(root) + b"/latin-\xe9.png", "wb"):
            pass
        found = list(expand([root], recursive=True))
        assert {each.path for each in found if isinstance(each, Entry)} == {"a.png", "linked/x.png"}
        problems = dict(each for each in found if not isinstance(each, Entry))
        reasons = {os.path.basename(uri): str(why).split(": ")[1] for uri, why in problems.items()}
        assert reasons == {
            "self": "is a symbolic link that leads back to itself",
            "gone.png": "is a link to something that is not there",
            "pipe": "is a pipe, socket or device; expected a file",
            "line\\nbreak.png": "it has control characters or is not UTF-8; rename it",
            "latin-\\udce9.png": "it has control characters or is not UTF-8; rename it",
        }
        assert all(uri.encode() and error for uri, error in problems.items())
        with pytest.raises(StorageError):
            list(LocalStorage().list(root))

    @pytest.mark.parametrize("link", [".state/work/x/y", ".state/work", ".state"])
    def test_clear_enters_no_link(self, root: str, tmp_path: Path, link: str) -> None:
        (tmp_path / "home/work/x").mkdir(parents=True)
        (tmp_path / "home/work/x/thesis.tex").write_bytes(b"x")
        (tmp_path / "linked").symlink_to(root)
        (Path(root) / link).parent.mkdir(parents=True, exist_ok=True)
        (Path(root) / link).symlink_to(tmp_path / "home")
        # An OUT that is a link itself is the user's own word.
        LocalStorage().clear(str(tmp_path / "linked"), ".state/work")
        assert (tmp_path / "home/work/x/thesis.tex").exists()
        assert (Path(root) / ".state/work/x").exists() == (link == ".state")

    def test_clear_tells_what_it_cannot_remove(self) -> None:
        with as_ordinary_user() as folder:
            (folder / "work/locked").mkdir(parents=True)
            (folder / "work/locked/a").write_bytes(b"x")
            (folder / "work/locked").chmod(0o500)
            with pytest.raises(AccessDenied, match="permission denied"):
                LocalStorage().clear(str(folder), "work")
            (folder / "work/locked").chmod(0o700)

    def test_what_is_excluded_is_no_problem(self, root: str) -> None:
        (Path(root) / "gone.png").symlink_to("nowhere")
        assert list(expand([root], exclude=["gone*"])) == []

    def test_permissions(self) -> None:
        with as_ordinary_user() as folder:
            (folder / "a.png").write_bytes(b"x")
            (folder / "b.png").write_bytes(b"x")
            (folder / "locked").mkdir()
            (folder / "b.png").chmod(0)
            (folder / "locked").chmod(0)
            found = list(expand([str(folder)]))
            ((uri, error),) = [each for each in found if not isinstance(each, Entry)]
            assert uri == str(folder / "locked")
            assert isinstance(error, AccessDenied)
            for call in (LocalStorage().read, LocalStorage().open):
                with pytest.raises(AccessDenied, match=r"b\.png: permission denied"):
                    call(str(folder / "b.png"))
            with pytest.raises(AccessDenied, match="permission denied"):
                LocalStorage().write(str(folder / "locked" / "c.png"), b"x")
            with pytest.raises(AccessDenied, match="permission denied"):
                list(expand([str(folder / "locked")]))
            (folder / "locked").chmod(0o700)

    def test_many_names_stream(self, root: str) -> None:
        for number in range(20_000):
            os.close(os.open(f"{root}/{number}", os.O_CREAT))
        tracemalloc.start()
        try:
            assert sum(1 for _ in LocalStorage().walk(root, Selection())) == 20_000
            assert tracemalloc.get_traced_memory()[1] < 500_000  # 25 bytes for each name
        finally:
            tracemalloc.stop()

    def test_globs_enter_only_what_may_match(self, root: str) -> None:
        for path in ("in/a.png", "out/b.png", "in/deep/c.png"):
            LocalStorage().write(join(root, path), b"x")
        (Path(root) / "out" / "gone").symlink_to("nowhere")
        assert [each.path for each in entries(expand([f"{root}/i*/*.png"]))] == ["in/a.png"]

    def test_relative_paths_and_file_uris(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root)
        LocalStorage().write("a b.png", b"x")
        uri = f"{root}/a b.png"
        as_uri = Path(uri).as_uri()
        for text in (
            "a b.png",
            ".",
            "*.png",
            as_uri,
            Path(root).as_uri(),
            f"file://{root}/../*1/*.png",
        ):
            (entry,) = entries(expand([text]))
            assert os.path.samefile(entry.uri, uri)
            assert os.path.isabs(entry.uri)
        assert storage_for(as_uri).read(as_uri) == b"x"
        assert join(Path(root).as_uri(), "a b.png") == uri
        with pytest.raises(UsageError, match="got the host"):
            LocalStorage().read("file://server/share")


class TestS3(StorageContract):
    @pytest.fixture
    def root(self, s3_server: Any) -> str:
        return join(s3_server.make_bucket(), "some folder")

    def test_at_the_root_of_a_bucket(self, s3_server: Any) -> None:
        bucket = s3_server.make_bucket()
        storage = storage_for(bucket)
        assert list(storage.list(bucket)) == []
        storage.write(join(bucket, "a.png"), b"x")
        assert [each.path for each in storage.list(bucket)] == ["a.png"]
        assert [each.path for each in entries(expand([f"{bucket}/*.png"]))] == ["a.png"]
        with pytest.raises(UsageError, match="expected s3://bucket/key"):
            storage.write(bucket, b"x")
        with pytest.raises(UsageError, match="bucket cannot be a pattern"):
            list(expand(["s3://test*/a.png"], QUICK))

    def test_many_pages(self, s3_server: Any) -> None:
        bucket = s3_server.make_bucket()
        for number in range(2_100):
            (s3_server.root / bucket[5:] / f"{number}.png").touch()
        assert len({each.path for each in storage_for(bucket).list(bucket)}) == 2_100

    def test_wrong_keys(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        planted = "planted-secret-0123456789"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", planted)
        self.refused(root, AccessDenied, "access denied; check AWS_ACCESS_KEY_ID", planted)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN012345678")
        self.refused(root, AccessDenied, "access denied; check AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")

    def test_no_keys(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        self.refused(root, AccessDenied, "no usable S3 credentials")

    def test_pyarrow_deletes_a_folder_at_once_and_whole(self, s3_server: Any) -> None:
        root = s3_server.make_bucket()
        storage = storage_for(root)
        for name in ("run/one/a", "run/one/b", "run/two/a"):
            storage.write(join(root, name), b"x")
        started = time.monotonic()
        arrow_s3(None).delete_dir(join(root, "run/one").removeprefix("s3://"))
        # A server that refuses an object for the folder is asked again and again, for two minutes.
        assert time.monotonic() - started < 60
        assert [entry.path for entry in storage.list(root)] == ["run/two/a"]

    @pytest.mark.parametrize("path", ["../../escaped", "a/../../b", "a\nb", "/etc/passwd"])
    def test_pyarrow_lists_no_key_that_leads_elsewhere(self, path: str) -> None:
        def listing(_: Any) -> list[Any]:
            return [pyarrow.fs.FileInfo(f"bucket/run/{each}") for each in ("checkpoint", path)]

        handler = FolderlessHandler(None)
        handler.__dict__["_s3"] = types.SimpleNamespace(get_file_info=listing)
        system = pyarrow.fs.PyFileSystem(handler)
        with pytest.raises(OSError, match=r"^s3://bucket/run/.*: it has"):
            system.get_file_info(pyarrow.fs.FileSelector("bucket/run", recursive=True))

    def test_missing_bucket(self, s3_server: Any, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"x")
        storage = S3Storage(QUICK)
        calls: list[Callable[[], object]] = [
            lambda: list(storage.list("s3://no-such-bucket/prefix")),
            lambda: storage.read("s3://no-such-bucket/a"),
            lambda: storage.write("s3://no-such-bucket/a", b"x"),
            lambda: storage.create("s3://no-such-bucket/a", b"x"),
            lambda: storage.upload(tmp_path / "f", "s3://no-such-bucket/a"),
            lambda: list(expand(["s3://no-such-bucket/*.png"], QUICK)),
        ]
        for call in calls:
            with pytest.raises(ObjectNotFound, match="there is no such bucket") as caught:
                call()
            assert_one_sentence(caught.value)

    def test_dead_endpoint(self, s3_server: Any) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
            host = f"127.0.0.1:{taken.getsockname()[1]}"
            options = StorageOptions(s3_endpoint=f"http://{host}", max_attempts=1)
            self.refused("s3://b", StorageUnavailable, f"{host} did not answer", options=options)

    def test_unknown_host(self, s3_server: Any) -> None:
        options = StorageOptions(s3_endpoint="http://nowhere.invalid", max_attempts=1)
        self.refused("s3://b", StorageUnavailable, "nowhere.invalid did not", options=options)

    def test_a_silent_server_is_told_of_while_it_is_tried(
        self, s3_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)
        options = StorageOptions(s3_endpoint="http://127.0.0.1:1", max_attempts=6)
        with pytest.raises(StorageUnavailable, match="after 6 tries"):
            S3Storage(options).read("s3://b/a")
        (record,) = caplog.records
        assert "S3 at 127.0.0.1:1 does not answer" in record.message

    def test_what_a_signal_handler_raises_ends_the_tries(
        self, s3_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The end of an image's time comes as an alarm, whose exception botocore wraps."""

        def alarmed(*_: Any, **__: Any) -> None:
            raise ImageTimeout("gave up")

        monkeypatch.setattr("urllib3.connectionpool.HTTPConnectionPool.urlopen", alarmed)
        options = StorageOptions(s3_endpoint="http://127.0.0.1:1", max_attempts=6)
        with pytest.raises(ImageTimeout, match="gave up"):
            S3Storage(options).read("s3://b/a")

    def test_pyarrow_asks_the_same_server(
        self, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one.invalid")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two.invalid")
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        handler = FolderlessHandler(None)
        assert (handler.endpoint, handler.region) == ("http://two.invalid", "eu-north-1")
        assert FolderlessHandler("http://three.invalid").endpoint == "http://three.invalid"

    def test_invalid_bucket_name(self, s3_server: Any) -> None:
        self.refused("s3://b ü", StorageError, "not a valid bucket")

    def refused(
        self,
        root: str,
        kind: type[StorageError],
        words: str,
        secret: str = "",
        *,
        options: StorageOptions = QUICK,
    ) -> None:
        storage = S3Storage(options)
        for call in (lambda: list(storage.list(root)), lambda: storage.read(join(root, "a"))):
            with pytest.raises(kind, match=words) as caught:
                call()
            assert_one_sentence(caught.value)
            assert not secret or secret not in str(caught.value)

    @pytest.mark.parametrize("fault", ["503", "429", "500", "cut", "drop", "reset", "slow"])
    def test_faults_are_survived(self, s3_server: Any, root: str, fault: str) -> None:
        S3Storage().write(join(root, "a.bin"), b"0123456789" * 100)
        with FlakyProxy(s3_server.endpoint, [fault]) as proxy:
            storage = S3Storage(StorageOptions(s3_endpoint=proxy.endpoint, max_attempts=3))
            assert storage.read(join(root, "a.bin")) == b"0123456789" * 100
            assert proxy.faults == []
            if fault != "cut":
                proxy.faults = [fault]
                storage.write(join(root, "b.bin"), b"new")
                assert proxy.faults == []
                assert storage.read(join(root, "b.bin")) == b"new"

    @pytest.mark.parametrize("fault", ["503", "reset"])
    def test_each_request_has_its_tries_however_many_failed_before(
        self, s3_server: Any, root: str, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """boto3 gives up once some 35 retries of a process have been in vain."""
        monkeypatch.setattr(s3_module.random, "uniform", lambda *_: 0.0)
        monkeypatch.setattr("botocore.retries.standard.random.random", lambda: 0.0)
        S3Storage().write(join(root, "a.bin"), b"0123456789")
        faults = [fault, fault, fault, ""] * 60
        with FlakyProxy(s3_server.endpoint, faults) as proxy:
            storage = S3Storage(StorageOptions(s3_endpoint=proxy.endpoint, max_attempts=4))
            for _ in range(60):
                assert storage.read(join(root, "a.bin")) == b"0123456789"
            assert (proxy.faults, proxy.met[fault]) == ([], 180)

    @pytest.mark.parametrize("fault", ["503", "429", "cut"])
    def test_faults_that_stay_are_told(self, s3_server: Any, root: str, fault: str) -> None:
        S3Storage().write(join(root, "a.bin"), b"0123456789" * 100)
        with FlakyProxy(s3_server.endpoint, [fault] * 9) as proxy:
            storage = S3Storage(StorageOptions(s3_endpoint=proxy.endpoint, max_attempts=2))
            with pytest.raises(StorageUnavailable, match="after 2 tries") as caught:
                storage.read(join(root, "a.bin"))
            assert_one_sentence(caught.value)
            assert len(proxy.faults) == 7

    def test_a_server_that_knows_if_none_match(
        self, s3_server: Any, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_sleep(_: float) -> None:
            raise AssertionError("waits although the server told who was first")

        monkeypatch.setattr(s3_module.time, "sleep", no_sleep)
        uri = join(root, "lock")
        with FlakyProxy(s3_server.endpoint, [], conditional=True) as proxy:
            storage = S3Storage(StorageOptions(s3_endpoint=proxy.endpoint, max_attempts=1))
            assert storage.create(uri, b"run 1")
            monkeypatch.setattr(S3Storage, "stat", lambda *_: None)  # looked before the other wrote
            assert not storage.create(uri, b"run 2")
        assert S3Storage().read(uri) == b"run 1"

    def test_keys_that_no_path_can_be(self) -> None:
        for path in ("../up.png", "a//b.png", "line\nbreak.png"):
            item = {"Key": path, "Size": 1, "ETag": '"e"'}
            found = s3_module._s3_found(item, f"s3://b/{path}", path)
            assert isinstance(found, tuple)
            assert isinstance(found[1], StorageError)


@contextmanager
def as_ordinary_user() -> Iterator[Path]:
    """Give a folder and drop root's right to ignore permissions while the block runs."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        local_module.shutil.rmtree(folder)


def test_storage_for() -> None:
    assert storage_for("/data/a.png") == LocalStorage()
    assert storage_for("relative/a:b.png") == LocalStorage()
    assert storage_for("s3://b/k", QUICK) == S3Storage(QUICK)
    for uri in ("gs://b/k", "http://host/a.png", "S3://b/k"):
        with pytest.raises(UsageError, match="expected a local path, file:// or s3://"):
            storage_for(uri)


def test_join() -> None:
    assert join("/out/", "images", "a/b c.png") == "/out/images/a/b c.png"
    assert join("s3://bucket", "a.png") == "s3://bucket/a.png"
    assert join("/", "a") == "/a"
    assert join("out", "..a/b..") == "out/..a/b.."
    leaving = ("..", "../a", "a/../b", "a/..", "/a", "a//b", "", ".", "./a", "a/")
    for part in (*leaving, "a\nb", "\x00", "\udce9"):
        with pytest.raises(UsageError, match="cannot be put below /out"):
            join("/out", part)


@pytest.mark.parametrize("url", ["http://key:planted@host", "host:9000", "ftp://host", "http://"])
def test_endpoints_that_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="endpoint is not valid") as caught:
        StorageOptions(s3_endpoint=url)
    assert "planted" not in str(caught.value)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="max_attempts is 0; expected at least 1"):
        StorageOptions(max_attempts=0)


def test_import_is_light() -> None:
    code = "import sys, denoise_core.storage; print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
