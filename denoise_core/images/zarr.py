"""Zarr folders as images: bare arrays and OME-Zarr (NGFF to 0.5), formats 2 and 3, in windows.

    with open_image(storage, "s3://plates/a.zarr") as source:   # a ZarrSource
        pixels, _ = read_window(source, y=slice(0, 512), x=slice(0, 512))

Of a pyramid, level 0 is the image. Axes other than y and x are flattened into channels and
restored on writing, as those of a TIFF are. The metadata files are carried over as they are, so
that format, chunks, codecs, axes and attributes come out as they went in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from denoise_core.errors import (
    CorruptImage,
    ImageTooLarge,
    NotAnImage,
    ObjectNotFound,
    UnsupportedImage,
    UsageError,
)
from denoise_core.images.tiff import flatten, unflatten
from denoise_core.images.types import (
    CODEC_ERRORS,
    SUPPORTED_DTYPES,
    Array,
    ImageHeader,
    ImageMetadata,
    check_dtype,
)
from denoise_core.storage import Storage, join

METADATA_FILES = (".zattrs", ".zmetadata", ".zgroup", ".zarray", "zarr.json")
"""Names of files that hold no pixels, in the order in which they make an image visible."""
ROOT_FILES = METADATA_FILES[2:]
MAX_METADATA_BYTES = 1 << 26
MAX_CHUNK_BYTES = 1 << 29
"""Decoded size of one chunk: a window takes whole chunks, some at a time."""
MAX_SHARD_BYTES = 1 << 31
SIDE_GROUPS = ("labels", "tables")
"""Groups beside the pyramid of an OME-Zarr, which are left behind."""
# These run code of the file's own choice.
_PICKLES = ("pickle", "json2", "msgpack2", "vlen", "categorize")


@dataclass(frozen=True, slots=True)
class ZarrSource:
    """A Zarr folder, where another format has an open file."""

    storage: Storage
    uri: str


@dataclass(slots=True)
class _Layout:
    """What the metadata tell. `files`: their contents by name; `path`: that of the array's folder.

    `chunk` is what is decoded at once, `unit` what is one file: the same without sharding.
    """

    files: dict[str, bytes]
    zarr_format: int
    path: str = ""
    shape: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    unit: tuple[int, ...] = ()
    axes: str = ""
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype("u1"))
    levels: int = 1

    def key(self, name: str) -> str:
        """The name of a file of the array's folder."""
        return f"{self.path}/{name}" if self.path else name


def read_header(source: ZarrSource, *, name: str) -> ImageHeader:
    """The header from the metadata files; no chunk is read."""
    return _header(_look(source, name=name))


def _header(layout: _Layout) -> ImageHeader:
    y, x = layout.axes.rfind("Y"), layout.axes.rfind("X")
    height, width = layout.shape[y], layout.shape[x]
    return ImageHeader(
        format="zarr",
        height=height,
        width=width,
        channels=math.prod(layout.shape) // (height * width),
        dtype=layout.dtype.newbyteorder("=").name,
        windowed=True,
        axes=layout.axes,
        bits=layout.dtype.itemsize * 8 if layout.dtype.kind in "ui" else 0,
        tile=(layout.chunk[y], layout.chunk[x]),
    )


def read_metadata(source: ZarrSource, *, name: str) -> ImageMetadata:
    """Everything but pixels."""
    layout = _look(source, name=name)
    header = _header(layout)
    if layout.zarr_format == 2 and (found := _fetch(source, ".zmetadata", name=name)):
        layout.files[".zmetadata"] = found
    lost = ["zarr:levels"] if layout.levels > 1 else []
    for group in SIDE_GROUPS if layout.path else ():
        files = ("zarr.json",) if layout.zarr_format == 3 else (".zgroup", ".zattrs")
        if any(source.storage.stat(join(source.uri, group, file)) for file in files):
            lost.append(f"zarr:{group}")
    return ImageMetadata(
        format="zarr",
        dtype=header.dtype,
        channels=header.channels,
        bits=header.bits,
        native={
            "files": layout.files,
            "zarr_format": layout.zarr_format,
            "path": layout.path,
            "axes": layout.axes,
            "shape": list(layout.shape),
            "unit": list(layout.unit),
        },
        lost=tuple(lost),
    )


