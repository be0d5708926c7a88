"""Objects of S3 or of a server that speaks its protocol, through boto3.

Owns the client of each process, retries, and the sentence for each refusal.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import mimetypes
import os
import random
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from denoise_core.errors import (
    AccessDenied,
    DenoiseError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
    UsageError,
)
from denoise_core.storage.base import (
    MAGIC,
    Bundle,
    Entry,
    Found,
    Selection,
    Storage,
    StorageOptions,
    bundle_above,
    check_endpoint,
    is_bundle,
    is_hidden,
    path_problem,
    printable,
)
from denoise_core.storage.local import os_errors

BLOCK = 1 << 20  # bytes of one cached piece of an open object: about what 10 ms can carry
CACHED_BLOCKS = 16  # per open object
PUTS_AT_ONCE = 8  # of the files of one folder that is published
SETTLE_S = 1.0  # longer than another creator needs from its stat to its put


class _RefusedError(StorageError):
    """A condition (If-Match, If-None-Match) did not hold."""


class _UnknownRequestError(StorageError):
    """The server does not know the request."""


class _RangeBeyondEndError(StorageError):
    """The object ends before the range begins."""


_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile or role) and the rights"
_CHANGED = "the object was changed by someone else at the same time; run again"
_REGION = "the bucket is in another region; set AWS_REGION"
_S3_ERRORS: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchBucket": (ObjectNotFound, "there is no such bucket; check its name and the endpoint"),
    "NoSuchKey": (ObjectNotFound, "there is no such object"),
    "404": (ObjectNotFound, "there is no such object or bucket"),
    "PreconditionFailed": (_RefusedError, _CHANGED),
    "ConditionalRequestConflict": (_RefusedError, _CHANGED),
    "412": (_RefusedError, _CHANGED),
    "InvalidRange": (_RangeBeyondEndError, "the range begins behind the object's end"),
    "416": (_RangeBeyondEndError, "the range begins behind the object's end"),
    "NotImplemented": (_UnknownRequestError, "the server cannot do this"),
    "InvalidObjectState": (AccessDenied, "the object is archived; restore it first"),
    "RequestTimeTooSkewed": (AccessDenied, "this machine's clock is wrong; set it"),
    "PermanentRedirect": (StorageError, _REGION),
    "AuthorizationHeaderMalformed": (StorageError, _REGION),
    "KeyTooLongError": (StorageError, "the key is longer than the 1024 bytes that S3 allows"),
}


# Tries without an answer after which a line says so.
TELL_AFTER = 4


@dataclass(frozen=True, slots=True)
class S3Storage(Storage):
    """Objects of S3 or of a server that speaks its protocol. Clients are per process, made late."""

    options: StorageOptions = field(default_factory=StorageOptions)

    def walk(self, root: str, selection: Selection) -> Iterator[Found]:
        """See `Storage.walk`. A root without '/' at its end is a folder first, then an object."""
        bucket, key = _split_s3(root)
        base = key if not key or key.endswith("/") else f"{key}/"
        whole = bool(key) and is_bundle(key) and not selection.pattern
        with self._s3(root) as client:
            items = (
                _below(client, bucket, base)
                if whole
                else _objects(client, bucket, base, selection=selection)
            )
            first = next(items, None)
            seen = first is not None
            if first is not None:
                items = itertools.chain((first,), items)
                if whole:
                    # Paths begin with the name of the bundle itself.
                    base = base[: base.rstrip("/").rfind("/") + 1]
                yield from _chosen(items, bucket, base, selection)
        if seen or not key or selection.pattern:
            return
        entry = None if key.endswith("/") else self.stat(root)
        if entry is None:
            raise ObjectNotFound(f"{root}: there is no such object or folder; got no key below it")
        if selection.takes(entry.path):
            yield entry

    def tree(self, root: str) -> Iterator[Entry]:
        """See `Storage.tree`."""
        bucket, key = _split_s3(root)
        base = f"{key.rstrip('/')}/" if key else ""
        nothing = True
        with self._s3(root) as client:
            for item in _below(client, bucket, base):
                if not item["Key"].endswith("/"):
                    nothing = False
                    yield _s3_entry(item, bucket, item["Key"][len(base) :])
        if nothing:
            raise ObjectNotFound(f"{root}: there is no object in this folder")

    def stat(self, uri: str) -> Entry | None:
        """See `Storage.stat`."""
        bucket, key = _split_s3(uri, key_needed=True)
        with suppress(ObjectNotFound), self._s3(uri) as client:
            found = client.head_object(Bucket=bucket, Key=key)
            size = found["ContentLength"]
            return Entry(uri, key.rstrip("/").rpartition("/")[2], size, _s3_stamp(found))
        return None

    def read(self, uri: str) -> bytes:
        """See `Storage.read`."""
        return self._get(uri)

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """See `Storage.read_range`."""
        return self._get(uri, start=start, length=length)

    def open(self, uri: str) -> BinaryIO:
        """See `Storage.open`; an object that changes while it is open raises."""
        entry = self.stat(uri)
        if entry is None:
            raise ObjectNotFound(f"{uri}: there is no such object")
        return io.BufferedReader(_ObjectReader(self, entry))

    def write(self, uri: str, data: bytes | memoryview) -> None:
        """See `Storage.write`: one put, which S3 publishes whole or not at all."""
        self._put(uri, bytes(data))

    def upload(self, local_path: str | os.PathLike[str], uri: str) -> None:
        """See `Storage.upload`: in parts, which are given up together on an error."""
        bucket, key = _split_s3(uri, key_needed=True)
        with os_errors(os.fspath(local_path)), self._s3(uri) as client:
            client.upload_file(os.fspath(local_path), bucket, key, ExtraArgs=_content_type(key))

    def publish(
        self, uri: str, files: Iterable[tuple[str, bytes]], *, last: Sequence[str] = ()
    ) -> None:
        """See `Storage.publish`; of the files in `last` readers find all or none of the root's.

        A process that is killed may leave objects without them; the next `publish` of the same URI
        replaces or deletes these.
        """
        root = uri.rstrip("/")

        def rank(name: str) -> tuple[int, int]:
            return -name.count("/"), last.index(name.rpartition("/")[2])

        old: set[str] = set()
        with suppress(ObjectNotFound):
            old = {entry.path for entry in self.tree(root)}
        markers = [name for name in old if name.rpartition("/")[2] in last]
        for name in sorted(markers, key=rank, reverse=True):
            self.delete(f"{root}/{name}")
        held: dict[str, bytes] = {}
        try:
            with _Puts(self) as puts:
                for name, data in files:
                    if problem := path_problem(name):
                        text = f"{printable(name)!r} cannot be put below {root}: {problem}"
                        raise UsageError(text)
                    if name.rpartition("/")[2] in last:
                        held[name] = data
                    else:
                        puts.add(f"{root}/{name}", data)
                    old.discard(name)
        except BaseException:
            # What is there is of no use without the rest, unless another has published it whole.
            with suppress(StorageError):
                if not any(self.stat(f"{root}/{name}") for name in last):
                    for entry in list(self.tree(root)):
                        self.delete(entry.uri)
            raise
        for name in old.difference(markers):
            self.delete(f"{root}/{name}")
        for name in sorted(held, key=rank):
            self.write(f"{root}/{name}", held[name])

    def create(self, uri: str, data: bytes) -> bool:
        """See `Storage.create`. Servers that ignore `If-None-Match` take a second put as well;
        there, the last of several creators wins, and all of them wait to see who it was."""
        if self.stat(uri) is not None:
            return False
        self._put_if_absent(uri, data)
        if self._put_if_absent(uri, data):
            time.sleep(SETTLE_S)
        with suppress(ObjectNotFound):
            return self.read(uri) == data
        return False

    def delete(self, uri: str) -> None:
        """See `Storage.delete`."""
        bucket, key = _split_s3(uri, key_needed=True)
        with self._s3(uri) as client:
            client.delete_object(Bucket=bucket, Key=key)

    def clear(self, root: str, path: str) -> None:
        """See `Storage.clear`; S3 has no links."""
        with suppress(ObjectNotFound):
            for entry in list(self.tree(f"{root.rstrip('/')}/{path}")):
                self.delete(entry.uri)

    def _put(self, uri: str, data: bytes, **conditions: str) -> None:
        bucket, key = _split_s3(uri, key_needed=True)
        with self._s3(uri) as client:
            client.put_object(Bucket=bucket, Key=key, Body=data, **_content_type(key), **conditions)

    def _put_if_absent(self, uri: str, data: bytes) -> bool:
        try:
            self._put(uri, data, IfNoneMatch="*")
        except _RefusedError:
            return False
        except _UnknownRequestError:
            self._put(uri, data)
        return True

    def _get(
        self, uri: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> bytes:
        if length is not None and length <= 0:
            return b""
        bucket, key = _split_s3(uri, key_needed=True)
        wanted = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}
        if etag:
            wanted["IfMatch"] = f'"{etag}"'
        with suppress(_RangeBeyondEndError), self._s3(uri) as client:
            return _get_whole(client, self.options.max_attempts, Bucket=bucket, Key=key, **wanted)
        return b""

    @contextmanager
    def _s3(self, uri: str) -> Iterator[Any]:
        """Give this process's client; turn what it raises into one sentence about `uri`."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            # The environment is part of the key, so that changed credentials make a new client.
            aws = hash(frozenset(i for i in os.environ.items() if i[0].startswith("AWS_")))
            yield _client(self.options, os.getpid(), aws)
        except (BotoCoreError, ClientError, Boto3Error) as error:
            # upload_file wraps the true error, which is then the context.
            cause = error.__context__ if isinstance(error, Boto3Error) else error
            raise _explain_s3(cause or error, uri, self.options) from None


