"""How fastprior computes fast. `cpu.py` and `cuda.py` each have an `Engine` with the methods of
`fastprior.Engine`, where the interface is written down (others are its own affair); this file is what both
share.

An engine knows arrays, numbers and the fields of a `Backbone`, never a `Prior`, and imports nothing of
fastprior: fastprior.py loads this folder by its path, whatever the program around it calls its own modules.
"""
from __future__ import annotations

import numpy as np

NONE, RELU6, SILU = 0, 1, 2  # activation codes, those of fastprior.py and of common.cuh
PANEL = 32  # side of an 8-bit tile, and what C is padded to
QTILE = np.dtype([("scale", np.float32, (PANEL,)), ("weight", np.int8, (PANEL, PANEL))])


class Unavailable(RuntimeError):
    """A device, library or file that an engine needs is missing. fastprior makes it a BackendUnavailable."""


class Unfit(ValueError):
    """Arguments that an engine cannot take. fastprior makes a ShapeError of it."""


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def padded_to(a: np.ndarray, *shape: int) -> np.ndarray:
    """float32 `a` with zeros after it along every axis."""
    full = np.zeros(shape, np.float32)
    full[tuple(slice(n) for n in a.shape)] = a
    return full


def same_padding(n: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(n/stride), the odd pixel of padding goes after."""
    total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
    return total // 2, total - total // 2
