"""The CUDA engine: the program of cpu.py as launches of the .cu files here, replayed as one graph a frame.

A buffer is known by its bytes an image and placed by `finish` (two buffers share memory if they never live at
once); a batch of B stretches all of it B times. What differs between calls (pixels, sizes, taps, where
results go) is in the image table, so that one graph a batch size serves every frame.
"""
from __future__ import annotations

import collections
import ctypes
import functools
import sys
import threading
import types
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np

from . import NONE, PANEL, QTILE, Unavailable, Unfit, padded_to, round_up, same_padding

_INSTALL_CUPY = "pip install cupy-cuda12x (driver for CUDA 12) or cupy-cuda13x (driver 580 or newer)"
_LEAST_CAPABILITY = 75  # m16n8k8 products of halves
_SMALL_MAP = 1 << 16  # chunks of a depthwise result below which more threads share the work of each
_MOST_SHARES = 1 << 12  # warps of a product among which K is shared
_IMAGE_WORDS = 15  # of struct Image in common.cuh
_EXPAND, _PROJECT = 1, 2  # products in integers, see product.cu


@functools.cache
def import_cupy():
    """CuPy with a GPU that works; Unavailable says what of them is missing."""
    try:
        import cupy
    except ImportError as e:
        raise Unavailable(f"device 'cuda': CuPy is missing ({e}): {_INSTALL_CUPY}") from e
    runtime = cupy.cuda.runtime
    driver, built_for = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise Unavailable("device 'cuda': CuPy is there, but no NVIDIA driver: install it, or use the CPU")
    if driver // 1000 < built_for // 1000:
        raise Unavailable(f"device 'cuda': the NVIDIA driver knows CUDA up to {driver // 1000}, this CuPy "
                          f"needs {built_for // 1000}: {_INSTALL_CUPY}")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as e:
        raise Unavailable(f"device 'cuda': CuPy and the driver are there, but no GPU answers ({e})") from e
    if count == 0:
        raise Unavailable("device 'cuda': CuPy and the driver are there, but no GPU is visible "
                          "(is CUDA_VISIBLE_DEVICES set?)")
    return cupy


@functools.cache
def kernel_source(name: str) -> str:
    """The text of <name>.cu with common.cuh pasted in, so that CuPy's cache is keyed by all of it."""
    folder = Path(__file__).parent
    try:
        common = (folder / "common.cuh").read_text()
        return (folder / f"{name}.cu").read_text().replace('#include "common.cuh"', common)
    except FileNotFoundError as e:
        raise Unavailable(f"device 'cuda': {e.filename} is missing: copy the whole folder kernels/") from e


