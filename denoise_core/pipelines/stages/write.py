"""Items -> files and rows of facts; the staged regions of a large image -> one file."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from denoise_core import metrics
from denoise_core.errors import (
    AccessDenied,
    ImageError,
    RunFailed,
    StorageError,
    StorageUnavailable,
    UnsupportedImage,
)
from denoise_core.images import (
    DecodedImage,
    ImageMetadata,
    data_range,
    decode,
    encode,
    fetch,
    fitting_compression,
    inverted,
    is_negative,
    is_nodata,
    left_behind,
    open_image,
    picture_of,
    read_header,
    read_metadata,
    read_window,
    rescale,
    to_dtype,
)
from denoise_core.images.zarr import METADATA_FILES
from denoise_core.pipelines.job import Facts, Job, merge_reference, now, reference_figures
from denoise_core.pipelines.stages.items import (
    Guard,
    Item,
    core_in_window,
    filled_of,
    measures,
    output_dtype,
    region_of,
    regions_of,
    to_items,
    untouched,
)
from denoise_core.storage import Storage, is_bundle, join, storage_for

Array = np.ndarray


class Write:
    """Encode and write; measure what no stage before has; the row that comes out has no pixels."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "write", ledger)
        self.output = storage_for(job.config.output, job.options)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Map items to rows of facts alone."""
        facts = []
        for item in to_items(table):
            if not (item.failed or item.facts.get("staged")):
                with self.guard.attempt([item]) as todo:
                    for each in todo:
                        with self.guard.catch(each):
                            self._write(each)
            item.facts["finished_at"] = now()
            item.facts["node_id"] = ray.get_runtime_context().get_node_id()
            facts.append(json.dumps(item.facts))
        yield pa.table({"facts": pa.array(facts, pa.string())})

    def _write(self, item: Item) -> None:
        facts = item.facts
        if facts.get("in_regions"):
            self._stage_region(item)
            return
        if facts.get("streamed"):
            self._copy_streamed(facts)
            return
        metadata = ImageMetadata.from_bytes(bytes(item.metadata))
        # Without pixels there is nothing left to measure.
        noisy = item.array("pixels") if item.pixels is not None else None
        lost: tuple[str, ...] = ()
        if facts.get("copied") and not facts["converted"]:
            denoised = noisy
            data = storage_for(facts["source_uri"], self.job.options).read(facts["source_uri"])
        else:
            denoised = item.array("pixels" if facts.get("copied") else "denoised")
            alpha = item.array("alpha") if item.alpha is not None else None
            config = self.job.config
            kept = output_dtype(self.job, facts["dtype"]) == denoised.dtype
            data, lost = encode(
                denoised if kept else filled_of(facts, denoised),
                alpha,
                metadata,
                format=config.format,
                bit_depth=config.bit_depth,
                compression=config.compression,
                value_range=tuple(facts["data_range"]),
            )
        facts["metadata_lost"] = list(lost)
        if noisy is not None and denoised is not None:
            if "sigma_out" not in facts:
                facts |= measures(self.job, facts, noisy, denoised)
            facts |= self._against_reference(facts, metadata, noisy, denoised)
        # Last, so that a failed row never leaves an image behind.
        write_output(self.output, facts["output_uri"], data)

    def _against_reference(
        self, facts: Facts, metadata: ImageMetadata, noisy: Array, denoised: Array
    ) -> Facts:
        root = self.job.config.reference
        if root is None:
            return {}
        uri = join(root, facts["path"])
        storage = storage_for(root, self.job.options)
        try:
            most = self.job.config.max_pixels
            reference = decode(fetch(storage, uri), name=uri, max_pixels=most, keep_nodata=True)
            if reference.pixels.shape != denoised.shape:
                return {"reference_problem": f"{uri}: shape {reference.pixels.shape}"}
            clean = self._same_units(reference, facts, denoised.dtype, name=uri)
        except (ImageError, StorageError) as error:
            return {"reference_problem": str(error)}
        if is_negative(reference.metadata) != is_negative(metadata):
            clean = inverted(clean, tuple(facts["data_range"]))
        absent = is_nodata(reference.pixels, reference.header.nodata)
        before, after = errors(facts, noisy, denoised, clean, absent)
        return {"reference_uri": uri, **reference_figures(after, before)}

    def _region_against_reference(
        self, facts: Facts, core: tuple[slice, slice], noisy: Array, denoised: Array
    ) -> Facts:
        """Return sums that merge over the regions, of `core`, a region's place in the image."""
        root = self.job.config.reference
        if root is None:
            return {}
        uri = join(root, facts["path"])
        try:
            with open_image(storage_for(root, self.job.options), uri) as file:
                header = read_header(file, name=uri, max_pixels=1 << 62)
                if not header.windowed or np.dtype(header.dtype) != denoised.dtype:
                    return {
                        "reference_problem": f"{uri}: {header.dtype} {header.format}; that "
                        f"of a large image has to be a Zarr or a tiled TIFF of {denoised.dtype}"
                    }
                shape = [header.height, header.width, header.channels]
                if shape != [*facts["size"], denoised.shape[2]]:
                    return {"reference_problem": f"{uri}: shape {tuple(shape)}"}
                clean, _ = read_window(file, y=core[0], x=core[1], name=uri, keep_nodata=True)
        except (ImageError, StorageError) as error:
            return {"reference_problem": str(error)}
        absent = is_nodata(clean, header.nodata)
        before, after = errors(facts, noisy, denoised, clean, absent)
        return {"reference_uri": uri, "after": asdict(after), "before": asdict(before)}

    def _copy_streamed(self, facts: Facts) -> None:
        """Copy a large quiet image."""
        source = storage_for(facts["source_uri"], self.job.options)
        config, sums = self.job.config, []
        regions = regions_of(self.job, {**facts, "in_regions": True})
        with open_image(source, facts["source_uri"]) as file:
            for region in regions if config.reference is not None else ():
                y0, y1, x0, x1 = region.core
                core = slice(y0, y1), slice(x0, x1)
                pixels, _ = read_window(
                    file, y=core[0], x=core[1], name=facts["path"], keep_nodata=True
                )
                sums.append(self._region_against_reference(facts, core, pixels, pixels))
                if "reference_problem" in sums[-1]:
                    break
        if is_bundle(facts["source_uri"]):
            copy_folder(source, facts["source_uri"], self.output, facts["output_uri"])
        else:
            copy_file(source, facts["source_uri"], self.output, facts["output_uri"])
        if sums:
            facts |= merge_reference(sums)
        facts |= {"metadata_lost": [], **untouched(facts)}

    def _same_units(
        self, reference: DecodedImage, facts: Facts, dtype: np.dtype[Any], *, name: str
    ) -> Array:
        """Return the reference's pixels in the image's units, of its `dtype`.

        Floats of any width have one unit. Else black and white are those of the two ranges. Raises
        UnsupportedImage where one of these is but the estimate of floats.
        """
        if reference.pixels.dtype == dtype:
            return reference.pixels
        pixels, own = picture_of(reference)
        if pixels.dtype.kind == dtype.kind == "f":
            return to_dtype(pixels.astype(np.float64), dtype)
        low, high = facts["data_range"]
        stated = self.job.config.data_range != "auto"
        if dtype.kind == "f" and (low, high) != (0, 1) and not stated:
            raise UnsupportedImage(
                f"{name}: {pixels.dtype}, and of the image's {dtype} it is not known which values "
                "are black and white: state --data-range"
            )
        if pixels.dtype.kind == "f" and own != (0, 1):
            raise UnsupportedImage(
                f"{name}: {pixels.dtype} outside of [0, 1]; expected {dtype} as in the image"
            )
        unit = (pixels.astype(np.float32) - own[0]) / (own[1] - own[0])
        return to_dtype(unit * (high - low) + low, dtype, low, high)

    def _stage_region(self, item: Item) -> None:
        facts = item.facts
        denoised = item.array("denoised")
        y0, y1, x0, x1 = region_of(self.job, facts).core
        core = core_in_window(self.job, facts)
        alpha = item.array("alpha")[core] if item.alpha is not None else None
        if item.pixels is not None:
            noisy = item.array("pixels")[core]
            if "sigma_out" not in facts:
                facts |= measures(self.job, facts, noisy, denoised)
            place = slice(y0, y1), slice(x0, x1)
            facts |= self._region_against_reference(facts, place, noisy, denoised)
        samples = self._samples(facts, denoised, alpha)
        buffer = io.BytesIO()
        np.save(buffer, samples, allow_pickle=False)
        pixels = self.job.staging(facts, f"{facts['region']:06d}.npy")
        write_output(self.output, pixels, buffer.getbuffer())
        # The marker comes last: a region with it is finished, whatever happens afterwards.
        marker = {k: v for k, v in facts.items() if k != "started_at"}
        marker |= {"run_id": self.job.run_id, "reference": self.job.config.reference}
        uri = self.job.staging(facts, f"{facts['region']:06d}.json")
        write_output(self.output, uri, json.dumps(marker).encode())

    def _samples(self, facts: Facts, denoised: Array, alpha: Array | None) -> Array:
        """Return channels and alpha in the output's dtype."""
        dtype = output_dtype(self.job, facts["dtype"])
        if dtype != denoised.dtype:
            low, high = facts["data_range"]
            if alpha is not None:
                alpha = rescale(alpha, dtype, source=data_range(alpha.dtype))
            denoised = rescale(filled_of(facts, denoised), dtype, source=(low, high))
        return denoised if alpha is None else np.dstack([denoised, alpha])


