"""zarr-python on our own storage. Imported late: it costs half a second and what zarr imports.

Endpoint, credentials and retries are thus those of `denoise_core.storage`. Two codecs are set
right: numcodecs reads beyond the end of a Blosc chunk that is cut short, and stamps the time into
gzip.
"""

from __future__ import annotations

import asyncio
import gzip
import warnings
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import cached_property
from typing import Any

import numcodecs
import zarr
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, GzipCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.registry import register_codec

from denoise_core.errors import ObjectNotFound
from denoise_core.storage import Storage

AT_ONCE = 4
"""Chunks that are fetched and decoded at a time: their memory adds to that of the window."""


class WholeBlosc(numcodecs.Blosc):
    """Blosc that refuses a chunk shorter than its header tells."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        """See `numcodecs.Blosc.decode`."""
        data = ensure_contiguous_ndarray(buf)
        head = data.view("u1")[:16].tobytes()
        told = int.from_bytes(head[12:16], "little")
        if len(head) < 16 or data.nbytes < told:
            raise ValueError(f"a Blosc chunk of {data.nbytes} bytes, expected {max(told, 16)}")
        return super().decode(data, out)


class TimelessGZip(numcodecs.GZip):
    """gzip that makes the same bytes of the same chunk at any time."""

    def encode(self, buf: Any) -> bytes:
        """See `numcodecs.GZip.encode`."""
        return gzip.compress(ensure_bytes(ensure_contiguous_ndarray(buf)), self.level, mtime=0)


class WholeBloscCodec(BloscCodec):
    """`WholeBlosc` for Zarr format 3."""

    @cached_property
    def _blosc_codec(self) -> Any:
        config = super()._blosc_codec.get_config()
        return WholeBlosc(**{name: value for name, value in config.items() if name != "id"})


class TimelessGzipCodec(GzipCodec):
    """`TimelessGZip` for Zarr format 3."""

    @cached_property
    def _gzip_codec(self) -> Any:
        return TimelessGZip(self.level)


def _set_up() -> None:
    numcodecs.register_codec(WholeBlosc, "blosc")
    numcodecs.register_codec(TimelessGZip, "gzip")
    for name, codec in (("blosc", WholeBloscCodec), ("gzip", TimelessGzipCodec)):
        register_codec(name, codec)
        zarr.config.set({f"codecs.{name}": f"{codec.__module__}.{codec.__qualname__}"})
    zarr.config.set({"async.concurrency": AT_ONCE})
    # Threads of Blosc put their blocks into the chunk in the order in which they end.
    numcodecs.blosc.use_threads = False


_set_up()


class ReadStore(Store):
    """A folder of a `Storage`, read-only. `known` files are not fetched again."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, storage: Storage, root: str, known: Mapping[str, bytes]) -> None:
        super().__init__(read_only=True)
        self._storage, self._root, self._known = storage, root.rstrip("/"), known

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadStore) and (self._storage, self._root) == (
            other._storage,
            other._root,
        )

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        """See `zarr.abc.store.Store.get`: None for a chunk that is not there."""
        try:
            data = await asyncio.to_thread(self._read, key, byte_range)
        except ObjectNotFound:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    def _read(self, key: str, wanted: Any) -> bytes:
        if wanted is None and key in self._known:
            return self._known[key]
        uri = f"{self._root}/{key}"
        if wanted is None:
            start, end, data = 0, 1, self._storage.read(uri)
        else:
            start, end = self._span(uri, wanted)
            data = self._storage.read_range(uri, start, end - start) if start >= 0 else b""
        if len(data) < end - start:
            # zarr takes some empty answers for a chunk that is not there.
            raise ValueError(f"{key} is too short")
        return data

    def _span(self, uri: str, wanted: Any) -> tuple[int, int]:
        if isinstance(wanted, RangeByteRequest):
            return wanted.start, wanted.end
        entry = self._storage.stat(uri)
        if entry is None:
            raise ObjectNotFound(f"{uri}: there is no such chunk")
        if isinstance(wanted, OffsetByteRequest):
            return wanted.offset, max(wanted.offset, entry.size)
        assert isinstance(wanted, SuffixByteRequest)
        return entry.size - wanted.suffix, entry.size

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[Any]) -> list[Any]:
        """See `zarr.abc.store.Store.get_partial_values`."""
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        """See `zarr.abc.store.Store.exists`."""
        found = await asyncio.to_thread(self._storage.stat, f"{self._root}/{key}")
        return key in self._known or found is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Refused: sources are not written to."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Refused: sources are not written to."""
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        """Refused: nothing here lists."""
        raise NotImplementedError
        yield ""

    list_prefix = list_dir = list


class DrainedStore(zarr.storage.MemoryStore):
    """Chunks on their way to the files of an image: what is written is taken out again."""

    def __init__(self, known: Mapping[str, bytes]) -> None:
        buffer = default_buffer_prototype().buffer
        self._files = {key: buffer.from_bytes(data) for key, data in known.items()}
        super().__init__(self._files)
        self._metadata = frozenset(known)

    def drain(self) -> Iterable[tuple[str, bytes]]:
        """Yield every chunk as (key, bytes), in the order of keys, and forget it."""
        for key in sorted(self._files.keys() - self._metadata):
            yield key, self._files.pop(key).to_bytes()


def open_array(
    store: Store, path: str, *, zarr_format: int, writing: bool = False, whole: bool = False
) -> Any:
    """Open the array at `path` of a store. Raises what zarr raises, which is nearly anything.

    `whole`: chunks that hold nothing but the fill value are written too.
    """
    # The settings of an array that exists are those of the moment at which it is opened.
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": whole}):
        warnings.simplefilter("ignore")
        return zarr.open_array(
            store=store, path=path, mode="r+" if writing else "r", zarr_format=zarr_format
        )
