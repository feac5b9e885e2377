"""Every operation of the table in twins.py: the CPU twin against its float64 reference; NaN, threads."""
import dataclasses
import math

import numpy as np
import pytest

import fastprior as fp
from emulated_cuda import KERNELS
from twins import OPS, cpu

# Relative to the largest value of the reference: float32 sums of some hundred products. Whitening and factors
# are stored in 8 bits: the reference is given the rounded ones.
TOLERANCE = 2e-6


def block(rng, c_in, mid, c_out, kernel, stride, act, squeeze=0, expand=True, skip=False):
    w = lambda *shape: rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[0])  # noqa: E731
    p = {"dw_w": w(kernel, kernel, mid), "dw_b": w(mid), "project_w": w(mid, c_out), "project_b": w(c_out)}
    if expand:
        p |= {"expand_w": w(c_in, mid), "expand_b": w(mid)}
    if squeeze:
        p |= {"se_reduce_w": w(mid, squeeze), "se_reduce_b": w(squeeze), "se_expand_w": w(squeeze, mid),
              "se_expand_b": w(mid)}
    return fp.InvertedResidual(p, stride, act, skip)


def blocks():
    """Every kind of inverted residual; hidden channels that do and do not fill whole vectors."""
    for kernel in (3, 5):
        for stride in (1, 2):
            for act in (fp.RELU6, fp.SILU):
                for squeeze in (0, 3):
                    yield 10, 28, 21, kernel, stride, act, squeeze, True, False
    yield 16, 96, 24, 3, 2, fp.RELU6, 0, True, False
    yield 24, 144, 24, 5, 1, fp.SILU, 6, True, True
    yield 14, 28, 14, 3, 1, fp.RELU6, 0, True, True
    yield 20, 20, 13, 3, 1, fp.SILU, 4, False, False
    yield 17, 17, 17, 5, 1, fp.RELU6, 0, False, True
    yield 7, 50, 70, 3, 1, fp.RELU6, 0, True, False  # five vectors of output: panels of three and two


def lower(rng, n, c):
    w = np.tril(rng.standard_normal((n, c, c)) / np.sqrt(c))
    return fp.unpack_lower(fp.pack_lower(w), c).astype(np.float64)


def cases(name, rng):
    """Argument tuples; floats come first where there is a choice: NaN can be planted in argument 0."""
    a = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    if name == "resize_normalize":
        for h, w, size, shift in ((37, 51, 64, (0., 0.)), (237, 151, (64, 96), (.02, -.03)),
                                  (64, 64, 64, (0., 0.)), (99, 99, (32, 160), (0., 0.)),
                                  (8, 300, 96, (0., 0.)), (513, 9, 32, (-.01, .01))):
            image = rng.integers(0, 256, (h, w, 3), np.uint8)
            yield image, size, (.485, .456, .406), (.229, .224, .225), shift
    elif name == "stem_mbconv":
        for side, act in ((32, fp.RELU6), (50, fp.SILU)):
            first = block(rng, 12, 12, 10, 3, 1, act, 3 * (act == fp.SILU), False)
            yield a(side, side, 3), first, a(3, 3, 3, 12), a(12)
    elif name == "mbconv":
        for spec in blocks():
            for h, w in ((17, 13), (1, 1), (6, 64), (70, 3)):
                yield a(h, w, spec[0]), block(rng, *spec)
    elif name == "pool":
        yield from ((a(12, 12, 5), 4), (a(9, 9, 33), 9), (a(32, 32, 17), 2),
                    (a(6, 10, 3), (3, 5)))
    elif name == "whiten":
        for n, c in ((3, 1), (6, 45), (5, 32), (9, 100)):
            yield a(n, c), a(n, c), lower(rng, n, c)
            yield a(n, c), a(n, c), a(n, c)
    elif name == "coarsen":
        for grid, c in (((1, 1), 1), ((2, 2), 5), ((3, 4), 45), ((1, 5), 32), ((14, 14), 100)):
            yield a(math.prod(grid), c), fp.coarse_cells(np.ones(math.prod(grid), bool), grid)
    elif name == "remove_factors":
        for n, c, k in ((3, 5, 2), (1, 32, 1), (9, 45, 33), (36, 100, 64)):
            v = fp.pack_factors(a(k, n, c) / np.sqrt(n * c))
            yield a(n, c), fp.unpack_factors(v, k, n, c).astype(np.float64)
    elif name == "linear":
        for n, k, m in ((1, 1, 1), (3, 5, 7), (8, 16, 48), (13, 33, 65), (9, 0, 20), (40, 7, 112)):
            for act in (fp.NONE, fp.RELU6, fp.SILU):
                yield a(n, k), a(k, m), a(m), act, a(n, m)
            yield a(n, k), a(k, m), a(n, m), fp.NONE  # a bias a row
    elif name == "mix":
        for n, d, m in ((9, 24, 5), (1, 16, 3), (36, 48, 64)):
            yield a(n, d), a(m, n), fp.SILU, a(m, d)
            yield a(n, d), a(m, n)
    elif name == "layer_norm":
        for n, d in ((9, 24), (1, 16), (33, 96)):
            yield a(n, d), a(d), a(d)
    elif name == "rotate_density":
        for n, d, c in ((9, 16, 40), (1, 48, 32), (37, 96, 272), (5, 0, 33)):
            yield a(n, d), a(d, c), a(c), a(n, c), (.8, .6)
    elif name == "fine_density":
        for n, c in ((1, 1), (9, 5), (36, 64), (17, 72), (100, 33)):
            yield a(n, c), a(n, c), a(c, c) / np.sqrt(c)
    elif name == "sharpen":
        for grid, fine, sigma in (((1, 1), (8, 8), 0), ((3, 3), (12, 12), .7), ((7, 2), (56, 16), 0),
                                  ((4, 9), (32, 72), 2), ((2, 1), (10, 8), 0)):
            f = a(*fine) ** 2
            f[:3] = 0  # beside its own maximum, and far from any
            yield a(*grid), f, *(fp.map_operator(*sides, sigma) for sides in zip(grid, fine))
    elif name == "anomaly_map":
        for fine, h, w in (((8, 8), 33, 21), ((56, 12), 256, 250), ((16, 80), 9, 1000), ((8, 8), 8, 8),
                           ((12, 12), 5, 9), ((9, 20), 301, 1)):
            yield a(*fine), h, w
    else:
        raise AssertionError(f"no test case for {name}")


