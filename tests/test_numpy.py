"""The references as what scores without kernels: float32 throughout, arguments untouched, bands alike."""
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

import fastprior as fp
from test_ops import block, blocks, cases


def narrow(a):
    """float64 arrays, also those of a block, as float32."""
    if isinstance(a, fp.InvertedResidual):
        return fp.InvertedResidual({k: narrow(v) for k, v in a.arrays.items()}, a.stride, a.act, a.skip)
    return a.astype(np.float32) if isinstance(a, np.ndarray) and a.dtype == np.float64 else a


def calls():
    """(function, arguments) of every reference operation on floats."""
    rng = np.random.default_rng(0)
    a = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    for name in ("mbconv", "pool", "whiten", "coarsen", "remove_factors", "linear", "mix", "layer_norm",
                 "rotate_density", "anomaly_map"):
        for args in cases(name, rng):
            yield getattr(fp, name), args
    for h, w in ((1, 1), (7, 10), (33, 2)):
        for act in (fp.NONE, fp.RELU6, fp.SILU):
            yield fp.stem, (a(h, w, 3), a(3, 3, 3, 8), a(8), act)
            for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
                yield fp.depthwise, (a(h, w, 7), a(kernel, kernel, 7), a(7), stride, act)
                columns = a(w, h, 7).swapaxes(0, 1)
                yield fp.depthwise, (columns, a(kernel, kernel, 7), a(7), stride, act)
        yield fp.squeeze_excite, (a(h, w, 7), a(7, 3), a(3), a(3, 7), a(7))


def test_float32_stays_float32_and_near_float64():
    for function, args in calls():
        want, got = function(*args), function(*[narrow(a) for a in args])
        for w, g in zip(*(r if isinstance(r, tuple) else (r,) for r in (want, got)), strict=True):
            assert g.dtype == np.float32 and g.shape == w.shape, function.__name__
            assert np.abs(g - w).max() <= 2e-6 * max(np.abs(w).max(), 1), function.__name__


def test_no_operation_writes_into_its_arguments():
    for function, args in calls():
        parts = [arg.arrays.values() if isinstance(arg, fp.InvertedResidual) else [arg] for arg in args]
        arrays = [a for part in parts for a in part if isinstance(a, np.ndarray)]
        before = [a.copy() for a in arrays]
        function(*args)
        for a, b in zip(arrays, before):
            np.testing.assert_array_equal(a, b, err_msg=function.__name__)


def test_resize_in_float32():
    for args in cases("resize_normalize", np.random.default_rng(0)):
        want, got = fp.resize_normalize(*args), fp.resize_normalize(*args, dtype=np.float32)
        assert (want.dtype, got.dtype) == (np.float64, np.float32) and got.flags.c_contiguous
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("size", [1, 300, 4000])
def test_bands_change_nothing(monkeypatch, size):
    rng = np.random.default_rng(0)
    for spec in blocks():
        b = block(rng, *spec)
        for h, w in ((17, 13), (1, 1), (6, 64), (70, 3), (5, 4)):
            x = rng.standard_normal((h, w, spec[0]))
            want = fp.mbconv(x, b)
            monkeypatch.setattr(fp, "_BAND_BYTES", size * w)
            np.testing.assert_allclose(fp.mbconv(x, b), want, rtol=1e-10, atol=1e-12)
            monkeypatch.undo()


def test_a_score_in_float32_throughout(trained, pictures, monkeypatch):
    """Nothing of a frame is computed in float64, which would be right and slow."""
    seen = {}

    def watch(name, function):
        def watched(*args, **options):
            out = function(*args, **options)
            floats = [a for a in (*args, out) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
            seen.setdefault(name, set()).update(str(a.dtype) for a in floats)
            return out
        monkeypatch.setattr(fp, name, watched)
    for name in ("resize_integers", "stem", "linear", "depthwise", "pool", "whiten", "remove_factors",
                 "layer_norm", "mix", "fine_density", "anomaly_map"):
        watch(name, getattr(fp, name))
    trained._reference_frames([pictures[0]], True)
    assert len(seen) == 11 and all(kinds == {"float32"} for kinds in seen.values()), seen


def test_float32_scores_as_float64_does(trained, pictures):
    s, b = trained.settings, fp.load_backbone("lite0")
    for image in pictures:
        wide = fp.resize_normalize(image, s.shape, b.mean, b.std)
        view = trained.grid, b.stages
        want, got = (trained.latent(b.features(x, view)[0]) for x in (wide, wide.astype(np.float32)))
        assert (want.dtype, got.dtype) == (np.float64, np.float32)
        assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("grid, sigma", [(2, .5), (4, 0), (7, 1), (14, .3), (5, 4)])
def test_smoothing_is_scipys(grid, sigma):
    want = gaussian_filter1d(np.eye(grid), sigma, axis=0, mode="reflect") if sigma else np.eye(grid)
    got = fp.map_operator(grid, grid, sigma)
    np.testing.assert_allclose(got, want, atol=1e-14)
    np.testing.assert_allclose(fp.map_operator(grid, 33, sigma).sum(1), 1)
    with pytest.raises(ValueError):
        got[0] = 0  # it is kept for the next image
