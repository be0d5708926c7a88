"""What an evaluation leaves: table, pictures, page and summary. Called once, on the driver.

OUT/reports/evaluation/part-*.parquet   a row for each image, method and noise
OUT/pictures/*.png                      the pictures
OUT/evaluation.html                     the page, with the pictures in it
OUT/summary.json                        means, intervals, warnings, settings; written last
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from denoise_core import __version__
from denoise_core.errors import ObjectNotFound
from denoise_core.evaluation import page, pictures, statistics
from denoise_core.evaluation.examples import ENDS, Example, example_uri, read_example
from denoise_core.evaluation.methods import IDENTITY, ModelSource
from denoise_core.evaluation.protocol import BINS, PAIRS, Array, describe
from denoise_core.evaluation.rows import SCHEMA, to_table, write_table
from denoise_core.evaluation.sources import Shot
from denoise_core.storage import Storage, StorageOptions, join, storage_for

SUMMARY_VERSION = 1
MOST_GALLERIES = 4
"""Up to so many (model, noise) pairs each get pictures of their best and worst images."""


@dataclass(slots=True)
class Collected:
    """Results as they come from the workers; rows are kept as tables, which are small."""

    tables: list[pa.Table] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[tuple[str, str], Array] = field(default_factory=dict)
    codes: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    misses_gpu: bool = False
    seconds: float = 0.0
    _waiting: list[dict[str, Any]] = field(default_factory=list)

    def add(self, parts: list[dict[str, Any]]) -> int:
        """Take what the stages tell of one image; return 1."""
        for part in parts:
            self._waiting += part["rows"]
            self.failures += [row for row in part["rows"] if row["status"] == "failed"]
            self.misses_gpu |= part.get("misses_gpu", False)
            for item in part.get("histograms", ()):
                key = (item["method"], item["noise"])
                counts = np.array(item["counts"], np.int64)
                self.histograms[key] = self.histograms.get(key, np.zeros(BINS, np.int64)) + counts
            for item in part.get("codes", ()):
                self.codes.setdefault((item["method"], item["noise"]), []).append(item)
        return 1

    def close(self) -> None:
        """Turn waiting rows into a table."""
        if self._waiting:
            self.tables.append(to_table(self._waiting))
            self._waiting = []

    def table(self) -> pa.Table:
        """All rows, sorted, so that the same run gives the same table."""
        self.close()
        whole = pa.concat_tables(self.tables) if self.tables else SCHEMA.empty_table()
        return whole.sort_by(
            [("image", "ascending"), ("noise", "ascending"), ("method", "ascending")]
        )


@dataclass(slots=True)
class Report:
    """All that pictures and page are made of."""

    out: str
    storage: Storage
    run_id: str
    models: list[str]
    noises: list[str]
    shots: list[Shot]
    data: statistics.Figures
    entries: list[dict[str, Any]]
    collected: Collected

    def example(self, kind: str, *, method: str, noise: str, image: str) -> Example | None:
        """Read an example; None where its image failed."""
        uri = example_uri(self.out, self.run_id, kind=kind, method=method, noise=noise, image=image)
        try:
            return read_example(self.storage, uri)
        except ObjectNotFound:
            return None


def publish(
    collected: Collected,
    *,
    out: str,
    options: StorageOptions,
    run_id: str,
    settings: dict[str, Any],
    models: list[ModelSource],
    filters: list[str],
    noises: list[str],
    shots: list[Shot],
) -> dict[str, Any]:
    """Write everything; return the summary, whose keys are those of `summary.json`."""
    storage = storage_for(out, options)
    labels = [model.label for model in models]
    table = collected.table()
    write_table(storage, out, table, run_id=run_id)
    # The noisy input first, then the models, then the other filters.
    methods = [IDENTITY, *labels, *(name for name in filters if name != IDENTITY)]
    data = statistics.figures(table, methods=methods, noises=noises)
    entries = statistics.summarise(data, models=labels)
    report = Report(
        out=out,
        storage=storage,
        run_id=run_id,
        models=labels,
        noises=noises,
        shots=shots,
        data=data,
        entries=entries,
        collected=collected,
    )
    drawn = list(draw(report))
    # Also those that some noise does not suit, which may have several rows.
    unusable = {row["image"] for row in collected.failures if row.get("method") is None}
    summary = {
        "schema_version": SUMMARY_VERSION,
        "program_version": __version__,
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": run_id,
        "protocol": describe(noises, protocol=settings["protocol"], paired=noises == [PAIRS]),
        "images": {
            "total": len(shots),
            "ok": len(shots) - len(unusable),
            "failed": len(unusable),
        },
        "seconds": round(collected.seconds, 1),
        "models": [{"label": m.label, "path": m.path, "hash": m.hash} for m in models],
        "noises": noises,
        "results": entries,
        "warnings": statistics.find_losses(entries),
        "pictures": [f"pictures/{picture.name}.png" for picture in drawn],
        "settings": settings,
    }
    _write_pictures(report, drawn)
    html = page.render(summary, drawn, data=data, failures=collected.failures)
    storage.write(join(out, "evaluation.html"), html.encode("utf-8", "backslashreplace"))
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    storage.write(join(out, "summary.json"), text.encode("utf-8", "backslashreplace"))
    return summary


def _write_pictures(report: Report, drawn: Sequence[pictures.Drawn]) -> None:
    """Write the pictures and delete those that only the summary of an earlier run names."""
    names = {f"pictures/{picture.name}.png" for picture in drawn}
    for picture in drawn:
        report.storage.write(join(report.out, "pictures", f"{picture.name}.png"), picture.png)
    uri = join(report.out, "summary.json")
    if report.storage.stat(uri) is None:
        return
    try:
        earlier = json.loads(report.storage.read(uri)).get("pictures", [])
    except (ValueError, AttributeError):
        return
    for name in earlier:
        if isinstance(name, str) and name.startswith("pictures/") and name not in names:
            report.storage.delete(join(report.out, name))


# --- Which pictures ---------------------------------------------------------------------------


def draw(report: Report) -> list[pictures.Drawn]:
    """Return all pictures, in the page's order."""
    found = [_curves(report), *_grids(report), *_side_by_side(report), *_ends(report)]
    found += [*_residuals(report), *_latents(report)]
    return list(_with_own_names(picture for picture in found if picture is not None))


