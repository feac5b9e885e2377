"""Every CUDA kernel, run on the CPU behind cuda_emulator.h, against the float64 NumPy references.

Odd shapes, several blocks, several block sizes, both storage types, three schedules of the threads; and
planted errors (wrong index, wrong stride, missing barrier) that the very same checks must catch.
"""
import faulthandler
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
        return x.data.ptr if isinstance(x, DeviceArray) else int(x)
    return b.cuda.asarray(np.array([[value(row.get(n, 0)) for n in names] for row in rows], np.int64))


def resize(b, block=64):
    size, mean, std = 20, np.array([.5, .4, .3]), np.array([.2, .3, .4])
    rows, images = [], []
    for h, w in ((37, 61), (20, 20), (9, 11)):
        image = b.rng.integers(0, 256, (h, w, 3), np.uint8)
        images.append(image)
        row = {"pixels": b.cuda.asarray(image), "height": h, "width": w}
        for side, n in (("row", h), ("col", w)):
            start, weight = fp.resize_taps(n, size)
            row |= {f"{side}_start": b.cuda.asarray(start.astype(I)), f"{side}_taps": weight.shape[1],
                    f"{side}_weight": b.cuda.asarray(weight.astype(F))}
        rows.append(row)
    out = b.empty(3, size, size, 4)
    affine = b.cuda.asarray(np.concatenate([1 / (255 * std), -mean / std]).astype(F))
    b.launch("resize_normalize", (-(-size * size // block), 1, 3), (block,), image_table(b, rows), affine,
             out, I(size))
    want = np.stack([fp.resize_normalize(image, size, mean, std) for image in images])
    b.check(out, np.concatenate([want, np.zeros((3, size, size, 1))], -1))


def stem(b, block=96):
    size, c = 18, 24
    x, x64 = b.random(2, size, size, 4)
    w, w64 = b.random(3, 3, 3, c)
    bias, bias64 = b.random(c, dtype=F)
    for act in (fp.NONE, fp.RELU6, fp.SILU):
        out = b.empty(2, size // 2, size // 2, c)
        b.launch("stem", (-(-(size // 2) ** 2 * (c // 4) // block), 1, 2), (block,), x, w, bias, out, I(size),
                 I(c), I(act))
        b.check(out, np.stack([fp.stem(i[..., :3], w64, bias64, act) for i in x64]))


def product(b, tile=64, m=70, n=72, k=80, period=35, act=fp.SILU, gated=True, by_row=False,
            with_residual=True):
    a, a64 = b.random(m, k)
    w, w64 = b.random(k, n, scale=k ** -.5)
    bias, bias64 = b.random(*((period, n) if by_row else (n,)), dtype=F)
    gate, gate64 = b.random(m // period, k, dtype=F)
    residual, residual64 = b.random(m, n)
    out = b.empty(m, n)
    b.launch("product", (-(-m // tile) * -(-n // tile),), (128,), a, L(0), I(k), w, L(0), I(n), bias,
             I(n if by_row else 0), gate if gated else NULL, residual if with_residual else NULL, out, I(m),
             I(n), I(k), I(period), I(act))
    if gated:
        a64 = (a64 * np.repeat(gate64, period, 0)).astype(b.dtype).astype(np.float64)
    b.check(out, fp.linear(a64, w64, np.tile(bias64, (m // period, 1)) if by_row else bias64, act,
                           residual64 if with_residual else None))
    return out.get()


def mix(b, tile=32, n_out=40, n=36, d=40, batch=3):
    """The same product with a shared left matrix, padded to a multiple of 8, and no bias."""
    w, w64 = b.random(n_out, n, scale=n ** -.5)
    padded = b.cuda.zeros((n_out, 40), b.dtype)
    padded.host[:, :n] = w.get()
    x, x64 = b.random(batch, n, d)
    residual, residual64 = b.random(batch, n_out, d)
    out = b.empty(batch, n_out, d)
    b.launch("product", (-(-n_out // tile) * -(-d // tile), 1, batch), (128,), padded, L(0), I(40), x,
             L(n * d), I(d), NULL, I(0), NULL, residual, out, I(n_out), I(d), I(n), I(1), I(fp.SILU))
    b.check(out, np.stack([fp.mix(i, w64, fp.SILU, r) for i, r in zip(x64, residual64)]))


def depthwise(b, block=(3, 8), h=12, w=9, c=40, kernel=5, stride=2, act=fp.SILU):
    x, x64 = b.random(2, h, w, c)
    taps, taps64 = b.random(kernel, kernel, c, scale=1 / kernel)
    bias, bias64 = b.random(c, dtype=F)
    ho, wo = -(-h // stride), -(-w // stride)
    vector = 16 // np.dtype(b.dtype).itemsize
    grid = (-(-c // vector // block[0]), -(-ho * -(-wo // 2) // block[1]), 2)
    out, sums = b.empty(2, ho, wo, c), b.empty(2, grid[1], c, dtype=F)
    top, left = (fp._same_padding(n, kernel, stride)[0] for n in (h, w))
    b.launch(f"depthwise_{kernel}{stride}", grid, block, x, taps, bias, out, sums, I(h), I(w), I(c), I(top),
             I(left), I(act))
    want = np.stack([fp.depthwise(i, taps64, bias64, stride, act) for i in x64])
    b.check(out, want)
    np.testing.assert_allclose(sums.get().sum(1), want.sum((1, 2)), rtol=1e-4, atol=1e-4)


def squeeze_excite(b, block=64):
    c, s, parts, pixels = 72, 5, 3, 12
    sums, sums64 = b.random(2, parts, c, dtype=F)
    rw, rw64 = b.random(s, c, dtype=F)
    rb, rb64 = b.random(s, dtype=F)
    ew, ew64 = b.random(s, c, dtype=F)
    eb, eb64 = b.random(c, dtype=F)
    gate = b.empty(2, c, dtype=F)
    b.launch("squeeze_excite", (1, 1, 2), (block,), sums, rw, rb, ew, eb, gate, I(parts), I(c), I(s),
             I(pixels))
    ones = np.ones((1, 1, c))  # a map whose mean is what the sums say: scale it afterwards
    for i in range(2):
        mean = sums64[i].sum(0) / pixels
        want = fp.squeeze_excite(mean * ones, rw64.T, rb64, ew64, eb64)[0, 0] / mean
        np.testing.assert_allclose(gate.get()[i], want, rtol=1e-5)


def pool(b, block=32):
    side, grid, c, ldx, first, columns, fill = 12, 4, 18, 24, 3, 29, 5
    x, x64 = b.random(2, side, side, ldx)
    out = b.empty(2, grid * grid, columns, dtype=F)
    out.fill(3)
    vector = 16 // np.dtype(b.dtype).itemsize
    b.launch("pool", (-(-grid * grid * -(-(c + fill) // vector) // block), 1, 2), (block,), x, out, I(side),
             I(ldx), I(c), I(fill), I(grid), I(first), I(columns))
    want = np.full((2, grid * grid, columns), 3.0)
    want[..., first + c:first + c + fill] = 0
    want[..., first:first + c] = np.stack([fp.pool(i[..., :c], grid).reshape(-1, c) for i in x64])
    b.check(out, want)


def whiten(b, block=64, batch=11, c=96):
    n = 3
    f, f64 = b.random(batch, n, c, dtype=F)
    mean, mean64 = b.random(n, c, dtype=F)
    lower = np.tril(b.rng.standard_normal((n, c, c)) / np.sqrt(c))
    packed = fp.pack_lower(lower)
    x, w = b.empty(batch, n, c), b.cuda.asarray(packed.view(np.int8))
    b.launch("whiten", (n * c // 32, 1, -(-batch // 8)), (block,), f, mean, w, x, I(n), I(c), I(batch))
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
    parts, groups = -(-size // 1024), packed.shape[1]
    sums = b.empty(batch, parts, groups * 32, dtype=F)
    b.launch("project_factors", (parts, 1, batch), (block,), x, v, sums, I(size), I(groups))
    b.check(b.cuda.asarray(sums.get().sum(1)[:, :k]), np.einsum("bnc,knc->bk", x64, v64))
    b.launch("remove_factors", (-(-size // second), 1, batch), (second,), x, v, sums, I(size), I(groups),
             I(parts))
    b.check(x, np.stack([fp.remove_factors(i, v64) for i in x64]))


def layer_norm(b, block=64, rows=7, d=272):
    x, x64 = b.random(rows, d)
    (gain, gain64), (bias, bias64) = b.random(d, dtype=F), b.random(d, dtype=F)
    out = b.empty(rows, d)
    b.launch("layer_norm", (-(-rows // (block // 32)),), (block,), x, gain, bias, out, I(rows), I(d))
    b.check(out, fp.layer_norm(x64, gain64, bias64))


def rotate_density(b, block=64, c=288):
    n, batch, coef = 3, 3, (.8, .6)
    (x, x64), (f, f64) = b.random(batch * n, c), b.random(batch * n, c)
    gain, gain64 = b.random(n, dtype=F)
    offset, offset64 = b.random(n, dtype=F)
    grid = (-(-batch * n // (block // 32)),)
    y, nll = fp.rotate_density(f64, np.eye(c), 0.0, x64, coef)
    rest, counts = (gain, offset), (I(batch * n), I(n), I(c))
    z = b.empty(batch * n, dtype=F)
    b.launch("rotate_density", grid, (block,), x, f, F(.8), F(.6), NULL, *rest, z, *counts)
    b.check(z, nll * np.tile(gain64, batch) + np.tile(offset64, batch))
    b.launch("rotate_density", grid, (block,), x, NULL, F(.8), F(.6), NULL, *rest, z, *counts)
    b.check(z, .32 * (x64 ** 2).sum(-1) * np.tile(gain64, batch) + np.tile(offset64, batch))
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
    z.host[2, n // 2] = np.nan
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


def sharpen(b, block=32, grid=3, fine=12):
    z, z64 = b.random(3, grid, grid, dtype=F)
    (weight, weight64), (offset, offset64) = b.random(grid, grid, dtype=F), b.random(grid, grid, dtype=F)
    f64 = b.random(3, fine, fine, dtype=F)[1] ** 2
    f64[0, :3] = 0  # beside its own maximum, and far from any
    f64 = f64.astype(F).astype(np.float64)
    f64[2, 4, 5] = np.nan
    operator = fp.map_operator(grid, fine, .4)
    out = b.empty(3, fine, fine, dtype=F)
    out.fill(3)
    f, enlarge = b.cuda.asarray(f64.astype(F)), b.cuda.asarray(operator.astype(F))
    b.launch("sharpen", (fine, 1, 3), (block,), z, weight, offset, f, enlarge, out,
             maps_wanted(b, True, False, True), I(grid), I(fine))
    want = np.stack([fp.sharpen(weight64 * i + offset64, own, operator) for i, own in zip(z64, f64)])
    want[1] = 3
    got = out.get()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    b.check(b.cuda.asarray(np.nan_to_num(got)), np.nan_to_num(want))


def anomaly_map(b, block=32, blocks=5):
    fine, sizes = 8, ((13, 37), (20, 9), None, (5, 6))
    m, m64 = b.random(4, fine, fine, dtype=F)
    rows, want = [], []
    for i, size in enumerate(sizes):
        if size is None:
            rows.append({"height": 8, "width": 8})
            continue
        rows.append({"height": size[0], "width": size[1], "map": b.empty(*size, dtype=F)})
        for side, n in zip(("map_row", "map_col"), size):
            start, share = fp.linear_taps(fine, n)
            rows[-1] |= {side: b.cuda.asarray(start.astype(I)),
                         f"{side}_share": b.cuda.asarray(share.astype(F))}
        want.append(fp.anomaly_map(m64[i], *size))
    b.launch("anomaly_map", (blocks, 1, 4), (block,), m, image_table(b, rows), I(fine))
    for row, w in zip([row for row in rows if "map" in row], want):
        b.check(row["map"], w)


OPERATIONS = {
    "resize_normalize": (resize, [{}, {"block": 256}, {"block": 33}]),
    "stem": (stem, [{}, {"block": 32}]),
    "product": (product, [
        {}, {"tile": 32}, {"by_row": True, "gated": False},
        {"m": 1, "n": 8, "k": 8, "period": 1, "with_residual": False},
        {"m": 140, "n": 136, "k": 32, "period": 70, "act": fp.RELU6},
        {"tile": 32, "k": 40, "act": fp.NONE, "gated": False}]),
    "mix": (mix, [{}, {"tile": 64}]),
    "depthwise": (depthwise, [{"kernel": k, "stride": s, "act": a} for k, s, a in
                              ((3, 1, fp.RELU6), (3, 2, fp.NONE), (5, 1, fp.RELU6), (5, 2, fp.SILU))]
                  + [{"block": (32, 4)}, {"block": (1, 32), "h": 1, "w": 1, "c": 8},
                     {"h": 16, "w": 16, "stride": 1}]),
    "squeeze_excite": (squeeze_excite, [{}, {"block": 32}, {"block": 512}]),
    "pool": (pool, [{}, {"block": 256}]),
    "whiten": (whiten, [{}, {"block": 128}, {"block": 32, "batch": 1}, {"batch": 8, "c": 32, "block": 256}]),
    "whiten_diagonal": (whiten_diagonal, [{}, {"block": 1000}]),
    "remove_factors": (remove_factors, [{}, {"block": 256, "k": 64, "second": 32}, {"n": 1, "k": 8},
                                        {"block": 32, "second": 1024}]),
    "layer_norm": (layer_norm, [{}, {"block": 32, "d": 16}, {"block": 128, "rows": 1}]),
    "rotate_density": (rotate_density, [{}, {"block": 128}, {"c": 32, "block": 32}]),
    "worst_mean": (worst_mean, [{}, {"block": 256}, {"n": 1, "count": 1}, {"count": 100}]),
    "fine_density": (fine_density, [{}, {"block": 32}, {"n": 3, "c": 96, "block": 96},
                                    {"c": 160, "block": 64}]),
    "sharpen": (sharpen, [{}, {"block": 128, "fine": 24}, {"grid": 1, "block": 1, "fine": 8}]),
    "anomaly_map": (anomaly_map, [{}, {"blocks": 64, "block": 64}, {"blocks": 1, "block": 1}]),
}
FILES = {"mix": "product", "whiten_diagonal": "whiten"}


def bench(name, dtype, schedule=0, edit=None, plain=False, **options):
    tile = options.get("tile", 32 if name == "mix" else 64)
    extra = (f"-DTILE={tile}",) if name in ("product", "mix") else ()
    return Bench(FILES.get(name, name), dtype, schedule, edit, extra + (("-DPLAIN",) if plain else ()))


def test_every_operation_of_the_table_is_here():
    assert {name for name, op in OPS.items() if op.cuda} - set(OPERATIONS) == {"linear"}  # as product
    assert {FILES.get(name, name) for name in OPERATIONS} == {op.cuda for op in OPS.values()} - {None}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernel_agrees_with_its_reference(name, dtype):
    run, variants = OPERATIONS[name]
    for i, options in enumerate(variants):
        for schedule in SCHEDULES if i == 0 else SCHEDULES[:1]:
            run(bench(name, dtype, schedule, **options), **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_product_agrees_with_its_reference(dtype):
    product(bench("product", dtype, plain=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_product_has_the_same_bits_whatever_the_tile_and_the_batch(dtype):
    both = [product(bench("product", dtype, tile=tile), tile=tile, gated=False) for tile in (32, 64)]
    np.testing.assert_array_equal(*both)
    b = bench("product", dtype)
    alone = product(b, m=35, gated=False, with_residual=False)
    # the generator starts anew: the same first rows of a
    b = bench("product", dtype)
    a, _ = b.random(35, 80)
    np.testing.assert_array_equal(alone.shape, (35, 72))
    twice = b.cuda.asarray(np.concatenate([a.get(), a.get()]))
    w, _ = b.random(80, 72, scale=80 ** -.5)
    bias, _ = b.random(72, dtype=F)
    out = b.empty(70, 72)
    b.launch("product", (4,), (128,), twice, L(0), I(80), w, L(0), I(72), bias, I(0), NULL, NULL, out, I(70),
             I(72), I(80), I(35), I(fp.SILU))
    np.testing.assert_array_equal(out.get()[:35], alone)
    np.testing.assert_array_equal(out.get()[35:], alone)


def test_whitening_has_the_same_bits_whatever_the_batch():
    b = Bench("whiten", np.float32)
    n, c = 2, 64
    (f, _), (mean, _) = b.random(9, n, c, dtype=F), b.random(n, c, dtype=F)
    packed = b.cuda.asarray(fp.pack_lower(np.tril(b.rng.standard_normal((n, c, c)))).view(np.int8))

    def whitened(features):
        batch, f = len(features), b.cuda.asarray(features)
        x = b.empty(batch, n, c)
        b.launch("whiten", (n * c // 32, 1, -(-batch // 8)), (128,), f, mean, packed, x, I(n), I(c), I(batch))
        return x.get()
    together = whitened(f.get())
    for i in (0, 7, 8):
        np.testing.assert_array_equal(whitened(f.get()[i:i + 1])[0], together[i])


# A break of every kind in the very text that ships: (operation, text, broken text).
MUTANTS = [
    ("resize_normalize", "if (i >= size * size) return;", "if (i > size * size) return;"),
    ("resize_normalize", "(long long)r * image.width * 3", "(long long)r * image.height * 3"),
    ("stem", "2 * column + kx", "2 * column + kx - 1"),
    ("stem", "if (y_in >= size || x_in >= size) continue;", "if (y_in > size || x_in >= size) continue;"),
    ("product", "        if (more) keep(buffer ^ 1);\n        __syncthreads();",
     "        if (more) keep(buffer ^ 1);"),
    ("product", "    keep(0);\n    __syncthreads();", "    keep(0);"),
    ("product", "if (more) keep(buffer ^ 1)", "if (more) keep(buffer)"),
    ("product", "if (col >= n) continue;", "if (col > n) continue;"),
    ("product", "down < k && col < n", "down <= k && col < n"),
    ("product", "row % period", "row / period"),
    ("product", "* A_ROW + inner + lane / 16 * 8", "* A_ROW + inner + lane / 8 * 8"),
    ("product", "multiply_add(sum[i][j], left[TERMS - 1][i], &right[0]",
     "multiply_add(sum[i][j], left[0][i], &right[0]"),
    ("mix", "down < k && col < n", "col < n"),
    ("mix", "w += blockIdx.z * w_step;", ""),
    ("depthwise", "__syncthreads();", ""),
    ("depthwise", "x_in >= width", "x_in > width"),
    ("depthwise", "row * STRIDE - top + i", "row * STRIDE - left + i"),
    ("depthwise", "if (column + o >= width_out) continue;", ""),
    ("squeeze_excite", "        mean[i] = total / (float)pixels;\n    }\n    __syncthreads();",
     "        mean[i] = total / (float)pixels;\n    }"),
    ("squeeze_excite", "hidden[s] = activate(total + reduce_b[s], SILU);\n    }\n    __syncthreads();",
     "hidden[s] = activate(total + reduce_b[s], SILU);\n    }"),
    ("pool", "if (channel + v < channels + fill)", ""),
    ("pool", "+ column) * ldx", "+ column) * channels"),
    ("whiten", "__syncthreads();", ""),
    ("whiten", "+ panel * (panel + 1) / 2;", "+ panel * (panel - 1) / 2;"),
    ("whiten", "column < (panel + 1) * PANEL", "column < panel * PANEL"),
    ("whiten_diagonal", "if (i < n * c) put", "if (i <= n * c) put"),
    ("whiten", "block.scale[lane % 4 * 8 + r]", "block.scale[lane % 4 + r]"),
    ("remove_factors", "= y;\n    }\n    __syncthreads();\n    for", "= y;\n    }\n    for"),
    ("remove_factors", "block.scale[j + e]", "block.scale[e]"),
    ("remove_factors", "v[i / PANEL * groups + g]", "v[i / PANEL + g]"),
    ("remove_factors", "        along[t] = y;\n    }\n    __syncthreads();", "        along[t] = y;\n    }"),
    ("remove_factors", "min(size / PANEL, first + ROWS / PANEL)", "first + ROWS / PANEL"),
    ("remove_factors", "if (i >= size) return;", "if (i > size) return;"),
    ("remove_factors", "sums += (long long)blockIdx.z * parts * k;", ""),
    ("layer_norm", "if (row >= rows) return;", "if (row > rows) return;"),
    ("layer_norm", "lane > 0; lane /= 2", "lane > 1; lane /= 2"),
    ("rotate_density", "gain[row % n]", "gain[row / n]"),
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
    ("sharpen", "column <= min(x + REACH, fine - 1)", "column <= x + REACH"),
    ("sharpen", "max(y - REACH, 0)", "y"),
    ("sharpen", "f += (long long)blockIdx.z * fine * fine;", ""),
    ("sharpen", "a > b || a != a ? a : b", "a > b ? a : b"),
    ("sharpen", "most = 1.17549435e-38f", "most = 0.f"),
    ("sharpen", "if (!images[blockIdx.z].map) return;", ""),
    ("anomaly_map", "if (!image.map) return;", ""),
    ("anomaly_map", "down * ((1.f - right) * at[fine]", "down * ((1.f - right) * at[1]"),
    ("anomaly_map", "image.map_row[y] * fine", "image.map_row[y] * image.width"),
    ("anomaly_map", "y * image.width + x", "y * image.height + x"),
]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name, text, broken", MUTANTS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTANTS)])
def test_a_planted_error_is_caught(name, text, broken):
    run, variants = OPERATIONS[name]
    dtype = np.float32
    cases = [(options, schedule) for options in variants for schedule in SCHEDULES]
    for options, schedule in cases:
        bench(name, dtype, schedule, edit=(text, broken), **options)  # it must compile, or nothing is shown

    child = os.fork()  # a wild write may take the process with it: that counts as caught
    if child == 0:
        faulthandler.disable()
        try:
            for options, schedule in cases:
                run(bench(name, dtype, schedule, edit=(text, broken), **options), **options)
            os._exit(0)
        except AssertionError:
            os._exit(3)
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