def read_window(source: ZarrSource, *, y: slice, x: slice, name: str) -> tuple[Array, ImageHeader]:
    """Samples (h, w, S) of rows `y` and columns `x`, reading only the chunks they touch."""
    layout = _look(source, name=name)
    header = _header(layout)
    array = _open(source, layout, name=name)
    window = [slice(None)] * len(layout.shape)
    window[layout.axes.rfind("Y")] = slice(*y.indices(header.height))
    window[layout.axes.rfind("X")] = slice(*x.indices(header.width))
    with _damage(name):
        values = np.asarray(array[tuple(window)])
    return flatten(values, layout.axes), header


def decode(source: ZarrSource, *, name: str) -> tuple[Array, ImageMetadata]:
    """Samples (H, W, S) and metadata."""
    samples, _ = read_window(source, y=slice(None), x=slice(None), name=name)
    return samples, read_metadata(source, name=name)


def _open(source: ZarrSource, layout: _Layout, *, name: str) -> Any:
    from denoise_core.images.zarr_store import ReadStore, open_array

    store = ReadStore(source.storage, source.uri, layout.files)
    try:
        return open_array(store, layout.path, zarr_format=layout.zarr_format)
    except CODEC_ERRORS as error:
        raise UnsupportedImage(
            f"{name}: zarr-python does not open this array ({_first_line(error)}); write it again "
            "with codecs of Zarr itself, such as zstd"
        ) from error


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What a codec raises is a damaged chunk; it may raise nearly anything."""
    try:
        yield
    except MemoryError as error:
        raise ImageTooLarge(
            f"{name}: there is not enough memory for its chunks; write it again in smaller ones"
        ) from error
    except CODEC_ERRORS as error:
        raise CorruptImage(
            f"{name}: a chunk is damaged or cut short ({_first_line(error)}); copy the folder again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


# --- metadata -----------------------------------------------------------------------------------


def _look(source: ZarrSource, *, name: str) -> _Layout:
    """Read the metadata files of the one image, and check them."""
    with _bad_metadata(name):
        layout = _root(source, name=name)
        if not _is_array(layout):
            _into_pyramid(source, layout, name=name)
        for file, data in layout.files.items():
            _check_document(file, _parsed(data, name=name))
        array = _parsed(layout.files[layout.key(_array_file(layout))], name=name)
        layout.shape = tuple(map(int, array["shape"]))
        _read_chunks(layout, array)
        layout.dtype = _dtype(layout, array, name=name)
        layout.axes = layout.axes or _own_axes(layout, array, name=name)
        _check(layout, array, name=name)
    return layout


def _check_document(file: str, document: dict[str, Any]) -> None:
    """Refuse what would stop the writing, though the pixels could be read."""
    for key in ("attributes", "consolidated_metadata") if file.endswith("zarr.json") else ():
        if not isinstance(document.get(key) or {}, dict):
            raise TypeError(f"{key} of {file} are no JSON object")


def _root(source: ZarrSource, *, name: str) -> _Layout:
    for file, zarr_format in (("zarr.json", 3), (".zarray", 2), (".zgroup", 2)):
        found = _fetch(source, file, name=name)
        if found is not None:
            layout = _Layout({file: found}, zarr_format)
            attributes = _fetch(source, ".zattrs", name=name) if zarr_format == 2 else None
            if attributes is not None:
                layout.files[".zattrs"] = attributes
            return layout
    raise NotAnImage(
        f"{name}: holds none of {', '.join(ROOT_FILES)}; expected a Zarr array or an OME-Zarr "
        "image: copy the folder again with its hidden files, or leave it out"
    )


def _is_array(layout: _Layout) -> bool:
    if layout.zarr_format == 2:
        return layout.key(".zarray") in layout.files
    found = _json(layout.files[layout.key("zarr.json")])
    return isinstance(found, dict) and found.get("node_type") == "array"


def _array_file(layout: _Layout) -> str:
    return ".zarray" if layout.zarr_format == 2 else "zarr.json"


def _into_pyramid(source: ZarrSource, layout: _Layout, *, name: str) -> None:
    """Go to level 0 of the OME-Zarr image that the root group is."""
    image = _image_of(_attributes(layout, name=name), name=name)
    paths = [str(level["path"]) for level in image["datasets"]]
    named = image.get("axes") or list("tczyx")
    axes = [each["name"] if isinstance(each, dict) else each for each in named]
    layout.path, layout.levels = paths[0].strip("/"), len(paths)
    try:
        join(source.uri, layout.path)
    except UsageError as error:
        raise ValueError(str(error)) from None
    layout.axes = _letters(axes, name=name)
    parts = layout.path.split("/")
    for depth in range(1, len(parts) + 1):
        folder = "/".join(parts[:depth])
        for file in METADATA_FILES if layout.zarr_format == 2 else ("zarr.json",):
            found = None
            if file != ".zmetadata":
                found = _fetch(source, f"{folder}/{file}", name=name)
            if found is not None:
                layout.files[f"{folder}/{file}"] = found
    if layout.key(_array_file(layout)) not in layout.files or not _is_array(layout):
        raise CorruptImage(
            f"{name}: its metadata name the array {layout.path!r}, which is not there; copy the "
            "folder again with its hidden files"
        )


def _image_of(attributes: dict[str, Any], *, name: str) -> dict[str, Any]:
    """The one multiscale image of a group's attributes; other groups are refused by name."""
    several = {
        "plate": "an OME-Zarr plate, which holds several images",
        "well": "a well of an OME-Zarr plate, which holds several images",
        "bioformats2raw.layout": "a bioformats2raw folder, which may hold several images",
    }
    for key, kind in several.items():
        if key in attributes:
            raise UnsupportedImage(
                f"{name}: {kind}; expected one: copy each image to a .zarr folder of its own"
            )
    if "image-label" in attributes:
        raise UnsupportedImage(f"{name}: a label image, whose values are names; leave it out")
    images = attributes.get("multiscales")
    if not images:
        raise UnsupportedImage(
            f"{name}: a Zarr group that is no OME-Zarr image; expected an array or a group with "
            "multiscales: save each array to a .zarr folder of its own"
        )
    if not isinstance(images, list) or not isinstance(images[0], dict):
        raise CorruptImage(f"{name}: its multiscales are damaged; write the metadata again")
    if len(images) > 1:
        raise UnsupportedImage(
            f"{name}: a group of {len(images)} multiscale images; expected one: copy each to a "
            ".zarr folder of its own"
        )
    return images[0]


