"""fastprior: anomaly scores for images, in real time, without reconstructing them.

An image of a good part, seen through a frozen ImageNet network, should be likely under a
diffusion model trained on good parts only. fastprior carries the features *forward* to noise
with a few DDIM inversion steps and reads the density of where they land under N(0, I). Low
density means anomaly.

    import fastprior as fp
    prior = fp.Prior.fit("good_images/")          # torch trains the denoiser; iterations=0: no torch
    prior.save("part.npz")
    prior = fp.Prior.load("part.npz")             # from here on torch is never imported
    result = prior.score("new.png")               # path, or HxWx3 uint8 array
    print(result.score, result.p_value, result.is_anomaly, result.anomaly_map.shape)

Vendoring: this file alone scores arrays with NumPy; with kernels/ beside it at full speed, CPU
and GPU; weights/ to train with the shipped backbones; examples/ for folders, data sets, foreign
weights, training and the command. Pillow decodes files; torch trains; typer and rich make the command.

Conventions: images are uint8, HxWx3, RGB. Inside, arrays are channels-last and C-contiguous;
float32 on the fast path, float64 in the references. Names are those of the papers: `x0`, `x_t`,
`eps` (noise, drawn or predicted), `v`, `alpha_bar`, `timesteps` (ascending: inversion runs from
data to noise), `log_prob` and `nll` in nats. N = G*G' grid positions, C channels, S*S' pixels.

A score's way: `main` -> examples/commands.py (options) -> console.py -> `Prior.load` -> `Prior.score` ->
`_frames` -> `_engine` (which builds once: `_emit`, `_emit_inversion`, `_emit_denoiser`) -> `Engine.run` of
kernels/ -> `Result`; without kernels/ `_reference_frames`. A training's: `fit` -> examples/extraction.py ->
fitting.py (Gaussians, what is set aside; training.py: the denoiser) -> `Prior`.

Limits: one product per model, seen from roughly one viewpoint; the density is per grid position,
so a part that lies anywhere in the frame needs alignment or many good images.

References: DDIM: Song, Meng, Ermon 2021 (arXiv:2010.02502). v-prediction: Salimans, Ho 2022
(arXiv:2202.00512). Inversion as anomaly score: InvAD, Sakai et al. (arXiv:2504.05662). Per-position
Gaussian: PaDiM (arXiv:2011.08785). Factors: Tipping, Bishop 1999 (probabilistic PCA). EfficientNet:
Tan, Le 2019 (arXiv:1905.11946). Conformal p-values: Vovk et al. 2005; Bates et al. 2023 (arXiv:2104.08279).

Licence: MIT (see LICENSE). Source of truth: this file; tests walk the table of operations in tests/twins.py.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import stat
import struct
import sys
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Protocol, Sequence

import numpy as np

__version__ = "0.2.0"
__all__ = [
    "Prior", "MultiPrior", "fit_many", "Result", "Region", "find_regions", "label_regions",
    "RegionOfInterest", "FastPriorError", "ShapeError", "ImageError", "ModelError", "BackendUnavailable",
    "alpha_bar", "select_timesteps", "rotation", "ddim_invert",
    "gaussian_log_prob", "conformal_p_value", "conformal_threshold", "Engine",
]

_log = logging.getLogger("fastprior")  # what a library has to say: the command shows it on stderr


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------

class FastPriorError(Exception):
    """Root of every error that fastprior raises on purpose."""


class ShapeError(FastPriorError, ValueError):
    """An array has the wrong shape, dtype or values."""


class ImageError(FastPriorError, ValueError):
    """A path or file that cannot be read as an image, or too few images."""


class ModelError(FastPriorError, ValueError):
    """A model or weight file that is damaged, hostile, or of another version."""


class BackendUnavailable(FastPriorError, RuntimeError):
    """A device or library that was asked for is not there."""


# ------------------------------------------------------------------------------------------------
# Schedule: DDIM inversion is a rotation
# ------------------------------------------------------------------------------------------------

NUM_TRAIN_TIMESTEPS = 1000


@functools.cache
def _alpha_bar_table() -> np.ndarray:
    beta = np.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS)
    table = np.cumprod(1.0 - beta)
    table.setflags(write=False)
    return table


def alpha_bar(timesteps) -> np.ndarray:
    """Cumulative signal power of the linear schedule of DDPM (Ho et al. 2020, section 4).

    Parameters
    ----------
    timesteps : int or array of int
        In [0, 1000). beta runs linearly from 1e-4 to 0.02.

    Returns
    -------
    ndarray, float64, same shape, dimensionless, in (0, 1), falling.

    >>> bool(alpha_bar(0) > 0.999), bool(alpha_bar(999) < 1e-4)
    (True, True)
    """
    t = np.asarray(timesteps)
    if not np.issubdtype(t.dtype, np.integer) or (t.size and (t.min() < 0 or t.max() >= NUM_TRAIN_TIMESTEPS)):
        raise ShapeError(f"timesteps: expected integers in [0, {NUM_TRAIN_TIMESTEPS}), got {timesteps!r}")
    return _alpha_bar_table()[t]


def select_timesteps(num_steps: int, first: int, last: int) -> np.ndarray:
    """The grid of an inversion with `num_steps` evaluations of the denoiser.

    Returns num_steps + 1 ascending timesteps from `first` to `last`, evenly spaced in the angle
    phi (cos phi = sqrt(alpha_bar)), so that every rotation is about as large as the others.

    >>> select_timesteps(2, 50, 500)
    array([ 50, 238, 500])
    """
    if not (isinstance(num_steps, (int, np.integer)) and 1 <= num_steps <= 200):
        raise ShapeError(f"num_steps: expected an integer from 1 to 200, got {num_steps!r}")
    if not 0 <= first < last < NUM_TRAIN_TIMESTEPS:
        raise ShapeError(f"timesteps: expected 0 <= first < last < {NUM_TRAIN_TIMESTEPS}, "
                         f"got {first}, {last}")
    phi = np.arccos(np.sqrt(_alpha_bar_table()))
    grid = np.searchsorted(phi, np.linspace(phi[first], phi[last], num_steps + 1)).clip(first, last)
    if np.any(np.diff(grid) < 1):
        raise ShapeError(f"num_steps: {num_steps} steps do not fit between t={first} and t={last}")
    return grid


def rotation(timesteps, prediction: str = "v") -> np.ndarray:
    """Coefficients (a, b) of every DDIM inversion step x_{t'} = a x_t + b F(x_t, t).

    For v-prediction this is the rotation a = cos(D), b = sin(D), D = phi_{t'} - phi_t. For
    eps-prediction the same DDIM update (Song et al. 2021, eq. 12 with sigma = 0) solved for
    x_t and eps: a = cos phi'/cos phi, b = sin phi' - cos phi' tan phi.

    Returns
    -------
    ndarray, float64, (len(timesteps) - 1, 2)
    """
    phi = np.arccos(np.sqrt(alpha_bar(timesteps)))
    now, then = phi[:-1], phi[1:]
    if prediction == "v":
        return np.stack([np.cos(then - now), np.sin(then - now)], 1)
    if prediction == "eps":
        return np.stack([np.cos(then) / np.cos(now), np.sin(then) - np.cos(then) * np.tan(now)], 1)
    raise ShapeError(f"prediction: expected 'v' or 'eps', got {prediction!r}")


def ddim_invert(x0: np.ndarray, denoiser: Callable[[np.ndarray, int], np.ndarray], timesteps,
                prediction: str = "v") -> np.ndarray:
    """Carry data to noise with len(timesteps) - 1 evaluations of the denoiser.

    Parameters
    ----------
    x0 : ndarray, any shape
        Taken as x_t at timesteps[0].
    denoiser : callable (x_t, t) -> array of the same shape
        v, or eps with ``prediction="eps"``.
    timesteps : ascending ints, at least two.

    Returns
    -------
    x_T : ndarray, same shape as x0, at timesteps[-1].

    >>> x = np.ones((2, 3)); zero = lambda x, t: 0 * x
    >>> bool(np.allclose(ddim_invert(x, zero, [0, 999]), x * rotation([0, 999])[0, 0]))
    True
    """
    x = np.asarray(x0)
    for (a, b), t in zip(rotation(timesteps, prediction).tolist(), np.asarray(timesteps)):
        x = a * x + b * denoiser(x, int(t))
    return x


def gaussian_log_prob(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Log-density of N(0, I) in nats: -|x|^2/2 - (C/2) log 2 pi, summed over `axis` (C long).

    >>> bool(np.isclose(gaussian_log_prob(np.zeros(2)), -np.log(2 * np.pi)))
    True
    """
    x = np.asarray(x)
    return -0.5 * np.sum(x * x, axis=axis) - 0.5 * x.shape[axis] * math.log(2 * math.pi)


# ------------------------------------------------------------------------------------------------
# Reference operations: textbook NumPy in the dtype that comes in. In float64 they are what every
# kernel answers to; in float32 they are what scores where there are no kernels, so the heavy ones
# are written as products that BLAS or einsum does in one go, and activations work in place.
# ------------------------------------------------------------------------------------------------

NONE, RELU6, SILU = 0, 1, 2  # activation codes, shared with the kernels
_BAND_BYTES = 1 << 20  # of the expanded image, see `mbconv`
_EXPANDED, _SUMS = (0, 2047), (-32767, 32767)  # limits in integers, see `Backbone`


def activate(x: np.ndarray, act: int, out: np.ndarray | None = None) -> np.ndarray:
    """x, min(max(x, 0), 6), or x * sigmoid(x), by code NONE, RELU6, SILU; into `out`, which may be x."""
    if act == RELU6:
        return np.clip(x, 0, 6, out=out)
    if act == SILU:
        with np.errstate(over="ignore"):  # x / inf is right
            y = np.exp(-x)
        y += 1
        return np.divide(x, y, out=y if out is None else out)
    return x


def resize_taps(n_in: int, n_out: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Triangle-filter taps that resample n_in samples to n_out, antialiased when shrinking.

    The filter is Pillow's BILINEAR: support max(1, n_in/n_out), centres at half pixels. `shift`
    moves the window by that share of n_in; what lies outside repeats the edge.

    Returns
    -------
    start : int64 (n_out,), first input sample of each output
    weight : float64 (n_out, taps), rows sum to 1, zero-padded, start + taps <= n_in
    """
    scale = n_in / n_out
    support = max(1.0, scale)
    centre = (np.arange(n_out) + 0.5) * scale + shift * n_in
    taps = int(math.ceil(support)) * 2 + 1
    begin = np.floor(centre - support + 0.5).astype(np.int64)
    where = begin[:, None] + np.arange(taps)
    weight = np.maximum(0, 1 - np.abs(where + 0.5 - centre[:, None]) / support)
    if not shift:  # Pillow drops what lies outside; with a shift it goes to the edge sample
        weight[(where < 0) | (where >= n_in)] = 0
    where = np.clip(where, 0, n_in - 1)
    first, last = np.where(weight > 0, where, n_in).min(1), np.where(weight > 0, where, -1).max(1)
    taps = int((last - first).max()) + 1  # no more than the widest row has
    start = np.minimum(first, n_in - taps)
    folded = np.zeros((n_out, taps))
    np.add.at(folded, (np.arange(n_out)[:, None], np.clip(where - start[:, None], 0, taps - 1)), weight)
    return start, folded / folded.sum(1, keepdims=True)


def fixed_point_taps(n_in: int, n_out: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """`resize_taps` in 1/4096: integers in float64; each running sum is rounded, so that rows sum to 4096.

    Half up, by a little less: last bits decide no tie.
    """
    start, weight = resize_taps(n_in, n_out, shift)
    total = np.cumsum(weight, 1)
    return start, np.diff(np.floor(total / total[:, -1:] * 4096 + (.5 + 1e-9)), axis=1, prepend=0)


@functools.lru_cache(16)
def _tap_bands(n_in: int, n_out: int, shift: float, dtype: type, taps: Callable) -> list:
    """Taps as one dense matrix for every 32 outputs: [(first input, (32, inputs))], kept a size."""
    start, weight = taps(n_in, n_out, shift)
    bands = []
    for i in range(0, n_out, 32):
        column = start[i:i + 32, None] - start[i] + np.arange(weight.shape[1])
        dense = np.zeros((len(column), column[-1, -1] + 1), dtype)
        np.put_along_axis(dense, column, weight[i:i + 32], 1)
        bands.append((start[i], dense))
    return bands


def _resample(x: np.ndarray, n_out: int, shift=0.0, dtype=np.float64, taps=resize_taps) -> np.ndarray:
    """x (n_in, ...) -> (n_out, ...) of dtype, along the first axis."""
    rows = [w @ np.ascontiguousarray(x[first:first + w.shape[1]], dtype).reshape(w.shape[1], -1)
            for first, w in _tap_bands(len(x), n_out, shift, dtype, taps)]
    return np.concatenate(rows).reshape((n_out,) + x.shape[1:])


def resize_normalize(image: np.ndarray, size, mean, std, shift=(0.0, 0.0),
                     dtype: type = np.float64) -> np.ndarray:
    """uint8 (H, W, 3) -> dtype (*size, 3), size a pair or a side: triangle filter, (x/255 - mean)/std."""
    height, width = np.broadcast_to(size, 2).tolist()
    x = _resample(image, height, shift[0], dtype)
    x = _resample(x.swapaxes(0, 1), width, shift[1], dtype).reshape(width, -1)
    x *= np.tile(1 / (255 * np.asarray(std)), height).astype(dtype)
    x -= np.tile(np.divide(mean, std), height).astype(dtype)
    return np.ascontiguousarray(x.reshape(width, height, 3).swapaxes(0, 1))


def resize_integers(image: np.ndarray, size, shift=(0.0, 0.0)) -> np.ndarray:
    """uint8 (H, W, 3) -> resized pixels in quarters of a grey level, less 510: integers, float32 (*size, 3).

    Every sum is of integers and below 2^24, exact in float32 in any order: `fixed_point_taps` down, rounded
    to sixteenths of a level, then across, rounded to quarters (half up both times).
    """
    height, width = np.broadcast_to(size, 2).tolist()
    x = _resample(image, height, shift[0], np.float32, fixed_point_taps)
    x = np.floor(x / np.float32(256) + np.float32(.5)).swapaxes(0, 1)
    x = _resample(x, width, shift[1], np.float32, fixed_point_taps) / np.float32(16384)
    return np.ascontiguousarray((np.floor(x + np.float32(.5)) - 510).swapaxes(0, 1))


def _same_padding(n: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(n/stride), the odd pixel of padding goes after."""
    total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
    return total // 2, total - total // 2


def _patches(x: np.ndarray, kernel: int, stride: int, beyond=None, columns: int = 1) -> np.ndarray:
    """(H, W, C) -> (Ho, Wo/columns, kernel, kernel, columns * C), SAME zero padding, a view.

    beyond: rows of zeros above and below, where x is a band of a taller image. In memory, a tap's
    pixels lie side by side: with stride 1, `columns` of them are one pixel of that many more channels.
    """
    h, w, c = x.shape
    x = np.pad(x, (beyond or _same_padding(h, kernel, stride), _same_padding(w, kernel, stride), (0, 0)))
    down, right, step = x.strides
    return np.lib.stride_tricks.as_strided(
        x, ((len(x) - kernel) // stride + 1, -(-w // stride) // columns, kernel, kernel, columns * c),
        (stride * down, stride * right * columns, down, right, step), writeable=False)


def stem(x: np.ndarray, w: np.ndarray, b: np.ndarray, act: int) -> np.ndarray:
    """3x3 convolution, stride 2, SAME: x (H, W, 3), w (3, 3, 3, C) as (ky, kx, in, out), b (C,)."""
    patches = _patches(x, 3, 2)
    return linear(patches.reshape(patches.shape[:2] + (-1,)), w.reshape(-1, len(b)), b, act)


def depthwise(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, act: int,
              beyond: tuple[int, int] | None = None) -> np.ndarray:
    """Depthwise convolution, SAME: x (H, W, C), w (k, k, C), b (C,) -> (ceil(H/s), ceil(W/s), C).

    beyond: see `_patches`.
    """
    columns = x.shape[1] if stride == 1 else 1
    y = np.einsum("hwijc,ijc->hwc", _patches(x, len(w), stride, beyond, columns), np.tile(w, columns))
    y += np.tile(b, columns)
    return activate(y, act, out=y).reshape(len(y), -1, len(b))


def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray, act: int = NONE,
           residual: np.ndarray | None = None) -> np.ndarray:
    """act(x @ w + b) + residual: x (..., K), w (K, M), b (M,) or (..., M)."""
    y = np.tensordot(x, w, 1)
    y += b
    activate(y, act, out=y)
    if residual is not None:
        y += residual
    return y


def squeeze_excite(x: np.ndarray, reduce_w, reduce_b, expand_w, expand_b) -> np.ndarray:
    """x * sigmoid(W2 silu(W1 mean(x) + b1) + b2), the mean over both spatial axes of (H, W, C)."""
    hidden = activate(x.mean((0, 1)) @ reduce_w + reduce_b, SILU)
    with np.errstate(over="ignore"):  # 1 / inf is right
        return x * (1 / (1 + np.exp(-(hidden @ expand_w + expand_b))))


def requantize(total: np.ndarray, m: np.ndarray, low: int = 0, high: int = 255) -> np.ndarray:
    """clip(rint(total * m)), in place: a layer in integers ends so, see `Backbone`.

    Two roundings: the product to float32, and that to the nearest integer (ties to even).
    """
    total *= m
    np.rint(total, out=total)
    return np.clip(total, low, high, out=total)


def _bands(shape: tuple[int, int, int], kernel: int, stride: int) -> list[tuple[slice, tuple[int, int]]]:
    """An image (H, W, C) in bands that fit the cache: input rows, and rows of zeros above and below them."""
    height, (top, _) = shape[0], _same_padding(shape[0], kernel, stride)
    out = -(-height // stride)
    count = min(out, -(-4 * math.prod(shape) // _BAND_BYTES))
    bands = []
    for i in range(count):
        first, last = out * i // count * stride - top, (out * (i + 1) // count - 1) * stride + kernel - top
        bands.append((slice(max(first, 0), min(last, height)), (max(-first, 0), max(last - height, 0))))
    return bands


def mbconv(x: np.ndarray, block: "InvertedResidual") -> np.ndarray:
    """Inverted residual: expand (1x1) -> depthwise -> squeeze-excite -> project (1x1) -> + x.

    x (H, W, Cin) -> (ceil(H/s), ceil(W/s), Cout). Expansion and squeeze-excitation are optional.
    Sandler et al. 2018 (arXiv:1801.04381); batch norms are already folded into the weights. For a block in
    integers see `Backbone`.
    """
    p = block.arrays
    squeeze, kernel, integer = "se_reduce_w" in p, len(p["dw_w"]), "dw_m" in p
    act = NONE if integer else block.act

    def done(y: np.ndarray, layer: str, *limits: int) -> np.ndarray:
        return requantize(y, p[f"{layer}_m"], *limits) if integer else y

    def band(rows: slice, beyond: tuple[int, int]) -> np.ndarray:
        m, most = p.get("input_m", (1, 0))
        y = requantize(x[rows].copy(), m, -most, most) if most else x[rows]
        if "expand_w" in p:
            y = done(linear(y, p["expand_w"], p["expand_b"], act), "expand", *_EXPANDED)
        y = done(depthwise(y, p["dw_w"], p["dw_b"], block.stride, act, beyond), "dw")
        return y if squeeze else done(linear(y, p["project_w"], p["project_b"]), "project", *_SUMS)
    bands = _bands(x.shape[:2] + (block.channels[1],), kernel, block.stride)
    y = np.concatenate([band(*rows) for rows in bands])
    if squeeze:
        y = squeeze_excite(y, p["se_reduce_w"], p["se_reduce_b"], p["se_expand_w"], p["se_expand_b"])
        y = linear(y, p["project_w"], p["project_b"])
    y = y + x if block.skip else y
    return y.clip(*_SUMS) if integer and block.skip else y


def pool(x: np.ndarray, grid, scale: float | None = None) -> np.ndarray:
    """Average (H, W, C) over the cells of a lattice -> (*grid, C); H and W are multiples of grid's.

    scale: x holds integers, whose exact sums are rounded to float32, then times scale / (pixels of a cell).
    """
    (h, w, c), (down, across) = x.shape, np.broadcast_to(grid, 2).tolist()
    if scale is None:
        return x.reshape(down, h // down, w * c).mean(1).reshape(down, across, w // across, c).mean(2)
    total = x.reshape(down, h // down, across, w // across, c).sum((1, 3), dtype=np.float64)
    return total.astype(np.float32) * (np.asarray(scale, np.float32) / np.float32(h // down * (w // across)))


def coarse_cells(inside: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """int64 (M, 4): of each coarse place, 2 x 2 places, those that it is the mean of.

    They count the places inside, of the bool (N,). A coarse place has at least one of them; another, outside,
    gives way to its first one. Where a side of the grid is odd the last two coarse places overlap.
    """
    def pairs(n: int) -> np.ndarray:
        first = np.minimum(np.arange(0, n, 2), max(n - 2, 0))
        return np.stack([first, np.minimum(first + 1, n - 1)], 1)
    down, across = map(pairs, grid)
    cells = (down[:, None, :, None] * grid[1] + across[None, :, None, :]).reshape(-1, 4)
    cells = cells[inside[cells].any(1)]
    first = np.take_along_axis(cells, inside[cells].argmax(1)[:, None], 1)
    return (np.cumsum(inside) - 1)[np.where(inside[cells], cells, first)]


def coarsen(f: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Mean of the places of each of `cells` (M, 4): f (N, C) -> (M, C); in one order, so equal to the bit."""
    a, b, c, d = (f[cells[:, i]] for i in range(4))
    return ((a + b) + (c + d)) * f.dtype.type(.25)


def whiten(f: np.ndarray, mean: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x0_n = W_n (f_n - mean_n): f, mean (N, C); w (N, C, C) lower-triangular = L^-1, or (N, C) diagonal."""
    d = f - mean
    return w * d if w.ndim == 2 else np.einsum("nij,nj->ni", w, d)


def remove_factors(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """x - V^T V x: shrinks the directions in which places vary together, see `fit_factors`.

    x (N, C), v (K, N, C).
    """
    v = v.reshape(len(v), -1)
    return x - (v @ x.ravel() @ v).reshape(x.shape)


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the last axis, tiny = 1e-5 (Ba et al. 2016), then gain and bias."""
    d = x - x.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-5) * gain + bias


def mix(x: np.ndarray, w: np.ndarray, act: int = NONE, residual: np.ndarray | None = None) -> np.ndarray:
    """act(w @ x) + residual: mixes positions, x (N, D), w (M, N) (Tolstikhin et al. 2021, token mixing)."""
    y = activate(w @ x, act)
    return y if residual is None else y + residual


def rotate_density(h: np.ndarray, w: np.ndarray, b: np.ndarray, x: np.ndarray,
                   coef) -> tuple[np.ndarray, np.ndarray]:
    """The denoiser's last product, the DDIM rotation and the log-density in one: a step of `ddim_invert`.

    x' = a x + b_ F with F = h @ w + b, coef = (a, b_); h (N, D), w (D, C), x (N, C).
    Returns x' (N, C) and nll (N,) = |x'|^2 / 2 in nats, less the constant (C/2) log 2 pi.
    """
    y = coef[0] * x + coef[1] * (h @ w + b)
    return y, 0.5 * np.sum(y * y, -1)


def fine_density(x: np.ndarray, mean: np.ndarray, w: np.ndarray) -> np.ndarray:
    """|W (x_n - mean_n)|^2 / 2 of each fine place: x, mean (N, C), w (C, C), one for all -> (N,)."""
    return 0.5 * np.square((x - mean) @ w.T).sum(-1)


def detail(f: np.ndarray) -> np.ndarray:
    """What `sharpen` multiplies by: f (F, F) >= 0 -> sqrt(f / its maximum over 5 x 5 places), in [0, 1]."""
    most = np.lib.stride_tricks.sliding_window_view(np.pad(f, 2, "edge"), (5, 5)).max((2, 3))
    return np.sqrt(f / np.maximum(most, np.finfo(np.float32).tiny))


def sharpen(cells: np.ndarray, f: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The coarse map finer: cells (G, G') enlarged by down (F, G) and across (F', G'), times `detail` of f.

    Cells say how unlikely a place is, f where in it; where f is highest nothing changes: maxima nearly stay.
    """
    return down @ cells @ across.T * detail(f)


def linear_taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation at the centres of n_out pixels, edges repeated.

    Output i is (1 - share_i) x[start_i] + share_i x[start_i + 1]: start int64, share float64 (n_out,). One
    sample is its own neighbour: x[-1] is x[0].
    """
    at = np.clip((np.arange(n_out) + .5) * n_in / n_out - .5, 0, n_in - 1)
    start = np.minimum(at.astype(np.int64), n_in - 2)
    return start, at - start


def anomaly_map(m: np.ndarray, height: int, width: int) -> np.ndarray:
    """The fine map (F, F') at an image's own size, (height, width), see `linear_taps`."""
    for n in (height, width):
        start, share = linear_taps(len(m), n)
        share = share[:, None].astype(m.dtype)
        m = ((1 - share) * m[start] + share * m[start + 1]).T
    return np.ascontiguousarray(m)


def _worst_count(share: float, n: int) -> int:
    return max(1, round(share * n))


def worst_mean(z: np.ndarray, share: float) -> np.ndarray:
    """Mean of the highest `share` of the positions of z (..., N), at least one."""
    k = _worst_count(share, z.shape[-1])
    return np.partition(z, -k, -1)[..., -k:].mean(-1)


@functools.lru_cache(16)
def map_operator(grid: int, n_out: int, sigma: float) -> np.ndarray:
    """Gaussian smoothing on the grid (sigma in cells, edges reflected), then linear enlargement.

    Both are linear and separable, so one (n_out, grid) matrix a side does the work. Rows sum to 1;
    float64, read-only, kept.
    """
    smooth = np.eye(grid)
    if sigma > 0:
        reach = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
        weight = np.exp(-0.5 * (reach / sigma) ** 2)
        cell = np.arange(grid)[:, None]
        source = (cell + reach) % (2 * grid)  # ... c b a | a b c ... | c b a ...
        smooth[:] = 0
        np.add.at(smooth, (cell, np.minimum(source, 2 * grid - 1 - source)), weight / weight.sum())
    start, share = linear_taps(grid, n_out)
    operator = (1 - share[:, None]) * smooth[start] + share[:, None] * smooth[start + 1]
    operator.setflags(write=False)
    return operator


def _enlargers(settings: "Settings") -> tuple[np.ndarray, ...]:
    """`map_operator` down and across."""
    return tuple(map_operator(*sides, settings.smooth) for sides in zip(settings.grid, settings.fine))


# ------------------------------------------------------------------------------------------------
# Backbone: an EfficientNet cut at stride 16, batch norms folded
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class InvertedResidual:
    """One inverted residual with its folded weights, float32 (see `mbconv` for the shapes)."""
    arrays: dict[str, np.ndarray]
    stride: int
    act: int
    skip: bool

    @property
    def channels(self) -> tuple[int, int, int]:
        """Input, expanded and output channels."""
        expanded, out = self.arrays["project_w"].shape
        return self.arrays["expand_w"].shape[0] if "expand_w" in self.arrays else expanded, expanded, out


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Stem and blocks up to stride 16; `stages` are the blocks whose outputs are features.

    All weights are rounded to float16 when imported (then computed with in float32), so that the
    file, every model that embeds it and every backend hold the very same numbers.

    In *integers* (ReLU6, no squeeze-excitation; examples/quantization.py makes them) features are the same on
    every machine, bit for bit. Arrays are float32 that hold integers: weights of 8 bits (of 16 in stem and
    depthwise layers, which need them), biases, and `_m`, a real multiplier an output channel. A layer is
    `requantize(x @ w + b, m)`: sums stay below 2^24, so float32 adds them exactly in any order. Depthwise
    layers take 0..2047 and give 0..255; a block gives -32767..32767, where residuals are added and features
    read, in units of `scales` (one a block). `input_m` (2,), multiplier and limit, makes of them what an
    expansion takes: +-1023, of many channels +-127. Zero stays zero: padding is exact. See `resize_integers`.
    """
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    act: int
    stem_w: np.ndarray
    stem_b: np.ndarray
    blocks: tuple[InvertedResidual, ...]
    stages: tuple[int, ...]
    stem_m: np.ndarray | None = None  # in integers
    scales: np.ndarray | None = None  # in integers: the unit of each block's output

    @property
    def integer(self) -> bool:
        return self.scales is not None

    @property
    def kind(self) -> str:
        return "integers" if self.integer else "floats"

    @property
    def taps(self) -> Callable:
        return fixed_point_taps if self.integer else resize_taps

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.blocks[i].channels[2] for i in self.stages)

    @property
    def fine(self) -> tuple[int, int]:
        """The last blocks of stride 4 and of stride 8: what a map is sharpened by."""
        stride = 2 * np.cumprod([block.stride for block in self.blocks])
        return tuple(int(np.flatnonzero(stride == s)[-1]) for s in (4, 8))

    @property
    def fine_channels(self) -> int:
        return sum(self.blocks[i].channels[2] for i in self.fine)

    def views(self, settings: "Settings") -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
        """The two that models see, each a grid and the blocks whose outputs are pooled to it."""
        return (settings.grid, self.stages), (settings.fine, self.fine)

    def pixels(self, image: np.ndarray, size, shift=(0.0, 0.0)) -> np.ndarray:
        """uint8 (H, W, 3) -> what the network takes, float32 (*size, 3)."""
        if self.integer:
            return resize_integers(image, size, shift)
        return resize_normalize(image, size, self.mean, self.std, shift, np.float32)

    def features(self, x: np.ndarray, *views: tuple[Any, tuple[int, ...]]) -> list[np.ndarray]:
        """Reference: what `pixels` returns -> for each view (N, C), pooled outputs side by side."""
        maps, scales = {}, [None] * len(self.blocks) if self.scales is None else self.scales
        x = stem(x, self.stem_w, self.stem_b, NONE if self.integer else self.act)
        x = requantize(x, self.stem_m, *_EXPANDED) if self.integer else x
        for i, (block, scale) in enumerate(zip(self.blocks, scales)):
            x = mbconv(x, block)
            maps |= {(i, grid): pool(x, grid, scale) for grid, blocks in views if i in blocks}
        parts = (np.concatenate([maps[i, grid] for i in blocks], -1) for grid, blocks in views)
        return [x.reshape(-1, x.shape[-1]) for x in parts]

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"stem_w": self.stem_w, "stem_b": self.stem_b}
        arrays |= {"stem_m": self.stem_m, "scales": self.scales} if self.integer else {}
        for i, block in enumerate(self.blocks):
            arrays.update({f"block{i}_{name}": a for name, a in block.arrays.items()})
        return {name: a.astype(_written_as(name, self.integer)) for name, a in arrays.items()}

    def header(self) -> dict:
        blocks = [{"stride": b.stride, "act": b.act, "skip": b.skip} for b in self.blocks]
        return {"name": self.name, "mean": self.mean, "std": self.std, "act": self.act, "stages": self.stages,
                "blocks": blocks} | ({"integer": True} if self.integer else {})

    @staticmethod
    def from_arrays(header: dict, arrays: dict[str, np.ndarray]) -> "Backbone":
        """Inverse of `header` and `to_arrays`; for what is no backbone, see `_decoding`."""
        integer = header.get("integer") is True
        own = {k: a.astype(np.float32) for k, a in arrays.items() if a.dtype == _written_as(k, integer)}
        blocks = []
        for i, h in enumerate(header["blocks"]):
            arrays = {k.removeprefix(f"block{i}_"): a for k, a in own.items() if k.startswith(f"block{i}_")}
            blocks.append(InvertedResidual(arrays, int(h["stride"]), int(h["act"]), bool(h["skip"])))
        types = {"mean": float, "std": float, "stages": int}
        mean, std, stages = (tuple(map(kind, header[k])) for k, kind in types.items())
        made = Backbone(str(header["name"]), mean, std, int(header["act"]), own["stem_w"], own["stem_b"],
                        tuple(blocks), stages, own.get("stem_m"), own.get("scales"))
        _check_backbone(made)
        return made


def _written_as(name: str, integer: bool) -> type:
    """The type of a backbone's array in a file."""
    kinds = {"_w": np.int16 if name.endswith(("stem_w", "dw_w")) else np.int8, "_b": np.int32}
    return kinds.get(name[-2:], np.float32) if integer else np.float16


_BLOCK_SHAPES = dict(dw_w="kkm", dw_b="m", project_w="mo", project_b="o", expand_w="im", expand_b="m",
                     se_reduce_w="mr", se_reduce_b="r", se_expand_w="rm", se_expand_b="m")
_MULTIPLIER_SHAPES = dict(dw_m="m", project_m="o", expand_m="m", input_m="2")


def _check_backbone(b: Backbone) -> None:
    """ModelError unless stem, blocks and stages fit one another: the kernels take it for granted."""
    own = {"stem_w": b.stem_w, "stem_b": b.stem_b} | ({"stem_m": b.stem_m} if b.integer else {})
    channels = _check_arrays(own, {k: "333c" if k == "stem_w" else "c" for k in own})["c"]
    stride, stages = 2, list(b.stages)
    good = stages == sorted(set(stages) & set(range(len(b.blocks)))) and stages[-1:] == [len(b.blocks) - 1]
    good &= b.act in (RELU6, SILU) and len(b.mean) == len(b.std) == 3
    good &= all(abs(v) <= 10 for v in b.mean) and all(1e-3 <= v <= 10 for v in b.std)
    for i, block in enumerate(b.blocks):
        parts = {"dw", "project"} | {k.partition("_")[0] for k in block.arrays}
        shapes = _BLOCK_SHAPES | (_MULTIPLIER_SHAPES if b.integer else {})
        shapes = {k: v for k, v in shapes.items() if k.partition("_")[0] in parts}
        kernel = _check_arrays(block.arrays, shapes)["k"]
        c_in, _, c_out = block.channels
        good &= kernel in (3, 5) and block.stride in (1, 2) and c_in == channels
        good &= not block.skip or block.stride == 1 and c_in == c_out
        # kernels fuse stem and first block: it has no activation of its own and can't expand or add its input
        good &= block.act == b.act and (i > 0 or not block.skip and "expand_w" not in block.arrays)
        channels, stride = c_out, stride * block.stride
    if not (good and stride == 16):
        raise ModelError("backbone: stem, blocks and stages do not fit together")
    if b.integer:
        _check_integers(b)


def _check_integers(b: Backbone) -> None:
    """ModelError unless all sums are exact in float32, and what is requantised fits int32."""
    wrong, layers = [], [("stem", {"stem_w": b.stem_w, "stem_b": b.stem_b, "stem_m": b.stem_m}, 510)]
    for i, block in enumerate(b.blocks):
        own, expands = block.arrays, i > 0
        if ("expand_w" in own) != expands or ("input_m" in own) != expands or "se_reduce_w" in own:
            wrong.append(f"block {i}: expansion, input or squeeze-excitation")
            continue
        m, most = own.get("input_m", (0, 127))
        layers += [("expand", own, most)] * expands + [("dw", own, 2047), ("project", own, 255)]
        wrong += ["input_m"] * (not 0 <= m < 128 or most not in (127, 1023))
    for name, own, most in layers:
        w, bias, m = (own[f"{name}_{part}"].astype(np.float64) for part in "wbm")
        total = (np.abs(w).reshape(-1, len(bias)).sum(0) * most + np.abs(bias)).max()
        wrong += [f"{name}: sums of {total:.0f}, not below 2^24"] if total >= 1 << 24 else []
        wrong += [f"{name}_m"] * (not ((0 <= m) & (m < 128)).all())
    good = b.act == RELU6 and b.mean == b.std == (.5,) * 3 and b.scales.shape == (len(b.blocks),)
    wrong += [] if good and (1e-15 < b.scales).all() and (b.scales < 1e15).all() else ["scales or network"]
    if wrong:
        raise ModelError(f"backbone in integers: {'; '.join(wrong):.300}")


def _data_folder(name: str) -> Path:
    """The folder `name` beside this file: `fastprior_<name>`, as pip installs it, or `<name>`."""
    here = Path(__file__).resolve().parent
    installed = here / f"fastprior_{name}"
    return installed if installed.is_dir() else here / name


def load_backbone(name: str | os.PathLike | Backbone) -> Backbone:
    """A shipped one by its name (`lite0`, `lite2`), or what examples/backbones.py imports.

    That is `lite1` (a pip package), `timm:tf_efficientnet_...` (pretrained), a .safetensors or .pth file.
    """
    if isinstance(name, Backbone):
        return name
    shipped = _data_folder("weights") / f"{os.fspath(name)}.npz"
    if shipped.is_file():
        with _decoding(shipped):
            return Backbone.from_arrays(*_read_npz(shipped))
    if name in ("lite0", "lite2"):
        raise ModelError(f"{shipped} is missing: copy the folder weights/ beside fastprior.py")
    return _room("backbones").load_backbone(os.fspath(name))


# ------------------------------------------------------------------------------------------------
# Engines: how a frame is computed fast, in kernels/ beside this file. Without that folder, or without
# Numba, the reference operations score.
# ------------------------------------------------------------------------------------------------

class Engine(Protocol):
    """What fastprior asks of kernels/cpu.py and kernels/cuda.py: a frame is built once, then run.

    Building methods take arrays and return places: opaque values that name so many numbers of an image. C is
    padded to whole panels of 32 channels, the `columns`. `run` may be called from several threads.
    """
    device: str
    threads: int

    def features(self, backbone: "Backbone", shape: tuple[int, int], views: Sequence,
                 taps: Callable) -> list[tuple[Any, int]]:
        """Pixels, resized to `shape` by `taps` -> for each view tokens (N, columns), and columns."""

    def given(self, n: int, c: int) -> tuple[Any, int]:
        """In place of a view of `features`: rows (N, C) that `run` is handed, and columns."""

    def fine_density(self, x, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> Any:
        """`fine_density` of x (n, c columns), for images whose map is wanted."""

    def coarsen(self, f, n: int, c: int, cells: np.ndarray) -> Any:
        """`coarsen` of f (n, c columns)."""

    def whiten(self, f, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> Any:
        """`whiten`: w is (N, C), diagonal, or the tiles of `pack_lower`. What f holds is lost."""

    def remove_factors(self, x, n: int, c: int, factors: np.ndarray) -> Any:
        """`remove_factors` in place, with the tiles of `pack_factors`."""

    def linear(self, x, n: int, k: int, w: np.ndarray, b: np.ndarray, act: int = 0, residual=None,
               lda: int | None = None, from_state: bool = False) -> tuple[Any, int]:
        """`linear` of n rows, lda floats apart -> place, row length. from_state: x is a `state`, or what
        `features`, `given`, `whiten` and `remove_factors` returned."""

    def mix(self, x, d: int, w: np.ndarray, act: int = 0, residual=None) -> Any:
        """`mix`: x (n, d), w (m, n) of the places -> (m, d)."""

    def layer_norm(self, x, n: int, d: int, gain: np.ndarray, bias: np.ndarray) -> Any:
        """`layer_norm`: x (n, d); gain, bias (d,)."""

    def state(self, *shape: int) -> Any:
        """float32 of an image's own until the frame ends: what `keep` may hand out."""

    def rotate(self, h, d: int, w: np.ndarray, b: np.ndarray, x, n: int, c: int, coef, last: bool, z,
               at: tuple[int, int], gain: np.ndarray, offset: np.ndarray) -> None:
        """`rotate_density` in place; at the last step z = gain |x'|^2 / 2 + offset. d = 0: F = b.

        at: first of the n numbers of z that are written, and how many z has.
        """

    def score(self, z, n: int, worst: int, zero: float, unit: float) -> None:
        """(mean of the `worst` highest z - zero) / unit, z (n,)."""

    def sharpen(self, z, n: int, weight: np.ndarray, offset: np.ndarray, f, down: np.ndarray,
                across: np.ndarray) -> Any:
        """`sharpen` by f (F*F',) of weight * z + offset, the first of z (n,), where a map is wanted."""

    def map(self, m, fine: tuple[int, int], taps: Callable) -> None:
        """`anomaly_map` of m (*fine) is an image's map; `taps` is `linear_taps`."""

    def keep(self, x, n: int, c: int | None = None) -> None:
        """`run` shall hand this out: (N,), or (N, C) of a place with padded columns."""

    def finish(self) -> None:
        """No more operations come."""

    def run(self, images, *, with_map=False, outputs=False, shifts=None, given=None, masks=None) -> Any:
        """A batch -> frames: `scores` (B,), `maps`, 0 outside `masks`, `outputs` (what was kept), `to_host`.

        images: uint8 (H, W, 3), contiguous, or None where everything is `given`: (B, N, C) for each view, of
        which the fine one may lack if no map is wanted. shifts: of each image, see `resize_taps`.
        """

    def run_only(self, stages: Sequence[str], images, with_map: bool = True) -> None:
        """Only the operations of these of STAGES, again: for timing."""


STAGES = "resize", "features", "whitening", "denoiser", "density", "map"


_BUILDING = threading.RLock()  # of modules and engines: other threads wait for the first
_BLAS = threading.RLock()  # see `_one_blas_thread`
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(
        _BUILDING=threading.RLock(), _PILLOW=threading.Lock(), _BLAS=threading.RLock()))


@functools.cache
def _engines(name: str):
    """Module `cpu` or `cuda` of kernels/; BackendUnavailable where the folder is missing."""
    return _load_module("kernels", name)


@functools.cache
def _room(name: str):
    """A module of examples/, with this very module, whatever it is called here, as its `fp`."""
    return _load_module("examples", name, fp=sys.modules[__name__])


def _load_module(folder: str, name: str, **names):
    """A module of a folder beside this file, found by its path: a host may have folders of the same name."""
    from importlib import util
    home = _data_folder(folder)
    if not (home / f"{name}.py").is_file():
        raise BackendUnavailable(f"{home / name}.py is missing: copy the folder {folder}/ "
                                 "beside fastprior.py")
    package = f"_fastprior_{folder}_{zlib.crc32(os.fsencode(home) + __name__.encode()):08x}"
    with _BUILDING:
        for module, path, inside in ((package, home / "__init__.py", [str(home)]),
                                     (f"{package}.{name}", home / f"{name}.py", None)):
            if module not in sys.modules:
                spec = util.spec_from_file_location(module, path, submodule_search_locations=inside)
                made = sys.modules[module] = util.module_from_spec(spec)
                vars(made).update(names)
                try:
                    spec.loader.exec_module(made)
                except BaseException:
                    del sys.modules[module]
                    raise
        return sys.modules[f"{package}.{name}"]


@contextlib.contextmanager
def _engine_errors():
    """What kernels/ raises, in our classes."""
    try:
        yield
    except Exception as e:
        kind = {"Unavailable": BackendUnavailable, "Unfit": ShapeError}.get(type(e).__name__)
        if kind is None or not type(e).__module__.startswith("_fastprior_kernels_"):
            raise
        raise kind(str(e)) from e


@functools.cache
def _cpu_engines(part: str = ""):
    """kernels/cpu.py where it (and that part) works, else None: the reference scores. Says why, once."""
    try:
        engines = _engines("cpu")
        with _engine_errors():
            engines.load_kernels(part)
        return engines
    except BackendUnavailable as e:
        _log.warning("scoring with NumPy alone, slowly: %s", e)
        return None


def resolve_device(device: str) -> str:
    """"cpu" or "cuda"; "auto" is "cuda" where CuPy, a GPU and kernels/ are there, else "cpu"."""
    if device not in ("cpu", "cuda", "auto"):
        raise ShapeError(f"device: expected 'cpu', 'cuda' or 'auto', got {device!r}")
    if device != "cpu":
        try:
            with _engine_errors():
                _engines("cuda").import_cupy()
            return "cuda"
        except BackendUnavailable:
            if device == "cuda":
                raise
    return "cpu"


def _new_engine(device="cpu", precision="float32", threads=None, backbone=None) -> Engine | None:
    with _engine_errors():
        if device == "cuda":
            return _engines("cuda").Engine(precision)
        engines = _cpu_engines(*([] if backbone is None else [backbone.kind]))
        return engines and engines.Engine(threads)


def _feature_engine(backbone: Backbone, settings: Settings, device: str = "cpu",
                    threads: int | None = None) -> Engine | None:
    """Pixels -> tokens of both views, its outputs."""
    e = _new_engine(device, threads=threads, backbone=backbone)
    if e is not None:
        with _engine_errors():
            views = backbone.views(settings)
            tokens = e.features(backbone, settings.shape, views, backbone.taps)
            for (x, _), (grid, blocks) in zip(tokens, views):
                e.keep(x, math.prod(grid), sum(backbone.blocks[i].channels[2] for i in blocks))
            e.finish()
    return e


# ------------------------------------------------------------------------------------------------
# Denoiser: a small token network with a view over the positions (reference; torch twin in training)
# ------------------------------------------------------------------------------------------------

_FREQUENCIES = 2.0 ** np.arange(6)


def _time_features(t: int) -> np.ndarray:
    """sin and cos of the angle phi_t at six octaves, (12,)."""
    phi = float(np.arccos(np.sqrt(alpha_bar(t))))
    return np.concatenate([np.sin(phi * _FREQUENCIES), np.cos(phi * _FREQUENCIES)])


def _at_time(p: dict[str, np.ndarray], t: int) -> dict[str, np.ndarray]:
    """The denoiser's weights with the time step folded in: `pos` (N, D), `out_w` (D, C), `out_b` (C,)."""
    hidden = activate(_time_features(t) @ p["time_w"] + p["time_b"], SILU)
    gain = 1 + hidden @ p["gain_w"]
    return p | {"pos": p["pos"] + hidden @ p["shift_w"], "out_w": p["out_w"] * gain,
                "out_b": p["out_b"] * gain}


def denoise(p: dict[str, np.ndarray], x: np.ndarray, t: int) -> np.ndarray:
    """F(x_t, t): MLP-Mixer (Tolstikhin et al. 2021) over the N positions of x (N, C) -> (N, C).

    Time enters as a shift of the embedded tokens and a gain of the output, both functions of phi_t,
    so that at a fixed step they fold into the weights.
    """
    p = {name: a.astype(x.dtype, copy=False) for name, a in _at_time(p, t).items()}
    h = linear(x, p["in_w"], p["pos"])
    for i in range(_num_mixers(p)):
        u = layer_norm(h, p[f"mix{i}_norm1_gain"], p[f"mix{i}_norm1_bias"])
        h = mix(mix(u, p[f"mix{i}_token1"], SILU), p[f"mix{i}_token2"], NONE, h)
        u = layer_norm(h, p[f"mix{i}_norm2_gain"], p[f"mix{i}_norm2_bias"])
        u = linear(u, p[f"mix{i}_w1"], p[f"mix{i}_b1"], SILU)
        h = linear(u, p[f"mix{i}_w2"], p[f"mix{i}_b2"], NONE, h)
    return linear(layer_norm(h, p["norm_gain"], p["norm_bias"]), p["out_w"], p["out_b"])


def _num_mixers(p: dict) -> int:
    return sum(name.endswith("_token1") for name in p)


def _emit_inversion(e: Engine, x, n: int, c: int, denoiser: dict | None, timesteps, prediction: str,
                    gain: np.ndarray, offset: np.ndarray, z, at: tuple[int, int]) -> None:
    """x0 (overwritten) -> n numbers of z, see `Prior.z` and `Engine.rotate`."""
    coefficients = rotation(timesteps, prediction)
    for i, (t, coef) in enumerate(zip(timesteps, coefficients)):
        h, d, w, b = _emit_denoiser(e, x, n, c, denoiser, int(t))
        e.rotate(h, d, w, b, x, n, c, coef, i == len(coefficients) - 1, z, at, gain, offset)


def _emit_denoiser(e: Engine, x, n: int, c: int, denoiser: dict | None, t: int):
    """Everything of F(x, t) up to its last product, which `rotate` fuses; F = 0 is a product of depth 0."""
    if denoiser is None:
        return 0, 0, np.zeros((0, c)), np.zeros(c)
    p = _at_time(denoiser, t)
    channels, d = p["in_w"].shape
    h, _ = e.linear(x, n, channels, p["in_w"], p["pos"], lda=c, from_state=True)
    for i in range(_num_mixers(p)):
        u = e.layer_norm(h, n, d, p[f"mix{i}_norm1_gain"], p[f"mix{i}_norm1_bias"])
        u = e.mix(u, d, p[f"mix{i}_token1"], SILU)
        h = e.mix(u, d, p[f"mix{i}_token2"], NONE, h)
        u = e.layer_norm(h, n, d, p[f"mix{i}_norm2_gain"], p[f"mix{i}_norm2_bias"])
        u, m = e.linear(u, n, d, p[f"mix{i}_w1"], p[f"mix{i}_b1"], SILU)
        h, _ = e.linear(u, n, m, p[f"mix{i}_w2"], p[f"mix{i}_b2"], NONE, h)
    return e.layer_norm(h, n, d, p["norm_gain"], p["norm_bias"]), d, p["out_w"], p["out_b"]


# ------------------------------------------------------------------------------------------------
# Gaussian preconditioning
# ------------------------------------------------------------------------------------------------

_PANEL = 32  # side of a QTILE, and what C is padded to


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _padded_to(a: np.ndarray, *shape: int) -> np.ndarray:
    """float32 `a` with zeros after it along every axis."""
    full = np.zeros(shape, np.float32)
    full[tuple(slice(n) for n in a.shape)] = a
    return full


# 32 x 32 weights of 8 bits. A column is an output, with a scale of its own; a row is an input.
QTILE = np.dtype([("scale", np.float32, (_PANEL,)), ("weight", np.int8, (_PANEL, _PANEL))])


def quantize(w: np.ndarray) -> np.ndarray:
    """(..., 32, 32) -> QTILE (...): weight = round(w / scale), scale = max |w| / 127 over its inputs."""
    blocks = np.empty(w.shape[:-2], QTILE)
    blocks["scale"] = np.abs(w).max(-2) / 127
    blocks["weight"] = np.rint(w / np.maximum(blocks["scale"], np.finfo(np.float32).tiny)[..., None, :])
    return blocks


def dequantize(blocks: np.ndarray) -> np.ndarray:
    """QTILE (...) -> float32 (..., 32, 32)."""
    return blocks["scale"][..., None, :] * blocks["weight"]


def pack_lower(w: np.ndarray) -> np.ndarray:
    """(N, C, C) lower-triangular -> QTILE (N, P(P+1)/2), P = ceil(C/32).

    Tile q(q+1)/2 + k holds rows 32q.. and columns 32k.. of W, transposed: an input of W is a row of the
    block. The blocks above the diagonal are not stored.
    """
    n, c, _ = w.shape
    panels = -(-c // _PANEL)
    full = _padded_to(w, n, panels * _PANEL, panels * _PANEL).reshape(n, panels, _PANEL, panels, _PANEL)
    q, k = np.tril_indices(panels)
    return quantize(full.transpose(0, 1, 3, 4, 2)[:, q, k])


def unpack_lower(blocks: np.ndarray, c: int) -> np.ndarray:
    """Inverse of `pack_lower`, float32 (N, C, C)."""
    n, panels = len(blocks), -(-c // _PANEL)
    full = np.zeros((n, panels, _PANEL, panels, _PANEL), np.float32)
    q, k = np.tril_indices(panels)
    full.transpose(0, 1, 3, 4, 2)[:, q, k] = dequantize(blocks)
    return full.reshape(n, panels * _PANEL, -1)[:, :c, :c]


def pack_factors(v: np.ndarray) -> np.ndarray:
    """(K, N, C) -> QTILE (N P, ceil(K/32)), P = ceil(C/32): 32 factors (in) by 32 channels (out)."""
    k, n, c = v.shape
    full = _padded_to(v, _round_up(k, _PANEL), n, _round_up(c, _PANEL))
    return quantize(full.reshape(-1, _PANEL, n * -(-c // _PANEL), _PANEL).transpose(2, 0, 1, 3))


def unpack_factors(blocks: np.ndarray, k: int, n: int, c: int) -> np.ndarray:
    """Inverse of `pack_factors`, float32 (K, N, C)."""
    return dequantize(blocks).transpose(1, 2, 0, 3).reshape(-1, n, _round_up(c, _PANEL))[:k, :, :c]


def shrink_covariance(cov: np.ndarray, average: np.ndarray, toward_average: float,
                      floor: float) -> np.ndarray:
    """(1 - a) cov_n + a mean_n(cov) + b tr(mean_n(cov))/C I, all (..., C, C)."""
    c = cov.shape[-1]
    ridge = floor * np.trace(average) / c
    return (1 - toward_average) * cov + toward_average * average + ridge * np.eye(c, dtype=cov.dtype)


def inverse_cholesky(cov: np.ndarray) -> np.ndarray:
    """L^-1 of every (C, C) matrix of (N, C, C), with L L^T = cov; float32 out, float64 inside."""
    from scipy.linalg import lapack
    out = np.empty(cov.shape, np.float32)
    for i, matrix in enumerate(cov):
        lower, info = lapack.dpotrf(matrix, lower=1, clean=1)
        if info:
            raise ShapeError(f"covariance of position {i} is not positive definite: are all images alike?")
        out[i] = lapack.dtrtri(lower, lower=1)[0]
    return out


def _run(f: Callable[[int], Any], count: int, threads: int | None) -> list:
    """[f(0), ... f(count - 1)], in threads; callers are `_one_blas_thread`, so no result depends on them."""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(_usual_threads(threads)) as pool:
        return list(pool.map(f, range(count)))


def _usual_threads(threads: int | None) -> int:
    engines = _cpu_engines()
    return engines.usual_threads(threads) if engines else threads or 1


def _one_blas_thread(f: Callable) -> Callable:
    """f, within which BLAS has one thread: several wait for each other, by the second on a busy machine.

    One f at a time: the limit is the process's, and whoever came second would give back the first one's.
    """
    @functools.wraps(f)
    def alone(*args, **options):
        import scipy.linalg  # noqa: F401  has a BLAS of its own, which must be there to be limited
        try:
            from threadpoolctl import threadpool_limits
        except ImportError:  # a vendored copy without it
            return f(*args, **options)
        with _BLAS, threadpool_limits(1, "blas"):
            return f(*args, **options)
    return alone


def fit_factors(x0: np.ndarray, fold: np.ndarray, count: int, threads: int | None = None) -> np.ndarray:
    """What places vary in together (pose, light): factors of the whitened features; taken out of x0 in place.

    Whitening knows each place alone. Here good images are a Gaussian over all places at once, of covariance
    I + U (diag(lambda) - I) U^T: U are the first `count` principal directions of the images, lambda (>= 1)
    the variance along them of images that did not give them. Its symmetric whitening is I - V^T V with
    v_k = sqrt(1 - lambda_k^-1/2) u_k. Probabilistic PCA: Tipping and Bishop 1999.

    x0 (M, N, C) float16; fold (M,): each fold loses the factors of the others; all images give the result,
    V, float32 (K, N, C).
    """
    from scipy.linalg import eigh
    m, n, c = x0.shape

    def share(k):  # of the inner products, whatever the threads
        x = x0[:, k::8].reshape(m, -1).astype(np.float32)
        return x @ x.T
    gram = sum(_run(share, min(n, 8), threads))

    def directions(rows: np.ndarray) -> np.ndarray:
        variance, w = eigh(gram[np.ix_(rows, rows)].astype(np.float64),
                           subset_by_index=[len(rows) - count, len(rows) - 1])
        w = (w / np.sqrt(np.maximum(variance, 1e-6))).astype(np.float32).T[::-1]
        return np.stack(_run(lambda i: w @ x0[rows, i].astype(np.float32), n, threads), 1)

    def project(u: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return sum(_run(lambda i: x0[rows, i].astype(np.float32) @ u[:, i].T, n, threads))

    def remove(v: np.ndarray, along: np.ndarray, rows: np.ndarray) -> None:
        def take(i):
            x0[rows, i] = x0[rows, i] - along @ v[:, i]
        _run(take, n, threads)
    used = np.arange(m)
    parts = [np.flatnonzero(fold == k) for k in np.unique(fold)]
    bases = [directions(np.setdiff1d(used, rows)) for rows in parts]
    along = [project(u, rows) for u, rows in zip(bases, parts)]
    gain = 1 - 1 / np.sqrt(np.maximum(np.concatenate(along).var(0), 1))
    factors = directions(used) * np.sqrt(gain)[:, None, None]
    for u, a, rows in zip(bases, along, parts):
        remove(u, a * gain, rows)
    return factors.astype(np.float32)


# ------------------------------------------------------------------------------------------------
# Calibration: conformal, from held-out good images
# ------------------------------------------------------------------------------------------------

def conformal_p_value(score, calibration: np.ndarray):
    """(1 + #{calibration >= score}) / (n + 1): under exchangeability P(p <= a) <= a (Vovk et al. 2005).

    >>> float(conformal_p_value(2.5, np.array([1., 2., 3.])))
    0.5
    """
    ordered = np.sort(calibration)
    above = len(ordered) - np.searchsorted(ordered, score, side="left")
    return (1 + above) / (len(ordered) + 1)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A score above `value` is called an anomaly; `rank` of `count` good scores do not lie above it."""
    value: float
    fpr: float  # false-alarm rate wished for
    rank: int
    count: int
    estimate: float  # parametric (Gumbel tail) threshold for `fpr`: an estimate, no promise

    @property
    def expected(self) -> float:
        """False-alarm rate that `count` exchangeable good images promise on average."""
        return (self.count + 1 - self.rank) / (self.count + 1)

    @property
    def bound(self) -> float:
        """What they promise with 95 % confidence over their draw: the quantile of Beta(n + 1 - k, k)."""
        from scipy.special import betaincinv
        return float(betaincinv(self.count + 1 - self.rank, self.rank, .95)) if self.rank else 1.0

    @property
    def needed(self) -> int:
        """Images that would bound `fpr` at 95 % confidence."""
        return math.ceil(math.log(.05) / math.log1p(-self.fpr) - 1e-9)


def conformal_threshold(calibration: np.ndarray, fpr: float, value: float | None = None) -> Threshold:
    """Order-statistic threshold of held-out good scores for a false-alarm rate; or what `value` promises.

    The k-th smallest of n, k = min(n, ceil((n + 1)(1 - fpr))); the false-alarm rate of that
    threshold is Beta(n + 1 - k, k) distributed (Vovk et al. 2005).

    >>> t = conformal_threshold(np.arange(41.), 0.01)
    >>> t.value, round(t.bound, 3), t.needed
    (40.0, 0.07, 299)
    """
    if not 0 < fpr < 1:
        raise ShapeError(f"fpr: expected a rate between 0 and 1, got {fpr}")
    scores = np.sort(np.asarray(calibration, np.float64))
    n = len(scores)
    if n < 2 or not np.isfinite(scores).all():
        raise ShapeError(f"calibration: expected at least two finite scores of good images, got {n}")
    k = min(n, max(1, math.ceil((n + 1) * (1 - fpr) - 1e-9)))
    if value is None:
        value = scores[k - 1]
    else:
        k = int(np.searchsorted(scores, value, side="right"))
    beta = max(scores.std(ddof=1), 1e-12) * math.sqrt(6) / math.pi
    estimate = scores.mean() - beta * (np.euler_gamma + math.log(-math.log1p(-fpr)))
    return Threshold(float(value), fpr, k, n, float(estimate))


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

_FORMATS = "PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "AVIF"  # no other decoder is ever asked
_JPEG_MARK = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # but those within a scan
_EIGHT_BITS = {"1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "PA", "La", "RGBa", "CMYK", "YCbCr", "HSV"}
_MOST_PIXELS = 1 << 28
_DEPTHS = 8, 10, 12, 14, 16
GREY = 116  # of what is outside a region: ImageNet's mean, to a network about nothing
_HOT = .001  # share of an image's values that may lie above its depth: hot pixels, glints
_PILLOW = threading.Lock()


class ImageWarning(UserWarning):
    """Values of an image lie above the depth that was declared for it, and are cut."""


def load_image(source, bits: int | None = None, roi: "RegionOfInterest | None" = None) -> np.ndarray:
    """File, array or PIL image -> contiguous uint8 (H, W, 3) RGB, upright by EXIF; grey repeated, no alpha.

    bits: how many of 16 bits a value are in use, 8, 10, 12, 14 or 16 (of 12, white is 4095); values above are
    cut, with an ImageWarning. Without it, 16, for an image that uses as many; others' depth is not known.
    roi: what is outside is painted over, see `RegionOfInterest.paint`.
    ImageError for a file, ShapeError for an array or PIL image, that cannot be read rightly: among them
    floats, signed and 32-bit values, animations, several pages, more than 2^28 pixels.
    """
    is_file = isinstance(source, (str, os.PathLike))
    try:
        a = _pixels(source)
        a = a if a.dtype == np.uint8 else _to_eight_bits(a, bits)
        a = np.ascontiguousarray(a if a.ndim == 3 else np.repeat(a[:, :, None], 3, 2))
        return roi.paint(a) if roi else a
    except BackendUnavailable:
        raise
    except Exception as e:  # whatever a decoder makes of foreign bytes
        text = str(e) or type(e).__name__
        text = text if isinstance(e, FastPriorError) else f"not a readable image ({text})"
        name = os.fsdecode(source) if is_file else "image"
        raise (ImageError if is_file else ShapeError)(_printable(f"{name}: {text}")) from e


def _beyond(a: np.ndarray) -> np.ndarray:
    return np.array([np.count_nonzero(a >> bits) if bits < 16 else 0 for bits in _DEPTHS])


def _depth(beyond: np.ndarray, count: int) -> int:
    return next(bits for bits, n in zip(_DEPTHS, beyond) if n <= _HOT * count)


def _to_eight_bits(a: np.ndarray, bits: int | None) -> np.ndarray:
    """uint16 -> uint8."""
    beyond = _beyond(a)
    if bits is None:
        bits = _depth(beyond, a.size)
        if bits < 16:
            raise ShapeError(f"16 bits a value, and it uses {bits} of them or fewer: how bright white is "
                             "must be said (bits=12, train --bits 12) or seen in training")
    elif bits not in _DEPTHS:
        raise ShapeError(f"bits: expected one of {', '.join(map(str, _DEPTHS))}, got {bits!r}")
    if beyond[_DEPTHS.index(bits)]:
        warnings.warn(f"values above {bits} bits are cut: darker light, or another depth (train --bits)",
                      ImageWarning)
        a = np.minimum(a, (1 << bits) - 1)
    return (a >> (bits - 8)).astype(np.uint8)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 8 or max(height, width) > 65535 or height * width > _MOST_PIXELS:
        raise ShapeError(f"expected 8 to 65535 pixels a side and at most {_MOST_PIXELS / 1e6:.0f} million, "
                         f"got {width}x{height}")


def _pixels(source, deep_only: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W), or uint16, as the source holds them; deep_only: of uint8 its shape alone."""
    if isinstance(source, (str, os.PathLike)):
        return _decode(source, deep_only)
    if "PIL.Image" in sys.modules and isinstance(source, sys.modules["PIL.Image"].Image):
        return _from_pillow(source, deep_only)
    if hasattr(source, "__cuda_array_interface__"):
        raise ShapeError("this array is on a GPU and the model on the CPU: Prior.load(..., "
                         "device='cuda'), or copy it")
    a = np.asarray(source)
    if a.ndim != 2 and (a.ndim != 3 or a.shape[2] not in (1, 3, 4)):
        raise ShapeError(f"expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got shape {a.shape}")
    if a.dtype.kind != "u" or a.dtype.itemsize > 2:
        raise ShapeError(f"expected uint8 or uint16, got {a.dtype}; scale to 0..255 first")
    _check_size(*a.shape[:2])
    a = a if a.ndim == 2 else a[:, :, 0] if a.shape[2] == 1 else a[:, :, :3]
    return a


def _decode(path: str | os.PathLike, deep_only: bool) -> np.ndarray:
    """`_pixels` of a file. Any exception."""
    try:
        from PIL import Image  # noqa: F401
    except ImportError as e:
        raise BackendUnavailable("Pillow is needed to read image files: pip install pillow, or pass "
                                 "uint8 arrays") from e
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ShapeError("a folder or a device, no image file")
        f = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError as e:
        raise ShapeError("no such file") from e
    except OSError as e:
        raise ShapeError(f"cannot be read ({e.strerror})") from e
    with f:
        image = _open_pillow(f)
        if image.format == "PNG":  # the decoder does not look at the checksums of what it decodes
            image.verify()
            image = _open_pillow(f)
        elif image.format == "JPEG":
            image, f = _whole_jpeg(f)
        return _from_pillow(image, deep_only, lambda: _open_pillow(f))


def _whole_jpeg(f):
    """A JPEG's image and file, if nothing of it is missing: libjpeg paints what was cut before an end mark.

    Of one scan: zeros for the end mark, and it misses what was cut. Of several: each component needs all its
    coefficients to the last bit, and what follows the last scan may not change a pixel.
    """
    f.seek(0)
    data, at, missing, scans = f.read(), 2, {}, 0
    while mark := _JPEG_MARK.search(data, at):
        at, kind = mark.end(), data[mark.end() - 1]
        if kind == 0xd9:
            break
        segment = data[at + 2:at + int.from_bytes(data[at:at + 2], "big")]
        if 0xc0 <= kind <= 0xcf and kind not in (0xc4, 0xc8, 0xcc):
            missing = {c: np.full(64, 1) for c in segment[6::3]}
        elif kind == 0xda and len(segment) >= 6:  # count, (component, tables) ..., first, last, bits left out
            scans += 1
            for c in segment[1:-3:2]:
                missing.get(c, np.zeros(64))[segment[-3]:segment[-2] + 1] = segment[-1] & 15
        at += 2 + len(segment)
    else:
        at = len(data) + 2
    missing = any(map(np.any, missing.values()))
    if scans < 2 and not missing:
        f = io.BytesIO(data[:at - 2] + bytes(16))
        return _open_pillow(f), f
    ends = [io.BytesIO(data[:at - 2] + fill * 64 + b"\xff\xd9") for fill in (b"\0", b"\x55")]
    image, other = map(_open_pillow, ends)
    if missing or not np.array_equal(*map(np.asarray, (image, other))):
        raise ShapeError("a part of this JPEG is missing")
    return image, ends[0]


def _open_pillow(f):
    """`PIL.Image.open` for our formats, without its limit of size (a global variable, and a warning)."""
    from PIL import Image
    f.seek(0)
    start = f.read(16)
    for find_plugins in (Image.preinit, Image.init):  # the second is slow
        find_plugins()
        for factory, accept in (Image.OPEN[name] for name in _FORMATS if name in Image.OPEN):
            if accept(start) is True:
                f.seek(0)
                return factory(f, None)
    known = ", ".join(name for name in _FORMATS if name in Image.OPEN)
    raise ShapeError(f"no image of a kind that is read here ({known})" if start else "an empty file")


def _from_pillow(image, deep_only: bool = False, again: Callable | None = None) -> np.ndarray:
    """`_pixels` of a PIL image. again(): opens it once more, for the low bytes of 16-bit colours."""
    _check_size(image.height, image.width)
    tiles = getattr(image, "tile", None) or [("libtiff", (0, 0, 0, 0), 0, "")]
    layout = tiles[0][3] if isinstance(tiles[0][3], tuple) else (tiles[0][3],)  # as Pillow names it: RGB;16B
    white = layout[1] if image.format == "PPM" and len(layout) == 2 else 255
    colours = re.fullmatch(r"RGB[AX]?;16[LBN]", str(layout[0]))
    deep = image.mode.startswith("I") or bool(colours)
    trouble = _tiff_trouble(image, deep, tiles) if image.format == "TIFF" else ""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # of such a JPEG the first is meant
        trouble = "several pages or frames: save the one that is meant"
    elif image.mode not in _EIGHT_BITS and not deep:
        trouble = f"values of kind {image.mode}: save it as grey or RGB with 8 or 16 bits a value"
    elif not deep and (re.search(r"(?<!BGR);16", str(layout[0])) or white > 255) or colours and not again:
        trouble = (f"16 bits a value, of a kind that Pillow cuts to 8 ({layout[0]}): "
                   "save it as a grey or RGB PNG")
    if trouble:
        raise ShapeError(trouble)
    if deep_only and not deep:
        is_tiff = image.format == "TIFF"  # whose size may be turned already; a PNG, asked, would be decoded
        tags = image.tag_v2 if is_tiff else image.getexif() if "exif" in image.info else {}
        turned = tags.get(274, 1) in (5, 6, 7, 8)
        size = (tags[256], tags[257]) if is_tiff and turned else image.size
        return np.broadcast_to(np.uint8(), size if turned else size[::-1])
    with _without_pillow_limits(image.height * image.width):
        if not colours and deep:
            a = np.asarray(_turned(image))
            if a.min() < 0 or a.max() > 65535:
                raise ShapeError(f"values from {a.min()} to {a.max()}: expected 0 to 65535")
            a = a if white == 255 else np.rint(a * (white / 65535))  # Pillow scales a PGM's white
            return a.astype(np.uint16)
        a = _to_rgb(_turned(image))
        if colours:  # Pillow reads the high bytes; the low ones are the high ones of the other byte order
            low, native = again(), {"little": "L", "big": "B"}[sys.byteorder]
            other = colours[0][:-1] + ("B" if colours[0][-1].replace("N", native) == "L" else "L")
            low.tile = [getattr(t, "_make", tuple)((
                *t[:3], other if isinstance(t[3], str) else (other, *t[3][1:]))) for t in low.tile]
            a = a.astype(np.uint16) << 8 | _to_rgb(_turned(low))
        return a


def _tiff_trouble(image, deep: bool, tiles: list) -> str:
    """What Pillow would read wrongly and say nothing."""
    def tag(number: int, default: int) -> tuple:
        value = image.tag_v2.get(number, default)
        return value if isinstance(value, tuple) else (value,)
    planes = len(image.getbands()) if tag(284, 1) == (2,) else 1
    covered = sum((x1 - x0) * (y1 - y0) for codec, (x0, y0, x1, y1), *_ in tiles
                  if codec != "libtiff")  # which checks it
    return next((text for text, wrong in {
        "signed or floating-point values: save it with 8 or 16 bits a value": set(tag(339, 1)) - {1, 4},
        "16 bits a value with white at 0: save it with black at 0": deep and tag(262, 0) == (0,),
        "16 bits a value in separate planes: save it with the colours together":
            planes > 1 and max(tag(258, 1)) > 8,
        "a preview of another image": tag(254, 0)[0] & 1,
        "a palette of 8 bits where 16 belong": max(tag(320, 256)) < 256,
        "YCbCr that is not compressed": tag(262, 0) == (6,) and tag(259, 1) == (1,),
        "strips or tiles are missing": 0 < covered < planes * image.height * image.width,
    }.items() if wrong), "")


@contextlib.contextmanager
def _without_pillow_limits(pixels: int):
    """Where Pillow's limit of size or its reading of truncated files would matter, neither; both put back."""
    from PIL import Image, ImageFile
    if not (_PILLOW.locked() or ImageFile.LOAD_TRUNCATED_IMAGES
            or pixels > (Image.MAX_IMAGE_PIXELS or pixels)):
        yield
        return
    with _PILLOW:
        host = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = host


def _turned(image):
    """Loaded, and turned as its EXIF says. Pillow turns a TIFF in loading; some versions leave the tag."""
    from PIL import ImageOps
    image.load()
    if image.format == "TIFF" or image.getexif().get(274, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image) -> np.ndarray:
    """A PIL image of 8 bits -> (H, W, 3), in strips: Pillow's copies are many."""
    out = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, (1 << 22) // image.width)
    for y in range(0, image.height, rows):
        strip = image.crop((0, y, image.width, min(y + rows, image.height)))
        strip.info.clear()  # transparency is no colour, and Pillow warns of some
        if strip.mode in ("La", "RGBa"):
            strip = strip.convert(strip.mode.upper())
        out[y:y + rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return out


def find_images(path: str | os.PathLike, without: str = "") -> list[Path]:
    """Image files under a folder, sorted (see `find_images` of examples/folders.py); or the file itself."""
    return _room("folders").find_images(path, without)


def image_key(image: np.ndarray) -> str:
    """A short hash of the pixels of uint8 (H, W, 3): what tells images apart, whatever their names."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:16]


class RegionOfInterest:
    """The pixels that count: mask (H, W), not 0 inside, for images of its proportions.

    The others are painted before the network sees them, as its receptive fields are far larger than a place:
    nothing there changes anything. A place counts when at least half of it is inside.
    """

    def __init__(self, mask: np.ndarray):
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.dtype.kind not in "bu" or not mask.any():
            raise ShapeError("roi: expected a mask (H, W), bool or uint8, not 0 where to look, not 0 "
                             f"somewhere; got {mask.dtype} {mask.shape}, {np.count_nonzero(mask)} not 0")
        _check_size(*mask.shape)
        self.mask = mask != 0

    @functools.lru_cache(4)
    def at(self, height: int, width: int, shift=(0.0, 0.0)) -> tuple[np.ndarray, ...]:
        """The mask (height, width), by nearest pixels and `resize_taps`' shift, and what `paint` needs."""
        rows, columns = (np.clip((2 * np.arange(out) + 1) * n // (2 * out) - round(by * n), 0, n - 1)
                         for n, out, by in zip(self.mask.shape, (height, width), shift))
        inside = self.mask[rows][:, columns]
        keep = np.repeat(inside, 3, 1).reshape(height, width, 3) * np.uint8(255)
        return inside, keep, ~keep & np.uint8(GREY)

    def fits(self, height: int, width: int) -> bool:
        """Whether an image has the mask's proportions, to a pixel."""
        h, w = self.mask.shape
        return abs(height * w - width * h) <= max(height, width, h, w)

    def paint(self, image: np.ndarray, shift=(0.0, 0.0)) -> np.ndarray:
        """uint8 (H, W, 3) -> GREY outside. ShapeError unless it `fits`."""
        (h, w), (height, width) = self.mask.shape, image.shape[:2]
        if not self.fits(height, width):
            raise ShapeError(f"{width}x{height} pixels, but the region is for {w}x{h} or these proportions")
        _, keep, fill = self.at(height, width, shift)
        return image & keep | fill


def _inside(roi: RegionOfInterest | None, grid: tuple[int, int], share: float = .5) -> np.ndarray:
    """bool (N,): places of the grid of which at least this share is inside, by 16 x 16 samples each."""
    if roi is None:
        return np.ones(math.prod(grid), bool)
    return pool(roi.at(*(16 * n for n in grid))[0][:, :, None].astype(float), grid).ravel() >= share


def _cells(settings: "Settings", inside: np.ndarray) -> np.ndarray:
    """`coarse_cells` of a model; (0, 4) of one without."""
    return coarse_cells(inside, settings.grid)[:None if settings.coarse else 0]


def _spread(inside: np.ndarray, a: np.ndarray, axis: int = 0, fill: float = 0) -> np.ndarray:
    """Values of the places inside -> of all places, along `axis`, with `fill` outside."""
    if inside.all():
        return a
    full = np.full(a.shape[:axis] + inside.shape + a.shape[axis + 1:], fill, a.dtype)
    full[(slice(None),) * axis + (inside,)] = a
    return full


# ------------------------------------------------------------------------------------------------
# The model file: one .npz of stored entries with a digest, no pickles
# ------------------------------------------------------------------------------------------------

FORMAT = 2
_MOST_FACTORS = 64  # that kernels/remove_factors.cu takes
_MAX_BYTES, _MAX_HEADER = 2 << 30, 4 << 20  # a longer zip has other records
_DTYPES = {repr(np.lib.format.dtype_to_descr(t)).encode(): t
           for t in (QTILE, *map(np.dtype, ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1")))}
_NPY = re.compile(rb"(?s)\x93NUMPY\x01\0..\{'descr': (.+), 'fortran_order': False, 'shape': \((.*)\), \} *\n")


@contextlib.contextmanager
def _decoding(path: str | os.PathLike):
    """Whatever foreign bytes raise becomes a ModelError of one line that names the file."""
    try:
        yield
    except Exception as e:
        why = "cannot be read" if isinstance(e, OSError) else "not a fastprior model, or damaged"
        raise ModelError(f"{path}: {e if isinstance(e, FastPriorError) else f'{why} ({e!r:.200})'}") from e


def _digest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """SHA-256 over names, types, shapes and values, u8 (32,)."""
    sha = hashlib.sha256()
    for name, a in sorted(arrays.items()):
        sha.update(f"{name} {a.dtype.descr} {a.shape}\n".encode())
        sha.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8))
    return np.frombuffer(sha.digest(), np.uint8)


def _read_npz(path: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays as `_write_npz` writes them, else ModelError. Nothing is inflated or unpickled."""
    with _decoding(path):
        if not Path(path).is_file():
            raise ModelError("no such model file")
        with open(path, "rb") as f:
            length = f.seek(0, os.SEEK_END)
            f.seek(max(0, length - 42))
            of_64, magic, size, start, comment = struct.unpack("<4s16x4s8xIIH", f.read())
            if (of_64 == b"PK\6\7" or magic != b"PK\5\6" or comment or start + size + 22 != length
                    or size > _MAX_HEADER or length > _MAX_BYTES):
                raise ValueError("a zip of another kind, or cut short")
            arrays, number, archive = {}, None, zipfile.ZipFile(f)
            for e in sorted(archive.infolist(), key=lambda e: e.filename != "header.npy"):
                name, length, stored = e.filename.removesuffix(".npy"), length - e.file_size, e.compress_size
                if e.compress_type or e.flag_bits or e.file_size != stored or length < 0 or name in arrays:
                    raise ValueError(f"{name!r:.80} is compressed, encrypted, too long or there twice")
                data = archive.read(e)
                head = _NPY.match(data[:512])
                shape = head and tuple(map(int, head[2].replace(b",", b" ").split()))
                dtype = head and _DTYPES.get(head[1])
                if not dtype or math.prod(shape) * dtype.itemsize != len(data) - head.end():
                    raise ValueError(f"{name!r:.80} is not a plain array")
                arrays[name] = np.frombuffer(data, dtype, offset=head.end()).reshape(shape)
                if name == "header":  # first, that a file of another format is called so
                    text = arrays[name][:_MAX_HEADER].tobytes()
                    header = json.loads(text)
                    number = header["format"]
                    if type(number) is int and number != FORMAT:
                        whose = "a newer" if number > FORMAT else "an older"
                        raise ModelError(f"written by {whose} fastprior, format {number!r:.20}, not {FORMAT}")
        if type(number) is not int or json.dumps(header, sort_keys=True, allow_nan=False).encode() != text:
            raise ValueError("the header is not as fastprior writes it")
        if arrays.pop("sha256").tobytes() != _digest(arrays).tobytes():
            raise ValueError("the digest is that of another content")
    return header, {name: a for name, a in arrays.items() if name != "header"}


def _write_npz(path: str | os.PathLike, header: dict, arrays: dict[str, np.ndarray]) -> None:
    """Written to a temporary name, then renamed: a reader sees the old file or the whole new one."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise OSError(0, "it exists and is no file")
        plain = json.loads(json.dumps({"format": FORMAT} | header))
        text = json.dumps(plain, sort_keys=True, allow_nan=False).encode()
        if len(text) > _MAX_HEADER:
            raise OSError(0, "too many names of images for one file")
        arrays = {"header": np.frombuffer(text, np.uint8), **arrays}
        arrays = {k: np.ascontiguousarray(a) for k, a in arrays.items()}
        with open(temporary, "xb") as f:
            np.savez(f, **arrays, sha256=_digest(arrays))
            f.flush()
            os.fsync(f.fileno())
            if f.tell() > _MAX_BYTES:
                raise OSError(0, "larger than a model can be")
        os.replace(temporary, target)
    except (OSError, TypeError, ValueError) as e:
        raise FastPriorError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e})") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


_VIEW = "mean", "whitener", "factors"


def _arrays_of(p: Prior) -> dict[str, np.ndarray]:
    """All but the backbone's, by their names in a file."""
    arrays = {"mean": p.mean, "whitener": p.whitener} | ({} if p.factors is None else {"factors": p.factors})
    for name, own in ("coarse", p.coarse), ("fine", p.fine):
        arrays |= {f"{name}/{k}": a for k, a in zip(_VIEW, own or ()) if a is not None}
    arrays |= {f"denoiser/{k}": a for k, a in (p.denoiser or {}).items()}
    arrays |= {"roi/size": np.array(p.roi.mask.shape), "roi/bits": np.packbits(p.roi.mask)} if p.roi else {}
    return arrays | {f"calibration/{n}/{k}": a for n, own in p.calibrations.items() for k, a in own.items()}


def _pack_model(priors: dict[str, Prior]) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays of a file. A single prior is called ""; of several, the i-th has its arrays in i/."""
    backbone, parts = next(iter(priors.values())).backbone, []
    arrays = {f"backbone/{k}": a for k, a in backbone.to_arrays().items()}
    for i, (name, p) in enumerate(priors.items()):
        arrays |= {f"{i}/{k}" if name else k: a for k, a in _arrays_of(p).items()}
        settings = dataclasses.asdict(p.settings) | {"backbone": backbone.name}
        settings = {k: v for k, v in settings.items() if k != "tile" or v}
        parts.append((name, {"settings": settings, "summary": p.summary}))
    kind = parts[0][1] | {"kind": "prior"} if "" in priors else {"kind": "priors", "products": parts}
    return {"fastprior": __version__, "backbone": backbone.header()} | kind, arrays


def _unpack_model(header: dict, arrays: dict[str, np.ndarray], threads: int | None) -> dict[str, Prior]:
    """Inverse of `_pack_model`; for what is no model, see `_decoding`."""
    def group(prefix: str, of: dict) -> dict:
        return {k[len(prefix):]: a for k, a in of.items() if k.startswith(prefix)}
    if header.get("kind") not in ("prior", "priors"):
        raise ModelError(f"holds a {header.get('kind')!r:.40}, not a trained model")
    backbone, priors = Backbone.from_arrays(header["backbone"], group("backbone/", arrays)), {}
    for i, (name, part) in enumerate(header["products"] if header["kind"] == "priors" else [("", header)]):
        settings, own = Settings(**part["settings"]), group(f"{i}/", arrays) if name else arrays
        names = {"mean", "whitener", "fine/mean", "fine/whitener"}
        names |= {"coarse/mean", "coarse/whitener"} if settings.coarse else set()
        if missing := names - own.keys():
            raise ModelError(f"missing arrays: {', '.join(sorted(missing))} (train again)")
        steps = sorted({k.split("/")[1] for k in own if k.startswith("calibration/")})
        calibrations = {int(k): group(f"calibration/{k}/", own) for k in steps}
        denoiser = group("denoiser/", own) or None
        h, w = own.get("roi/size", (0, 0))
        roi = RegionOfInterest(np.unpackbits(own["roi/bits"])[:h * w].reshape(h, w)) if h else None
        priors[name] = Prior(settings, backbone, own["mean"], own["whitener"], denoiser, calibrations,
                             dict(part["summary"]), threads, factors=own.get("factors"),
                             fine=(own["fine/mean"], own["fine/whitener"]), roi=roi,
                             coarse=tuple(own.get(f"coarse/{k}") for k in _VIEW) if settings.coarse else None)
    again, known = _pack_model(priors)  # a model is taken as it would be written, and as nothing else
    again |= {"format": FORMAT, "fastprior": str(header["fastprior"])}
    if arrays.keys() != known.keys() or len({json.dumps(h, sort_keys=True) for h in (header, again)}) > 1:
        raise ModelError("unknown or missing arrays or fields, or fields of another type")
    return priors


def _check_arrays(given: dict, shapes: dict[str, str], **sizes: int) -> dict[str, int]:
    """Sizes by letter (one a dimension); ModelError if one differs or values are absurd."""
    if given.keys() != shapes.keys():
        raise ModelError(f"missing or unknown arrays: {sorted(given.keys() ^ shapes.keys())!r:.200}")
    sizes |= {"2": 2, "3": 3}
    for name, letters in shapes.items():
        a = given[name]
        fits = a.size and a.ndim == len(letters)
        if not fits or any(sizes.setdefault(k, m) != m for k, m in zip(letters, a.shape)):
            wanted = ", ".join(str(sizes.get(k, k)) for k in letters)
            raise ModelError(f"{name}: shape {a.shape} does not fit, expected ({wanted})")
        if a.dtype.kind != "f" or not -1e15 <= float(a.min()) <= float(a.max()) <= 1e15:
            raise ModelError(f"{name} holds numbers that are not finite, or absurd")
    return sizes


_CALIBRATION_SHAPES = dict(gain="z", offset="z", moments="3", scores="s", peaks="h")
_DENOISER_SHAPES = dict(in_w="cd", pos="nd", time_w="tk", time_b="k", shift_w="kd", gain_w="kc",
                        norm_gain="d", norm_bias="d", out_w="dc", out_b="c")
_MIXER_SHAPES = dict(token1="mn", token2="nm", w1="de", b1="e", w2="ed", b2="d",
                     norm1_gain="d", norm1_bias="d", norm2_gain="d", norm2_bias="d")


def _check_model(p: Prior) -> None:
    """ModelError unless all fits together, a frame has a sane size and no image can make infinite numbers."""
    settings, n, c = p.settings, int(p.inside.sum()), sum(p.backbone.channels)
    panels, groups, mixers = -(-c // _PANEL), -(-settings.factors // _PANEL), _num_mixers(p.denoiser or {})
    shapes = {"mean": "nc", "whitener": "nbp" if p.whitener.dtype == QTILE else "nc"}
    shapes |= {"fine/mean": "fv", "fine/whitener": "vv"}
    shapes |= {"factors": "qgp"} if groups else {}
    if settings.coarse:
        shapes |= {"coarse/mean": "oc", "coarse/whitener": "obp"}
        shapes |= {"coarse/factors": "rgp"} if groups else {}
    shapes |= {f"denoiser/{k}": v for k, v in _DENOISER_SHAPES.items() if p.denoiser}
    for i in range(mixers):
        own = {ord("m"): chr(65 + 2 * i), ord("e"): chr(66 + 2 * i)}  # capitals: hidden sizes, its own
        shapes |= {f"denoiser/mix{i}_{k}": v.translate(own) for k, v in _MIXER_SHAPES.items()}
    shapes |= {f"calibration/{n}/{k}": v for n in p.calibrations for k, v in _CALIBRATION_SHAPES.items()}
    given = {k: a["scale"] if a.dtype == QTILE or k == "factors" else a for k, a in _arrays_of(p).items()
             if not k.startswith("roi/")}
    o = len(p.cells)
    sizes = _check_arrays(given, shapes, n=n, c=c, t=2 * len(_FREQUENCIES), p=_PANEL, q=n * panels, g=groups,
                          o=o, r=o * panels, z=n + o, b=panels * (panels + 1) // 2,
                          f=math.prod(settings.fine), v=p.backbone.fine_channels)
    for steps, own in p.calibrations.items():
        select_timesteps(steps, settings.first, settings.last)
        rising = all(len(own[k]) > 1 and (np.diff(own[k]) >= 0).all() for k in ("scores", "peaks"))
        if not (rising and own["gain"].min() > 0 and own["moments"][1] > 0 and own["moments"][2] >= 0):
            raise ModelError(f"calibration/{steps}: scales are not above zero, or scores do not rise")
    d, hidden = sizes.get("d", 0), sum(size for k, size in sizes.items() if k.isupper())
    floats = settings.steps * (3 * (mixers + 1) * n * d + max(n, d) * hidden)
    pixels = math.prod(settings.shape)
    for block in p.backbone.blocks:
        floats += pixels // 4 * sum(block.channels[1:])
        pixels //= block.stride ** 2
    if d % 16 or floats > 1 << 28:
        raise ModelError(f"no width or size of ours: {d} in the denoiser, {4 * floats:.0e} bytes a frame")
    if not _largest_number(p) < 1e34:  # float32 ends at 1e38, and up to 4096 of them are added
        raise ModelError("numbers so large that a score could overflow")


def _largest_number(p: Prior) -> float:
    """No number on any image's way to score and map is larger, by the largest weights."""
    def most(a: np.ndarray) -> float:
        return float(np.abs(a["scale"]).max()) * 127 if a.dtype == QTILE else float(np.abs(a).max())
    own, (n, c), net, h = p.calibration, p.mean.shape, p.backbone, 0.0
    if net.integer:
        x = float(_SUMS[1] * net.scales.max())
    elif net.act == RELU6:
        layers = ((b.arrays["project_w"], b.arrays["project_b"]) for b in net.blocks)
        x = sum(float(6 * np.abs(w).sum(0).max() + np.abs(b).max()) for w, b in layers)
    else:  # nothing bounds SiLU: the features of a picture, and a wide margin
        picture = np.random.default_rng(0).standard_normal((16, 16, 3), np.float32) / min(net.std)
        with np.errstate(all="ignore"):
            x = 1e4 * max(map(most, net.features(picture, (1, net.stages), (1, net.fine))))
    v = p.backbone.fine_channels
    f = v * ((x + most(p.fine[0])) * most(p.fine[1]) * v) ** 2

    def whitened(mean, whitener, factors) -> float:
        y = (x + most(mean)) * most(whitener) * (c + _PANEL)
        return y if factors is None else y * (
            1 + p.settings.factors * len(mean) * (c + _PANEL) * most(factors) * most(factors))
    coarse = whitened(*p.coarse) if p.coarse else 0.0
    x = whitened(p.mean, p.whitener, p.factors)
    if p.denoiser:
        w = {k: most(a) * a.shape[0] ** (a.ndim - 1) for k, a in p.denoiser.items()}  # the gain of a sum
        time, d = w["time_w"] + w["time_b"], len(p.denoiser["out_w"])
        out = w["out_w"] * (d * w["norm_gain"] + w["norm_bias"]) + w["out_b"]
        x += p.settings.steps * out * (1 + time * w["gain_w"])  # a rotation turns x and F
        q = max(max(a.shape) * max(most(a), 1) for a in p.denoiser.values())  # a mixer adds 6 q^3 at most
        h = x * w["in_w"] + w["pos"] + time * w["shift_w"] + 6 * _num_mixers(w) * q * q * q
    z = c * max(x, coarse) ** 2 * max(1, most(own["gain"])) + most(own["offset"])
    middle, spread, zero = map(float, own["moments"])
    span = max(float(own["peaks"][0]), 1.001 * zero) - zero  # of a map at any false-alarm rate, at least
    on_map = (z / float(own["gain"].min()) + zero) / span if span > 0 else math.inf
    return max(z, f, h * h, on_map, (z + abs(middle)) / spread)


# ------------------------------------------------------------------------------------------------
# Prior: the product
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Settings:
    """How a prior is built. Defaults were chosen over several categories, never for one.

    variant "whitened" is the method; "plain" is the paper's (channel-standardised features and
    eps-prediction), for ablations. `steps` may be changed when scoring.
    """
    backbone: str = "lite0"
    # Pixels an image is resized to, (height, width); or a square's side: `fit` takes its images' proportions.
    size: int | tuple[int, int] = 448
    cell: int = 0  # side of a place, pixels of the resized image; 0: 32 from 384 x 384 pixels on, else 16
    coarse: bool | None = None  # places of 2 x 2 too; None: where a place has more than 16 pixels a side
    steps: int = 2
    first: int = 50  # t at which the features are taken to lie
    last: int = 500  # t at which the density is read
    variant: str = "whitened"
    shrink: float = .1  # of each covariance toward the average over positions
    floor: float = .03  # of the average variance, added to every variance
    factors: int = 64  # directions in which places vary together (at most half as many as images)
    copies: int = 4  # jittered copies of a training image
    worst: float = .03  # share of the grid whose mean is the image's score
    smooth: float = 0.0  # Gaussian smoothing of the map, in grid cells
    width: int = 96  # of the denoiser
    mixers: int = 1
    fpr: float = .01  # false-alarm rate the threshold is set for
    threshold: float | None = None  # a fixed one instead
    calibration: str = "cross"
    seed: int = 0
    bits: int | None = None  # of 16-bit images, see `load_image`; None: found in training, if it sees any
    tile: int = 0  # side of the windows that an image is cut into (examples/tiles.py), pixels; 0: not cut

    def __post_init__(self) -> None:
        if isinstance(self.size, list):  # of a file
            object.__setattr__(self, "size", tuple(self.size))
        if self.cell == 0 and len(self.shape) == 2 and all(type(n) is int for n in self.shape):
            object.__setattr__(self, "cell", 32 if math.prod(self.shape) >= 384 ** 2 else 16)
        if self.coarse is None and type(self.cell) is int:
            object.__setattr__(self, "coarse", self.cell > 16)
        if self.variant == "plain":  # the paper's has none
            object.__setattr__(self, "coarse", False)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) that an image is resized to."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def grid(self) -> tuple[int, int]:
        """Places down and across."""
        return self.shape[0] // self.cell, self.shape[1] // self.cell

    @property
    def fine(self) -> tuple[int, int]:
        """Fine places down and across, of 8 pixels: those of the map."""
        return self.shape[0] // 8, self.shape[1] // 8

    def check(self) -> None:
        """ShapeError unless every setting is of the type of its default and in its range."""
        sides = self.shape
        good = len(sides) == 2 and all(type(n) is int and n % 32 == 0 and 64 <= n <= 8192 for n in sides)
        if not good or math.prod(sides) > 1024 ** 2:
            expected = ("a height and a width, multiples of 32 from 64 to 8192, of at most 1024 * 1024 pixels"
                        if isinstance(self.size, tuple) else "a multiple of 32 from 64 to 1024")
            raise ShapeError(f"size: expected {expected}, got {_size_text(self.size)!r:.60}")
        last = NUM_TRAIN_TIMESTEPS - 1
        allowed = {"cell": range(16, 1025, 16), "steps": range(1, 201),
                   "first": range(last), "last": range(1, last + 1), "factors": range(_MOST_FACTORS + 1),
                   "copies": range(65), "tile": range(4097),
                   "width": range(16, 1025, 16), "mixers": range(14), "seed": range(2 ** 63),
                   "bits": _DEPTHS, "coarse": (False, True), "variant": ("whitened", "plain"),
                   "calibration": ("cross", "holdout"),
                   "shrink": [0, 1], "floor": [1e-9, 1], "worst": [1e-9, 1], "smooth": [0, 64],  # low, high
                   "fpr": [1e-9, 1 - 1e-9], "threshold": [-1e9, 1e9]}
        for name, of in allowed.items():
            v, low, high = getattr(self, name), of[0], of[-1]
            good, expected = type(v) is type(low) and v in of, f"{low!r} or {high!r}"
            if isinstance(of, range):
                kind = "an integer" if of.step == 1 else f"a multiple of {of.step}"
                expected = f"{kind} from {low} to {high}"
            elif isinstance(of, list):
                good = isinstance(v, (int, float)) and type(v) is not bool and low <= v <= high
                expected = f"a number from {low} to {high}"
            elif name == "bits":
                expected = "8, 10, 12, 14 or 16"
            if not good and not (v is None and name in ("threshold", "bits")):
                raise ShapeError(f"{name}: expected {expected}, got {v!r:.60}")
        if 0 < self.tile < 64:
            raise ShapeError(f"tile: expected 0 or an integer from 64 to 4096, got {self.tile}")
        if self.tile and sides[0] != sides[1]:
            raise ShapeError(f"tile: its windows, squares, need a square size, not {_size_text(self.size)}")
        if any(n % self.cell for n in sides):
            raise ShapeError("cell: expected a multiple of 16 that divides the size, "
                             f"{_size_text(self.size)}, got {self.cell}")
        select_timesteps(self.steps, self.first, self.last)


def _size_text(size):
    """A pair (height, width) as people say it, "640x320", width x height; anything else as it is."""
    return "x".join(map(str, size[::-1])) if isinstance(size, tuple) else size


# Speed against accuracy, as keywords of `fit`.
TIERS = {"fast": {"backbone": "lite0", "size": 256}, "default": {"backbone": "lite0", "size": 448},
         "accurate": {"backbone": "lite2", "size": 448}}


class Frames(NamedTuple):
    """A batch as the reference operations score it; an engine's frames have these attributes too."""
    scores: np.ndarray  # (B,)
    maps: list  # float32 (H, W), or None
    outputs: list  # z (B, N)

    def to_host(self, array):
        return array


class Result:
    """What one image got. On a GPU an attribute waits and copies when it is first read.

    score : how far above the median held-out good image, in units of their spread (IQR / 1.349).
    p_value : share of held-out good images that score as high, conformal.
    is_anomaly : unless the score is known to be at most the threshold.
    anomaly_map : float32 (H, W) at the image's own size, the sharpened nll of each fine place: 0 is the
        median of good images, 1 the map's threshold: at the false-alarm rate a good image's maximum exceeds
        it. None if not asked for.
    device_map : the same as the engine has it; on a GPU a CuPy array, ordered on the call's stream.
    product : of a model of several products, the one this image was taken for.
    """

    def __init__(self, frames, index: int, prior: "Prior", product: str = ""):
        self._frames, self._index, self._calibration = frames, index, prior.calibration["scores"]
        self.threshold, self.product = prior.threshold.value, product

    def __getstate__(self) -> dict:
        alone = Frames(np.array([self.score]), [self.anomaly_map], [])  # on the host, without its batch
        return self.__dict__ | {"_frames": alone, "_index": 0}

    @functools.cached_property
    def score(self) -> float:
        return float(self._frames.to_host(self._frames.scores)[self._index])

    @property
    def p_value(self) -> float:
        return float(conformal_p_value(self.score, self._calibration))

    @property
    def is_anomaly(self) -> bool:
        return self.product == "unknown" or not self.score <= self.threshold  # what is no number is not good

    @property
    def verdict(self) -> str:
        return "anomaly" if self.is_anomaly else "good"

    @property
    def device_map(self):
        return self._frames.maps[self._index]

    @functools.cached_property
    def anomaly_map(self) -> np.ndarray | None:
        return None if self.device_map is None else self._frames.to_host(self.device_map)

    @property
    def regions(self) -> "list[Region]":
        """Where the map is above its threshold; see `find_regions`."""
        return find_regions(self.anomaly_map)

    def __repr__(self) -> str:
        return f"Result(score={self.score:.4g}, p_value={self.p_value:.4g}, verdict={self.verdict!r})"


class Region(NamedTuple):
    """One connected part of a map above its threshold: box in pixels (right, bottom excluded), size, peak."""
    left: int
    top: int
    right: int
    bottom: int
    pixels: int
    peak: float


HALO = .3  # chosen on drawn specks, see BENCHMARKS.md, "Boxes of regions"


def label_regions(anomaly_map: np.ndarray) -> np.ndarray:
    """(H, W) in units of its threshold -> int32 (H, W): the region, from 1, that a pixel lies in; 0 in none.

    One region for each 8-connected part above 1: around its peak, what is at least `HALO` of the peak. The
    rest is halo: what is strong shines as far as the network looks, which says nothing of its size.
    """
    from scipy import ndimage
    above, eight = np.asarray(anomaly_map) > 1, np.ones((3, 3))
    parts, count = ndimage.label(above, eight)
    part, value, peaks = parts[above], anomaly_map[above], np.zeros(count + 1)
    np.maximum.at(peaks, part, value)
    above[above] = value >= HALO * peaks[part]
    pieces, count = ndimage.label(above, eight)
    highest, number = value == peaks[part], np.zeros(count + 1, np.int32)
    number[pieces[parts > 0][highest]] = part[highest]
    return number[pieces]


def find_regions(anomaly_map: np.ndarray | None) -> list[Region]:
    """`label_regions` of a map (H, W), highest peak first. ShapeError without a map."""
    if anomaly_map is None:
        raise ShapeError("regions: this image was scored without its map: score(..., with_map=True)")
    from scipy import ndimage
    labels, regions = label_regions(anomaly_map), []
    for number, (y, x) in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[y, x] == number
        peak = float(anomaly_map[y, x][inside].max())
        regions.append(Region(x.start, y.start, x.stop, y.stop, int(inside.sum()), peak))
    return sorted(regions, key=lambda r: -r.peak)


def _reference_tokens(image: np.ndarray, backbone: Backbone, settings: Settings,
                      shift=(0.0, 0.0)) -> list[np.ndarray]:
    """uint8 (H, W, 3) -> features of both views, (N, C) each, by the reference operations."""
    return backbone.features(backbone.pixels(image, settings.shape, shift), *backbone.views(settings))


class Prior:
    """A trained model: backbone, preconditioning, denoiser, calibration. Build with `fit` or `load`.

    Safe to use from several threads; calls on one object are serialised. Can be pickled and copied.

    settings : how it was built, and the steps and rate it judges with
    backbone : the frozen network
    mean : float32 (N, C), of the features of good images at each place
    whitener : tiles of `pack_lower`; float32 (N, C) for the plain variant
    denoiser : weights of `denoise`; None: F = 0, the joint Gaussian
    calibrations : by number of steps, what `_calibrate` and `_read_scores` return
    summary : what training has to say
    threads, device, precision : see `load`
    factors : tiles of `pack_factors`, or None
    fine : mean (F*F', C') and whitener (C', C') of the fine view, which sharpens the map
    coarse : mean (M, C), whitener and factors of the coarse places, `cells` (M, 4), where F = 0; or None
    roi : RegionOfInterest, or None. N counts the places inside it, those of `inside`, bool (G*G',)
    grid : (G, G'), places down and across
    """

    def __init__(self, settings: Settings, backbone: Backbone, mean: np.ndarray, whitener: np.ndarray,
                 denoiser: dict[str, np.ndarray] | None, calibrations: dict[int, dict[str, np.ndarray]],
                 summary: dict, threads: int | None = None, device: str = "cpu", precision: str = "float32",
                 factors: np.ndarray | None = None, *, fine: tuple[np.ndarray, np.ndarray], roi=None,
                 coarse: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None):
        settings.check()
        self.settings, self.backbone, self.denoiser, self.summary = settings, backbone, denoiser, summary
        self.mean, self.whitener, self.factors, self.fine = mean, whitener, factors, fine
        self.coarse = coarse
        self.calibrations, self.threads, self.precision = calibrations, threads, precision
        if settings.steps not in calibrations:
            raise ShapeError(f"steps: this model is calibrated for {sorted(calibrations)}, "
                             f"got {settings.steps}")
        self.calibration = calibrations[settings.steps]
        self.grid, self.roi = settings.grid, roi
        self.inside = _inside(roi, self.grid)
        self.cells = _cells(settings, self.inside)
        self._built: dict[bool, Engine] = {}  # from pixels, from tokens
        _check_model(self)
        self.threshold = conformal_threshold(self.calibration["scores"], settings.fpr, settings.threshold)
        self.device = resolve_device(device)
        if self.device == "cuda":
            try:
                self._engine()
            except Exception as e:  # whatever CUDA makes of a GPU that is full, busy or too old
                if device == "cuda":
                    raise
                _log.warning("scoring on the CPU: %s", e)
                self.device = "cpu"

    def __getstate__(self) -> dict:
        kept = self.__dict__.keys() - {"_preconditioning", "_window"}  # many times the rest
        return {k: self.__dict__[k] for k in kept} | {"_built": {}}  # an engine is made of addresses

    # -- file ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write one self-contained .npz; atomically."""
        _write_npz(path, *_pack_model({"": self}))

    @staticmethod
    def load(path: str | os.PathLike, *, threads: int | None = None, steps: int | None = None,
             fpr: float | None = None, threshold: float | None = None, device: str = "cpu",
             precision: str = "float32") -> "Prior | MultiPrior":
        """Read a model; `steps`, `fpr` and `threshold` override its own. ModelError if it is none.

        device: "cpu"; "cuda" (BackendUnavailable says what is missing); or "auto", the GPU where it works.
        precision, on the GPU only: how activations are stored, "float32" (the CPU's scores to 1e-5) or
        "float16" (half the memory traffic; scores differ in the third digit).
        """
        header, arrays = _read_npz(path)
        with _decoding(path):
            priors = _unpack_model(header, arrays, threads)
            made = priors.get("") or MultiPrior(priors)
        changes = {k: v for k, v in {"steps": steps, "fpr": fpr, "threshold": threshold}.items()
                   if v is not None}
        if not changes and device == "cpu":
            return made
        if fpr is not None and threshold is None:
            changes["threshold"] = None  # the rate that is asked for now, not the file's fixed threshold
        for name, p in priors.items():
            p.device, p.precision = device, precision  # `_with` hands them on
            priors[name] = p._with(dataclasses.replace(p.settings, **changes), p.calibrations, p.summary)
        return priors.get("") or MultiPrior(priors)

    def with_steps(self, steps: int) -> "Prior":
        """The same model with another number of DDIM inversion steps (one it is calibrated for)."""
        return self._with(dataclasses.replace(self.settings, steps=steps), self.calibrations, self.summary)

    def _with(self, settings: Settings, calibrations: dict[int, dict], summary: dict) -> "Prior":
        return Prior(settings, self.backbone, self.mean, self.whitener, self.denoiser, calibrations, summary,
                     self.threads, self.device, self.precision, self.factors, fine=self.fine, roi=self.roi,
                     coarse=self.coarse)

    @_one_blas_thread
    def calibrate(self, images, *, keep_all: bool = False, progress: "Progress" = lambda *_: None,
                  fpr: float | None = None, threshold: float | None = None) -> "Prior":
        """This model with zero and unit of score and map, p-values and thresholds read from new good images.

        images: folder, or sequence of paths or uint8 arrays, that the model was not trained on; then the
        promise is split conformal, exact with keep_all. Equal pixels and near-duplicates count once, images
        unlike the others are set aside (`summary["set_aside_today"]`) unless keep_all. fpr: a rate other than
        the model's. threshold: a fixed one; without it the model's own, of other zero and unit, goes. Nothing
        is trained, the order of scores stays. ImageError if fewer than 10 can be read.
        """
        fpr = self.settings.fpr if fpr is None else fpr
        settings = dataclasses.replace(self.settings, fpr=fpr, threshold=threshold)
        settings.check()
        images, unreadable, _ = _room("folders").good_images(images)
        if self.settings.tile:
            return _room("tiles").calibrate(self, images, unreadable, keep_all, progress, settings)
        extract, two = _room("extraction").extract_features, dataclasses.replace(self.settings, copies=2)
        e = extract(images, two, self.backbone, self.threads, progress, np.float32, roi=self.roi)
        unreadable += e.unreadable
        if seen := len(set(e.keys) & set(self.summary.get("trained_on", ()))):
            raise ImageError(f"{seen} of {len(images)} images were trained on: calibrate needs unseen ones")
        curation = _room("curation")
        lone = e.of(curation.first_of(curation.near_duplicates(e)))
        count, tokens = len(lone.keys), _spread(self.inside, lone.features[lone.clean], 1)
        if count < MIN_HELD_OUT:
            raise ImageError(f"{count} readable, different good images (near-duplicates count once): at "
                             f"least {MIN_HELD_OUT} are needed to calibrate"
                             + (f" (first problem: {unreadable[0]})" if unreadable else ""))
        nll = {}
        for steps, own in self.calibrations.items():
            prior = self.with_steps(steps)
            frames = [prior._frames(None, False, [tokens[i:i + 16]]) for i in range(0, count, 16)]
            z = np.concatenate([prior._z(f) for f in frames]).astype(np.float64)
            nll[steps] = (z - own["offset"]) / own["gain"]
            progress("calibration", len(nll), len(self.calibrations))
        kept = ~curation.outliers(nll[self.settings.steps], self.settings.worst)[0] | keep_all
        details = _details(itertools.compress(lone.fine, kept), *self.fine, self.settings, self.roi)
        calibrations = {}
        for steps, own in self.calibrations.items():
            raw = worst_mean(nll[steps][kept] * own["gain"] + own["offset"], self.settings.worst)
            calibrations[steps] = {"gain": own["gain"], "offset": own["offset"],
                                   **_read_scores(raw, nll[steps][kept], details, self.settings, self.roi)}
        aside = _names(images, [lone.sources[i] for i in np.flatnonzero(~kept)])
        told = {"calibrated_on": int(kept.sum()), "held_out_aside": len(aside), "set_aside_today": aside,
                "near_duplicates_today": len(e.keys) - count, "unreadable": unreadable[:20],
                "traits": curation.known_traits(lone.of(kept).looks)}
        made = self._with(settings, calibrations, self.summary | told)
        return curation.doubted(self, made)

    def update(self, images, known: str | os.PathLike, **options) -> "Prior":
        """This model trained on `images` too, without its old ones: `update` of examples/kept.py."""
        return _room("kept").update(self, images, known, **options)

    # -- scoring ---------------------------------------------------------------------------------

    @property
    def timesteps(self) -> np.ndarray:
        return select_timesteps(self.settings.steps, self.settings.first, self.settings.last)

    @property
    def prediction(self) -> str:
        return "v" if self.settings.variant == "whitened" else "eps"

    @property
    def backend(self) -> str:
        """"cuda", "numba" or "numpy", whichever scores."""
        return "cuda" if self.device == "cuda" else "numba" if _cpu_engines(self.backbone.kind) else "numpy"

    def score(self, image: str | os.PathLike | np.ndarray, *, with_map: bool = True) -> Result:
        """Score one image, a path or an array (see `load_image`)."""
        return self.score_batch([image], with_map=with_map)[0]

    def score_batch(self, images: Sequence[str | os.PathLike | np.ndarray], *, with_map: bool = True,
                    chunk: int = 16, errors: str = "raise") -> list[Result]:
        """Score many images of any sizes; the same numbers as one by one.

        errors="return": an image that cannot be read has its ImageError or ShapeError in place of a result.

        With device="cuda" images may be CuPy or torch CUDA arrays, u8 (H, W, 3), and the results
        stay on the GPU until they are read; nothing here waits for it.
        """
        if self.settings.tile:
            return _room("tiles").score_batch(self, images, with_map, chunk, errors)
        results: list = [None] * len(images)
        for places, pixels in _load_chunks(self, images, chunk, errors, results):
            frames = self._frames(pixels, with_map)
            for i, place in enumerate(places):
                results[place] = Result(frames, i, self)
        return results

    def z(self, images: Sequence[str | os.PathLike | np.ndarray]) -> np.ndarray:
        """Standardised negative log-likelihood of each place (inside), then coarse place, float32 (B, N + M).

        z_n = (|x_T,n|^2 / 2) * scale_n + location_n, in standard deviations of held-out good images.
        ShapeError of a model with windows (tile).
        """
        if self.settings.tile:
            raise ShapeError("z: expected a model of whole images, got one of windows (tile)")
        rows = [self._z(self._frames(a, False)) for _, a in _load_chunks(self, images, 16, "raise", [])]
        return np.concatenate([np.empty((0, len(self.mean) + len(self.cells)), np.float32), *rows])

    def _z(self, frames) -> np.ndarray:
        return frames.to_host(frames.outputs[0])[:, self._places]

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """bool: those inside, of the grid and then the coarse ones."""
        return np.concatenate([self.inside, np.ones(len(self.cells), bool)])

    def _frames(self, pixels: list | None, with_map: bool, tokens=None):
        """A batch scored by the engine or the reference operations.

        tokens, (B, N, C) of each view: in place of pixels, of which only the sizes count then, and for a map.
        """
        engine = self._engine(tokens is None)
        if engine is None:
            return self._reference_frames(pixels, with_map, tokens)
        masks = [self.roi.at(*image.shape[:2])[0] for image in pixels] if with_map and self.roi else None
        with _engine_errors():
            return engine.run(pixels, with_map=with_map, outputs=True, given=tokens, masks=masks)

    def _engine(self, from_pixels: bool = True) -> Engine | None:
        """The engine with the program of a frame, built at first use; None: the reference scores."""
        if from_pixels in self._built:
            return self._built[from_pixels]
        with _BUILDING:
            if from_pixels not in self._built:
                engine = _new_engine(self.device, self.precision, self.threads, self.backbone)
                if engine is None:
                    return None
                with _engine_errors():
                    self._emit(engine, from_pixels)
                self._built[from_pixels] = engine
            return self._built[from_pixels]

    def _emit(self, e: Engine, from_pixels: bool) -> None:
        n, c, fine = len(self.inside), self.mean.shape[1], self.fine[0].shape
        everywhere = functools.partial(_spread, self.inside)
        if from_pixels:
            views = e.features(self.backbone, self.settings.shape, self.backbone.views(self.settings),
                               self.backbone.taps)
        else:
            views = e.given(n, c), e.given(*fine)
        (f, columns), (fine_f, fine_columns) = views
        density = e.fine_density(fine_f, fine[0], fine_columns, *self.fine)
        m = len(self.cells)
        if self.coarse:
            y = e.coarsen(f, n, columns, np.flatnonzero(self.inside)[self.cells])
            y = e.whiten(y, m, columns, *self.coarse[:2])
        x = e.whiten(f, n, columns, everywhere(self.mean), everywhere(self.whitener))
        if self.factors is not None:
            tiles = np.repeat(self.inside, -(-c // _PANEL))
            x = e.remove_factors(x, n, columns, _spread(tiles, self.factors))
        if self.coarse and self.coarse[2] is not None:
            y = e.remove_factors(y, m, columns, self.coarse[2])
        denoiser = self.denoiser and {k: everywhere(a, k.endswith("1")) if k == "pos" or "token" in k else a
                                      for k, a in self.denoiser.items()}
        z, gain, offset = e.state(n + m), self.calibration["gain"], self.calibration["offset"]
        k = len(self.mean)
        _emit_inversion(e, x, n, columns, denoiser, self.timesteps, self.prediction, everywhere(gain[:k]),
                        everywhere(offset[:k], fill=-1e30), z, (0, n + m))  # outside, never among the worst
        if self.coarse:
            _emit_inversion(e, y, m, columns, None, self.timesteps, self.prediction, gain[k:], offset[k:], z,
                            (n, n + m))
        e.score(z, n + m, _worst_count(self.settings.worst, k + m), *self.calibration["moments"][:2])
        out = e.sharpen(z, n + m, *map(everywhere, self._map_weights()), density, *_enlargers(self.settings))
        e.map(out, self.settings.fine, linear_taps)
        e.keep(z, n + m)
        e.finish()

    def _image_scores(self, z: np.ndarray) -> np.ndarray:
        zero, unit = self.calibration["moments"][:2]
        return (worst_mean(z, self.settings.worst) - zero) / unit

    def _map_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """weight, offset (N,) that turn z back into nll, in the unit of the map (see `Result`)."""
        zero = self.calibration["moments"][2]
        one = max(conformal_threshold(self.calibration["peaks"], self.settings.fpr).value, zero * 1.001)
        gain, offset = (self.calibration[k][:len(self.mean)] for k in ("gain", "offset"))
        return 1 / (gain * (one - zero)), -(offset / gain + zero) / (one - zero)

    @functools.cached_property
    def _log_determinant(self) -> float:
        """Of the map from features to x0: what the density of features has beside that of x0."""
        w, (n, c) = self.whitener, self.mean.shape
        if w.dtype == QTILE:
            panel = np.arange(-(-c // _PANEL))
            w = dequantize(w[:, panel * (panel + 1) // 2 + panel]).diagonal(0, -2, -1).reshape(n, -1)[:, :c]
        total = float(np.log(np.maximum(w, 1e-30), dtype=np.float64).sum())
        if self.factors is not None:
            v = unpack_factors(self.factors, self.settings.factors, n, c).reshape(self.settings.factors, -1)
            total += float(np.log1p(-np.minimum(np.square(v, dtype=np.float64).sum(1), 1 - 1e-9)).sum())
        return total

    def log_likelihood(self, z: np.ndarray) -> np.ndarray:
        """What `z` returns (B, N + M) -> log-density of the features (B,) in nats, less a constant.

        The coarse places say nothing that the others do not: they are means of them.
        """
        nll = (z - self.calibration["offset"]) / self.calibration["gain"]
        return self._log_determinant - nll[:, :len(self.mean)].sum(-1, dtype=np.float64)

    @functools.cached_property
    def _preconditioning(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """mean (N, C), whitener (N, C, C) or (N, C) and factors (K, N, C) as float32, for NumPy, and those of
        the coarse places. Made at first use."""
        def unpacked(mean, w, v):
            return (mean, unpack_lower(w, mean.shape[1]) if w.dtype == QTILE else w,
                    None if v is None else unpack_factors(v, self.settings.factors, *mean.shape))
        own = self.mean, self.whitener, self.factors
        return [unpacked(*view) for view in (own, self.coarse) if view is not None]

    def latent(self, features: np.ndarray) -> np.ndarray:
        """Reference: features (N, C) -> x_T (N + M, C), in the features' dtype."""
        views, parts = [(features, self.denoiser), (coarsen(features, self.cells), None)], []
        for (x, p), (mean, whitener, factors) in zip(views, self._preconditioning):
            x = whiten(x, mean, whitener)
            x = x if factors is None else remove_factors(x, factors)
            f = (lambda x, t, p=p: denoise(p, x, t)) if p else (lambda x, t: np.zeros_like(x))
            parts.append(ddim_invert(x, f, self.timesteps, self.prediction))
        return np.concatenate(parts)

    def _reference_frames(self, pixels: list | None, with_map: bool, tokens=None) -> Frames:
        rows, maps = [], []
        for i, image in enumerate(tokens[0] if pixels is None else pixels):
            views = (_reference_tokens(image, self.backbone, self.settings) if tokens is None
                     else [view[i] for view in tokens])
            x_T = self.latent(views[0][self.inside])
            rows.append(0.5 * np.sum(x_T * x_T, -1) * self.calibration["gain"] + self.calibration["offset"])
            if with_map:
                weight, offset = self._map_weights()
                cells = _spread(self.inside, weight * rows[-1][:len(weight)] + offset).reshape(self.grid)
                f = fine_density(views[1], self.fine[0].astype(np.float32), self.fine[1])
                m = sharpen(cells, f.reshape(self.settings.fine), *_enlargers(self.settings))
                m = anomaly_map(m.astype(np.float32), *image.shape[:2])
                maps.append(m * self.roi.at(*m.shape)[0] if self.roi else m)
        z = np.array(rows, np.float32)
        outputs = [_spread(self._places, z, 1, -1e30)]
        return Frames(self._image_scores(z), maps or [None] * len(rows), outputs)


_FOREIGN = 4.0  # deviations of half an image's places, see `MultiPrior`


class MultiPrior:
    """Several products in one model. The one under which an image as a whole is likeliest scores it.

    An image more than half of whose places lie `_FOREIGN` deviations beyond good ones of that product fits
    none: it is an anomaly, of the product "unknown".
    An image's features are computed once and read under every product. Build with `fit_many` or `Prior.load`.
    """

    def __init__(self, priors: dict[str, Prior]):
        kinds = {(p.backbone.name, p.settings.shape, p.grid, p.settings.coarse, p.settings.steps)
                 for p in priors.values()}
        if len(kinds) != 1:
            raise ModelError("products of one model need one backbone, size, cell, coarse places or none, "
                             f"and number of steps, got {sorted(kinds)}")
        if len({b"".join(map(bytes, p.backbone.to_arrays().values())) for p in priors.values()}) != 1:
            raise ModelError("products of one model need one backbone: train them together (fit_many)")
        if len({p.roi and image_key(p.roi.mask) for p in priors.values()}) != 1:
            raise ModelError("products of one model need one region of interest")
        if any(p.settings.tile for p in priors.values()):
            raise ModelError("products of one model are not cut into windows (tile)")
        if len({p.settings.bits for p in priors.values()} - {None}) > 1:
            raise ModelError("products of one model need one depth of their 16-bit images (bits)")
        self.check_names(priors)
        self.priors = priors
        first = next(iter(priors.values()))
        self.backbone, self.settings, self.grid = first.backbone, first.settings, first.grid
        self.device, self.backend, self.threads = first.device, first.backend, first.threads
        self.roi, self._built = first.roi, None
        for prior in priors.values():
            prior.roi = first.roi  # the same, and what it keeps of a size is then made once

    @staticmethod
    def check_names(names: Iterable[str]) -> None:
        """ModelError unless these can be products."""
        if not all(isinstance(k, str) and 0 < len(k) < 256 and k.isprintable() and k != "unknown"
                   for k in names):
            raise ModelError(f"products: expected printable names of 1 to 255 letters, not 'unknown', got "
                             f"{[*names]!r:.90}")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_built": None}

    def save(self, path: str | os.PathLike) -> None:
        """Write one self-contained .npz; atomically."""
        _write_npz(path, *_pack_model(self.priors))

    def with_steps(self, steps: int) -> "MultiPrior":
        return MultiPrior({name: prior.with_steps(steps) for name, prior in self.priors.items()})

    def score(self, image, *, with_map: bool = True) -> Result:
        """As `Prior.score`; the result names the product."""
        return self.score_batch([image], with_map=with_map)[0]

    def score_batch(self, images: Sequence, *, with_map: bool = True, chunk: int = 16,
                    errors: str = "raise") -> list[Result]:
        """As `Prior.score_batch`."""
        results, priors = [None] * len(images), list(self.priors.items())
        for places, pixels in _load_chunks(self, images, chunk, errors, results):
            tokens = self._tokens(pixels)
            frames = [prior._frames(pixels, with_map, tokens) for _, prior in priors]
            z = np.array([p._z(f) for (_, p), f in zip(priors, frames)])
            likely = np.array([p.log_likelihood(own) for (_, p), own in zip(priors, z)])
            for i, (place, k) in enumerate(zip(places, likely.argmax(0))):
                fits = np.median(z[k, i]) <= _FOREIGN
                results[place] = Result(frames[k], i, priors[k][1], priors[k][0] if fits else "unknown")
        return results

    def _tokens(self, pixels: list) -> list:
        """Features of both views, (B, N, C) each, on the device that computes them."""
        with _BUILDING:
            if self._built is None:
                self._built = _feature_engine(self.backbone, self.settings, self.device, self.threads)
        if self._built is None:
            views = zip(*(_reference_tokens(image, self.backbone, self.settings) for image in pixels))
            return [np.stack(view) for view in views]
        with _engine_errors():
            return self._built.run(pixels, outputs=True).outputs


def _bits(model: "Prior | MultiPrior") -> int | None:
    return next((prior.settings.bits for prior in _products(model).values() if prior.settings.bits), None)


def _load_chunks(model, images: Sequence, chunk: int, errors: str, results: list):
    """Yields places and arrays of at most `chunk` images, about 64 million pixels; errors go into results."""
    if isinstance(images, (str, os.PathLike)) or errors not in ("raise", "return"):
        raise ShapeError("score_batch: expected a list of images, and errors='raise' or 'return'")
    bits, places, arrays, pixels = _bits(model), [], [], 0
    for i, image in enumerate(images):
        try:
            if model.device == "cuda" and model.roi and hasattr(image, "__cuda_array_interface__"):
                image = image.get() if hasattr(image, "get") else image.cpu().numpy()  # to be painted
            if model.device != "cuda" or not hasattr(image, "__cuda_array_interface__"):
                image = load_image(image, bits, model.roi)
            if model.device == "cuda":
                with _engine_errors():
                    _engines("cuda").check_image(image)
        except (ImageError, ShapeError) as e:
            if errors == "raise":
                raise
            results[i] = e
            continue
        places.append(i)
        arrays.append(image)
        host = isinstance(image, np.ndarray)
        pixels += math.prod((image.shape if host else image.__cuda_array_interface__["shape"])[:2])
        if len(arrays) == chunk or pixels > 1 << 26:
            yield places, arrays
            places, arrays, pixels = [], [], 0
    if arrays:
        yield places, arrays


# ------------------------------------------------------------------------------------------------
# Fitting: features -> Gaussians of every fold -> denoiser -> calibration
# ------------------------------------------------------------------------------------------------

MIN_IMAGES = 5
MIN_HELD_OUT = 10  # good images that calibrate
FIT_REVISION = 19  # raised when the same images and settings give another model: caches are then stale
_CALIBRATED_STEPS = (1, 2, 3, 4, 5, 10)  # a model can be scored with any of these
Progress = Callable[[str, int, int], None]  # (what, done, of how many)
_quiet: Progress = lambda *_: None


def _details(fine: Iterable[np.ndarray], mean: np.ndarray, whitener: np.ndarray, settings: Settings,
             roi=None) -> np.ndarray:
    """`detail` of each image's fine features (F*F', C'), float32 (n, F, F'), 0 where none inside reads it.

    It may be an image that was fitted on: leaving it out of the mean scales all its density alike, and a
    detail is a ratio; its share of the covariance is one of many.
    """
    mean, shape = mean.astype(np.float32), settings.fine
    from scipy import ndimage
    near = ndimage.binary_dilation(_inside(roi, shape, 1e-9).reshape(shape), np.ones((3, 3)))
    return np.array([near * detail(fine_density(x, mean, whitener).reshape(shape)) for x in fine],
                    np.float32).reshape(-1, *shape)


def _nll_of(x0: np.ndarray, denoiser: dict | None, timesteps, prediction: str,
            threads: int | None = None) -> np.ndarray:
    """|x_T|^2 / 2 of x0 (M, N, C), float32 (M, N)."""
    m, n, c = x0.shape
    e = _new_engine(threads=threads)
    if e is None:
        def f(x, t):
            return denoise(denoiser, x, t) if denoiser else np.zeros_like(x)
        return np.stack([0.5 * np.square(ddim_invert(x.astype(np.float32), f, timesteps, prediction)).sum(-1)
                         for x in x0])
    x, columns = e.given(n, c)
    z = e.state(n)
    _emit_inversion(e, x, n, columns, denoiser, timesteps, prediction, np.ones(n), np.zeros(n), z, (0, n))
    e.keep(z, n)
    e.finish()
    return np.concatenate([e.run(None, given=[x0[i:i + 16]], outputs=True).outputs[0]
                           for i in range(0, m, 16)])


def _calibrate(nll: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """From held-out good nll (n, N): gain and offset of z at each position, and z (n, N).

    Each position's deviation is averaged (in variance) with the mean over positions: with few
    images it is noisy, and a position that never varies must not shout. An image's own z is
    standardised by the others (jackknife), as a new image's will be.
    """
    n = len(nll)
    mean, variance = nll.mean(0), nll.var(0)
    away = nll - mean
    others = np.maximum(n * variance - n / (n - 1) * away ** 2, 0) / (n - 1)  # variance without the image

    def deviation(v):
        return np.sqrt(.5 * v + .5 * v.mean(-1, keepdims=True)) + 1e-12
    gain = 1 / deviation(variance)
    return ({"gain": gain.astype(np.float32), "offset": (-mean * gain).astype(np.float32)},
            away * (n / (n - 1)) / deviation(others))


def _read_scores(raw: np.ndarray, nll: np.ndarray, details: np.ndarray, settings: Settings,
                 roi=None) -> dict[str, np.ndarray]:
    """raw (n,): worst means of good images; nll (n, N + M): moments, sorted scores and peaks of maps.

    details (m, F, F'), of the first m images: those whose maps are read. Zero and unit of the score are the
    median and the spread of the middle half, zero of the map a median too: one wild image hardly moves them.
    """
    inside = _inside(roi, settings.grid)
    nll = nll[:, :np.count_nonzero(inside)]
    down, across = _enlargers(settings)
    low, middle, high = np.quantile(raw, [.25, .5, .75])
    moments = np.array([middle, max((high - low) / 1.349, 1e-6), np.median(nll.mean(1))])
    cells = (_spread(inside, x - moments[2]).reshape(settings.grid) for x in nll)
    maps = (down @ x @ across.T * own for x, own in zip(cells, details))
    return {"moments": moments, "scores": np.sort((raw - moments[0]) / moments[1]),
            "peaks": np.sort([m.max() for m in maps]) + moments[2]}


def fit(images, *, iterations: int | None = None, minutes: float | None = None, threads: int | None = None,
        keep_all: bool = False, roi=None, progress: Progress = _quiet, features=None, known=None,
        denoiser=None, ranged=(), **settings) -> Prior:
    """Train a prior on good images. See `Settings` for the keywords; `Prior.fit` is this function.

    Parameters
    ----------
    images : folder (see `find_good`), or sequence of paths or uint8 arrays.
    iterations : at most this many training steps (default 900; the held-out loss may stop it earlier).
        0: no denoiser and no torch, the density is that of the joint Gaussian (places and shared factors).
    minutes : at most this long in the denoiser's training (but one step).
    keep_all : images that are unlike the others calibrate too. Else they are set aside (at most a tenth, or a
        fifth if they stand far apart), and named in `summary["set_aside"]`; those that are so by far take no
        part in anything.
    roi : mask (H, W) of the images' size, not 0 inside, or a file (examples/region.py): `RegionOfInterest`.
    features : file to keep the images' features in, for `Prior.update`.
    known, denoiser, ranged : what `Prior.update` hands in: a file of features, whose images take part too,
        and weights to keep instead of training; and `fit_many`: keys of images that decided ranges.

    Raises
    ------
    ImageError if fewer than MIN_IMAGES different images can be read, or less than half of them;
    BackendUnavailable without torch.

    Images with the same pixels count once. The same set of images gives the same model, whatever their
    names and order. Calibration "cross" scores every image by Gaussians that did not see it (10 folds) while
    the final Gaussian uses all images; the denoiser has seen eight of the ten folds. "holdout" keeps a
    fifth of the images away from everything: exact split-conformal, at some cost in accuracy.
    """
    began, fitting, training = time.perf_counter(), _room("fitting"), _room("training")
    images, locked, found = _room("folders").good_images(images)
    config = Settings(**settings)
    config.check()
    for steps in _CALIBRATED_STEPS:
        select_timesteps(steps, config.first, config.last)
    if denoiser is None and (iterations is None or iterations > 0):
        training.import_torch()  # fail before the work, not after
    if minutes is not None and not minutes > 0:
        raise ShapeError(f"minutes: expected a positive number, got {minutes!r:.60}")
    if len(images) < MIN_IMAGES and not known:
        raise ImageError(f"{len(images)} good images: at least {MIN_IMAGES} are needed, 50 are better")
    backbone = load_backbone(config.backbone)
    config, proportions = _room("curation").settle(images, config)
    config = dataclasses.replace(config, backbone=backbone.name)
    if config.tile:
        return _room("tiles").fit(images, locked, found, config, backbone, keep_all, (roi, known, features),
                                  progress, iterations=iterations, minutes=minutes, threads=threads)
    roi = None if roi is None else _room("region").region_of(roi, images, config)
    kept = _room("kept")
    known = kept.read(known, kept.about(config, backbone, roi)) if known else None
    training.check_memory(len(images) + (len(known.keys) if known else 0), config, backbone)
    given, network, far, again = [*(known.names if known else ()), *images], backbone, set(), True
    while again:  # until no image that is set aside by far has decided how the network is rounded
        backbone, own = _room("quantization").quantize_on(network, images, config, roi, progress, far)
        extracted = _room("extraction").extract_features(images, config, backbone, threads, progress,
                                                         known=known, roi=roi)
        unreadable = locked + extracted.unreadable
        if 2 * len(unreadable) > (count := len(images) + len(locked)):
            raise ImageError(f"{len(unreadable)} of {count} images cannot be read, the first: "
                             f"{unreadable[0]}")
        extracted = extracted._replace(ranged=known.ranged if known else own or ranged, unreadable=unreadable)
        whitened = fitting.whiten_features(extracted, config, keep_all, progress, threads)
        far |= (again := {*own} - {*whitened.summary["trained_on"]})
    whitened.summary["set_aside"] = _names(given, whitened.summary["set_aside"])
    prior = fitting.fit_whitened(whitened, config, backbone, iterations, minutes, threads, progress, denoiser)
    prior.summary |= {"seconds": round(time.perf_counter() - began, 1), "found": found,
                      "not_read": len(unreadable), "proportions": proportions, "factors": config.factors}
    if features:  # last: what is interrupted leaves those of the old model
        extracted = extracted._replace(names=_names(given, range(len(given)), False))
        kept.write(extracted, features, kept.about(config, backbone, roi))
    return prior


Prior.fit = staticmethod(fit)


def _names(images: Sequence, places: Iterable[int], ordered: bool = True) -> list[str]:
    names = [str(images[i]) if isinstance(images[i], (str, os.PathLike)) else f"image {i}" for i in places]
    return sorted(names) if ordered else names


def fit_many(root: str | os.PathLike, **options) -> MultiPrior:
    """`fit` for every product of ROOT, a folder each (of good images, or a data set's), in one model."""
    return _room("folders").fit_many(root, **options)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def demo_model() -> Path:
    """The model in weights/ that scores the washers of examples/."""
    return _data_folder("weights") / "demo.npz"


def _printable(text: object) -> str:
    """One line that moves no cursor and forges no row: what cannot be printed as Python escapes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _products(model: Prior | MultiPrior) -> dict[str, Prior]:
    return model.priors if isinstance(model, MultiPrior) else {"": model}


def main() -> None:
    """The command. It ends with 0, 1 (an anomaly), 2 (an error, in one line) or 130 (interrupted)."""
    try:
        console = _room("console")
    except BackendUnavailable as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    console.run(lambda: _room("commands").build_app())


if __name__ == "__main__":
    main()
