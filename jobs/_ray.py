"""Joins the Ray cluster that the job was submitted to, or starts a quiet local one."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from denoise_core.errors import RunFailed

# Ray gives its processes 30 s to start, by a constant; on a busy machine the first try may miss it.
_LOCAL_STARTS = 2
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def start_ray() -> None:
    """Call `ray.init` once: by RAY_ADDRESS where it is set, else on this machine alone.

    Call it from the main thread: Ray's processes die with the thread that started them. SIGTERM
    then ends the job as Ctrl-C does.
    """
    # Ray 2.60 shows all GPUs to workers that asked for none unless told otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # Ray's C++ core writes warnings about its own internals to stderr, as TensorFlow's does.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Else Ray prints the errors of tasks that an interrupted job no longer waits for.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A worker for reading and writing takes seconds of CPU to start; Ray ends it after one idle.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    if os.environ.get("RAY_ADDRESS"):
        # gRPC's keepalive. By default Ray pings a silent connection after 300 s and waits for 120,
        # so a cut link is noticed after seven minutes. Its servers drop whoever pings more often
        # than once a minute, and with that the one long call of a training. On one machine no link
        # is cut, and a busy one answers late.
        os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "65000")
        os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "20000")
    else:
        rest_log_monitor()
    # Without this a thread that outlives Ray at the end of a run starts a new one.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    try:
        _join()
    except SystemExit:
        # From the handler that Ray has for SIGTERM while it starts.
        raise KeyboardInterrupt from None
    _hide_token()
    # Ray has put a handler of its own in place, one that aborts.
    end_on_sigterm()


def rest_log_monitor() -> None:
    """Have the log monitor of a Ray that is started here look for no files.

    Else it lists the folder of logs ten times a second, for a driver that prints none of them.
    """
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "86400")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, in the processes of a Ray that is started here from now on.

    For training: each step takes the same memory again. By default glibc gives large blocks back to
    the kernel, and every page of them anew is a fault: 13,000 in a step of unet-s on a CPU, a tenth
    of its CPU time. Workers then hold up to a sixth more memory.
    """
    # Not by GLIBC_TUNABLES: it reaches the children of a child cut at its first ':'.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 33))


def end_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C, with rows and lock in order: `ray job stop` sends it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def start_local(**options: Any) -> None:
    """Start a Ray on this machine alone, a second time where its processes came late.

    `options` are `ray.init`'s. Raises whatever that raises the last time.
    """
    import ray

    for left in reversed(range(_LOCAL_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, **QUIET, **options)
            return
        except Exception:  # Ray raises that very class where its start takes too long
            if not left:
                raise


def _join() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    try:
        with silent_stderr():
            if address:
                ray.init(**QUIET)
            else:
                start_local()
    except Exception as error:
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise RunFailed(
            f"Ray {where} could not be started or joined ({type(error).__name__}: {reason})."
        ) from error


def _hide_token() -> None:
    """Keep Ray's token to its owner: Ray writes it with the umask's mode, mostly for all to read.

    Who has it runs code as this user, on any machine that reaches this Ray's ports.
    """
    # There is no token, its file system takes no modes, or this user has no home (RuntimeError).
    with suppress(OSError, RuntimeError):
        path = Path.home() / ".ray" / "auth_token"
        info = path.lstat()
        if stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid() and info.st_mode & 0o077:
            path.chmod(0o600)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Send the process's stderr to nowhere: the log level itself is logged, at any level.

    Errors of the body are Python exceptions, so none is lost.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
