"""The CPU kernels as functions of arrays, and OPS: the one table of operations, which the tests walk.

A twin takes what its reference in fastprior.py takes. It builds an `Engine` with that one operation, plants
the inputs in its memory, where everything else is NaN, runs it, and reads the result: what is tested is what
a frame runs. Compiled code believes the addresses and sizes it is handed: a twin checks its arguments first.
"""
from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

import fastprior as fp

cpu = fp._engines("cpu")
cpu.load_kernels("floats")
PANEL = cpu.PANEL
_BLANK = np.zeros((1, 1, 3), np.uint8)  # where an operation reads no pixels


def check(**arguments) -> dict[str, int]:
    """name=(array or None, axes): floats with one size a name; the sizes. Axes may be a choice: "m | n m"."""
    sizes: dict[str, int] = {}
    for name, (array, choices) in arguments.items():
        if array is None:
            continue
        array = np.asarray(array)
        for axes in map(str.split, choices.split("|")):
            named = sizes | {axis: int(axis) if axis.isdigit() else n
                             for axis, n in zip(axes, array.shape) if axis not in sizes}
            if array.dtype.kind == "f" and [named.get(axis) for axis in axes] == list(array.shape):
                sizes = named
                break
        else:
            raise fp.ShapeError(f"{name}: expected floats ({choices}) where {sizes}, "
                                f"got {array.dtype} {array.shape}")
    return sizes


def expect(good: bool, message: str) -> None:
    if not good:
        raise fp.ShapeError(message)


def widened(x: np.ndarray, to: int) -> np.ndarray:
    """Zeros after the last axis, up to a multiple of `to`."""
    return fp._padded_to(x, *x.shape[:-1], fp._round_up(x.shape[-1], to))


def run_alone(build: Callable, threads: int | None, image=_BLANK, shift=(0.0, 0.0), with_map: bool = False):
    """Copies of the outputs, and the map.

    build(engine) emits the operation and returns its inputs (memory, place, array) and outputs (memory,
    place, shape), memory being "workspace" or "state".
    """
    engine = cpu.Engine(threads)
    inputs, outputs = build(engine)
    engine.finish()
    engine._image_table([image], [shift], [None])  # the memory grows now, not after the inputs are there
    engine._memory[...] = engine.prepare(1)[...] = np.nan

    def at(memory, place, shape):
        floats = engine._memory[0, engine._line:] if memory == "workspace" else engine.prepare(1)[0]
        return floats[place:place + int(np.prod(shape))].reshape(shape)
    for memory, place, array in inputs:
        at(memory, place, array.shape)[...] = array
    frames = engine.run([image], shifts=[shift], with_map=with_map)
    return [at(*output).copy() for output in outputs], frames.maps[0]


# -- twins -------------------------------------------------------------------------------------------

def resize_normalize(image, size, mean, std, shift=(0.0, 0.0), *, threads=None):
    image = np.ascontiguousarray(image)
    expect(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0,
           f"image: expected uint8 (h, w, 3), got {image.dtype} {image.shape}")
    check(mean=(mean, "3"), std=(std, "3"), shift=(shift, "2"))

    height, width = np.broadcast_to(size, 2).tolist()

    def build(e):  # a row and a column after the image are the zeros that the stem reads
        place = e.resize((height, width), mean, std, fp.resize_taps)
        return [], [("workspace", place, (height + 1, width + 1, 3))]
    (out,), _ = run_alone(build, threads, image, shift)
    return out[:height, :width]


_BLOCK_AXES = {"expand_w": "in mid", "expand_b": "mid", "dw_w": "k k mid", "dw_b": "mid",
               "se_reduce_w": "mid s", "se_reduce_b": "s", "se_expand_w": "s mid", "se_expand_b": "mid",
               "project_w": "mid out", "project_b": "out"}


def mbconv(x, block, stem_w=None, stem_b=None, *, threads=None):
    sizes = check(**{name: (array, _BLOCK_AXES[name]) for name, array in block.arrays.items()})
    expect(sizes["k"] in (3, 5) and block.stride in (1, 2), f"no such kernel: {sizes}, stride {block.stride}")
    c_in, _, c_out = block.channels
    expect(not block.skip or c_in == c_out and block.stride == 1, "a skip keeps size and channels")
    sizes = check(x=(x, f"h w {c_in if stem_w is None else 3}"), stem_w=(stem_w, f"3 3 3 {c_in}"),
                  stem_b=(stem_b, f"{c_in}"))
    h, w = sizes["h"], sizes["w"]
    expect(min(h, w) > 0, f"x: expected pixels, got {x.shape}")
    if stem_w is None:
        planted = widened(x, cpu._LANES)
    else:
        expect(h % 2 == w % 2 == 0, f"x: expected even sides, got {x.shape}")
        expect("expand_w" not in block.arrays and not block.skip, "the first block neither expands nor skips")
        h, w, planted = h // 2, w // 2, np.pad(x, ((0, 1), (0, 1), (0, 0)))

    def build(e):
        place = e.workspace(*planted.shape)
        out, h_out, w_out = e.mbconv(place, h, w, block, stem_w, stem_b)
        shape = h_out, w_out, fp._round_up(c_out, cpu._LANES)
        return [("workspace", place, planted)], [("workspace", out, shape)]
    (out,), _ = run_alone(build, threads)
    return out[..., :c_out]


