"""DATA of trainings and evaluations by names: `*_real.JPG` is noisy, `*_mean.JPG` its partner.

noisy = matched(entries, "*_real.JPG", flag="noisy")
clean = matched(entries, "*_mean.JPG", flag="clean")
refuse_unpaired(noisy, clean)
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

from denoise_core.errors import UsageError
from denoise_core.storage import Entry, StorageOptions, expand, is_bundle

NAMED = 5
"""So many files an error names one by one."""


def no_images(
    data: Sequence[str], options: StorageOptions, *, suffixes: Sequence[str]
) -> UsageError:
    """Return what to say of DATA without one image file or IDX file; of a Zarr that is there."""
    uris = (found.uri for found in expand(data, options) if isinstance(found, Entry))
    zarr = next(filter(is_bundle, uris), None)
    if zarr is not None:
        return UsageError(
            f"No images found in {', '.join(data)} but Zarrs such as {zarr}: training and "
            "evaluation take image files, .npy and IDX, so convert them; jobs.denoise takes Zarrs."
        )
    return UsageError(
        f"No images found in {', '.join(data)}: expected files with one of the endings "
        f"{', '.join(suffixes)}, or IDX files."
    )


def matched(entries: Iterable[Entry], pattern: str, *, flag: str) -> dict[str, Entry]:
    """Return what '*' stands for -> entry, of the entries whose relative path fits the pattern.

    A pattern without a folder fits the file's name in any folder. Raises UsageError where two files
    stand for the same, or none fits.
    """
    before, _, after = pattern.partition("*")
    found: dict[str, Entry] = {}
    for entry in entries:
        folder, name = ("", entry.path) if "/" in pattern else posixpath.split(entry.path)
        fits = name.startswith(before) and name.endswith(after)
        if not fits or len(name) < len(before) + len(after):
            continue
        key = posixpath.join(folder, name[len(before) : len(name) - len(after)])
        if key in found:
            raise UsageError(
                f"--{flag} {pattern!r}: {found[key].uri} and {entry.uri} both stand for {key!r}; "
                "give the folders one by one."
            )
        found[key] = entry
    if not found:
        raise UsageError(f"--{flag} {pattern!r}: no image in DATA has such a path.")
    return found


def refuse_unpaired(noisy: dict[str, Entry], clean: dict[str, Entry]) -> None:
    """Raise UsageError, naming the first of them, where an image has no partner."""
    alone = [f"{noisy[key].path} (no clean one)" for key in sorted(noisy.keys() - clean.keys())]
    alone += [f"{clean[key].path} (no noisy one)" for key in sorted(clean.keys() - noisy.keys())]
    if alone:
        rest = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
        raise UsageError(
            f"{len(alone)} file(s) without a partner: {', '.join(alone[:NAMED])}{rest}. Add the "
            "partners, or change the names that are looked for."
        )


def spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """Return at most `most` of the items, evenly spread."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]
