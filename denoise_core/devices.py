"""What the machine can do: CPU features, GPUs and TensorFlow's threads and memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# CPUs that multiply bfloat16 in hardware; elsewhere it is emulated and slower than float32.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
# What Keras imports where it is installed.
KERAS_EXTRAS = ("matplotlib", "matplotlib.pyplot", "cv2", "sklearn")


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 arithmetic (Linux; False elsewhere)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in flags for flag in BFLOAT16_FLAGS)


def configure_tensorflow(*, threads: int | None, use_gpu: bool) -> Any:
    """Import TensorFlow with quiet logs, bounded threads and GPU memory that grows.

    For a process of its own: it calls gc.freeze(), so objects that exist now are never collected.
    Must run before TensorFlow makes its first tensor. Without `use_gpu` all GPUs are hidden: Ray
    2.60 shows every GPU to workers that asked for none.
    """
    tf = import_tensorflow()
    gc.freeze()
    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    if not use_gpu:
        tf.config.set_visible_devices([], "GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    return tf


def import_tensorflow() -> Any:
    """Return TensorFlow, imported with quiet logs and without what Keras can do without."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with quick_import():
        import tensorflow as tf
    return tf


@contextmanager
def quick_import() -> Iterator[None]:
    """Shorten the first import of TensorFlow or Keras, in every process that computes.

    Keras takes it that KERAS_EXTRAS are not installed: it imports them to draw and to wrap, pyplot
    alone for 0.65 of 3.5 s. Python's garbage collector rests: it went through TensorFlow's million
    objects again and again, 0.7 of 2.9 s, and all of them stay.
    """
    hidden = [name for name in KERAS_EXTRAS if name not in sys.modules]
    collects = gc.isenabled()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()


NO_GPU = (
    "Ray has GPUs, but TensorFlow sees none and computes on CPUs. Install CUDA's libraries (`make "
    "install DEVICE=gpu`), or ask for no GPU."
)


def has_gpu(tf: Any) -> bool:
    """Return whether TensorFlow may use a GPU."""
    return bool(tf.config.get_visible_devices("GPU"))


def bound_kernels(tf: Any) -> int:
    """Let every kernel use one thread and TensorFlow run several at once; returns how many.

    oneDNN and Eigen cut and order their sums by the number of threads, so only one-thread kernels
    give the same bytes on every machine, whatever threads an actor was given. Where TensorFlow has
    already made a tensor, its threads stay as they are.
    """
    threads = tf.config.threading.get_intra_op_parallelism_threads() or cores()
    try:
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        tf.config.threading.set_intra_op_parallelism_threads(1)
    except RuntimeError:
        return max(1, tf.config.threading.get_inter_op_parallelism_threads())
    return int(threads)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def device_memory() -> int:
    """Return the bytes that one patch may count on: the smallest GPU's, else a core's share here.

    Asks `nvidia-smi`, so that nothing has to import TensorFlow. A driver without GPU answers for
    its own machine, where every core works on a patch of its own.
    """
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        return min(int(line) for line in done.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return _memory() // cores()


def _memory() -> int:
    """Return the bytes of memory of this machine: of all, so that the same choice comes again."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_precision(wanted: str, tf: Any) -> str:
    """Resolve 'auto' to 'bfloat16' where the device computes fast in it, else 'float32'.

    Where float32 is wanted this process computes in it from now on: TensorFlow's own way on GPUs
    since Ampere is TF32, whose mantissa of 10 bits is nearer to bfloat16's 7 than to 23.
    """
    if wanted == "float32":
        tf.config.experimental.enable_tensor_float_32_execution(False)
    if wanted != "auto":
        return wanted
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        # Ampere, compute capability 8.0, is the first with bfloat16.
        return "bfloat16" if details.get("compute_capability", (0, 0)) >= (8, 0) else "float32"
    return "bfloat16" if cpu_has_bfloat16() else "float32"
