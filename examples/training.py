#!/usr/bin/env python3
"""Training of the denoiser, the only place where torch is imported, and the memory that a training takes.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp


def import_torch():
    # GNU OpenMP spins for 300,000 rounds at each barrier, which beside other work takes up to ten times as
    # long; for 1000 where threads outnumber the cores. It reads this when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import torch
    except ImportError as e:
        raise fp.BackendUnavailable("training the denoiser needs torch: pip install 'fastprior[train]', or "
                                    "--iterations 0 for the Gaussian prior without torch") from e
    return torch


def initial_denoiser(n: int, c: int, settings: fp.Settings) -> dict[str, np.ndarray]:
    """Random weights of the denoiser; its output layer starts at zero, so that F = 0."""
    rng, d, tokens = np.random.default_rng(settings.seed), settings.width, 64

    def dense(*shape):
        return (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)
    k = 64
    p = {"in_w": dense(c, d), "pos": .02 * dense(n, d) * math.sqrt(n), "time_w": dense(12, k),
         "time_b": np.zeros(k), "shift_w": dense(k, d), "gain_w": np.zeros((k, c)),
         "norm_gain": np.ones(d), "norm_bias": np.zeros(d), "out_w": np.zeros((d, c)), "out_b": np.zeros(c)}
    for i in range(settings.mixers):
        p |= {f"mix{i}_token1": dense(n, tokens).T, f"mix{i}_token2": dense(tokens, n).T,
              f"mix{i}_w1": dense(d, 2 * d), f"mix{i}_b1": np.zeros(2 * d),
              f"mix{i}_w2": dense(2 * d, d), f"mix{i}_b2": np.zeros(d)}
        for j in (1, 2):
            p |= {f"mix{i}_norm{j}_gain": np.ones(d), f"mix{i}_norm{j}_bias": np.zeros(d)}
    return {name: np.ascontiguousarray(a, np.float32) for name, a in p.items()}


def denoiser_loss(x0: np.ndarray, p: dict[str, np.ndarray] | None, prediction: str) -> float:
    """Mean |F(x_t, t) - target|^2 of x0 (M, N, C), what training lowers, at four t; None: F = 0."""
    rng, losses = np.random.default_rng(0), []
    for x in x0:
        for t in (50, 100, 200, 400):
            eps, abar = rng.standard_normal(x.shape, np.float32), fp._alpha_bar_table()[t]
            signal, noise = np.float32(abar ** .5), np.float32((1 - abar) ** .5)
            target = signal * eps - noise * x if prediction == "v" else eps
            f = fp.denoise(p, signal * x + noise * eps, t) if p else 0
            losses.append(np.mean((f - target) ** 2))
    return float(np.mean(losses))


def torch_denoise(torch, p: dict, x, t):
    """`fp.denoise` for a batch, differentiable: x (B, N, C), t int64 (B,)."""
    functional = torch.nn.functional
    phi = torch.arccos(torch.sqrt(torch.from_numpy(fp._alpha_bar_table().copy()).float()))[t]
    angles = phi[:, None] * torch.from_numpy(fp._FREQUENCIES).float()
    hidden = functional.silu(torch.cat([angles.sin(), angles.cos()], 1) @ p["time_w"] + p["time_b"])
    h = x @ p["in_w"] + p["pos"] + (hidden @ p["shift_w"])[:, None]
    d = (h.shape[-1],)
    for i in range(fp._num_mixers(p)):
        u = functional.layer_norm(h, d, p[f"mix{i}_norm1_gain"], p[f"mix{i}_norm1_bias"])
        h = h + p[f"mix{i}_token2"] @ functional.silu(p[f"mix{i}_token1"] @ u)
        u = functional.layer_norm(h, d, p[f"mix{i}_norm2_gain"], p[f"mix{i}_norm2_bias"])
        h = h + functional.silu(u @ p[f"mix{i}_w1"] + p[f"mix{i}_b1"]) @ p[f"mix{i}_w2"] + p[f"mix{i}_b2"]
    u = functional.layer_norm(h, d, p["norm_gain"], p["norm_bias"])
    return (u @ p["out_w"] + p["out_b"]) * (1 + hidden @ p["gain_w"])[:, None]


def train_denoiser(x0: np.ndarray, held_out: np.ndarray, settings: fp.Settings, iterations: int,
                   minutes: float | None, prediction: str, progress: fp.Progress = fp._quiet,
                   threads: int | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Minimise |F(x_t, t) - target|^2 with AdamW; returns the averaged weights with the best held-out loss.

    x0 (M, N, C) float16; rows marked in `held_out` (M,) are only ever evaluated. Every 50 iterations
    the exponential moving average is evaluated on fixed noise; after six evaluations without
    improvement training stops, so the number of iterations is chosen by the held-out loss.
    KeyboardInterrupt stops training and keeps the best weights so far.
    """
    torch = import_torch()
    usual = torch.get_num_threads()
    torch.set_num_threads(fp._usual_threads(threads))
    generator = torch.Generator().manual_seed(settings.seed)
    m, n, c = x0.shape
    p = {k: torch.from_numpy(v).requires_grad_() for k, v in initial_denoiser(n, c, settings).items()}
    average = {k: v.detach().clone() for k, v in p.items()}
    optimiser = torch.optim.AdamW(p.values(), lr=2e-3, weight_decay=.01, betas=(.9, .99))
    table = torch.from_numpy(fp._alpha_bar_table().copy()).float()
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
        t = torch.searchsorted(phi, angle).clamp(max=fp.NUM_TRAIN_TIMESTEPS - 1)
        return t, torch.randn(count, n, c, generator=generator)
    fixed = [(rows, *draw(len(rows))) for rows in np.array_split(test[:64], max(1, len(test[:64]) // 16))]

    def evaluate(params):
        with torch.no_grad():
            return float(np.mean([loss(params, *f).item() for f in fixed]))
    rng, began, interrupted = np.random.default_rng(settings.seed), time.perf_counter(), False
    limit = 60 * minutes if minutes else math.inf
    start = best_loss = evaluate(average)
    best, best_at, waited, i = {k: v.clone() for k, v in average.items()}, 0, 0, 0
    try:
        for i in range(1, iterations + 1):
            share = min(1, max(i / iterations, (time.perf_counter() - began) / limit))
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
            last = i == iterations or time.perf_counter() - began > limit
            if i % 50 == 0 or last:
                current = evaluate(average)
                waited = 0 if current < best_loss else waited + 1
                if current < best_loss:
                    best_loss, best, best_at = current, {k: v.clone() for k, v in average.items()}, i
            progress("training", i, iterations)
            if last or waited >= 6:
                break
    except KeyboardInterrupt:
        fp._log.warning("interrupted: keeping the best weights so far")
        interrupted = True
    finally:
        torch.set_num_threads(usual)
    if not math.isfinite(best_loss):
        raise fp.FastPriorError("training diverged: the held-out loss is not finite; try another seed")
    report = {"iterations": best_at, "iterations_run": i, "loss_start": round(start, 5),
              "loss": round(best_loss, 5)} | ({"interrupted": True} if interrupted else {})
    return {k: v.numpy().copy() for k, v in best.items()}, report


def training_memory(images: int, settings: fp.Settings, backbone: fp.Backbone) -> int:
    """Bytes that a training on so many images takes, about, beside the 0.6 GB of Python with torch.

    Features four times (two bytes; themselves, those that are used, whitened, in work), fine features, and
    5 numbers of 4 bytes for each place and pair of channels: sums, a covariance in float64, two whiteners.
    Before that, for a backbone in integers, maps of some images in 6 bytes, those of the stem being largest.
    """
    n, c = math.prod(settings.grid), sum(backbone.channels)
    n += len(fp._cells(settings, np.ones(n, bool)))
    extraction, quantization = fp._room("extraction"), fp._room("quantization")
    fine = min(images, extraction.MOST_FINE) * math.prod(settings.fine) * backbone.fine_channels
    maps = 6 * min(images, quantization.RANGE_IMAGES) * math.prod(settings.shape) // 4 * len(backbone.stem_b)
    return max(8 * images * (extraction.copies_of(images, settings) + 1) * n * c + 2 * fine + 20 * n * c * c,
               maps * quantization.fits(backbone))


def memory_left() -> float:
    """Bytes that this process can still take, by what the system says; infinite where it does not."""
    left, own = [math.inf], 0
    with contextlib.suppress(OSError, ValueError, LookupError):
        free = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        left.append(1024 * (int(free["MemAvailable"]) + int(free["SwapFree"])))
    with contextlib.suppress(OSError, ValueError, LookupError, ImportError):
        import resource
        pages = Path("/proc/self/statm").read_text().split()[:2]
        size, own = (resource.getpagesize() * int(x) for x in pages)
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        left += [limit - size] * (limit != resource.RLIM_INFINITY)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left.append(int(Path(file).read_text()) - own)
    return min(left)


def check_memory(images: int, settings: fp.Settings, backbone: fp.Backbone) -> None:
    """FastPriorError unless a training finds the memory it takes, which is logged."""
    needed, left = training_memory(images, settings, backbone), memory_left()
    if needed > left:
        raise fp.FastPriorError(
            f"training on {images} images at {fp._size_text(settings.size)} pixels takes "
            f"{needed / 1e9:.1f} GB of memory, {max(left, 0) / 1e9:.1f} are free: take fewer images, or a "
            "smaller size or backbone")
    fp._log.info("training takes about %.1f GB of memory", (needed + 6e8) / 1e9)