def pool(x, grid, *, threads=None):
    c, (down, across) = check(x=(x, "h w c"))["c"], np.broadcast_to(grid, 2).tolist()
    cell = x.shape[0] // down
    expect(x.size > 0 and x.shape[:2] == (cell * down, cell * across),
           f"x: expected a multiple of {grid} a side, got {x.shape}")

    def build(e):
        planted = widened(x, cpu._LANES)
        place, out = e.workspace(*planted.shape), e.state(down * across, c)
        e.emit(cpu._pool, x=place, cell=cell, stride=planted.shape[2], channels=c, down=down, across=across,
               out=out, columns=c)
        return [("workspace", place, planted)], [("state", out, (down, across, c))]
    return run_alone(build, threads)[0][0]


def whiten(f, mean, w, *, threads=None):
    check(f=(f, "n c"), mean=(mean, "n c"), w=(w, "n c | n c c"))
    expect(f.size > 0 and (w.ndim == 2 or not np.triu(w, 1).any()), "w: expected lower-triangular matrices")

    def build(e):
        planted = widened(f, PANEL)
        place = e.state(*planted.shape)
        out = e.whiten(place, *planted.shape, mean, w if w.ndim == 2 else fp.pack_lower(w))
        return [("state", place, planted)], [("state", out, planted.shape)]
    return run_alone(build, threads)[0][0][:, :f.shape[1]]


def coarsen(f, cells, *, threads=None):
    check(f=(f, "n c"))
    expect(f.size > 0 and cells.shape[1:] == (4,) and len(cells) > 0, f"expected cells, got {cells.shape}")

    def build(e):
        planted = widened(f, PANEL)
        place = e.state(*planted.shape)
        out = e.coarsen(place, *planted.shape, cells)
        return [("state", place, planted)], [("state", out, (len(cells), planted.shape[1]))]
    return run_alone(build, threads)[0][0][:, :f.shape[1]]


def remove_factors(x, v, *, threads=None):
    check(x=(x, "n c"), v=(v, "k n c"))
    expect(v.size > 0, f"v: expected factors, got {v.shape}")

    def build(e):
        planted = widened(x, PANEL)
        place = e.state(*planted.shape)
        e.remove_factors(place, *planted.shape, fp.pack_factors(v))
        return [("state", place, planted)], [("state", place, planted.shape)]
    return run_alone(build, threads)[0][0][:, :x.shape[1]]


def linear(x, w, b, act=fp.NONE, residual=None, *, threads=None):
    """The same twice: x in the workspace, and in the state with rows that are longer."""
    sizes = check(x=(x, "n k"), w=(w, "k m"), b=(b, "m | n m"), residual=(residual, "n m"))
    n, k, m = (sizes[axis] for axis in "nkm")
    expect(n > 0 and m > 0, f"expected rows and columns, got {x.shape} @ {w.shape}")

    def build(e):
        wide = fp._round_up(m, cpu._LANES)
        place, skip = e.workspace(n, k), None if residual is None else e.workspace(n, wide)
        other, longer = e.state(n, k + 5), np.pad(x, ((0, 0), (0, 5)), constant_values=np.nan)
        inputs = [("workspace", place, x), ("state", other, longer)]
        inputs += [] if skip is None else [("workspace", skip, widened(residual, cpu._LANES))]
        outs = (e.linear(place, n, k, w, b, act, skip),
                e.linear(other, n, k, w, b, act, skip, lda=k + 5, from_state=True))
        return inputs, [("workspace", out, (n, columns)) for out, columns in outs]
    (out, again), _ = run_alone(build, threads)
    np.testing.assert_array_equal(out, again)
    return out[:, :m]


def mix(x, w, act=fp.NONE, residual=None, *, threads=None):
    d = check(x=(x, "n d"), w=(w, "m n"), residual=(residual, "m d"))["d"]
    expect(x.size > 0 and w.size > 0, f"expected places, got {w.shape} @ {x.shape}")

    def build(e):
        planted = widened(x, cpu._LANES)
        wide = planted.shape[1]
        place, skip = e.workspace(*planted.shape), None if residual is None else e.workspace(len(w), wide)
        inputs = [("workspace", place, planted)]
        inputs += [] if skip is None else [("workspace", skip, widened(residual, cpu._LANES))]
        return inputs, [("workspace", e.mix(place, wide, w, act, skip), (len(w), wide))]
    return run_alone(build, threads)[0][0][:, :d]


def layer_norm(x, gain, bias, *, threads=None):
    check(x=(x, "n d"), gain=(gain, "d"), bias=(bias, "d"))
    expect(x.size > 0, f"x: expected rows, got {x.shape}")

    def build(e):
        place = e.workspace(*x.shape)
        return [("workspace", place, x)], [("workspace", e.layer_norm(place, *x.shape, gain, bias), x.shape)]
    return run_alone(build, threads)[0][0]


