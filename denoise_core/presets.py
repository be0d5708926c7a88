"""Presets of `jobs.train`: an architecture with its arguments and the recipe it is trained by.

`unet-*` are the project's own networks. The other five are classic small autoencoders with the
layers, losses, optimizers and schedules that are known of the systems they stand for; what is not
known of them (widths, some losses, epochs and batches) is as usual for such networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from denoise_core.config import nearest
from denoise_core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Stage:
    """From the share `start` of the schedule on: crops of `crop` pixels in batches of `batch`."""

    start: float
    crop: int
    batch: int


@dataclass(frozen=True, slots=True)
class Plateau:
    """Multiply the rate by `factor` after `patience` validations without a better loss."""

    factor: float = 0.5
    patience: int = 5
    floor: float = 1e-6


@dataclass(frozen=True, slots=True)
class Preset:
    """An architecture and its recipe.

    `default_halo` is in pixels. `noise` and `validation_noise` are texts that `parse_noise` reads.
    The rate warms up over `warmup_steps` and then follows `schedule`: 'cosine' to zero at the end,
    'plateau' or 'constant'. `loss` is a name that
    `training.loss_function` takes; from the share `mse_from` of the
    schedule on it is the squared error. `sample` is the one (height, width) of the images that the
    preset is for. `epochs` is the length where the user gives none; `order` 'epochs' shows every
    image once in an epoch, 'draws' takes images at random by the root of their pixels.
    """

    architecture: str
    arguments: dict[str, Any]
    default_halo: int
    learning_rate: float
    stages: tuple[Stage, ...]
    warmup_steps: int = 200
    mse_from: float = 0.9
    # The median norm of unet-s's gradients is 0.1; without a bound a run at 1.5e-3 in batches of
    # four 64 px crops diverged within 1,100 steps. 0: unbounded.
    clip_norm: float = 0.1
    ema: float = 0.999
    loss: str = "l1"
    optimizer: str = "adam"
    schedule: str = "cosine"
    plateau: Plateau = field(default_factory=Plateau)
    noise: str = "gaussian:0-55"
    validation_noise: str | None = None
    augment: str = "flip,rotate90"
    grey: float = 0.2
    order: str = "draws"
    epochs: int | None = None
    sample: tuple[int, int] | None = None
    # XLA takes a quarter off a U-Net's step on a CPU; the strided and transposed 3x3 convolutions
    # of the dense autoencoder cost five times as much in it.
    xla: bool = True
    about: str = ""

    @property
    def channels(self) -> int:
        """Channels of the images that the network takes."""
        return int(self.arguments.get("channels", 3))


# Small crops first: as many optimizer steps for each pixel of a CPU's budget as the gradient's
# noise allows. Large crops last: the network meets the context it will see in use.
STAGES = (Stage(0.0, 64, 8), Stage(0.6, 96, 8), Stage(0.85, 128, 8))


def unet(widths: tuple[int, ...], blocks: tuple[int, ...], rate: float, **more: Any) -> Preset:
    """Return the preset of one size of the residual U-Net."""
    arguments = {"widths": widths, "blocks": blocks, "channels": more.pop("channels", 3)}
    more = {"validation_noise": "gaussian:25", "stages": STAGES, **more}
    return Preset("unet", arguments, 32, rate, **more)


def classic(architecture: str, about: str, *, crop: int, batch: int, **more: Any) -> Preset:
    """Return the preset of a classic autoencoder: no warm-up, no average, no bound, one stage."""
    plain: dict[str, Any] = {
        "warmup_steps": 1,
        "mse_from": 1.1,
        "clip_norm": 0.0,
        "ema": 0.0,
        "loss": "mse",
        "schedule": "constant",
        "augment": "none",
        "grey": 0.0,
        "order": "epochs",
        "learning_rate": 1e-3,
        "stages": (Stage(0.0, crop, batch),),
    }
    return Preset(architecture, about=about, **{**plain, **more})


MNIST: dict[str, Any] = {"crop": 28, "sample": (28, 28)}
FACTOR = "factor:0.5"
MIXED = "gaussian:10-40+clip|salt-pepper:0.01-0.1|speckle:20-60+clip|poisson:30-300+clip"

PRESETS = {
    "unet-xs": unet((16, 32, 64, 128), (1, 1, 1, 2), 2e-3, about="residual U-Net, speed first"),
    "unet-s": unet((24, 48, 96, 192), (1, 1, 1, 2), 1e-3, about="residual U-Net, the default"),
    "unet-m": unet((40, 80, 160, 320), (1, 1, 1, 2), 6e-4, about="residual U-Net, for a GPU"),
    "unet-l": unet((56, 112, 224, 448), (1, 1, 2, 2), 4e-4, about="residual U-Net, the teacher"),
    "unet-s-photo": unet(
        (24, 48, 96, 192),
        (1, 1, 1, 2),
        6e-4,
        noise="camera",
        validation_noise="camera",
        about="unet-s for camera noise in 8-bit photographs",
    ),
    "unet-mnist": unet(
        (16, 32, 64),
        (1, 1, 2),
        2e-3,
        channels=1,
        noise=FACTOR,
        validation_noise=None,
        stages=(Stage(0.0, 28, 64),),
        augment="none",
        grey=0.0,
        order="epochs",
        loss="mse",
        epochs=10,
        sample=(28, 28),
        about="residual U-Net on MNIST, to compare the classic ones with",
    ),
    # Its loss is not known. By the squared error its output went to zero within the first epoch and
    # stayed there (9.74 dB after three): there the sigmoid passes no gradient on.
    "mnist-conv": classic(
        "autoencoder",
        "conv 32-32, max-pool, up-sampling, sigmoid; augmentation; reduce-on-plateau",
        arguments={"widths": (32, 32), "channels": 1, "up": "upsample"},
        default_halo=12,
        batch=32,
        epochs=50,
        loss="crossentropy",
        schedule="plateau",
        plateau=Plateau(0.5, 5, 1e-6),
        noise=FACTOR,
        augment="affine",
        **MNIST,
    ),
    "mnist-latent16": classic(
        "dense",
        "two convs, dropout, dense latent of 16, two transposed convs, sigmoid",
        arguments={"size": (28, 28), "channels": 1, "widths": (32, 64), "latent": 16},
        default_halo=0,
        batch=128,
        epochs=50,
        schedule="plateau",
        noise="factor:0.2",
        xla=False,
        **MNIST,
    ),
    "photo-conv": classic(
        "autoencoder",
        "conv 32/64/128 with max-pool, transposed convs 128/64/32, conv 3; 256x256 photographs",
        arguments={"widths": (32, 64, 128), "channels": 3},
        default_halo=16,
        crop=256,
        # Batch and schedule are not known: small batches, for the steps that they make of a pixel.
        batch=2,
        epochs=50,
        schedule="cosine",
        noise="gaussian:15+clip",
    ),
    "batchnorm": classic(
        "autoencoder",
        "conv-batchnorm-ReLU-pool, transposed conv-batchnorm-ReLU; Gaussian, salt and pepper, more",
        arguments={"widths": (32, 64, 128), "channels": 3, "norm": True},
        default_halo=16,
        crop=256,
        batch=32,
        epochs=50,
        noise=MIXED,
    ),
    "mnist-crossentropy": classic(
        "autoencoder",
        "convolutional autoencoder by binary cross-entropy; Adam, or --optimizer adadelta",
        arguments={"widths": (32, 32), "channels": 1, "up": "upsample"},
        default_halo=12,
        batch=128,
        epochs=100,
        loss="crossentropy",
        noise=FACTOR,
        **MNIST,
    ),
}


def preset(name: str) -> Preset:
    """Return a preset by name. Raises UsageError for an unknown one."""
    if name not in PRESETS:
        hint = nearest(name, PRESETS) or f" Expected one of {', '.join(PRESETS)}."
        raise UsageError(f"Unknown preset {name!r}.{hint}")
    return PRESETS[name]