def _attributes(layout: _Layout, *, name: str) -> dict[str, Any]:
    """The root's attributes; of NGFF 0.5 those below 'ome'."""
    if layout.zarr_format == 2:
        found = layout.files.get(".zattrs")
        attributes = {} if found is None else _parsed(found, name=name)
    else:
        attributes = _parsed(layout.files["zarr.json"], name=name).get("attributes") or {}
    inner = attributes.get("ome", attributes)
    if not isinstance(inner, dict):
        raise CorruptImage(f"{name}: its attributes are damaged; write the metadata again")
    return inner


def _own_axes(layout: _Layout, array: dict[str, Any], *, name: str) -> str:
    """Axes of a bare array: by its dimension names, else as those of a .npy file."""
    if layout.zarr_format == 3:
        names = array.get("dimension_names")
    else:
        found = layout.files.get(".zattrs")
        names = None if found is None else _parsed(found, name=name).get("_ARRAY_DIMENSIONS")
    # xarray numbers what has no name.
    if isinstance(names, list) and not all(not n or str(n).startswith("dim_") for n in names):
        return _letters(names, name=name)
    if len(layout.shape) not in (2, 3):
        raise UnsupportedImage(
            f"{name}: an array of shape {layout.shape} whose axes have no names; expected (height, "
            "width), (height, width, channels) or dimension names with y and x: name them"
        )
    return "YXS"[: len(layout.shape)]