def _with_own_names(drawn: Iterable[pictures.Drawn]) -> Iterator[pictures.Drawn]:
    """Number the pictures whose names, which are cut short, are those of others before them."""
    taken: set[str] = set()
    for picture in drawn:
        name, number = picture.name, 1
        while name in taken:
            number += 1
            name = f"{picture.name}-{number}"
        taken.add(name)
        yield replace(picture, name=name)


def _curves(report: Report) -> pictures.Drawn | None:
    levels = statistics.gaussian_levels(report.noises)
    if len(levels) < 2:
        return None
    return pictures.curves(report.entries, levels=levels, models=report.models)


def _grids(report: Report) -> list[pictures.Drawn]:
    """A grid for each noise: noisy, each model's output, clean."""
    found = []
    for noise in report.noises:
        rows = []
        for shot in (shot for shot in report.shots if shot.shown):
            row = [
                report.example("shown", method=method, noise=noise, image=shot.name)
                for method in report.models
            ]
            if all(example is not None for example in row):
                rows.append((shot.name, [example for example in row if example is not None]))
        if rows:
            found.append(pictures.grid(rows, noise=noise, methods=report.models))
    return found


def _side_by_side(report: Report) -> list[pictures.Drawn]:
    """One image for each noise through every method."""
    found = []
    for noise in report.noises:
        shown = [shot for shot in report.shots if shot.shown]
        for shot in (*shown[len(shown) // 2 :], *shown[: len(shown) // 2]):
            each = {
                method: report.example("shown", method=method, noise=noise, image=shot.name)
                for method in report.data.methods
            }
            known = {method: example for method, example in each.items() if example is not None}
            if len(known) > 2:
                found.append(pictures.side_by_side(known, noise=noise, image=shot.name))
                break
    return found


def gallery_pairs(models: list[str], noises: list[str]) -> list[tuple[str, str]]:
    """Return the (model, noise) pairs that get galleries: all, or at the middle noise alone."""
    if len(models) * len(noises) > MOST_GALLERIES:
        noises = [noises[len(noises) // 2]]
    return [(model, noise) for noise in noises for model in models]


def _ends(report: Report) -> list[pictures.Drawn]:
    """The worst and the best images of each model."""
    found = []
    for model, noise in gallery_pairs(report.models, report.noises):
        values = report.data.psnr[report.data.at(model, noise)]
        for kind, places in zip(("worst", "best"), statistics.two_ends(values, ENDS), strict=True):
            names = [report.data.images[place] for place in places]
            examples = [
                (name, report.example("ends", method=model, noise=noise, image=name))
                for name in names
            ]
            known = [(name, example) for name, example in examples if example is not None]
            if known:
                found.append(pictures.gallery(known, kind=kind, model=model, noise=noise))
    return found


def _residuals(report: Report) -> list[pictures.Drawn]:
    found = []
    for noise in report.noises:
        known = {
            method: report.collected.histograms[method, noise]
            for method in report.data.methods
            if (method, noise) in report.collected.histograms
        }
        if known:
            found.append(pictures.residuals(known, noise=noise, models=report.models))
    return found


def _latents(report: Report) -> list[pictures.Drawn]:
    """PCA of the codes of every model that has a bottleneck, over all noises together."""
    found = []
    for model in report.models:
        items = [
            item
            for noise in report.noises
            for item in sorted(
                report.collected.codes.get((model, noise), []), key=lambda item: str(item["image"])
            )
        ]
        if len(items) < 3:
            continue
        points, shares = statistics.principal_components(
            np.array([item["code"] for item in items], np.float64)
        )
        found.append(
            pictures.latent(
                points,
                shares,
                noises=[item["noise"] for item in items],
                labels=[item["label"] for item in items],
                model=model,
                dimensions=len(items[0]["code"]),
            )
        )
    return found
