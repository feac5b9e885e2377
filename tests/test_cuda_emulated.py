"""Every CUDA kernel, run on the CPU behind cuda_emulator.h, against the float64 NumPy references.

Odd shapes, several blocks, several block sizes, both storage types, three schedules of the threads; and
planted errors (wrong index, wrong stride, missing barrier) that the very same checks must catch.
"""
import faulthandler
import itertools
import math
import os

import numpy as np
import pytest

import fastprior as fp
from emulated_cuda import DeviceArray, FakeCupy, LaunchError, gxx, source
from twins import OPS

pytestmark = pytest.mark.skipif(gxx() is None, reason="no g++ with 16-bit floats to emulate CUDA with")

# float32: sums of up to a few hundred products in another order. float16: one rounding of the result
# (2^-11 = 5e-4) next to float32 sums; the inputs are rounded before the reference sees them.
TOLERANCE = {np.float32: 3e-6, np.float16: 1e-3}
SCHEDULES = (0, 1, 7)  # ascending, descending, shuffled threads


class Bench:
    """One kernel module in one storage type, and arrays for it."""

    def __init__(self, name, dtype, schedule=0, edit=None, options=()):
        self.cuda, self.dtype, self.rng = FakeCupy(schedule), dtype, np.random.default_rng(5)
        text = source(name)
        if edit:
            assert edit[0] in text, f"{name}: the text to break is gone: {edit[0]!r}"
            text = text.replace(*edit)
        self.module = self.cuda.RawModule(code=text, options=(f"-DHALF={int(dtype == np.float16)}", *options))

    def random(self, *shape, dtype=None, scale=1.0):
        """Device array and its float64 values after rounding."""
        a = (scale * self.rng.standard_normal(shape)).astype(dtype or self.dtype)
        return self.cuda.asarray(a), a.astype(np.float64)

    def empty(self, *shape, dtype=None):
        return self.cuda.empty(shape, dtype or self.dtype)

    def launch(self, name, grid, block, *args):
        self.module.get_function(name)(grid, block, args)

    def check(self, got, want, slack=1.0):
        assert isinstance(got, DeviceArray) and got.shape == want.shape, (got.shape, want.shape)
        error = np.abs(got.get().astype(np.float64) - want).max() / max(1.0, np.abs(want).max())
        assert error < slack * TOLERANCE[self.dtype], f"error {error:.2e}"


I, L, F, NULL = np.int32, np.int64, np.float32, np.uint64(0)


def image_table(b, rows):
    """The table of `Image` rows: dictionaries of device arrays and integers."""
    names = ("pixels", "height", "width", "row_start", "row_weight", "row_taps", "col_start", "col_weight",
             "col_taps", "map", "map_row", "map_row_share", "map_col", "map_col_share", "score")

    def value(x):
        return x.data.ptr if hasattr(x, "data") else int(x)
    return b.cuda.asarray(np.array([[value(row.get(n, 0)) for n in names] for row in rows], np.int64))


