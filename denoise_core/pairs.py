"""DATA of trainings and evaluations by names: `*_real.JPG` is noisy, `*_mean.JPG` its partner.

noisy, clean = find_pairs(entries, noisy="*_real.JPG", clean="*_mean.JPG")
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


def find_pairs(
    entries: Sequence[Entry], *, noisy: str, clean: str
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Return the noisy and the clean entries of equal keys, which are what '*' stands for.

    A pattern without a folder fits the file's name in any folder. A file that fits both patterns
    belongs to the longer one: of `a.png` and `a_clean.png`, '*.png' is the first alone where
    '*_clean.png' names the other. Raises UsageError where that does not decide, two files stand
    for the same, none fits, or one has no partner.
    """
    both = {e.uri for e in entries if None not in (_key(e.path, noisy), _key(e.path, clean))}
    if both and len(noisy) == len(clean):
        raise UsageError(
            f"{min(both)} fits both --noisy {noisy!r} and --clean {clean!r}; state more of the "
            "names in one of them."
        )
    rest = [entry for entry in entries if entry.uri not in both]
    found = (
        _matched(rest if len(noisy) < len(clean) else entries, noisy, flag="noisy"),
        _matched(rest if len(clean) < len(noisy) else entries, clean, flag="clean"),
    )
    refuse_unpaired(*found)
    return found


def _key(path: str, pattern: str) -> str | None:
    """Return what '*' stands for, after the folder where the pattern has none; None: no fit."""
    before, _, after = pattern.partition("*")
    folder, name = ("", path) if "/" in pattern else posixpath.split(path)
    fits = name.startswith(before) and name.endswith(after)
    if not fits or len(name) < len(before) + len(after):
        return None
    return posixpath.join(folder, name[len(before) : len(name) - len(after)])


def _matched(entries: Iterable[Entry], pattern: str, *, flag: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        key = _key(entry.path, pattern)
        if key is None:
            continue
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