TWINS = [name for name, op in OPS.items() if op.cpu]


def both(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """NaN around all memory of an engine: a read past an array shows in the result, a write here."""
    made, guard = [], 4096

    def aligned(shape, dtype=np.float32):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.full(size + 2 * guard + 64, 255, np.uint8)
        start = guard + -(raw.ctypes.data + guard) % 64
        made.append((raw, start, start + size))
        inside = raw[start:start + size]
        inside[:] = 0
        return inside.view(dtype).reshape(shape)
    monkeypatch.setattr(cpu, "_aligned", aligned)
    yield
    assert all((raw[:start] == 255).all() and (raw[stop:] == 255).all() for raw, start, stop in made)


@pytest.mark.parametrize("name", TWINS)
def test_twin_equals_the_reference(name):
    for i, args in enumerate(cases(name, np.random.default_rng(0))):
        want, got = both(OPS[name].reference(*args)), both(OPS[name].cpu(*args))
        for w, g in zip(want, got, strict=True):
            assert g.shape == w.shape and g.dtype == np.float32, (name, i)
            assert np.abs(g - w).max() <= TOLERANCE * max(np.abs(w).max(), 1), (name, i)


@pytest.mark.parametrize("name", TWINS)
def test_result_does_not_depend_on_threads(name, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    for args in cases(name, np.random.default_rng(1)):
        one, *others = (both(OPS[name].cpu(*args, threads=t)) for t in (1, 2, 3))
        for other in others:
            for a, b in zip(one, other):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [n for n in TWINS if n != "resize_normalize"])
def test_nan_comes_out_where_the_reference_has_it(name):
    for i, args in enumerate(cases(name, np.random.default_rng(2))):
        x = np.array(args[0], copy=True)
        if x.size == 0:
            continue
        x.flat[x.size // 2] = np.nan
        want, got = (both(f(x, *args[1:])) for f in (OPS[name].reference, OPS[name].cpu))
        for w, g in zip(want, got):
            assert np.isnan(w).any()
            # by rows: the dense reference of whitening multiplies a NaN by the zeros above the diagonal too
            np.testing.assert_array_equal(np.isnan(g).any(-1), np.isnan(w).any(-1), err_msg=f"{name} {i}")


def resized(a: np.ndarray):
    """The array with one element more and one less along each axis, an axis more, and as integers."""
    for axis in range(a.ndim):
        yield np.repeat(a, [2] + [1] * (a.shape[axis] - 1), axis) if a.shape[axis] else a.reshape(-1)
        yield np.delete(a, 0, axis) if a.shape[axis] else a.reshape(-1)
    yield a[None]
    yield a.astype(np.int16)


def misfits(args):
    """Argument tuples in which one array, also one of a block, has another shape or dtype."""
    for i, arg in enumerate(args):
        if isinstance(arg, fp.InvertedResidual):
            changed = [dataclasses.replace(arg, arrays=arg.arrays | {name: other})
                       for name, a in arg.arrays.items() for other in resized(a)]
        else:
            changed = resized(arg) if isinstance(arg, np.ndarray) else ()
        for other in changed:
            yield args[:i] + (other,) + args[i + 1:]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_refuses_what_does_not_fit(name):
    args, refused = next(cases(name, np.random.default_rng(3))), 0
    for bad in misfits(args):
        try:
            got = both(OPS[name].cpu(*bad))
        except fp.ShapeError:
            refused += 1
            continue
        # what it takes must mean something: pixels more, rows less
        for w, g in zip(both(OPS[name].reference(*bad)), got, strict=True):
            assert g.shape == w.shape and np.abs(g - w).max() <= TOLERANCE * max(np.abs(w).max(), 1)
    assert refused >= 2


def test_the_table_is_whole():
    for name, op in OPS.items():
        assert op.cpu or op.cuda, name
        assert op.cuda is None or (KERNELS / f"{op.cuda}.cu").is_file(), name
    assert {p.stem for p in KERNELS.glob("*.cu")} == {op.cuda for op in OPS.values()} - {None}


def test_the_far_tail_of_silu_and_sigmoid_is_zero_without_a_warning():
    far = np.array([[[-1e4, 1e4]]])
    np.testing.assert_array_equal(fp.activate(far, fp.SILU), [[[0, 1e4]]])
    expand = np.array([[-1e4, 1e4]])
    gated = fp.squeeze_excite(np.ones((1, 1, 2)), np.ones((2, 1)), np.ones(1), expand, np.zeros(2))
    np.testing.assert_array_equal(gated, [[[0, 1]]])
