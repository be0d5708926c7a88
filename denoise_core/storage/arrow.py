"""A pyarrow file system on S3 for libraries that want one, such as Ray Train's checkpoints."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import pyarrow.fs

from denoise_core.storage.base import StorageOptions, path_problem, printable
from denoise_core.storage.s3 import S3Storage, server


class FolderlessHandler(pyarrow.fs.FileSystemHandler):
    """pyarrow's S3 without empty objects for folders, which several S3-compatible servers refuse.

    Pickles to the endpoint and the region alone: credentials come from the environment of the
    process that uses it.
    """

    def __init__(self, endpoint: str | None) -> None:
        self.endpoint, self.region = server(StorageOptions(s3_endpoint=endpoint))

    def __getstate__(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "region": self.region}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FolderlessHandler) and self.__getstate__() == other.__getstate__()

    @cached_property
    def _s3(self) -> Any:
        # Several servers refuse chunked trailers with status 411.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        # Its own three tries end within seconds; these wait as ours do.
        tries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=StorageOptions().max_attempts)
        return pyarrow.fs.S3FileSystem(
            endpoint_override=self.endpoint, region=self.region, retry_strategy=tries
        )

    def get_type_name(self) -> str:
        """Return the name that pyarrow shows."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """Return the path as S3 takes it."""
        return str(self._s3.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        """Describe the paths; a folder is what has objects below it."""
        return self._s3.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        """Describe what is below a folder. Raises OSError for a key that no path below it can be.

        pyarrow copies such a key to where it points, outside the folder that is written to.
        """
        found = self._s3.get_file_info(selector)
        base = f"{selector.base_dir.rstrip('/')}/"
        for each in found:
            if problem := path_problem(each.path.removeprefix(base)):
                raise OSError(f"s3://{printable(each.path)}: {problem}")
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: S3 has no folders."""

    def delete_dir(self, path: str) -> None:
        """Delete the objects below a path."""
        self.delete_dir_contents(path, missing_dir_ok=True)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete the objects below a path."""
        found = self._s3.get_file_info(
            pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True)
        )
        for each in found:
            if each.type == pyarrow.fs.FileType.File:
                self.delete_file(each.path)

    def delete_root_dir_contents(self) -> None:
        """Refuse: nothing here deletes all buckets."""
        raise OSError("refused to delete every bucket")

    def delete_file(self, path: str) -> None:
        """Delete one object. pyarrow would leave one for its folder."""
        options = StorageOptions(s3_endpoint=self.endpoint, region=self.region)
        S3Storage(options).delete(f"s3://{path}")

    def move(self, src: str, dest: str) -> None:
        """Copy an object and delete it."""
        self._s3.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy an object."""
        self._s3.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        """Open an object for reading from its beginning."""
        return self._s3.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        """Open an object for reading anywhere."""
        return self._s3.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Open an object for writing."""
        return self._s3.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Refuse: S3 cannot append."""
        raise OSError("S3 cannot append to an object")


def arrow_s3(endpoint: str | None) -> Any:
    """Return a pyarrow file system for `bucket/key` paths."""
    return pyarrow.fs.PyFileSystem(FolderlessHandler(endpoint))
