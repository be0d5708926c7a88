"""Joins the Ray cluster that the job was submitted to, or starts a quiet local one."""

from __future__ import annotations

import logging
import os


def start_ray() -> None:
    """Call `ray.init` once: by RAY_ADDRESS where it is set, else on this machine alone."""
    # Ray 2.60 shows all GPUs to workers that asked for none unless told otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # Ray's C++ core prints warnings about its own internals to the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    local = None if os.environ.get("RAY_ADDRESS") else "local"
    ray.init(
        address=local,
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False if local else None,
    )