def fragments(w: np.ndarray, wide: bool) -> np.ndarray:
    """w (K, N) in tiles of 16 x 16 as product.cu reads them: (N/16, K/16, terms, lanes 32, 8), halves.

    Lane 4 g + q has rows 4 q to 4 q + 3 of column g, then of column g + 8 (`mma.m16n8k16` of the PTX manual,
    section 9.7.14, the order of K within sixteen being free). wide: a second term, what rounding left over.
    """
    k, n = (round_up(size, to) for size, to in zip(w.shape, (16, 32)))
    tiles = padded_to(w, k, n).reshape(k // 16, 4, 4, n // 16, 2, 8).transpose(3, 0, 5, 1, 4, 2)
    high = tiles.astype(np.float16)
    terms = [high, (tiles - high).astype(np.float16)] if wide else [high]
    return np.stack([t.reshape(n // 16, k // 16, 32, 8) for t in terms], 2)


def byte_fragments(w: np.ndarray) -> np.ndarray:
    """QTILEs as whiten.cu reads them: scales, then of each 16 rows what the lanes multiply, plus 128.

    A lane has the four rows of `fragments` of columns g, g + 8, g + 16 and g + 24.
    """
    out = np.empty(w.shape, [("scale", np.float32, (PANEL,)), ("weight", np.uint8, (2, 8, 4, 4, 4))])
    out["scale"] = w["scale"]
    rows = w["weight"].view(np.uint8).reshape(*w.shape, 2, 4, 4, 4, 8)  # half, q, row of q, eight, g
    out["weight"] = np.moveaxis(rows, (-5, -1, -4, -2, -3), (-5, -4, -3, -2, -1)) ^ 128
    return out


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_int),
                ("rest", ctypes.c_int * 15)]


class _Configuration(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
                ("count", ctypes.c_uint)]


@functools.cache
def overlapping_launch() -> Callable | None:
    """cuLaunchKernelEx of the driver, which CuPy does not offer; None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None


def launch_overlapping(launch: "Launch", stream) -> bool:
    """Enqueue a launch that may start before the one ahead of it has ended; False if the driver refuses.

    Programmatic dependent launch (CUDA Programming Guide): its kernel waits in `await_launch` of common.cuh.
    """
    function = getattr(getattr(launch.kernel, "kernel", None), "ptr", None)
    if not function:
        return False
    attribute = _Attribute(6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    block = *launch.block, 1, 1
    configuration = _Configuration(launch.grid, block[:3], 0, stream.ptr, ctypes.pointer(attribute), 1)
    values = [np.array(a if isinstance(a, np.generic) else np.uint64(a.data.ptr)) for a in launch.args]
    arguments = (ctypes.c_void_p * len(values))(*[v.ctypes.data for v in values])
    return not overlapping_launch()(ctypes.byref(configuration), ctypes.c_void_p(function), arguments, None)


class Buffer:
    """Device memory of `size` bytes an image; `offset` an image is set by `Engine.finish`."""

    def __init__(self, size: int):
        self.size, self.offset = round_up(size, 256), 0


class Launch(NamedTuple):
    """Arguments: buffers, device arrays, None for null, int for int32, float for float32, scalars.

    beside: the branch of the graph that the launch is on (None: the trunk); waits: branches it waits for.
    """
    kernel: Callable
    grid: tuple[int, int, int]
    block: tuple[int, ...]
    args: tuple
    beside: str | None = None
    waits: tuple[str, ...] = ()


class _Frame(NamedTuple):
    """All launches of one batch size, bound to addresses, and their graph."""
    stages: list[str]  # of each launch
    launches: list[Launch]
    graph: Any


class Frames:
    """What `run` left on the GPU, in the order of `stream`: scores (B,), maps, what was kept."""

    def __init__(self, scores, maps: list, outputs: list, stream, gpu):
        self.scores, self.maps, self.outputs, self.stream, self._gpu = scores, maps, outputs, stream, gpu
        self._host: dict[int, np.ndarray] = {}

    def to_host(self, array) -> np.ndarray:
        """Waits for the frame and copies, once."""
        if id(array) not in self._host:
            with self._gpu, self.stream:
                self._host[id(array)] = array.get()
        return self._host[id(array)]


def check_image(image) -> None:
    """Unfit unless an array, of the host or a GPU, is one that kernels take."""
    about = getattr(image, "__cuda_array_interface__", None) or np.asarray(image).__array_interface__
    shape, kind = tuple(about["shape"]), about["typestr"]
    if (kind[1:] != "u1" or len(shape) != 3 or shape[2] != 3 or min(shape[:2]) < 8
            or max(shape[:2]) > 32768):
        raise Unfit("image on the GPU: expected uint8 (H, W, 3) of 8 to 32768 pixels a side, "
                    f"got {np.dtype(kind)} {shape}")


class Engine:
    """Device memory, weights and launches of one model on the current GPU. See `fastprior.Engine`.

    precision "float32" stores activations in 32 bits and multiplies them on tensor cores as pairs of
    halves, "float16" stores 16 bits; both add in float32. A backbone in integers is the same in both, see
    common.cuh. Work of several streams is put in order.
    """

    device = "cuda"
    threads = 1
    _RING = 8  # frames that may be in flight before the host waits to write another image table

    def __init__(self, precision: str = "float32"):
        if precision not in ("float16", "float32"):
            raise Unfit(f"precision: expected 'float32' or 'float16', got {precision!r}")
        self.cupy = import_cupy()
        self.gpu = self.cupy.cuda.Device()
        properties = self.cupy.cuda.runtime.getDeviceProperties(self.gpu.id)
        capability = 10 * properties["major"] + properties["minor"]
        if capability < _LEAST_CAPABILITY:
            raise Unavailable(f"device 'cuda': {properties['name'].decode()} has compute capability "
                              f"{capability / 10}, 7.5 (Turing) or newer is needed: use device='cpu'")
        self.processors = properties["multiProcessorCount"]
        driver = self.cupy.cuda.runtime.driverGetVersion()  # from 12.3 on graphs hold such launches
        self.overlaps = capability >= 90 and driver >= 12030 and overlapping_launch() is not None
        self.real = np.dtype(precision)
        self.steps: list[tuple[str, Callable[[int], Launch]]] = []
        self.frames: dict[int, _Frame] = {}
        self.image_bytes = 0
        self._lock = threading.Lock()
        self._modules: dict[tuple, Any] = {}
        self._stage = "resize"  # what the launches that are being emitted belong to
        self._tables: dict[tuple, tuple[list[int], list]] = {}
        self._shape, self._capacity = (0, 0), 0
        self._taps = self._map_taps = None
        self._given: list[tuple[Buffer, int, int, int]] = []
        self._scored = False
        self._kept: list[tuple[Buffer, tuple[int, int], int | None]] = []

    # -- building blocks ---------------------------------------------------------------------------

    def constant(self, array, dtype=np.float32):
        """A device copy."""
        return self.cupy.asarray(np.ascontiguousarray(array, dtype))

    def weights(self, array, *shape: int, integer: bool = False):
        """A device copy in the storage type, filled with zeros up to `shape`."""
        return self.constant(padded_to(array, *shape), np.int16 if integer else self.real)

    def buffer(self, *shape: int, dtype=None) -> Buffer:
        return Buffer(int(np.prod(shape)) * np.dtype(dtype or self.real).itemsize)

    def vector(self, integer: bool) -> int:
        """Elements of a chunk, see common.cuh."""
        return 8 if integer else 16 // self.real.itemsize

    def state(self, *shape: int) -> Buffer:
        return self.buffer(*shape, dtype=np.float32)

    def kernel(self, file: str, name: str | None = None, **macros: int):
        half = self.real == np.float16 or bool(macros.get("INTEGER"))  # integers are the same in both
        macros = {"HALF": int(half)} | macros
        options = tuple(f"-D{macro}={value}" for macro, value in macros.items())
        source = kernel_source(file)
        try:
            if (file, options) not in self._modules:
                self._modules[file, options] = self.cupy.RawModule(code=source, options=options)
            return self._modules[file, options].get_function(name or file)
        except Exception as e:  # CuPy finds NVRTC, or what NVRTC says, only when it compiles
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise Unavailable(f"device 'cuda': CuPy cannot compile kernels/{file}.cu ({reason}); if NVRTC is "
                              "missing: pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]'") from e

    def emit(self, make: Callable[[int], Launch], beside: str | None = None,
             waits: tuple[str, ...] = ()) -> None:
        """Append a launch, given the batch; see `Launch` for the rest.

        A branch starts where the trunk stands. What its launches name lives until the trunk waits for it.
        """
        self.steps.append((self._stage, lambda batch: make(batch)._replace(beside=beside, waits=waits)))

    def product(self, a: Buffer, lda: int, w: np.ndarray, rows: int, k: int, *, bias=None, ldbias: int = 0,
                gate=None, residual: Buffer | None = None, act=NONE, transposed: bool = False,
                integer: int = 0) -> Buffer:
        """act(a @ w + bias) + residual, w (K, N) the same for all images.

        transposed: a is (k, rows) of each image and the result (N, rows). integer: 0, _EXPAND or _PROJECT;
        act is then multipliers, see `_ending`, and gate that of a.
        """
        n = w.shape[1] if transposed else round_up(w.shape[1], 8)
        out = self.buffer(n, rows, dtype=np.int16 if integer else None)
        wide = self.real == np.float32 and not np.array_equal(w, w.astype(np.float16))
        packed = self.constant(fragments(w, wide).view(np.int16), np.int16)
        across = -(-n // 32)
        # warps that share K: one image decides, not the batch, so that a score has the same bits in any
        split = max(s for s in (1, 2, 4, 8) if s == 1 or
                    32 * s <= round_up(k, 16) and s * across * -(-rows // 32) <= _MOST_SHARES)

        def make(batch: int) -> Launch:
            m, images = (rows, batch) if transposed else (rows * batch, 1)
            # the large tile reads less, the small one spreads a small product over more processors
            tile = 32 if -(-m // 32) * across * images * split >= 8 * self.processors else 16
            warps = max(4, split)
            args = (a, np.int64(k * lda if transposed else 0), lda, packed, bias, ldbias, gate, residual, out,
                    m, n, k, rows, act, split)
            kernel = self.kernel("product", TILE=tile, WARPS=warps, WIDE=int(wide),
                                 TRANSPOSED=int(transposed), INTEGER=integer)
            shares = -(-m // tile) * across * split
            return Launch(kernel, (-(-shares // warps), 1, images), (32 * warps,), args)
        self.emit(make)
        return out

    # -- operations: the interface -----------------------------------------------------------------

    def features(self, backbone, shape: tuple[int, int], views: Sequence,
                 taps: Callable) -> list[tuple[Buffer, int]]:
        tokens, filled = [], [0] * len(views)
        for grid, blocks in views:
            columns = round_up(sum(backbone.blocks[i].channels[2] for i in blocks), PANEL)
            tokens.append((self.state(*grid, columns), columns))
        integer = backbone.integer
        x = self.resize(shape, backbone.mean, backbone.std, taps, integer)
        self._stage = "features"
        x = self.stem(x, shape, backbone)
        h, w = (n // 2 for n in shape)
        for i, block in enumerate(backbone.blocks):
            x, h, w = self.mbconv(x, h, w, block)
            channels = block.channels[2]
            for k, (((down, across), blocks), (out, columns)) in enumerate(zip(views, tokens)):
                if i in blocks:
                    fill = columns - filled[k] - channels if i == blocks[-1] else 0
                    threads = down * across * -(-(channels + fill) // self.vector(integer))
                    scale = backbone.scales[i] / np.float32(h // down * (w // across)) if integer else 0
                    args = (x, out, h // down, round_up(channels, 8), channels, fill, down, across, filled[k],
                            columns, float(scale))
                    self.emit(lambda batch, args=args, threads=threads: Launch(
                        self.kernel("pool", INTEGER=int(integer)), (-(-threads // 128), 1, batch), (128,),
                        args), "pools")
                    filled[k] += channels
        return tokens

    def given(self, n: int, c: int) -> tuple[Buffer, int]:
        columns = round_up(c, PANEL)
        self._given.append((self.state(n, columns), n, c, columns))
        return self._given[-1][0], columns

    def fine_density(self, x: Buffer, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> Buffer:
        self._stage, f = "map", self.state(n)
        mean, w = self.constant(padded_to(mean, n, c)), self.constant(padded_to(w.T, c, c))
        self.emit(lambda batch: Launch(self.kernel("fine_density"), (-(-n // 8), 1, batch),
                                       (min(round_up(c, 32), 256),), (x, mean, w, f, self.table, n, c)),
                  "fine", ("pools",))
        return f

    def coarsen(self, f: Buffer, n: int, c: int, cells: np.ndarray) -> Buffer:
        self._stage, m = "whitening", len(cells)
        out, cells = self.state(m, c), self.constant(cells, np.int32)
        self.emit(lambda batch: Launch(self.kernel("coarsen"), (-(-m * c // 128), 1, batch), (128,),
                                       (f, cells, out, n, m, c)), waits=("pools",))
        return out

    def whiten(self, f: Buffer, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> Buffer:
        self._stage = "whitening"
        x, mean = self.buffer(n, c), self.constant(padded_to(mean, n, c))
        if w.dtype != QTILE:
            w = self.constant(padded_to(w, n, c))
            self.emit(lambda batch: Launch(self.kernel("whiten", "whiten_diagonal"),
                                           (-(-n * c // 128), 1, batch), (128,), (f, mean, w, x, n, c)),
                      waits=("pools",))
        else:
            w = self.constant(byte_fragments(w).view(np.uint8), np.uint8)
            self.emit(lambda batch: Launch(self.kernel("whiten"), (n * c // PANEL, 1, -(-batch // 16)),
                                           (128,), (f, mean, w, x, n, c, batch)), waits=("pools",))
        return x

    def remove_factors(self, x: Buffer, n: int, c: int, factors: np.ndarray) -> Buffer:
        self._stage = "whitening"
        size, groups, v = n * c, factors.shape[1], self.constant(factors.view(np.int8), np.int8)
        parts = -(-size // 512)
        sums, along = (self.buffer(*shape, dtype=np.float32)
                       for shape in ((parts, groups * PANEL), (groups * PANEL,)))
        self.emit(lambda batch: Launch(self.kernel("remove_factors", "project_factors"), (parts, 1, batch),
                                       (256,), (x, v, sums, size, groups)))
        self.emit(lambda batch: Launch(self.kernel("remove_factors", "sum_factors"), (1, 1, batch), (512,),
                                       (sums, along, groups, parts)))
        self.emit(lambda batch: Launch(self.kernel("remove_factors"), (-(-size // 256), 1, batch), (256,),
                                       (x, v, along, size, groups)))
        return x

    def linear(self, x: Buffer, n: int, k: int, w: np.ndarray, b: np.ndarray, act: int = NONE,
               residual: Buffer | None = None, lda: int | None = None,
               from_state: bool = False) -> tuple[Buffer, int]:
        self._stage = "denoiser"
        m, k = round_up(w.shape[1], 8), round_up(k, 8)
        bias = self.constant(padded_to(b, *b.shape[:-1], m))
        return self.product(x, lda or k, w, n, k, bias=bias, ldbias=m if b.ndim == 2 else 0, act=act,
                            residual=residual), m

    def mix(self, x: Buffer, d: int, w: np.ndarray, act: int = NONE,
            residual: Buffer | None = None) -> Buffer:
        self._stage = "denoiser"
        return self.product(x, d, w.T, d, w.shape[1], residual=residual, act=act, transposed=True)

    def layer_norm(self, x: Buffer, n: int, d: int, gain: np.ndarray, bias: np.ndarray) -> Buffer:
        self._stage = "denoiser"
        out, gain, bias = self.buffer(n, d), self.constant(gain), self.constant(bias)
        self.emit(lambda batch: Launch(self.kernel("layer_norm"), (-(-n * batch // 4), 1, 1), (128,),
                                       (x, gain, bias, out, n * batch, d)))
        return out

    def rotate(self, h, d: int, w: np.ndarray, b: np.ndarray, x: Buffer, n: int, c: int, coef, last: bool,
               z: Buffer, at: tuple[int, int], gain: np.ndarray, offset: np.ndarray) -> None:
        f = self.linear(h, n, d, padded_to(w, d, c), padded_to(b, c))[0] if d else None
        self._stage = "density"
        gain, offset = self.constant(gain), self.constant(offset)
        keep, turn = map(float, coef)
        x_out, z = (None, z) if last else (x, None)
        self.emit(lambda batch: Launch(self.kernel("rotate_density"), (-(-n * batch // 4), 1, 1), (128,),
                                       (x, f, keep, turn, x_out, gain, offset, z, *at, n * batch, n, c)))

    def score(self, z: Buffer, n: int, worst: int, zero: float, unit: float) -> None:
        self._stage, self._scored, zero, per_unit = "map", True, float(zero), float(1 / unit)
        self.emit(lambda batch: Launch(self.kernel("worst_mean"), (1, 1, batch), (256,),
                                       (z, self.table, n, worst, zero, per_unit)), "score")

    def sharpen(self, z: Buffer, n: int, weight: np.ndarray, offset: np.ndarray, f: Buffer, down: np.ndarray,
                across: np.ndarray) -> Buffer:
        self._stage, sizes = "map", (*down.shape, *across.shape)
        weight, offset, down, across = map(self.constant, (weight, offset, down, across))
        out = self.state(sizes[0], sizes[2])
        self.emit(lambda batch: Launch(self.kernel("sharpen"), (sizes[0], 1, batch), (64,),
                                       (z, weight, offset, f, down, across, out, self.table, *sizes, n)),
                  waits=("fine",))
        return out

    def map(self, m: Buffer, fine: tuple[int, int], taps: Callable) -> None:
        self._stage, self._map_taps = "map", lambda sides: map(taps, fine, sides)
        self.emit(lambda batch: Launch(self.kernel("anomaly_map"), (256, 1, batch), (128,),
                                       (m, self.table, *fine)))

    def keep(self, x: Buffer, n: int, c: int | None = None) -> None:
        self._kept.append((x, (n, 1 if c is None else round_up(c, PANEL)), c))

    # -- what the interface's operations are made of -----------------------------------------------

    def resize(self, shape: tuple[int, int], mean, std, taps: Callable, integer: bool) -> Buffer:
        """u8 pixels of the image table -> (*shape, 4), the fourth value zero."""
        self._shape, self._taps, mean, std = shape, taps, np.asarray(mean), np.asarray(std)
        out = self.buffer(*shape, 4, dtype=np.int16 if integer else None)
        name = "resize_integers" if integer else "resize_normalize"
        affine = [] if integer else [self.constant(np.concatenate([1 / (255 * std), -mean / std]))]
        self.emit(lambda batch: Launch(self.kernel("resize_normalize", name),
                                       (-(-shape[0] * shape[1] // 128), 1, batch), (128,),
                                       (self.table, *affine, out, *shape)))
        return out

    def _ending(self, arrays: dict, layer: str, c: int, act: int):
        """How a layer ends: its activation's code, or its multipliers in integers."""
        m = arrays.get(f"{layer}_m")
        return act if m is None else self.constant(padded_to(m, c))

    def stem(self, x: Buffer, shape: tuple[int, int], backbone) -> Buffer:
        c, (high, wide) = round_up(backbone.stem_w.shape[-1], 8), (n // 2 for n in shape)
        integer = backbone.integer
        w = self.weights(backbone.stem_w, 3, 3, 3, c, integer=integer)
        b = self.constant(padded_to(backbone.stem_b, c))
        ending = self._ending({"stem_m": backbone.stem_m}, "stem", c, backbone.act)
        out = self.buffer(high, wide, c, dtype=np.int16 if integer else None)
        threads = high * -(-wide // 4) * c // self.vector(integer)
        self.emit(lambda batch: Launch(self.kernel("stem", INTEGER=int(integer)),
                                       (-(-threads // 128), 1, batch), (128,),
                                       (x, w, b, out, *shape, c, ending)))
        return out

    def mbconv(self, x: Buffer, h: int, w: int, block) -> tuple[Buffer, int, int]:
        """Returns the output map and its size; channels padded to a multiple of 8, at every place."""
        p = block.arrays
        c_in, mid, c_out = (round_up(c, 8) for c in block.channels)
        y, integer = x, "dw_m" in p
        if "expand_w" in p:
            y = self.product(x, c_in, p["expand_w"], h * w, c_in, integer=_EXPAND * integer,
                             gate=self.constant(p["input_m"]) if integer else None,
                             act=self._ending(p, "expand", mid, block.act),
                             bias=self.constant(padded_to(p["expand_b"], mid)))
        size, stride = p["dw_w"].shape[0], block.stride
        h_out, w_out = -(-h // stride), -(-w // stride)
        middle = self.buffer(h_out, w_out, mid, dtype=np.uint8 if integer else None)
        chunks = mid // self.vector(integer)
        squeezed, across = "se_reduce_w" in p, min(chunks, 32)
        down = 128 // across

        def grid(batch: int) -> tuple[bool, int, int]:
            # sums of a batch are those of its images: their parts must not depend on it
            small = h_out * w_out * chunks * (1 if squeezed else batch) < _SMALL_MAP
            return small, -(-chunks // across), -(-h_out * -(-w_out // (2 if small else 4)) // down)
        parts = grid(1)[2]
        sums = self.buffer(parts, mid, dtype=np.float32) if squeezed else None
        taps = self.weights(p["dw_w"], size, size, mid, integer=integer)
        bias, ending = self.constant(padded_to(p["dw_b"], mid)), self._ending(p, "dw", mid, block.act)
        top, left = (same_padding(n, size, stride)[0] for n in (h, w))
        args = y, taps, bias, middle, sums, h, w, mid, top, left, ending

        def make(batch: int) -> Launch:
            small, *blocks = grid(batch)
            kernel = self.kernel("depthwise", f"depthwise_{size}{stride}", SMALL=int(small),
                                 INTEGER=int(integer))
            return Launch(kernel, (*blocks, batch), (across, down, size if small else 1), args)
        self.emit(make)
        gate = self.squeeze_excite(sums, parts, mid, h_out * w_out, p) if sums else None
        out = self.product(middle, mid, p["project_w"], h_out * w_out, mid, integer=_PROJECT * integer,
                           act=self._ending(p, "project", c_out, NONE), gate=gate,
                           bias=self.constant(padded_to(p["project_b"], c_out)),
                           residual=x if block.skip else None)
        return out, h_out, w_out

    def squeeze_excite(self, sums: Buffer, parts: int, c: int, pixels: int, p: dict) -> Buffer:
        s, runs = p["se_reduce_b"].size, -(-c // 32)
        if s > 256:
            raise Unfit(f"squeeze-excitation to {s} channels: on a GPU at most 256")
        pieces = min(16, -(-parts // 128))
        hidden, gate = (self.buffer(*shape, dtype=np.float32) for shape in ((runs * pieces, s), (c,)))
        reduce_w, reduce_b, expand_w, expand_b = (self.constant(padded_to(a, *shape)) for a, shape in (
            (p["se_reduce_w"].T, (s, c)), (p["se_reduce_b"], (s,)), (p["se_expand_w"], (s, c)),
            (p["se_expand_b"], (c,))))
        self.emit(lambda batch: Launch(self.kernel("squeeze_excite", "squeeze"), (runs, pieces, batch),
                                       (512,), (sums, reduce_w, hidden, parts, c, s, pixels)))
        self.emit(lambda batch: Launch(self.kernel("squeeze_excite", "excite"), (runs, 1, batch), (512,),
                                       (hidden, reduce_b, expand_w, expand_b, gate, runs * pieces, c, s)))
        return gate

    # -- running -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Place every buffer in the bytes of an image, first fit, by the launches that name it; compile."""
        self._allocate(1)
        lives: dict[Buffer, list[int]] = {given[0]: [0, 0] for given in self._given}
        launches, last = [make(1) for _, make in self.steps], len(self.steps)
        for i, launch in enumerate(launches):
            joins = (k for k in range(i, last)
                     if launch.beside in launches[k].waits and not launches[k].beside)
            end = next(joins, last) if launch.beside else i
            for a in launch.args:
                if isinstance(a, Buffer):
                    live = lives.setdefault(a, [i, end])
                    live[1] = max(live[1], end)
        for buffer, _, _ in self._kept:
            lives[buffer][1] = len(self.steps)
        placed: list[Buffer] = []
        for buffer, (begin, end) in lives.items():
            buffer.offset = 0
            beside = [p for p in placed if lives[p][0] <= end and lives[p][1] >= begin]
            for other in sorted(beside, key=lambda p: p.offset):
                if other.offset < buffer.offset + buffer.size:
                    buffer.offset = max(buffer.offset, other.offset + other.size)
            placed.append(buffer)
        self.image_bytes = max(b.offset + b.size for b in placed)
        self.capture_stream = self.cupy.cuda.Stream(non_blocking=True)
        self.done = self.cupy.cuda.Event(disable_timing=True)
        self.done.record()

    def _allocate(self, capacity: int) -> None:
        """Memory for batches up to `capacity`; what was bound to the old addresses goes."""
        if self._capacity:
            self.done.synchronize()
        self._capacity = 0  # should there be no memory
        self.frames.clear()
        self.workspace = None  # before the new one, so that both never exist together
        self.workspace = self.cupy.empty(max(self.image_bytes, 256) * capacity, np.uint8)
        self.table = self.cupy.empty((capacity, _IMAGE_WORDS), np.int64)
        self.written: list[list[int]] = []
        words = capacity * _IMAGE_WORDS
        pinned = [self.cupy.cuda.alloc_pinned_memory(8 * words) for _ in range(self._RING)]
        self.ring = collections.deque((p, np.frombuffer(p, np.int64, words).reshape(capacity, -1),
                                       self.cupy.cuda.Event(disable_timing=True)) for p in pinned)
        self._capacity = capacity if self.image_bytes else 0

    def bind(self, launch: Launch, batch: int) -> Launch:
        """Buffers to addresses, numbers to the types that kernels take."""
        base = self.workspace.data.ptr

        def value(a):
            if isinstance(a, Buffer):
                return np.uint64(base + a.offset * batch)
            if a is None:
                return np.uint64(0)
            return np.int32(a) if isinstance(a, int) else np.float32(a) if isinstance(a, float) else a
        return launch._replace(args=tuple(map(value, launch.args)))

    def launch(self, launches: Iterable[Launch]) -> None:
        for kernel, grid, block, args, *_ in launches:
            kernel(grid, block, args)

    def capture(self, launches: Iterable[Launch]):
        """A CUDA graph of launches that have all run before (so that nothing is loaded while capturing)."""
        trunk = self.capture_stream
        streams, pending = {None: trunk}, set()

        def wait(stream, branch: str | None) -> None:
            event = self.cupy.cuda.Event(disable_timing=True)
            event.record(streams[branch])
            stream.wait_event(event)
        with trunk:
            trunk.begin_capture()
            try:
                for i, launch in enumerate(launches):
                    if launch.beside not in streams:
                        streams[launch.beside] = self.cupy.cuda.Stream(non_blocking=True)
                    stream = streams[launch.beside]
                    for branch in (None, *launch.waits) if launch.beside else launch.waits:
                        if branch in streams:
                            wait(stream, branch)
                    pending = pending | {launch.beside} if launch.beside else pending - {*launch.waits}
                    follows = i > 0 and not (launch.beside or launch.waits)
                    if not (follows and self.overlaps and launch_overlapping(launch, stream)):
                        with stream:
                            self.launch([launch])
                for branch in pending:
                    wait(trunk, branch)
            finally:
                graph = trunk.end_capture()
        return graph

    def image_row(self, pixels, shift: tuple[float, float], score: int, target=None) -> list[int]:
        """The image table's row: see struct Image in common.cuh. Taps are kept by size."""
        key = *pixels.shape[:2], *shift
        entry = self._tables.pop(key, None)
        if entry is None:
            row, keep = [], []
            for n, out, s in zip(pixels.shape, self._shape, shift):
                taps = self._taps or (lambda *_: (np.zeros(1), np.zeros((1, 1))))  # no pixels are read
                start, weight = taps(n, out, s)
                keep += [self.constant(start, np.int32), self.constant(weight)]
                row += [keep[-2].data.ptr, keep[-1].data.ptr, weight.shape[1]]
            for start, share in self._map_taps(pixels.shape[:2]) if self._map_taps else ():
                keep += [self.constant(start, np.int32), self.constant(share)]
            entry = row, keep
        self._tables[key] = entry  # most recently used last
        row, keep = entry
        where = [0] * 5 if target is None else [a.data.ptr for a in (target, *keep[-4:])]
        return [pixels.data.ptr, *pixels.shape[:2], *row, *where, score]

    def stream_of(self, images: Sequence):
        """torch's current stream if there are torch tensors among the images, else CuPy's."""
        torch, cuda = sys.modules.get("torch"), self.cupy.cuda
        if torch and any(isinstance(image, torch.Tensor) for image in images):
            pointer = torch.cuda.current_stream(self.gpu.id).cuda_stream
            if not pointer:
                return cuda.Stream(null=True)
            if not hasattr(cuda.Stream, "from_external"):  # before CuPy 14
                return cuda.ExternalStream(pointer)
            return cuda.Stream.from_external(types.SimpleNamespace(__cuda_stream__=lambda: (0, pointer)))
        return cuda.get_current_stream()

    def to_device(self, image):
        """u8 (H, W, 3) on this GPU; an array that is there already is not copied."""
        check_image(image)
        a = self.cupy.asarray(image)
        if a.device.id != self.gpu.id:
            raise Unfit(f"image on GPU {a.device.id}, the model is on GPU {self.gpu.id}: copy it there")
        return self.cupy.ascontiguousarray(a)

    def run(self, images: Sequence | None, *, with_map: bool = False, outputs: bool = False,
            shifts: Sequence[tuple[float, float]] | None = None, given=None,
            masks: Sequence[np.ndarray] | None = None) -> Frames:
        """Enqueue a batch on the caller's stream; nothing waits for it."""
        batch = len(given[0]) if images is None else len(images)
        shifts = shifts or [(0.0, 0.0)] * batch
        with self._lock, self.gpu, self.stream_of(images or ()) as stream:
            if batch > self._capacity:
                self._allocate(batch)
            # never one that a frame in flight points to
            while len(self._tables) > self._RING * max(128, self._capacity):
                del self._tables[next(iter(self._tables))]
            stream.wait_event(self.done)  # the workspace is shared between streams
            pixels = [self.to_device(image) for image in images or ()]
            scores = self.cupy.empty(batch, np.float32) if self._scored else None
            maps = [self.cupy.empty(p.shape[:2], np.float32) if with_map else None for p in pixels]
            at = scores.data.ptr if self._scored else 0
            rows = [self.image_row(p, s, at + 4 * i, m)
                    for i, (p, s, m) in enumerate(zip(pixels, shifts, maps))]
            rows = rows or [[0] * _IMAGE_WORDS] * batch
            for (x, n, c, columns), values in zip(self._given, given or ()):
                places = self._view(x, batch, n, columns)
                places.fill(0)
                places[:, :, :c] = self.cupy.asarray(values)
            if rows != self.written:
                self.write_table(rows, stream)
            frame = self.frames.get(batch)
            if frame is None:
                launches = [self.bind(make(batch), batch) for _, make in self.steps]
                self.launch(launches)
                stages = [stage for stage, _ in self.steps]
                self.frames[batch] = _Frame(stages, launches, self.capture(launches))
            else:
                frame.graph.launch(stream)
            for m, mask in zip(maps, masks or ()):
                m *= self.cupy.asarray(mask)
            kept = []
            for x, shape, c in self._kept if outputs else ():
                places = self._view(x, batch, *shape)
                kept.append((places.reshape(batch, -1) if c is None else places[:, :, :c]).copy())
            self.done.record(stream)
        return Frames(scores, maps, kept, stream, self.gpu)

    def _view(self, buffer: Buffer, batch: int, *shape: int):
        """A float32 buffer of the workspace as an array (B, ...)."""
        start = buffer.offset * batch
        size = 4 * int(np.prod(shape)) * batch
        return self.workspace[start:start + size].view(np.float32).reshape(batch, *shape)

    def run_only(self, stages: Sequence[str], images: Sequence, with_map: bool = True) -> None:
        """Only the launches of these stages, on whatever the others left, and the wait for them."""
        built = self.frames[len(images)]
        with self._lock, self.gpu:
            self.launch([k for s, k in zip(built.stages, built.launches) if s in stages])
            self.cupy.cuda.get_current_stream().synchronize()

    def write_table(self, rows: list[list[int]], stream) -> None:
        pinned, host, copied = self.ring[0]
        self.ring.rotate(-1)
        copied.synchronize()  # long past, unless _RING frames are in flight
        host[:len(rows)] = rows
        runtime = self.cupy.cuda.runtime
        runtime.memcpyAsync(self.table.data.ptr, host.ctypes.data, 8 * _IMAGE_WORDS * len(rows),
                            runtime.memcpyHostToDevice, stream.ptr)
        copied.record(stream)
        self.written = rows


def bench_cuda(engine: Engine, images: Sequence[int] = (1, 16, 64, 256), frames: int = 200,
               pixels: Sequence[int] = (256, 256), values: int = 64 << 20) -> dict:
    """Device-event timings of a built engine, u8 on the device to score and map, after a warm-up.

    Returns, for each batch of `images` random images (*pixels, 3): p50 and p95 in ms a batch, images a
    second; for batch 1 also the p50 of each stage (a graph of its own, so a stage includes one graph launch);
    and for the fused rotation and density on `values` values: bytes moved a second, beside those of a device
    copy of as many bytes.
    """
    cupy, rng = engine.cupy, np.random.default_rng(0)
    runtime = cupy.cuda.runtime
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

    report: dict[str, Any] = {"gpu": runtime.getDeviceProperties(engine.gpu.id)["name"].decode(),
                              "precision": str(engine.real), "frames": frames, "batches": {},
                              "stages_p50_ms": {}}
    with stream:
        for batch in images:
            frame = [cupy.asarray(rng.integers(0, 256, (*pixels, 3), np.uint8)) for _ in range(batch)]
            ms = timed(lambda: engine.run(frame, with_map=True), max(10, frames // batch))
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
        rotate = engine.bind(Launch(engine.kernel("rotate_density"), (-(-rows // 4), 1, 1), (128,),
                                     (x, f, .8, .6, None, ones, ones, z, 0, n, rows, n, c)), 1)
        moved = x.nbytes + f.nbytes + z.nbytes
        copy = cupy.empty(x.nbytes, np.uint8)
        for name, work, size in (
                ("rotate_density", lambda: engine.launch([rotate]), moved),
                ("device_copy", lambda: runtime.memcpyAsync(copy.data.ptr, x.data.ptr, x.nbytes,
                                                            runtime.memcpyDeviceToDevice, stream.ptr),
                 2 * x.nbytes)):
            ms = timed(work, 50)
            report[f"{name}_gb_per_s"] = size / ms[len(ms) // 2] / 1e6
    report["rotate_share_of_copy"] = report["rotate_density_gb_per_s"] / report["device_copy_gb_per_s"]
    return report
