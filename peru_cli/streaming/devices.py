"""Choose the device for tensor work."""

from __future__ import annotations

import ctypes
import sys

from peru_cli.errors import UsageError
from peru_cli.streaming.arrays import CPU, Arrays


def pick_arrays(device: str) -> Arrays:
    """The namespace of `auto`, `cpu`, `cuda` or `cuda:N`. UsageError if the device does not exist."""
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return CPU
    from peru_cli.streaming.gpu import Gpu, find_gpu

    found = find_gpu(device)
    if found is None and device != "auto":
        raise UsageError(f"--device {device!r} is not auto, cpu, cuda or cuda:N, or there is no such GPU", "use --device cpu")
    return CPU if found is None else Gpu(found)


def _has_driver() -> bool:
    """Whether NVIDIA's driver sees a GPU, determined without torch."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(number)) == 0 and number.value > 0
    except (OSError, AttributeError):
        return False