def _letters(names: list[Any], *, name: str) -> str:
    """One capital letter for each axis, Q for those with longer names."""
    letters = [str(each).upper() if len(str(each)) == 1 else "Q" for each in names]
    if letters.count("Y") != 1 or letters.count("X") != 1:
        raise UnsupportedImage(
            f"{name}: a Zarr of axes {', '.join(map(str, names))}; expected y and x among them"
        )
    return "".join(letters)


def _read_chunks(layout: _Layout, array: dict[str, Any]) -> None:
    if layout.zarr_format == 2:
        layout.chunk = layout.unit = tuple(map(int, array["chunks"]))
        return
    layout.unit = tuple(map(int, array["chunk_grid"]["configuration"]["chunk_shape"]))
    layout.chunk = layout.unit
    for codec in array["codecs"]:
        if isinstance(codec, dict) and codec.get("name") == "sharding_indexed":
            layout.chunk = tuple(map(int, codec["configuration"]["chunk_shape"]))


def _dtype(layout: _Layout, array: dict[str, Any], *, name: str) -> np.dtype[Any]:
    told = array.get("dtype" if layout.zarr_format == 2 else "data_type")
    try:
        if not isinstance(told, str) or (layout.zarr_format == 3 and told not in SUPPORTED_DTYPES):
            raise TypeError(told)
        dtype = np.dtype(told)
    except TypeError as error:
        raise UnsupportedImage(
            f"{name}: {str(told)[:60]} samples are not denoised; expected 8-, 16- or 32-bit "
            "integers or floats; convert the array first"
        ) from error
    check_dtype(dtype, name=name)
    return dtype


def _check(layout: _Layout, array: dict[str, Any], *, name: str) -> None:
    sizes = (layout.shape, layout.chunk, layout.unit)
    if {len(each) for each in sizes} != {len(layout.axes)} or min(min(layout.chunk), 1) < 1:
        raise CorruptImage(
            f"{name}: axes {layout.axes}, shape {layout.shape} and chunks {layout.chunk} do not "
            "go together; write the metadata again"
        )
    if min(layout.shape) < 1:
        raise UnsupportedImage(f"{name}: an array of shape {layout.shape}; expected some pixels")
    for what, shape, most in (
        ("chunks", layout.chunk, MAX_CHUNK_BYTES),
        ("shards", layout.unit, MAX_SHARD_BYTES),
    ):
        if math.prod(shape) * layout.dtype.itemsize > most:
            raise ImageTooLarge(
                f"{name}: its {what} are of {'x'.join(map(str, shape))} samples, over {most >> 20} "
                "MiB each; write it again in smaller ones"
            )
    codecs = [array.get("compressor"), *(array.get("filters") or ()), *(array.get("codecs") or ())]
    for codec in codecs:
        named = str(codec.get("id", codec.get("name"))) if isinstance(codec, dict) else ""
        if any(word in named for word in _PICKLES):
            raise UnsupportedImage(
                f"{name}: the codec {named[:60]} is for objects, not for pixels; convert the array"
            )