def errors(
    facts: Facts, noisy: Array, denoised: Array, clean: Array, absent: Array
) -> tuple[metrics.ErrorSums, metrics.ErrorSums]:
    """Return the errors of the noisy and of the denoised pixels, without those that are no data.

    All are (h, w, C) of one dtype; `absent` tells as bool which values of `clean` are no data. SSIM
    takes these and those of the image for equal.
    """
    low, high = facts["data_range"]
    absent = absent | is_nodata(noisy, facts.get("nodata"))
    missing = int(np.count_nonzero(absent))
    before = filled_of(facts, noisy)

    def sums_of(pixels: Array) -> metrics.ErrorSums:
        pair = pixels, clean
        if missing:
            pair = np.where(absent, before, pixels), np.where(absent, before, clean)
        sums = metrics.error_sums(*pair, data_range=high - low)
        return replace(sums, count=sums.count - missing)

    sums = sums_of(noisy)
    return sums, sums if denoised is noisy else sums_of(denoised)


@contextmanager
def no_fault_of_an_image() -> Iterator[None]:
    """Raise RunFailed in place of what would befall every other image too: a full disk, say."""
    try:
        yield
    except (AccessDenied, StorageUnavailable) as error:
        raise RunFailed(str(error)) from None


def write_output(storage: Storage, uri: str, data: Any) -> None:
    """Write to the output. Raises StorageError for what concerns `uri` alone, else RunFailed."""
    with no_fault_of_an_image():
        storage.write(uri, data)


