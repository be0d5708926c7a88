"""What the machine can do: memory by nvidia-smi or by /proc, cores; what TensorFlow imports."""

from __future__ import annotations

import gc
import importlib
import os
import stat
import sys
from dataclasses import replace

import pytest

from denoise_core import devices
from denoise_core.checkpoints import load_checkpoint
from denoise_core.denoiser import Denoiser


def test_memory_of_the_smallest_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 24576\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert devices.device_memory() == 24576 * 2**20


def test_without_a_gpu_the_cores_share_the_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(devices, "cores", lambda: 1)
    whole = devices.device_memory()
    assert 2**26 < whole <= physical
    monkeypatch.setattr(devices, "cores", lambda: 10**6)
    assert devices.device_memory() < 2**20


def test_a_broken_nvidia_smi_is_as_none(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert devices.device_memory() > 2**26


@pytest.mark.parametrize("name", devices.KERAS_EXTRAS)
def test_extras_are_hidden_from_keras_and_there_for_all_others(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    with devices.quick_import(), pytest.raises(ImportError):
        importlib.import_module(name)
    module = importlib.import_module(name)

    with devices.quick_import():
        assert sys.modules[name] is module


def test_no_garbage_is_collected_during_a_quick_import_and_all_is_as_before_after_it():
    try:
        for before in (True, False):
            (gc.enable if before else gc.disable)()
            with devices.quick_import():
                assert not gc.isenabled()
            assert gc.isenabled() is before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("wanted", "only", "tf32"),
    [
        ("float32", False, False),
        ("bfloat16", True, False),
        ("bfloat16", False, True),
        ("auto", False, True),
    ],
)
def test_float32_is_no_tf32(wanted, only, tf32):
    config = devices.import_tensorflow().config.experimental
    shipped = load_checkpoint("unet-s")
    checkpoint = replace(shipped, card={**shipped.card, "float32_only": only})
    config.enable_tensor_float_32_execution(True)
    try:
        denoiser = Denoiser(checkpoint, precision=wanted)
        assert config.tensor_float_32_execution_enabled() is tf32
        assert wanted == "auto" or denoiser.precision == ("float32" if not tf32 else "bfloat16")
    finally:
        config.enable_tensor_float_32_execution(True)
