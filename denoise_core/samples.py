"""Sample pictures: photographs of scikit-image made noisy, and their clean versions.

write_samples(Path("demo"))      # demo/noisy/..., demo/clean/..., the same relative paths
before_after(Path("demo"), Path("demo/out"))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoise_core.images import decode

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture of scikit-image by name, the noise to add (sigma of 255) and where it goes."""

    picture: str
    sigma: float
    path: str
    bits: int = 8

    def clean(self) -> Array:
        """Return the picture, (H, W) or (H, W, 3), uint8, or uint16 with real depth.

        16 bits come from the mean of 2x2 pixels, which has two more bits than its terms.
        """
        from skimage import data

        image: Array = getattr(data, self.picture)()
        if self.bits == 8:
            return image
        height, width = (side // 2 * 2 for side in image.shape[:2])
        quads = image[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
        return np.rint(quads.mean(axis=(1, 3)) * 257.0).astype(np.uint16).squeeze()

    def noisy(self) -> Array:
        """Return the picture with white Gaussian noise, clipped and rounded to its own depth."""
        clean = self.clean()
        top = np.iinfo(clean.dtype).max
        rng = np.random.default_rng(len(self.path) + int(self.sigma))
        noise = rng.normal(0.0, self.sigma / 255.0 * top, clean.shape)
        return np.clip(np.rint(clean + noise), 0, top).astype(clean.dtype)


SAMPLES = (
    Sample("astronaut", 25, "people/astronaut.png"),
    Sample("coffee", 15, "coffee.png"),
    Sample("chelsea", 50, "cat, very noisy.png"),
    Sample("rocket", 25, "rocket.tif"),
    Sample("retina", 20, "science/retina 16 bit.tif", bits=16),
    Sample("immunohistochemistry", 15, "science/tissue.png"),
    Sample("camera", 25, "grey/cameraman.png"),
    Sample("coins", 35, "grey/coins.png"),
    Sample("brick", 50, "grey/brick.tif"),
    Sample("hubble_deep_field", 10, "science/hubble 16 bit.png", bits=16),
)


def write_samples(root: Path) -> None:
    """Write every sample under `root`/noisy and its clean version under `root`/clean."""
    for sample in SAMPLES:
        for folder, pixels in (("noisy", sample.noisy()), ("clean", sample.clean())):
            target = root / folder / sample.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, pixels)


def _write(path: Path, pixels: Array) -> None:
    import imagecodecs
    import tifffile

    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        photometric = "rgb" if pixels.ndim == 3 else "minisblack"
        tifffile.imwrite(path, pixels, photometric=photometric, compression="deflate")


def before_after(root: Path, out: Path, *, paths: tuple[str, ...] = ()) -> Path:
    """Draw noisy, denoised and clean side by side, PSNR in dB below; return the PNG's path.

    `root` holds what `write_samples` wrote, `out` is the output of the denoising job.
    """
    from matplotlib.figure import Figure

    from denoise_core.metrics import psnr

    chosen = paths or tuple(s.path for s in (SAMPLES[0], SAMPLES[2], SAMPLES[6]))
    figure = Figure(figsize=(9.6, 3.35 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    for row, path in zip(axes, chosen, strict=True):
        folders = {"noisy": root / "noisy", "denoised": out / "images", "clean": root / "clean"}
        images = {
            name: decode((folder / path).read_bytes(), name=path).pixels
            for name, folder in folders.items()
        }
        top = float(np.iinfo(images["clean"].dtype).max)
        for axis, (name, image) in zip(row, images.items(), strict=True):
            axis.imshow(_crop(image).squeeze() / top, cmap="grey", vmin=0, vmax=1)
            axis.axis("off")
            figures = psnr(image, images["clean"], data_range=top)
            axis.set_title(name if name == "clean" else f"{name}, {figures:.2f} dB", fontsize=11)
    target = root / "before-after.png"
    figure.savefig(target, dpi=100)
    return target


def _crop(image: Array, side: int = 256) -> Array:
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    return image[top // 2 : top // 2 + side, left : left + side]