def resize(b, block=64):
    size, mean, std = (20, 28), np.array([.5, .4, .3]), np.array([.2, .3, .4])
    rows, images = [], []
    for h, w in ((37, 61), (20, 20), (9, 11)):
        image = b.rng.integers(0, 256, (h, w, 3), np.uint8)
        images.append(image)
        row = {"pixels": b.cuda.asarray(image), "height": h, "width": w}
        for side, n, out in zip(("row", "col"), (h, w), size):
            start, weight = fp.resize_taps(n, out)
            row |= {f"{side}_start": b.cuda.asarray(start.astype(I)), f"{side}_taps": weight.shape[1],
                    f"{side}_weight": b.cuda.asarray(weight.astype(F))}
        rows.append(row)
    out = b.empty(3, *size, 4)
    affine = b.cuda.asarray(np.concatenate([1 / (255 * std), -mean / std]).astype(F))
    b.launch("resize_normalize", (-(-size[0] * size[1] // block), 1, 3), (block,), image_table(b, rows),
             affine, out, *map(I, size))
    want = np.stack([fp.resize_normalize(image, size, mean, std) for image in images])
    b.check(out, np.concatenate([want, np.zeros((3, *size, 1))], -1))


def stem(b, block=96):
    (height, width), c = (18, 26), 24
    x, x64 = b.random(2, height, width, 4)
    w, w64 = b.random(3, 3, 3, c)
    bias, bias64 = b.random(c, dtype=F)
    for act in (fp.NONE, fp.RELU6, fp.SILU):
        out = b.empty(2, height // 2, width // 2, c)
        strips = height // 2 * -(-width // 8) * c // 4
        b.launch("stem", (-(-strips // block), 1, 2), (block,), x, w, bias, out, I(height), I(width), I(c),
                 I(act))
        b.check(out, np.stack([fp.stem(i[..., :3], w64, bias64, act) for i in x64]))


def product(b, tile=32, m=70, n=72, k=80, period=35, act=fp.SILU, gated=True, by_row=False,
            with_residual=True, wide=False, split=2, warps=4):
    wide = wide and b.dtype == F
    a, a64 = b.random(m, k)
    w64 = b.rng.standard_normal((k, n)) * k ** -.5
    w64 = w64.astype(F if wide else np.float16).astype(np.float64)
    bias, bias64 = b.random(*((period, n) if by_row else (n,)), dtype=F)
    gate, gate64 = b.random(m // period, k, dtype=F)
    residual, residual64 = b.random(m, n)
    out = b.empty(m, n)
    b.launch("product", (-(-(-(-m // tile) * -(-n // 32)) * split // warps),), (32 * warps,), a, L(0), I(k),
             packed(b, w64, wide), bias, I(n if by_row else 0), gate if gated else NULL,
             residual if with_residual else NULL, out, I(m), I(n), I(k), I(period), I(act), I(split))
    if gated:
        a64 = (a64 * np.repeat(gate64, period, 0)).astype(b.dtype).astype(np.float64)
    b.check(out, fp.linear(a64, w64, np.tile(bias64, (m // period, 1)) if by_row else bias64, act,
                           residual64 if with_residual else None))
    return out.get()


def packed(b, w, wide=False):
    return b.cuda.asarray(fp._engines("cuda").fragments(w.astype(F), wide))


def mix(b, tile=16, n_out=37, n=36, d=40, batch=3, split=2, transposed=True, wide=True):
    """The same product with the images' matrix on the right, hence transposed, and no bias."""
    w64 = (b.rng.standard_normal((n_out, n)) * n ** -.5).astype(F).astype(np.float64)
    x, x64 = b.random(batch, n, d)
    residual, residual64 = b.random(batch, n_out, d)
    out = b.empty(batch, n_out, d)
    wide = wide and b.dtype == F
    if not wide:
        w64 = w64.astype(np.float16).astype(np.float64)
    tiles = -(-d // tile) * -(-n_out // 32)
    b.launch("product", (-(-tiles * split // 4), 1, batch), (128,), x, L(n * d), I(d),
             packed(b, w64.T, wide), NULL, I(0), NULL, residual, out, I(d), I(n_out), I(n), I(d), I(fp.SILU),
             I(split))
    b.check(out, np.stack([fp.mix(i, w64, fp.SILU, r) for i, r in zip(x64, residual64)]))


def depthwise(b, block=(3, 8), h=12, w=9, c=40, kernel=5, stride=2, act=fp.SILU, small=0):
    x, x64 = b.random(2, h, w, c)
    taps, taps64 = b.random(kernel, kernel, c, scale=1 / kernel)
    bias, bias64 = b.random(c, dtype=F)
    ho, wo = -(-h // stride), -(-w // stride)
    vector = 16 // np.dtype(b.dtype).itemsize
    grid = (-(-c // vector // block[0]), -(-ho * -(-wo // (2 if small else 4)) // block[1]), 2)
    block = *block, kernel if small else 1
    out, sums = b.empty(2, ho, wo, c), b.empty(2, grid[1], c, dtype=F)
    top, left = (fp._same_padding(n, kernel, stride)[0] for n in (h, w))
    b.launch(f"depthwise_{kernel}{stride}", grid, block, x, taps, bias, out, sums, I(h), I(w), I(c), I(top),
             I(left), I(act))
    want = np.stack([fp.depthwise(i, taps64, bias64, stride, act) for i in x64])
    b.check(out, want)
    np.testing.assert_allclose(sums.get().sum(1), want.sum((1, 2)), rtol=1e-4, atol=1e-4)


def squeeze_excite(b, block=64, s=5, parts=3, pieces=1):
    c, pixels = 72, 12
    sums, sums64 = b.random(2, parts, c, dtype=F)
    rw, rw64 = b.random(s, c, dtype=F)
    rb, rb64 = b.random(s, dtype=F)
    ew, ew64 = b.random(s, c, dtype=F)
    eb, eb64 = b.random(c, dtype=F)
    runs = -(-c // 32)
    hidden, gate = b.empty(2, runs * pieces, s, dtype=F), b.empty(2, c, dtype=F)
    b.launch("squeeze", (runs, pieces, 2), (block,), sums, rw, hidden, I(parts), I(c), I(s), I(pixels))
    b.launch("excite", (runs, 1, 2), (block,), hidden, rb, ew, eb, gate, I(runs * pieces), I(c), I(s))
    ones = np.ones((1, 1, c))  # a map whose mean is what the sums say: scale it afterwards
    for i in range(2):
        mean = sums64[i].sum(0) / pixels
        want = fp.squeeze_excite(mean * ones, rw64.T, rb64, ew64, eb64)[0, 0] / mean
        np.testing.assert_allclose(gate.get()[i], want, rtol=1e-5)


def pool(b, block=32):
    cell, (down, across), c, ldx, first, columns, fill = 3, (4, 5), 18, 24, 3, 29, 5
    x, x64 = b.random(2, down * cell, across * cell, ldx)
    out = b.empty(2, down * across, columns, dtype=F)
    out.fill(3)
    vector = 16 // np.dtype(b.dtype).itemsize
    b.launch("pool", (-(-down * across * -(-(c + fill) // vector) // block), 1, 2), (block,), x, out, I(cell),
             I(ldx), I(c), I(fill), I(down), I(across), I(first), I(columns), F(0))
    want = np.full((2, down * across, columns), 3.0)
    want[..., first + c:first + c + fill] = 0
    want[..., first:first + c] = np.stack([fp.pool(i[..., :c], (down, across)).reshape(-1, c) for i in x64])
    b.check(out, want)


def integers(b, *shape, most, extreme=.1):
    """Float32 integers up to `most` in magnitude, a share of them at the ends or zero."""
    a = b.rng.integers(-most, most + 1, shape)
    ends = b.rng.random(shape)
    return np.where(ends < extreme, np.sign(a) * most, np.where(ends < 1.5 * extreme, 0, a)).astype(F)


def fitting(b, w, most, out):
    """Bias and multipliers of integer weights (..., C): sums below 2^24 for inputs up to `most`.

    Results are clipped at `out` on both sides; column 0 has ties, the last is padding.
    """
    w[..., -1] = 0
    of_column = np.abs(w).reshape(-1, w.shape[-1])
    bias, largest = integers(b, w.shape[-1], most=4000), of_column.sum(0) * most
    m = out / np.maximum(largest, most) * b.rng.uniform(.5, 8, w.shape[-1]) * len(of_column) ** .5
    bias[-1] = m[-1] = 0
    m[0] = 2 ** np.floor(np.log2(m[0]))
    assert (largest + np.abs(bias)).max() < 1 << 24
    return bias, m.astype(F)


def as_type(b, dtype, *arrays):
    return [b.cuda.asarray(a.astype(dtype)) for a in arrays]


def check_equal(got, want, *limits):
    """Bit for bit; many values are there, and the limits, or nothing is shown."""
    assert want.size < 1000 or len(np.unique(want)) > 20 and set(limits) <= set(want.ravel())
    assert got.shape == want.shape
    np.testing.assert_array_equal(got.get(), want)


def resize_integers(b, block=64):
    size, rows, want = (20, 28), [], []
    for h, w, shift in ((37, 61, (0, 0)), (20, 20, (0.03, -.2)), (9, 111, (0, .01)), (80, 56, (0, 0))):
        image = b.rng.integers(0, 256, (h, w, 3), np.uint8)  # by four down: every second sum is a tie
        image[:h // 4, :w // 2], image[h // 2:, w // 2:] = 255, 0
        row = {"pixels": b.cuda.asarray(image), "height": h, "width": w}
        for side, n, out, s in zip(("row", "col"), (h, w), size, shift):
            start, weight = fp.fixed_point_taps(n, out, s)
            row |= {f"{side}_start": b.cuda.asarray(start.astype(I)), f"{side}_taps": weight.shape[1],
                    f"{side}_weight": b.cuda.asarray(weight.astype(F))}
        rows.append(row)
        want.append(fp.resize_integers(image, size, shift))
    out = b.empty(4, *size, 4, dtype=np.int16)
    b.launch("resize_integers", (-(-size[0] * size[1] // block), 1, 4), (block,), image_table(b, rows), out,
             *map(I, size))
    check_equal(out, np.concatenate([want, np.zeros((4, *size, 1))], -1), -510, 510)


def stem_integers(b, block=96):
    (height, width), c = (18, 26), 24
    x, w = integers(b, 2, height, width, 4, most=510), integers(b, 3, 3, 3, c, most=1200)
    w[..., 1] = 0
    w[1, 1, 1, 1] = 32767
    bias, m = fitting(b, w, 510, 2047)
    out = b.empty(2, height // 2, width // 2, c, dtype=np.int16)
    strips = height // 2 * -(-width // 8) * c // 8
    b.launch("stem", (-(-strips // block), 1, 2), (block,), *as_type(b, np.int16, x, w),
             *as_type(b, F, bias), out, I(height), I(width), I(c), *as_type(b, F, m))
    want = [fp.requantize(fp.stem(i[..., :3], w, bias, fp.NONE), m, 0, 2047) for i in x]
    check_equal(out, np.stack(want), 0, 2047)


def expand(b, tile=32, m=70, n=72, k=80, split=2, warps=4, most=127, input_m=1 / 32, limit=1023):
    a, w = integers(b, m, k, most=32767), integers(b, k, n, most=most)
    bias, multiplier = fitting(b, w, limit, 2047)
    out = b.empty(m, n, dtype=np.int16)
    input_m = np.array([input_m, limit], F)
    b.launch("product", (-(-(-(-m // tile) * -(-n // 32)) * split // warps),), (32 * warps,),
             *as_type(b, np.int16, a), L(0), I(k), packed(b, w), *as_type(b, F, bias), I(0),
             *as_type(b, F, input_m), NULL, out, I(m), I(n), I(k), I(m), *as_type(b, F, multiplier), I(split))
    small = fp.requantize(a.copy(), input_m[0], -limit, limit)
    assert (np.abs(small) == limit).any() and (np.abs(a * input_m[0]) > limit + .5).any()
    check_equal(out, fp.requantize(fp.linear(small, w, bias), multiplier, 0, 2047), 0, 2047)


def project(b, tile=32, m=70, n=72, k=80, split=2, warps=4, most=127, with_residual=True):
    a, w = np.abs(integers(b, m, k, most=255)), integers(b, k, n, most=most)
    bias, multiplier = fitting(b, w, 255, 32767)
    residual = integers(b, m, n, most=32767)
    out = b.empty(m, n, dtype=np.int16)
    b.launch("product", (-(-(-(-m // tile) * -(-n // 32)) * split // warps),), (32 * warps,),
             *as_type(b, np.uint8, a), L(0), I(k), packed(b, w), *as_type(b, F, bias), I(0), NULL,
             *(as_type(b, np.int16, residual) if with_residual else [NULL]), out, I(m), I(n), I(k), I(m),
             *as_type(b, F, multiplier), I(split))
    want = fp.requantize(fp.linear(a, w, bias), multiplier, -32767, 32767)
    check_equal(out, (want + residual).clip(-32767, 32767) if with_residual else want, -32767, 32767)


def depthwise_integers(b, block=(3, 8), h=12, w=9, c=40, kernel=5, stride=2, small=0):
    x, taps = np.abs(integers(b, 2, h, w, c, most=2047)), integers(b, kernel, kernel, c, most=300)
    taps[..., 1] = 0
    taps[0, -1, 1], taps[-1, 0, 1] = 4000, -4000
    bias, m = fitting(b, taps, 2047, 255)
    ho, wo = -(-h // stride), -(-w // stride)
    grid = (-(-c // 8 // block[0]), -(-ho * -(-wo // (2 if small else 4)) // block[1]), 2)
    out = b.empty(2, ho, wo, c, dtype=np.uint8)
    top, left = (fp._same_padding(n, kernel, stride)[0] for n in (h, w))
    b.launch(f"depthwise_{kernel}{stride}", grid, (*block, kernel if small else 1), *as_type(b, np.int16, x),
             *as_type(b, np.int16, taps), *as_type(b, F, bias), out, NULL, I(h), I(w), I(c), I(top), I(left),
             *as_type(b, F, m))
    want = np.stack([fp.requantize(fp.depthwise(i, taps, bias, stride, fp.NONE), m) for i in x])
    check_equal(out, want, 0, 255)


def pool_integers(b, block=32, cell=3, down=4, across=5, sign=0):
    c, ldx, first, columns, fill, scale = 18, 24, 3, 29, 5, F(.0123)
    x = integers(b, 2, down * cell, across * cell, ldx, most=32767)
    x[1] = x[1] if sign == 0 else sign * 32767
    out = b.empty(2, down * across, columns, dtype=F)
    out.fill(3)
    b.launch("pool", (-(-down * across * -(-(c + fill) // 8) // block), 1, 2), (block,),
             *as_type(b, np.int16, x), out, I(cell), I(ldx), I(c), I(fill), I(down), I(across), I(first),
             I(columns), scale / F(cell * cell))
    want = np.full((2, down * across, columns), F(3))
    want[..., first + c:first + c + fill] = 0
    want[..., first:first + c] = [fp.pool(i[..., :c], (down, across), scale).reshape(-1, c) for i in x]
    check_equal(out, want)


def whiten(b, block=64, batch=19, c=96, scale=1.0):
    n = 3
    f, f64 = b.random(batch, n, c, dtype=F, scale=scale)
    mean, mean64 = b.random(n, c, dtype=F, scale=scale)
    lower = np.tril(b.rng.standard_normal((n, c, c)) / np.sqrt(c) / scale)
    packed = fp.pack_lower(lower)
    x, w = b.empty(batch, n, c), b.cuda.asarray(fp._engines("cuda").byte_fragments(packed).view(np.uint8))
    b.launch("whiten", (n * c // 32, 1, -(-batch // 16)), (block,), f, mean, w, x, I(n), I(c), I(batch))
    w64 = fp.unpack_lower(packed, c).astype(np.float64)
    b.check(x, np.stack([fp.whiten(i, mean64, w64) for i in f64]))


def whiten_diagonal(b, block=64):
    n, c = 5, 32
    (f, f64), (mean, mean64) = b.random(3, n, c, dtype=F), b.random(n, c, dtype=F)
    w, w64 = b.random(n, c, dtype=F)
    x = b.empty(3, n, c)
    b.launch("whiten_diagonal", (-(-n * c // block), 1, 3), (block,), f, mean, w, x, I(n), I(c))
    b.check(x, np.stack([fp.whiten(i, mean64, w64) for i in f64]))


def remove_factors(b, block=64, second=64, n=45, c=32, k=24):
    size, batch = n * c, 2
    x, x64 = b.random(batch, n, c)
    packed = fp.pack_factors(b.rng.standard_normal((k, n, c)) / np.sqrt(size))
    v, v64 = b.cuda.asarray(packed.view(np.int8)), fp.unpack_factors(packed, k, n, c).astype(np.float64)
    parts, groups = -(-size // 512), packed.shape[1]
    sums = b.empty(batch, parts, groups * 32, dtype=F)
    b.launch("project_factors", (parts, 1, batch), (block,), x, v, sums, I(size), I(groups))
    b.check(b.cuda.asarray(sums.get().sum(1)[:, :k]), np.einsum("bnc,knc->bk", x64, v64))
    along = b.empty(batch, groups * 32, dtype=F)
    b.launch("sum_factors", (1, 1, batch), (block // 32 * 64,), sums, along, I(groups), I(parts))
    b.launch("remove_factors", (-(-size // second), 1, batch), (second,), x, v, along, I(size), I(groups))
    b.check(x, np.stack([fp.remove_factors(i, v64) for i in x64]))


def layer_norm(b, block=64, rows=7, d=272):
    x, x64 = b.random(rows, d)
    (gain, gain64), (bias, bias64) = b.random(d, dtype=F), b.random(d, dtype=F)
    out = b.empty(rows, d)
    b.launch("layer_norm", (-(-rows // (block // 32)),), (block,), x, gain, bias, out, I(rows), I(d))
    b.check(out, fp.layer_norm(x64, gain64, bias64))


def coarsen(b, block=64, n=6, m=3, c=32):
    x, x64 = b.random(3, n, c, dtype=F)
    cells = np.random.default_rng(0).integers(0, n, (m, 4))
    out = b.empty(3, m, c, dtype=F)
    b.launch("coarsen", (-(-m * c // block), 1, 3), (block,), x, b.cuda.asarray(cells.astype(I)), out,
             *map(I, (n, m, c)))
    b.check(out, np.stack([fp.coarsen(i, cells) for i in x64]))
    np.testing.assert_array_equal(out.get(), np.stack([fp.coarsen(i, cells) for i in x.get()]))


def rotate_density(b, block=64, c=288):
    n, batch, coef = 3, 3, (.8, .6)
    (x, x64), (f, f64) = b.random(batch * n, c), b.random(batch * n, c)
    gain, gain64 = b.random(n, dtype=F)
    offset, offset64 = b.random(n, dtype=F)
    grid = (-(-batch * n // (block // 32)),)
    y, nll = fp.rotate_density(f64, np.eye(c), 0.0, x64, coef)
    first, ldz = 2, 7
    rest, counts = (gain, offset), (I(first), I(ldz), I(batch * n), I(n), I(c))
    z = b.empty(batch, ldz, dtype=F)
    z.fill(3)

    def check(want):
        whole = np.full((batch, ldz), 3.)
        whole[:, first:first + n] = want.reshape(batch, n)
        b.check(z, whole)
    b.launch("rotate_density", grid, (block,), x, f, F(.8), F(.6), NULL, *rest, z, *counts)
    check(nll * np.tile(gain64, batch) + np.tile(offset64, batch))
    b.launch("rotate_density", grid, (block,), x, NULL, F(.8), F(.6), NULL, *rest, z, *counts)
    check(.32 * (x64 ** 2).sum(-1) * np.tile(gain64, batch) + np.tile(offset64, batch))
    b.launch("rotate_density", grid, (block,), x, f, F(.8), F(.6), x, *rest, NULL, *counts)
    b.check(x, y)


def worst_mean(b, block=64, n=100, count=7):
    z, z64 = b.random(3, n, dtype=F)
    z64[1, :9] = 4.0  # ties
    z = b.cuda.asarray(z64.astype(F))
    scores = b.empty(3, dtype=F)
    table = image_table(b, [{"score": scores.data.ptr + 4 * i} for i in range(3)])
    b.launch("worst_mean", (1, 1, 3), (block,), z, table, I(n), I(count), F(.5), F(2))
    b.check(scores, (fp.worst_mean(z64, count / n) - .5) * 2)
    z64[2, n // 2] = np.nan
    z = b.cuda.asarray(z64.astype(F))
    b.launch("worst_mean", (1, 1, 3), (block,), z, table, I(n), I(count), F(.5), F(2))
    assert np.isnan(scores.get()).tolist() == [False, False, True]


def maps_wanted(b, *wanted):
    """An image table of which only the column `map` is read."""
    return image_table(b, [{"map": 1} if yes else {} for yes in wanted])


def fine_density(b, block=64, n=19, c=64):
    (x, x64), (mean, mean64), (w, w64) = (b.random(*shape, dtype=F) for shape in ((3, n, c), (n, c), (c, c)))
    f = b.empty(3, n, dtype=F)
    f.fill(3)
    table = maps_wanted(b, True, False, True)
    b.launch("fine_density", (-(-n // 8), 1, 3), (block,), x, mean, w, f, table, I(n), I(c))
    want = np.stack([fp.fine_density(i, mean64, w64.T) for i in x64])
    want[1] = 3
    b.check(f, want)


def sharpen(b, block=32, grid=(3, 2), fine=(12, 20)):
    z, z64 = b.random(3, math.prod(grid) + 2, dtype=F)  # two more than are looked at
    (weight, weight64), (offset, offset64) = b.random(*grid, dtype=F), b.random(*grid, dtype=F)
    f64 = b.random(3, *fine, dtype=F)[1] ** 2
    f64[0, :3] = 0  # beside its own maximum, and far from any
    f64 = f64.astype(F).astype(np.float64)
    f64[2, 4, 5] = np.nan
    down, across = (fp.map_operator(*sides, .4) for sides in zip(grid, fine))
    out = b.empty(3, *fine, dtype=F)
    out.fill(3)
    f, *enlargers = (b.cuda.asarray(a.astype(F)) for a in (f64, down, across))
    b.launch("sharpen", (fine[0], 1, 3), (block,), z, weight, offset, f, *enlargers, out,
             maps_wanted(b, True, False, True), *map(I, (*down.shape, *across.shape, z.shape[1])))
    want = np.stack([fp.sharpen(weight64 * i[:-2].reshape(grid) + offset64, own, down, across)
                     for i, own in zip(z64, f64)])
    want[1] = 3
    got = out.get()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    b.check(b.cuda.asarray(np.nan_to_num(got)), np.nan_to_num(want))


def anomaly_map(b, block=32, blocks=5):
    fine, sizes = (8, 12), ((13, 37), (20, 9), None, (5, 6))
    m, m64 = b.random(4, *fine, dtype=F)
    rows, want = [], []
    for i, size in enumerate(sizes):
        if size is None:
            rows.append({"height": 8, "width": 8})
            continue
        rows.append({"height": size[0], "width": size[1], "map": b.empty(*size, dtype=F)})
        for side, *sides in zip(("map_row", "map_col"), fine, size):
            start, share = fp.linear_taps(*sides)
            rows[-1] |= {side: b.cuda.asarray(start.astype(I)),
                         f"{side}_share": b.cuda.asarray(share.astype(F))}
        want.append(fp.anomaly_map(m64[i], *size))
    b.launch("anomaly_map", (blocks, 1, 4), (block,), m, image_table(b, rows), *map(I, fine))
    for row, w in zip([row for row in rows if "map" in row], want):
        b.check(row["map"], w)


OPERATIONS = {
    "resize_normalize": (resize, [{}, {"block": 256}, {"block": 33}]),
    "stem": (stem, [{}, {"block": 32}]),
    "product": (product, [
        {}, {"tile": 16, "wide": True}, {"by_row": True, "gated": False, "split": 8, "warps": 8},
        {"m": 1, "n": 8, "k": 8, "period": 1, "with_residual": False, "split": 1},
        {"m": 140, "n": 136, "k": 32, "period": 70, "act": fp.RELU6, "split": 4},
        {"tile": 16, "k": 200, "act": fp.NONE, "gated": False, "wide": True, "split": 4, "warps": 8}]),
    "mix": (mix, [{}, {"tile": 32, "wide": False}, {"n_out": 8, "n": 9, "split": 1}]),
    "depthwise": (depthwise, [{"kernel": k, "stride": s, "act": a} for k, s, a in
                              ((3, 1, fp.RELU6), (3, 2, fp.NONE), (5, 1, fp.RELU6), (5, 2, fp.SILU))]
                  + [{"block": (32, 4)}, {"block": (1, 32), "h": 1, "w": 1, "c": 8},
                     {"h": 16, "w": 16, "stride": 1}]
                  + [{"small": 1}, {"small": 1, "kernel": 3, "stride": 1, "h": 5, "block": (32, 4)},
                     {"small": 1, "h": 16, "w": 16, "stride": 1, "act": fp.RELU6}]),
    "squeeze_excite": (squeeze_excite, [{}, {"block": 32, "parts": 70, "pieces": 4},
                                        {"block": 512, "s": 256}]),
    "pool": (pool, [{}, {"block": 256}]),
    "whiten": (whiten, [{}, {"block": 128}, {"block": 32, "batch": 1}, {"batch": 3, "scale": 1e-4},
                        {"batch": 8, "c": 32, "block": 96}]),
    "whiten_diagonal": (whiten_diagonal, [{}, {"block": 1000}]),
    "remove_factors": (remove_factors, [{}, {"block": 256, "k": 64, "second": 192}, {"n": 1, "k": 8},
                                        {"block": 32, "second": 512}]),
    "layer_norm": (layer_norm, [{}, {"block": 32, "d": 16}, {"block": 128, "rows": 1}]),
    "coarsen": (coarsen, [{}, {"block": 128, "m": 1, "n": 1}]),
    "rotate_density": (rotate_density, [{}, {"block": 128}, {"c": 32, "block": 32}]),
    "worst_mean": (worst_mean, [{}, {"block": 256}, {"n": 1, "count": 1}, {"count": 100}]),
    "fine_density": (fine_density, [{}, {"block": 32}, {"n": 3, "c": 96, "block": 96},
                                    {"c": 160, "block": 64}]),
    "sharpen": (sharpen, [{}, {"block": 128, "fine": (24, 8)}, {"grid": (1, 1), "block": 1, "fine": (8, 8)}]),
    "anomaly_map": (anomaly_map, [{}, {"blocks": 64, "block": 64}, {"blocks": 1, "block": 1}]),
}
IN_INTEGERS = {  # equal, not close, to their references
    "resize_integers": (resize_integers, [{}, {"block": 256}]),
    "stem_integers": (stem_integers, [{}, {"block": 32}]),
    "expand": (expand, [{}, {"tile": 16, "m": 5, "n": 40, "k": 1032, "split": 8, "warps": 8, "most": 15},
                        {"m": 1, "n": 8, "k": 8, "split": 1, "input_m": .033}, {"limit": 127}]),
    "project": (project, [{}, {"tile": 16, "m": 5, "n": 40, "k": 512, "split": 8, "warps": 8},
                          {"m": 40, "k": 24, "split": 1, "with_residual": False}]),
    "depthwise_integers": (depthwise_integers, [
        {}, {"kernel": 3, "stride": 1, "h": 1, "w": 6, "block": (1, 32)}, {"kernel": 3, "block": (32, 4)},
        {"h": 16, "w": 16, "stride": 1}, {"small": 1}, {"small": 1, "kernel": 3, "stride": 1, "h": 5}]),
    "pool_integers": (pool_integers, [{}, {"block": 256, "cell": 257, "down": 1, "across": 1, "sign": 1},
                                      {"cell": 257, "down": 1, "across": 1, "sign": -1}]),
}
OPERATIONS |= IN_INTEGERS
CASES = [(name, dtype) for name in OPERATIONS for dtype in (np.float32, np.float16)
         if dtype == np.float16 or name not in IN_INTEGERS]  # which the engine compiles with HALF=1
FILES = {"mix": "product", "whiten_diagonal": "whiten", "resize_integers": "resize_normalize",
         "stem_integers": "stem", "expand": "product", "project": "product",
         "depthwise_integers": "depthwise", "pool_integers": "pool"}

INTEGER_FILES = "product", "stem", "depthwise", "pool"  # which the engine compiles with INTEGER


def macros(name, dtype, tile=None, small=None, wide=None, warps=4, **_):
    """The macros with which the engine would compile what these options launch."""
    tile, wide = tile or (16 if name == "mix" else 32), (name == "mix") if wide is None else wide
    integer = 2 if name == "project" else int(name in IN_INTEGERS)
    chosen = {"HALF": int(dtype == np.float16)}
    if FILES.get(name, name) == "product":
        chosen |= {"TILE": tile, "WARPS": warps, "WIDE": int(wide and dtype == np.float32),
                   "TRANSPOSED": int(name == "mix")}
    chosen |= {"SMALL": small} if small else {}
    chosen |= {"INTEGER": integer} if FILES.get(name, name) in INTEGER_FILES else {}
    return tuple(f"-D{macro}={value}" for macro, value in chosen.items())


def bench(name, dtype, schedule=0, edit=None, **options):
    return Bench(FILES.get(name, name), dtype, schedule, edit, macros(name, dtype, **options))


def test_every_operation_of_the_table_is_here():
    assert {name for name, op in OPS.items() if op.cuda} - set(OPERATIONS) == {"linear"}  # as product
    assert {FILES.get(name, name) for name in OPERATIONS} == {op.cuda for op in OPS.values()} - {None}


@pytest.mark.parametrize("name, dtype", CASES)
def test_kernel_agrees_with_its_reference(name, dtype):
    run, variants = OPERATIONS[name]
    for i, options in enumerate(variants):
        for schedule in SCHEDULES if i == 0 else SCHEDULES[:1]:
            run(bench(name, dtype, schedule, **options), **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_product_has_the_same_bits_whatever_the_tile_and_the_batch(dtype):
    first, *others = (product(bench("product", dtype, **kind), gated=False, **kind) for kind in (
        {"tile": 32, "warps": 4}, {"tile": 16, "warps": 4}, {"tile": 16, "warps": 8}))
    for other in others:
        np.testing.assert_array_equal(other, first)
    options = {"gated": False, "with_residual": False}
    alone = product(bench("product", dtype), m=35, **options)
    b = bench("product", dtype)  # the generator starts anew: the same first rows of a, w and bias
    a, _ = b.random(35, 80)
    w64 = (b.rng.standard_normal((80, 72)) * 80 ** -.5).astype(np.float16)
    bias, _ = b.random(72, dtype=F)
    out = b.empty(70, 72)
    b.launch("product", (5,), (128,), b.cuda.asarray(np.concatenate([a.get()] * 2)), L(0), I(80),
             packed(b, w64), bias, I(0), NULL, NULL, out, I(70), I(72), I(80), I(35), I(fp.SILU), I(2))
    np.testing.assert_array_equal(out.get()[:35], alone)
    np.testing.assert_array_equal(out.get()[35:], alone)


def test_whitening_has_the_same_bits_whatever_the_batch():
    b = bench("whiten", np.float32)
    n, c = 2, 64
    (f, _), (mean, _) = b.random(19, n, c, dtype=F), b.random(n, c, dtype=F)
    packed = fp.pack_lower(np.tril(b.rng.standard_normal((n, c, c))))
    packed = b.cuda.asarray(fp._engines("cuda").byte_fragments(packed).view(np.uint8))

    def whitened(features):
        batch, f = len(features), b.cuda.asarray(features)
        x = b.empty(batch, n, c)
        b.launch("whiten", (n * c // 32, 1, -(-batch // 16)), (128,), f, mean, packed, x, I(n), I(c),
                 I(batch))
        return x.get()
    together = whitened(f.get())
    for i in (0, 7, 8, 18):
        np.testing.assert_array_equal(whitened(f.get()[i:i + 1])[0], together[i])


# A break of every kind in the very text that ships: (operation, text, broken text).
MUTANTS = [
    ("resize_normalize", "if (i >= height * width) return;", "if (i > height * width) return;"),
    ("resize_normalize", "y = i / width, x = i % width;", "y = i / height, x = i % height;"),
    ("resize_normalize", "(long long)r * image.width * 3", "(long long)r * image.height * 3"),
    ("stem", "line[2 * o + kx]", "line[2 * o + 2 - kx]"),
    ("stem", "if (y_in >= height) continue;", "if (y_in > height) continue;"),
    ("stem", "pixels[y_in * width +", "pixels[y_in * height +"),
    ("stem", "2 * column + j < width ?", "2 * column + j <= width ?"),
    ("stem", "if (column + o >= wide) continue;", ""),
    ("product", "    __syncthreads();\n    if (first_row >= m) return;", "    if (first_row >= m) return;"),
    ("product", "if (first_row + row >= m ||", "if (first_row + row > m ||"),
    ("product", "first_col + col >= n) continue", "first_col + col > n) continue"),
    ("product", "rows[i][h] && inner < k", "inner < k"),
    ("product", "rows[i][h] && inner < k", "rows[i][h] && inner <= k"),
    ("product", "(first_row + row) % period", "(first_row + row) / period"),
    ("product", "(long long)(row / period) * k", "(long long)(row % period) * k"),
    ("product", "part[first + s]", "part[s]"),
    ("product", "if (sixteen + p * split < sixteens) multiply", "multiply"),
    ("product", "add(TERMS - 1, 0);", "add(0, 0);"),
    ("product", "add(0, WIDE);", "add(0, 0);"),
    ("mix", "if (inner + e < k) quad", "quad"),
    ("mix", "a += blockIdx.z * a_step;", ""),
    ("mix", "+ first_col + col) * m + first_row + row", "+ first_col + col) * m + first_row"),
    ("depthwise", "= total[v];\n    __syncthreads();", "= total[v];"),
    ("depthwise", "= sum[o][v];\n    __syncthreads();", "= sum[o][v];"),
    ("depthwise", "if (SMALL) __syncthreads();", ""),
    ("depthwise", "(SMALL && i != threadIdx.z)", "false"),
    ("depthwise", "x_in >= width ?", "x_in > width ?"),
    ("depthwise", "row * STRIDE - top + i", "row * STRIDE - left + i"),
    ("depthwise", "if (column + o >= width_out) continue;", ""),
    ("squeeze_excite", "= total;\n    __syncthreads();", "= total;"),
    ("squeeze_excite", "32 + lane < c ? mean", "32 + lane < 96 ? mean"),
    ("squeeze_excite", "p < last; p += warps", "p < parts; p += warps"),
    ("squeeze_excite", "t % squeezed] = y;\n    }\n    __syncthreads();", "t % squeezed] = y;\n    }"),
    ("squeeze_excite", "activate(y, SILU);\n    }\n    __syncthreads();", "activate(y, SILU);\n    }"),
    ("squeeze_excite", "part[warp][lane] = y;\n    __syncthreads();", "part[warp][lane] = y;"),
    ("squeeze_excite", "row < rows; row += QUARTERS", "row < rows; row += 5"),
    ("squeeze_excite", "channel < c && s < squeezed", "channel < c && s < squeezed - 1"),
    ("pool", "if (channel + v < channels + fill)", ""),
    ("pool", "+ column) * ldx", "+ column) * channels"),
    ("whiten", "__syncthreads();", ""),
    ("whiten", "+ panel * (panel + 1) / 2;", "+ panel * (panel - 1) / 2;"),
    ("whiten", "step <= panel", "step < panel"),
    ("whiten", "multiply_add(low[j], left[1], right)", "multiply_add(low[j], left[0], right)"),
    ("whiten", "(long long)(h * 8 + lane / 4) * n * c", "(long long)(h * 4 + lane / 4) * n * c"),
    ("whiten", "min(IMAGES, batch - first)", "IMAGES"),
    ("whiten_diagonal", "if (i < n * c) put", "if (i <= n * c) put"),
    ("whiten", "tile.scale[j * 8 + lane % 4 * 2 + i % 2]", "tile.scale[j * 8 + lane % 4 * 2 + i / 2]"),
    ("remove_factors", "= y;\n    }\n    __syncthreads();\n    for", "= y;\n    }\n    for"),
    ("remove_factors", "* get(x[panel * PANEL + lane]);\n            __syncwarp();",
     "* get(x[panel * PANEL + lane]);"),
    ("remove_factors", "(block.weight[lane] + h * 16);\n            __syncwarp();",
     "(block.weight[lane] + h * 16);"),
    ("remove_factors", "block.scale[lane]", "block.scale[0]"),
    ("remove_factors", "v[panel * groups + g];\n        float of", "v[panel + g];\n        float of"),
    ("remove_factors", "part[threadIdx.x] = own;\n    __syncthreads();", "part[threadIdx.x] = own;"),
    ("remove_factors", "other < blockDim.x; other += k", "other < k; other += k"),
    ("remove_factors", "along += (long long)blockIdx.z * groups * PANEL;", ""),
    ("remove_factors", "min(size / PANEL, first + ROWS / PANEL)", "first + ROWS / PANEL"),
    ("remove_factors", "if (panel >= size / PANEL) return;", "if (panel > size / PANEL) return;"),
    ("remove_factors", "(long long)blockIdx.z * parts * k + threadIdx.x % k", "threadIdx.x % k"),
    ("remove_factors", "other = 8; other < 32", "other = 8; other < 16"),
    ("layer_norm", "if (row >= rows) return;", "if (row > rows) return;"),
    ("layer_norm", "lane > 0; lane /= 2", "lane > 1; lane /= 2"),
    ("coarsen", "x += (long long)blockIdx.z * n * c + i % c;", "x += i % c;"),
    ("coarsen", "cells + i / c * 4", "cells + i / c"), ("coarsen", "x[cell[3] * c]", "x[cell[1] * c]"),
    ("rotate_density", "* ldz + first", "* n + first"), ("rotate_density", "ldz + first +", "ldz +"),
    ("rotate_density", ".5f * square * gain[row % n]", ".5f * square * gain[row / n]"),
    ("rotate_density", "a * get(value.at[v]) + b", "b * get(value.at[v]) + a"),
    ("worst_mean", "        __syncthreads();\n        if (threadIdx.x < half)",
     "        if (threadIdx.x < half)"),
    ("worst_mean", "(value[j] == own && j < i)", "value[j] == own"),
    ("worst_mean", "+= blockDim.x) value[i] = z[(long long)blockIdx.z * n + i];\n    __syncthreads();",
     "+= blockDim.x) value[i] = z[(long long)blockIdx.z * n + i];"),
    ("fine_density", "            __syncthreads();\n            for (int t", "            for (int t"),
    ("fine_density", "= x[at] - mean[at];\n            }\n            __syncthreads();",
     "= x[at] - mean[at];\n            }"),
    ("fine_density", "= y;\n    }\n    __syncthreads();", "= y;\n    }"),
    ("fine_density", "min(PLACES, n - first)", "PLACES"),
    ("fine_density", "output < c && i < depth", "i < depth"),
    ("fine_density", "start < c; start += blockDim.x", "start < c; start += c"),
    ("fine_density", "mean += (long long)first * c;", ""),
    ("fine_density", "if (!images[blockIdx.z].map) return;", ""),
    ("sharpen", "mixed[j] = sum;\n    }\n    __syncthreads();", "mixed[j] = sum;\n    }"),
    ("sharpen", "min(max(x + j, 0), width - 1)", "max(x + j, 0)"),
    ("sharpen", "min(max(y + i, 0), height - 1) * width", "min(max(y + i, 0), width - 1) * width"),
    ("sharpen", "int i = -REACH", "int i = 0"),
    ("sharpen", "f += (long long)blockIdx.z * height * width;", ""),
    ("sharpen", "a > b || a != a ? a : b", "a > b ? a : b"),
    ("sharpen", "most = 1.17549435e-38f", "most = 0.f"),
    ("sharpen", "if (!images[blockIdx.z].map) return;", ""),
    ("anomaly_map", "if (!image.map) return;", ""),
    ("anomaly_map", "down * ((1.f - right) * at[width]", "down * ((1.f - right) * at[1]"),
    ("anomaly_map", "image.map_row[y] * width", "image.map_row[y] * image.width"),
    ("anomaly_map", "y * image.width + x", "y * image.height + x"),
    ("resize_integers", "floorf(down[c] / 256.f + .5f)", "rintf(down[c] / 256.f)"),
    ("stem_integers", "ending, first + v, 2047.f)", "ending, v, 2047.f)"),
    ("expand", "rintf(__fmul_rn(total, m))", "floorf(__fmul_rn(total, m) + .5f)"),
    ("project", "requantize(total, ending[first_col + col + e], -32767.f, 32767.f)",
     "rintf(total * ending[first_col + col + e])"),
    ("project", "clip(own + get(rest.at[e]), -32767.f, 32767.f)", "own + get(rest.at[e])"),
    ("depthwise_integers", "ending, first + v, 255.f);", "ending, v, 255.f);"),
    ("pool_integers", "typedef long long Total;", "typedef int Total;"),
]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name, text, broken", MUTANTS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTANTS)])
def test_a_planted_error_is_caught(name, text, broken):
    run, variants = OPERATIONS[name]
    dtype = np.float16 if name in IN_INTEGERS else np.float32
    child = os.fork()  # a wild write may take the process with it: that counts as caught
    if child == 0:
        faulthandler.disable()
        try:
            for options, schedule in itertools.product(variants, SCHEDULES):
                # it must compile, or nothing is shown
                broken_bench = bench(name, dtype, schedule, edit=(text, broken), **options)
                try:
                    run(broken_bench, **options)
                except AssertionError:
                    os._exit(3)
            os._exit(0)
        finally:
            os._exit(4)  # any other exception: the check itself is broken
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 3 or code < 0, f"not caught (exit code {code})"


def test_a_barrier_that_some_threads_skip_is_an_error():
    cuda = FakeCupy()
    text = ('extern "C" __global__ void half_way(float* x) '
            '{ if (threadIdx.x < 16) return; __syncthreads(); x[threadIdx.x] = 1.f; }')
    with pytest.raises(LaunchError, match="not reached by all threads"):
        cuda.RawModule(code=text).get_function("half_way")((1,), (32,), (cuda.empty(32),))


def test_a_write_beside_an_array_is_an_error():
    cuda = FakeCupy()
    text = 'extern "C" __global__ void beside(float* x) { x[threadIdx.x] = 1.f; }'
    kernel = cuda.RawModule(code=text).get_function("beside")
    kernel((1,), (32,), (cuda.empty(32),))
    with pytest.raises(LaunchError, match="wrote beside"):
        kernel((1,), (33,), (cuda.empty(32),))