def copy_file(source: Storage, uri: str, output: Storage, target: str) -> None:
    """Copy a file of any size by way of a temporary one."""
    with source.open(uri) as file, tempfile.TemporaryDirectory(prefix="denoise-") as folder:
        path = Path(folder) / "image.tif"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 24)
        with no_fault_of_an_image():
            output.upload(path, target)


def copy_folder(source: Storage, uri: str, output: Storage, target: str) -> None:
    """Copy a Zarr, file by file; it appears whole. Raises ImageError where the source fails."""

    def files() -> Iterator[tuple[str, bytes]]:
        try:
            for entry in source.tree(uri):
                yield entry.path, source.read(entry.uri)
        except StorageError as error:
            raise ImageError(f"{error} (of the folder {uri})") from error

    with no_fault_of_an_image():
        output.publish(target, files(), last=METADATA_FILES)


def publish_image(job: Job, facts: Facts) -> tuple[str, ...]:
    """Assemble an image's staged regions to one TIFF or Zarr and publish it.

    The regions stay, so that it can be done again. Memory is bounded by one row of regions. Returns
    the names of what metadata was lost.
    """
    from denoise_core.assemble import Region as Piece
    from denoise_core.assemble import assemble_tiff, zarr_files

    source = storage_for(facts["source_uri"], job.options)
    output = storage_for(job.config.output, job.options)
    with open_image(source, facts["source_uri"]) as file:
        header = read_header(file, name=facts["path"], max_pixels=1 << 62)
        metadata = read_metadata(file, name=facts["path"])

    def load(uri: str, y: int, x: int) -> Array:
        try:
            pixels: Array = np.load(io.BytesIO(output.read(uri)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ImageError(
                f"{facts['path']}: the staged region at y={y}, x={x} is damaged ({error}); "
                "--retry-failed denoises the image again"
            ) from error
        return pixels

    pieces = []
    for index, region in enumerate(regions_of(job, {**facts, "in_regions": True})):
        y0, y1, x0, x1 = region.core
        uri = job.staging(facts, f"{index:06d}.npy")
        pieces.append(Piece(y0, x0, y1 - y0, x1 - x0, partial(load, uri, y0, x0)))
    if (metadata.format, job.config.format) == ("zarr", "preserve"):
        lost = metadata.lost
        files = zarr_files(pieces, header=header, metadata=metadata)
        with no_fault_of_an_image():
            output.publish(facts["output_uri"], files, last=METADATA_FILES)
    else:
        with tempfile.TemporaryDirectory(prefix="denoise-") as folder:
            path = Path(folder) / "image.tif"
            lost = assemble_tiff(
                pieces,
                path=path,
                header=header,
                metadata=metadata,
                dtype=output_dtype(job, header.dtype).name,
                compression=fitting_compression(job.config.compression, "tiff"),
            )
            lost = tuple(dict.fromkeys((*lost, *left_behind(metadata, "tiff"))))
            with no_fault_of_an_image():
                output.upload(path, facts["output_uri"])
    return lost


def drop_regions(job: Job, facts: Facts) -> None:
    """Delete the staged regions of an image whose row is safe."""
    output = storage_for(job.config.output, job.options)
    # Markers go first: one without its pixels would tell the next run of a region that is no more.
    for kind in ("json", "npy"):
        for region in range(facts["regions"]):
            output.delete(job.staging(facts, f"{region:06d}.{kind}"))