@contextmanager
def _bad_metadata(name: str) -> Iterator[None]:
    """JSON of any kind may stand in any place, and NumPy evaluates a dtype like Python code."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptImage(
            f"{name}: the Zarr metadata are damaged ({type(error).__name__}: "
            f"{_first_line(error)}); write or copy them again"
        ) from error


def _fetch(source: ZarrSource, file: str, *, name: str) -> bytes | None:
    try:
        data = source.storage.read_range(join(source.uri, file), 0, MAX_METADATA_BYTES + 1)
    except ObjectNotFound:
        return None
    if len(data) > MAX_METADATA_BYTES:
        raise ImageTooLarge(f"{name}: {file} has over {MAX_METADATA_BYTES >> 20} MiB; look at it")
    return data


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _parsed(data: bytes, *, name: str) -> dict[str, Any]:
    found = _json(data)
    if not isinstance(found, dict):
        raise CorruptImage(
            f"{name}: a metadata file is no JSON object but {data[:20]!r}; copy the folder again"
        )
    return found


def left_behind(metadata: ImageMetadata) -> list[str]:
    """Names of the axes and attributes that no other format keeps."""
    native = metadata.native
    lost = [] if native["axes"] in ("YX", "YXS") else [f"zarr:axes {native['axes']}"]
    attributes: dict[str, Any] = {}
    for file, data in native["files"].items():
        found = _json(data) or {}
        if file.endswith(".zattrs"):
            attributes |= found
        elif file.endswith("zarr.json"):
            attributes |= found.get("attributes") or {}
    return lost + (["zarr:attributes"] if attributes.keys() - {"_ARRAY_DIMENSIONS"} else [])


# --- writing ------------------------------------------------------------------------------------


class ZarrWriter:
    """Makes the files of an image like its source, a few chunks at a time.

    `unit` is the (height, width) of what one file holds of the picture.
    """

    def __init__(self, metadata: ImageMetadata) -> None:
        from denoise_core.images.zarr_store import DrainedStore, open_array

        native = metadata.native
        self.axes, self.shape = native["axes"], native["shape"]
        self._y, self._x = self.axes.rfind("Y"), self.axes.rfind("X")
        self.unit = native["unit"][self._y], native["unit"][self._x]
        self._files = _files_to_write(native)
        self._store = DrainedStore(self._files)
        self._array = open_array(
            self._store,
            native["path"],
            zarr_format=native["zarr_format"],
            writing=True,
            whole=_has_no_fill(native),
        )

    def chunks(self, samples: Array, *, y0: int, x0: int) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) for samples (h, w, S), whose sides are multiples of `unit`.

        Chunks that hold nothing but the fill value, where there is one, have no file, as in
        zarr-python. Raises UnsupportedImage where a codec of the source reads but does not write.
        """
        height, width = samples.shape[:2]
        shape, window = list(self.shape), [slice(None)] * len(self.shape)
        for axis, start, size in ((self._y, y0, height), (self._x, x0, width)):
            shape[axis], window[axis] = size, slice(start, start + size)
        try:
            self._array[tuple(window)] = unflatten(samples, self.axes, tuple(shape))
        except CODEC_ERRORS as error:
            raise UnsupportedImage(
                f"the codecs of this Zarr cannot write it ({_first_line(error)}); use --format "
                "tiff, or write the source again with codecs of Zarr itself, such as zstd"
            ) from error
        yield from self._store.drain()

    def metadata_files(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of what is no chunk."""
        yield from self._files.items()


def _has_no_fill(native: dict[str, Any]) -> bool:
    """Whether a chunk without a file is undefined: in format 2 the fill value may be null."""
    array = native["files"].get("/".join(filter(None, (native["path"], ".zarray"))))
    return array is not None and json.loads(array).get("fill_value") is None


def _files_to_write(native: dict[str, Any]) -> dict[str, bytes]:
    """The source's metadata files, of a pyramid with level 0 alone."""
    files: dict[str, bytes] = dict(native["files"])
    root = ".zattrs" if native["zarr_format"] == 2 else "zarr.json"
    if native["path"] and root in files:
        document = json.loads(files[root])
        attributes = document if root == ".zattrs" else document["attributes"]
        (image,) = attributes.get("ome", attributes)["multiscales"]
        if len(image["datasets"]) > 1:
            image["datasets"] = image["datasets"][:1]
            files[root] = _dumped(document)
    if ".zmetadata" in files:
        found = {name: json.loads(data) for name, data in files.items() if name != ".zmetadata"}
        files[".zmetadata"] = _dumped({"metadata": found, "zarr_consolidated_format": 1})
    elif root == "zarr.json" and "consolidated_metadata" in (document := json.loads(files[root])):
        below = {
            name.removesuffix("/zarr.json"): json.loads(data)
            for name, data in files.items()
            if name != root
        }
        if document["consolidated_metadata"]:
            document["consolidated_metadata"] |= {"metadata": below}
            files[root] = _dumped(document)
    return files


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