def rotate_density(h, w, b, x, coef, *, threads=None):
    """Twice: a step in the middle, which leaves x', and the last one, which leaves z."""
    sizes = check(h=(h, "n d"), w=(w, "d c"), b=(b, "c"), x=(x, "n c"), coef=(coef, "2"))
    n, d = sizes["n"], sizes["d"]
    expect(x.size > 0, f"x: expected places, got {x.shape}")
    gain, offset = np.random.default_rng(0).uniform(.5, 2, (2, n)).astype(np.float32)  # a place's own

    def build(e):
        planted = widened(x, PANEL)
        hidden, outputs, inputs = e.workspace(n, d), [], []
        for last in (False, True):
            place, z = e.state(*planted.shape), e.state(n + 3)
            e.rotate(hidden, d, w, b, place, *planted.shape, coef, last, z, (2, n + 3), gain, offset)
            inputs += [("state", place, planted), ("state", z, np.full(n + 3, 7, np.float32))]
            outputs.append(("state", z, (n + 3,)) if last else ("state", place, planted.shape))
        return [("workspace", hidden, h), *inputs], outputs
    (y, z), _ = run_alone(build, threads)
    assert z[0] == z[1] == z[-1] == 7  # it writes its own and no others
    return y[:, :x.shape[1]], (z[2:-1] - offset) / gain


def fine_density(x, mean, w, *, threads=None):
    check(x=(x, "n c"), mean=(mean, "n c"), w=(w, "c c"))
    expect(x.size > 0, f"x: expected places, got {x.shape}")

    def build(e):
        planted = widened(x, PANEL)
        place = e.state(*planted.shape)
        f = e.fine_density(place, *planted.shape, mean, w)
        return [("state", place, planted)], [("state", f, (len(x),))]
    return run_alone(build, threads, with_map=True)[0][0]


def sharpen(cells, f, down, across, *, threads=None):
    sizes = check(cells=(cells, "r c"), f=(f, "h w"), down=(down, "h r"), across=(across, "w c"))
    expect(min(sizes.values()) > 0, f"expected a map, got {sizes}")
    weight, offset = np.random.default_rng(0).uniform(.5, 2, (2, cells.size)).astype(np.float32)

    def build(e):
        z, density = e.state(*cells.shape), e.state(*f.shape)
        out = e.sharpen(z, cells.size, weight, offset, density, down, across)
        planted = (cells - offset.reshape(cells.shape)) / weight.reshape(cells.shape)
        return [("state", z, planted), ("state", density, f)], [("state", out, f.shape)]
    return run_alone(build, threads, with_map=True)[0][0]


def anomaly_map(m, height, width, *, threads=None):
    check(m=(m, "h w"))
    expect(min(m.shape) > 1 and min(height, width) > 0, f"expected a map, got {m.shape}")

    def build(e):
        place = e.state(*m.shape)
        e.map(place, m.shape, fp.linear_taps)
        return [("state", place, m)], []
    return run_alone(build, threads, np.zeros((height, width, 3), np.uint8), with_map=True)[1]


# -- the table ---------------------------------------------------------------------------------------

class Op(NamedTuple):
    """Reference and CPU twin take the same arguments; `cuda` is the .cu file in kernels/."""
    reference: Callable
    cpu: Callable | None
    cuda: str | None


def _stem_mbconv(x, block, stem_w, stem_b):
    return fp.mbconv(fp.stem(x, stem_w, stem_b, block.act), block)


OPS: dict[str, Op] = {
    "resize_normalize": Op(fp.resize_normalize, resize_normalize, "resize_normalize"),
    "stem": Op(fp.stem, None, "stem"),  # the CPU fuses it with the first block:
    "stem_mbconv": Op(_stem_mbconv, mbconv, None),
    "mbconv": Op(fp.mbconv, mbconv, None),  # on CUDA in parts:
    "depthwise": Op(fp.depthwise, None, "depthwise"),
    "squeeze_excite": Op(fp.squeeze_excite, None, "squeeze_excite"),
    "pool": Op(fp.pool, pool, "pool"),
    "whiten": Op(fp.whiten, whiten, "whiten"),
    "coarsen": Op(fp.coarsen, coarsen, "coarsen"),
    "remove_factors": Op(fp.remove_factors, remove_factors, "remove_factors"),
    "linear": Op(fp.linear, linear, "product"),
    "mix": Op(fp.mix, mix, "product"),
    "layer_norm": Op(fp.layer_norm, layer_norm, "layer_norm"),
    "rotate_density": Op(fp.rotate_density, rotate_density, "rotate_density"),
    "worst_mean": Op(fp.worst_mean, None, "worst_mean"),  # NumPy does it on the CPU
    "fine_density": Op(fp.fine_density, fine_density, "fine_density"),
    "sharpen": Op(fp.sharpen, sharpen, "sharpen"),
    "anomaly_map": Op(fp.anomaly_map, anomaly_map, "anomaly_map"),
}