def _explain_s3(error: BaseException, uri: str, options: StorageOptions) -> StorageError:
    """One sentence from facts of our own: a server's text may quote keys and signatures."""
    from botocore import exceptions as boto

    host = _s3_host(options)
    tries = f"after {options.max_attempts} tries"
    if isinstance(error, boto.ClientError):
        code = str(error.response.get("Error", {}).get("Code", "?"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind, text = _S3_ERRORS.get(code, (StorageError, "the request was refused"))
        if kind is StorageError and status in (401, 403):
            kind, text = AccessDenied, f"access denied; {_KEYS}"
        elif kind is StorageError and (status == 429 or status >= 500):
            kind, text = StorageUnavailable, f"the server is overloaded or failing {tries}"
        return kind(f"{uri}: {text} (S3 at {host} answered {code})")
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        text = f"S3 at {host} did not answer {tries}; check the network and --s3-endpoint"
        return StorageUnavailable(f"{uri}: {text} ({type(error).__name__})")
    if isinstance(error, boto.ParamValidationError):
        return StorageError(f"{uri}: is not a valid bucket and key; expected s3://bucket/key")
    if any(word in type(error).__name__ for word in ("Credential", "Token", "Profile", "Auth")):
        return AccessDenied(f"{uri}: no usable S3 credentials ({type(error).__name__}); {_KEYS}")
    return StorageError(
        f"{uri}: S3 at {host} failed ({type(error).__name__}); see the AWS_ settings"
    )


def server(options: StorageOptions) -> tuple[str | None, str]:
    """Return the endpoint, None for Amazon's own, and the region, as this process is told them."""
    import boto3

    named = options.region or os.environ.get("AWS_REGION")
    return _s3_endpoint(options), named or boto3.session.Session().region_name or "us-east-1"


def _s3_endpoint(options: StorageOptions) -> str | None:
    env = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    url = options.s3_endpoint or env
    return check_endpoint(url) if url else None


def _s3_host(options: StorageOptions) -> str:
    return urlsplit(_s3_endpoint(options) or "//amazonaws.com").netloc


@functools.lru_cache(maxsize=8)
def _client(options: StorageOptions, pid: int, environment: int) -> Any:
    """One thread-safe boto3 client per process, options and AWS_ environment."""
    import boto3
    from botocore.config import Config

    endpoint, region = server(options)
    session = boto3.session.Session()
    config = Config(
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=32,
        # "adaptive" would also slow down for long after a single 503 (0.5 requests/s at worst).
        retries={"mode": "standard", "total_max_attempts": options.max_attempts},
        # Other servers refuse the checksum trailers of "when_supported" with status 411.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Other servers rarely have a DNS name per bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    for hook in (functools.partial(_tell, _s3_host(options)), functools.partial(_try_on, options)):
        client.meta.events.register("needs-retry.s3", hook)
    return client


def _tell(host: str, *, attempts: int, caught_exception: Exception | None, **_: Any) -> None:
    """Say that a server is silent: the remaining tries take about a minute."""
    if attempts == TELL_AFTER and caught_exception is not None:
        kind = type(caught_exception).__name__
        logging.getLogger(__name__).warning("S3 at %s does not answer (%s); trying on.", host, kind)


def _try_on(
    options: StorageOptions,
    *,
    attempts: int,
    response: tuple[Any, Any] | None,
    caught_exception: Exception | None,
    **_: Any,
) -> float | None:
    """Return the seconds until the next try where boto3 would make none any more.

    Besides the tries of each request it has a quota for all of a process together, which some 35
    failures in a row of whatever requests use up; of images there are many at a time. It asks its
    own handler first, so that this one is heard where that has refused.
    """
    from botocore import exceptions as boto

    # A signal handler's own, such as the end of an image's time, which botocore has wrapped.
    inner = getattr(caught_exception, "kwargs", {}).get("error")
    if isinstance(inner, DenoiseError):
        raise inner
    silent = isinstance(caught_exception, boto.HTTPClientError | boto.ConnectionError)
    status = response[0].status_code if response is not None else 0
    if attempts >= options.max_attempts or not (silent or status in (429, 500, 502, 503, 504)):
        return None
    return random.uniform(0, _longest_pause(attempts))


def _longest_pause(attempts: int) -> float:
    """Seconds, as in boto3: full jitter below a bound that doubles up to 20."""
    return float(min(20, 2 ** (attempts - 1)))


def _split_s3(uri: str, *, key_needed: bool = False) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or (key_needed and not key):
        raise UsageError(f"{uri}: expected s3://bucket/key")
    if MAGIC.search(bucket):
        raise UsageError(f"{uri}: a bucket cannot be a pattern; expected s3://bucket/pattern")
    return bucket, key


def _content_type(key: str) -> dict[str, str]:
    return {"ContentType": mimetypes.guess_type(key)[0] or "application/octet-stream"}


def _s3_stamp(item: dict[str, Any]) -> str:
    return item.get("ETag", "").strip('"') or f"mtime-{int(item['LastModified'].timestamp())}"


def _s3_entry(item: dict[str, Any], bucket: str, path: str) -> Entry:
    return Entry(f"s3://{bucket}/{item['Key']}", path, item["Size"], _s3_stamp(item))


def _s3_found(item: dict[str, Any], uri: str, path: str) -> Found:
    if problem := path_problem(path):
        return printable(uri), StorageError(f"{printable(uri)}: {problem}")
    return Entry(uri, path, item["Size"], _s3_stamp(item))


def _chosen(
    items: Iterator[dict[str, Any]], bucket: str, base: str, selection: Selection
) -> Iterator[Found]:
    """The wanted ones of what is listed; the objects of a bundle follow one another."""

    def wanted(path: str) -> bool:
        return selection.takes(path) and (not is_hidden(path) or bool(path_problem(path)))

    def above(item: dict[str, Any]) -> str | None:
        return bundle_above(item["Key"][len(base) :])

    for top, group in itertools.groupby(items, key=above):
        if top is None:
            for item in group:
                path = item["Key"][len(base) :]
                # One that ends with '/' is a folder, or an object that stands for one.
                if path and not path.endswith("/") and wanted(path):
                    yield _s3_found(item, f"s3://{bucket}/{item['Key']}", path)
        elif wanted(top):
            yield from _bundled(group, bucket, base, top)


def _bundled(items: Iterator[dict[str, Any]], bucket: str, base: str, top: str) -> Iterator[Found]:
    bundle = Bundle()
    for item in items:
        if not item["Key"].endswith("/"):
            bundle.add(_s3_entry(item, bucket, item["Key"][len(base) + len(top) + 1 :]))
    uri = f"s3://{bucket}/{base}{top}"
    if problem := path_problem(top):
        yield printable(uri), StorageError(f"{printable(uri)}: {problem}")
    elif bundle.files:
        yield bundle.entry(uri, top)


def _below(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Stream every object whose key begins so."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for page in pages:
        yield from page.get("Contents", ())


def _objects(
    client: Any, bucket: str, base: str, *, selection: Selection, below: str = ""
) -> Iterator[dict[str, Any]]:
    """Stream a superset of the wanted objects, and folders as keys that end with '/'.

    A flat listing costs one request for 1,000 keys, however deep; one by folders is taken where
    it leaves most of the keys out: no recursion, or a pattern for one level ('s3://b/*.png').
    """
    pattern = "" if below else "/".join(selection.pattern)
    depth = 0 if below else len(selection.pattern)
    by_folder = not selection.recursive if depth == 0 else depth == 1 and "**" not in pattern
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket,
        Prefix=base + below + MAGIC.split(pattern, maxsplit=1)[0],
        **({"Delimiter": "/"} if by_folder else {}),
    )
    for page in pages:
        yield from page.get("Contents", ())
        for folder in page.get("CommonPrefixes", ()):
            yield {"Key": folder["Prefix"]}
            path = folder["Prefix"][len(base) :]
            if is_bundle(path):
                if not is_hidden(path) and selection.takes(path.rstrip("/")):
                    yield from _below(client, bucket, folder["Prefix"])
            elif not is_hidden(path) and selection.enters(path.rstrip("/")):
                yield from _objects(client, bucket, base, selection=selection, below=path)


def _get_whole(client: Any, attempts: int, **request: str) -> bytes:
    """Get a body; boto3 tries the request again by itself, but not a body that breaks off."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    for attempt in range(1, attempts + 1):
        answer = client.get_object(**request)
        try:
            return bytes(answer["Body"].read())
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            if attempt == attempts:
                raise
            time.sleep(random.uniform(0, _longest_pause(attempt)))
    raise AssertionError("max_attempts is at least 1")


class _Puts:
    """Several puts at once, of bounded number; leaving the block waits for all of them."""

    def __init__(self, storage: S3Storage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(PUTS_AT_ONCE)
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> _Puts:
        return self

    def add(self, uri: str, data: bytes) -> None:
        """Put one more; raises what an earlier one met."""
        if len(self._waiting) >= 2 * PUTS_AT_ONCE:
            self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(self._storage.write, uri, data))

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        for future in self._waiting if kind is None else ():
            future.result()


class _ObjectReader(io.RawIOBase):
    """A seekable S3 object. Small reads go through cached blocks, large ones straight."""

    def __init__(self, storage: S3Storage, entry: Entry) -> None:
        self._storage, self._entry, self._position = storage, entry, 0
        self._etag = None if entry.stamp.startswith("mtime-") else entry.stamp
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}; expected 0 or more")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._entry.size - self._position)
        if wanted <= 0:
            return 0
        if wanted > BLOCK:
            data = self._fetch(self._position, wanted)
        else:  # a read over the end of a block comes short, which RawIOBase allows
            index, offset = divmod(self._position, BLOCK)
            data = self._block(index)[offset : offset + wanted]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            self._blocks[index] = self._fetch(index * BLOCK, BLOCK)
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return self._blocks[index]

    def _fetch(self, start: int, length: int) -> bytes:
        return self._storage._get(self._entry.uri, start=start, length=length, etag=self._etag)
