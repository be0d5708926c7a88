"""Every error that the project raises on purpose.

DenoiseError
├── UsageError              wrong flag, key or value; a job ends with exit code 2
├── CheckpointError         weights or card missing, damaged or of another architecture
├── OutputLocked            another run works on this OUT
├── RunFailed               the run as a whole cannot go on; exit code 1
├── StorageError            a file or an object could not be reached
│   ├── ObjectNotFound      there is no such file, object, folder or bucket
│   ├── AccessDenied        permissions or credentials do not allow it
│   └── StorageUnavailable  the server or disk did not answer after all retries, or has no space
└── ImageError              one image cannot be denoised; it becomes a `failed` row
    ├── NotAnImage          the bytes are of no known image format, or there are none
    ├── CorruptImage        the format is known, the bytes are damaged or cut short
    ├── UnsupportedImage    a valid image of a kind that is refused by name
    ├── ImageTooLarge       more pixels than allowed, told from the header alone
    ├── NonFiniteValues     NaN or infinite values
    ├── OutputConflict      two inputs map to one output
    ├── ImageTimeout        took longer than --timeout-per-image
    └── WorkerDied          the process that worked on it ended without a word

A message says what was got, what was expected and what to do.
"""

from __future__ import annotations


class DenoiseError(Exception):
    """Base of all errors that the project raises on purpose."""


class UsageError(DenoiseError):
    """A flag, a configuration key or a value is wrong."""


class CheckpointError(DenoiseError):
    """A checkpoint is missing, damaged or does not fit."""


class OutputLocked(DenoiseError):
    """Another run holds the lock of this output folder."""


class RunFailed(DenoiseError):
    """The run as a whole cannot go on."""


class StorageError(DenoiseError):
    """A file or an object could not be reached."""


class ObjectNotFound(StorageError):
    """There is no such file, object, folder or bucket."""


class AccessDenied(StorageError):
    """Permissions or credentials do not allow it."""


class StorageUnavailable(StorageError):
    """The server or disk did not answer after all retries, or has no space left."""


class ImageError(DenoiseError):
    """One image cannot be denoised."""


class NotAnImage(ImageError):
    """The bytes are of no known image format, or there are none."""


class CorruptImage(ImageError):
    """The format is known, but the bytes are damaged or cut short."""


class UnsupportedImage(ImageError):
    """A valid image of a kind that is refused by name."""


class ImageTooLarge(ImageError):
    """More pixels than allowed, told from the header alone."""


class NonFiniteValues(ImageError):
    """The image holds NaN or infinite values."""


class OutputConflict(ImageError):
    """Two inputs map to one output."""


class ImageTimeout(ImageError):
    """The image took longer than --timeout-per-image."""


class WorkerDied(ImageError):
    """The process that worked on the image ended without a word."""
