"""The references against other people's implementations and closed forms: schedule, inversion, network."""
import numpy as np
import pytest
from PIL import Image
from scipy import linalg, stats

import fastprior as fp

fitting = fp._room("fitting")

torch = pytest.importorskip("torch", reason="torch is in the extras `train` and `test`")
functional = torch.nn.functional


def t(a):
    return torch.from_numpy(np.ascontiguousarray(a, np.float64))


def test_alpha_bar_is_the_product_of_one_minus_beta():
    beta = np.linspace(1e-4, .02, 1000)
    for step in (0, 1, 50, 500, 999):
        assert fp.alpha_bar(step) == pytest.approx(np.prod(1 - beta[:step + 1]), rel=1e-12)
    assert fp.alpha_bar(np.array([[3, 4]])).shape == (1, 2)
    for bad in (-1, 1000, 2.5):
        with pytest.raises(fp.ShapeError, match="timesteps"):
            fp.alpha_bar(bad)


def test_timesteps_are_even_in_angle():
    for n in (1, 2, 3, 5, 10, 50):
        grid = fp.select_timesteps(n, 50, 500)
        assert len(grid) == n + 1 and grid[0] == 50 and grid[-1] == 500 and (np.diff(grid) > 0).all()
        angle = np.diff(np.arccos(np.sqrt(fp.alpha_bar(grid))))
        assert angle.max() - angle.min() < 2 * .0027  # one timestep of angle at either end
    for bad in ((0, 50, 500), (201, 50, 500), (2, 500, 50), (2, 0, 1000), (100, 50, 60)):
        with pytest.raises(fp.ShapeError):
            fp.select_timesteps(*bad)


def textbook_ddim(x, eps, grid):
    """Song et al. 2021, equation 12 with sigma = 0, run from data to noise."""
    for now, then in zip(grid[:-1], grid[1:]):
        e, a, b = eps(x, now), fp.alpha_bar(now), fp.alpha_bar(then)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(1 - b) * e
    return x


def test_inversion_equals_the_textbook_in_eps_and_in_v():
    rng = np.random.default_rng(0)
    x0, w = rng.standard_normal((5, 7)), rng.standard_normal((7, 7)) / 5
    grid = fp.select_timesteps(4, 20, 800)

    def eps(x, step):
        return np.tanh(x @ w + step / 1000)

    def v(x, step):  # v = (eps - sin * x_t) / cos, from x_t = cos x0 + sin eps and v = cos eps - sin x0
        a = fp.alpha_bar(step)
        return (eps(x, step) - np.sqrt(1 - a) * x) / np.sqrt(a)
    want = textbook_ddim(x0, eps, grid)
    np.testing.assert_allclose(fp.ddim_invert(x0, eps, grid, "eps"), want, rtol=1e-10)
    np.testing.assert_allclose(fp.ddim_invert(x0, v, grid, "v"), want, rtol=1e-10)
    assert np.allclose((fp.rotation(grid) ** 2).sum(1), 1)
    with pytest.raises(fp.ShapeError):
        fp.rotation(grid, "x0")


def test_inversion_of_gaussian_data_converges_to_the_exact_map():
    # data N(0, s^2): the best v is linear, and the flow keeps quantiles: x_T = x_t * std_T / std_t
    s = 3.0

    def variance(step):
        return fp.alpha_bar(step) * s * s + 1 - fp.alpha_bar(step)

    def v(x, step):
        a = fp.alpha_bar(step)
        return np.sqrt(a * (1 - a)) * (1 - s * s) / variance(step) * x
    errors = []
    for n in (2, 10, 50, 150):
        got = fp.ddim_invert(np.ones(1), v, fp.select_timesteps(n, 50, 900))[0]
        errors.append(abs(got / np.sqrt(variance(900) / variance(50)) - 1))
    assert errors == sorted(errors, reverse=True) and errors[-1] < .02
    assert 2 < errors[-2] / errors[-1] < 4.5  # first order: three times the steps


def test_log_prob_is_that_of_the_standard_normal():
    x = np.random.default_rng(0).standard_normal((4, 6))
    want = stats.multivariate_normal(np.zeros(6)).logpdf(x)
    np.testing.assert_allclose(fp.gaussian_log_prob(x), want, rtol=1e-12)
    np.testing.assert_allclose(fp.gaussian_log_prob(x.T, axis=0), want, rtol=1e-12)


@pytest.mark.parametrize("h, w, size", [(300, 200, 64), (64, 64, 64), (20, 31, 96), (1024, 700, 256),
                                        (1, 40, 32)])
def test_resize_is_pillows_bilinear(h, w, size):
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    want = np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR), float)
    got = fp.resize_normalize(image, size, (0, 0, 0), (1, 1, 1)) * 255
    assert np.abs(got - want).max() <= 1.01  # Pillow rounds to bytes after each axis


@pytest.mark.parametrize("n_in, n_out, shift, taps", [
    (448, 448, 0, 1), (900, 448, 0, 5), (1024, 448, 0, 5), (200, 448, 0, 2), (1, 32, .3, 1),
    (448, 448, -2, 1)])
def test_no_more_taps_than_are_used(n_in, n_out, shift, taps):
    start, weight = fp.resize_taps(n_in, n_out, shift)
    assert weight.shape == (n_out, taps) and (weight > 0).all(1).any()
    assert (start >= 0).all() and (start + taps <= n_in).all() and np.allclose(weight.sum(1), 1)


@pytest.mark.parametrize("kernel, stride, squeeze, expand, act, size", [
    (3, 1, 0, True, fp.RELU6, (9, 12)), (5, 2, 4, True, fp.SILU, (13, 8)), (3, 2, 3, False, fp.SILU, (8, 8)),
    (5, 1, 0, False, fp.RELU6, (7, 7))])
def test_inverted_residual_is_torchs(kernel, stride, squeeze, expand, act, size):
    rng = np.random.default_rng(0)
    a = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    mid = 12 if expand else 6
    p = {"dw_w": a(kernel, kernel, mid), "dw_b": a(mid), "project_w": a(mid, 6), "project_b": a(6)}
    p |= {"expand_w": a(6, mid), "expand_b": a(mid)} if expand else {}
    if squeeze:
        p |= {"se_reduce_w": a(mid, squeeze), "se_reduce_b": a(squeeze), "se_expand_w": a(squeeze, mid),
              "se_expand_b": a(mid)}
    skip = stride == 1
    x = a(*size, 6)
    f = functional.silu if act == fp.SILU else functional.relu6

    def conv(y, w, b, groups=1, stride=1):
        pad = []
        for n in (y.shape[3], y.shape[2]):  # TensorFlow's SAME, by its definition
            total = max((int(np.ceil(n / stride)) - 1) * stride + w.shape[2] - n, 0)
            pad += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(y, pad), t(w), t(b), stride, groups=groups)
    y = image = t(x.transpose(2, 0, 1)[None])
    if expand:
        y = f(conv(y, p["expand_w"].T[:, :, None, None], p["expand_b"]))
    y = f(conv(y, p["dw_w"].transpose(2, 0, 1)[:, None], p["dw_b"], mid, stride))
    if squeeze:
        gate = functional.silu(y.mean((2, 3)) @ t(p["se_reduce_w"]) + t(p["se_reduce_b"]))
        y = y * torch.sigmoid(gate @ t(p["se_expand_w"]) + t(p["se_expand_b"]))[:, :, None, None]
    y = conv(y, p["project_w"].T[:, :, None, None], p["project_b"])
    y = y + image if skip else y
    got = fp.mbconv(x, fp.InvertedResidual(p, stride, act, skip))
    np.testing.assert_allclose(got, y[0].permute(1, 2, 0), rtol=1e-9, atol=1e-9)


def test_stem_pool_and_layer_norm_are_torchs():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((10, 14, 3)), rng.standard_normal((3, 3, 3, 5)), rng.standard_normal(5)
    image = functional.pad(t(x.transpose(2, 0, 1)[None]), (0, 1, 0, 1))
    want = functional.relu6(functional.conv2d(image, t(w.transpose(3, 2, 0, 1)), t(b), 2))[0].permute(1, 2, 0)
    np.testing.assert_allclose(fp.stem(x, w, b, fp.RELU6), want, rtol=1e-10, atol=1e-12)
    y = rng.standard_normal((12, 12, 4))
    want = functional.adaptive_avg_pool2d(t(y.transpose(2, 0, 1)[None]), 3)[0].permute(1, 2, 0)
    np.testing.assert_allclose(fp.pool(y, 3), want, rtol=1e-10)
    h, gain, bias = rng.standard_normal((6, 16)), rng.standard_normal(16), rng.standard_normal(16)
    want = functional.layer_norm(t(h), (16,), t(gain), t(bias))
    np.testing.assert_allclose(fp.layer_norm(h, gain, bias), want, rtol=1e-9)


def test_whitening_whitens():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 20, 20))
    cov = root @ root.transpose(0, 2, 1) + np.eye(20)
    w = fp.inverse_cholesky(cov)
    for c, inverse in zip(cov, w):
        exact = linalg.solve_triangular(np.linalg.cholesky(c), np.eye(20), lower=True)
        np.testing.assert_allclose(inverse, exact, atol=1e-5)
    f, mean = rng.standard_normal((3, 20)), rng.standard_normal((3, 20))
    want = [-2 * stats.multivariate_normal(m, c).logpdf(x) - 20 * np.log(2 * np.pi) - np.linalg.slogdet(c)[1]
            for x, m, c in zip(f, mean, cov)]
    # the Mahalanobis distance
    np.testing.assert_allclose((fp.whiten(f, mean, w) ** 2).sum(1), want, rtol=1e-4)
    with pytest.raises(fp.ShapeError, match="positive definite"):
        fp.inverse_cholesky(np.zeros((1, 4, 4)))


def test_blocks_hold_every_weight_to_half_a_step():
    rng = np.random.default_rng(0)
    w = np.tril(rng.standard_normal((2, 70, 70))) * rng.uniform(1e-3, 1e3, (2, 70, 1))
    v = rng.standard_normal((40, 3, 45))
    v[:, 1] = 0
    kept_w, kept_v = fp.unpack_lower(fp.pack_lower(w), 70), fp.unpack_factors(fp.pack_factors(v), 40, 3, 45)
    for kept, a, packed, shape, inputs in ((kept_w, w, fp.pack_lower(w), (2, 6), 2),
                                           (kept_v, v, fp.pack_factors(v), (6, 2), 0)):
        assert packed.dtype == fp.QTILE and packed.shape == shape
        largest = np.abs(a).max(inputs, keepdims=True)  # of what an output sums
        assert (np.abs(kept - a) <= 1.01 * largest / 254).all() and np.abs(kept - a).max() > 0
        np.testing.assert_array_equal(kept == 0, np.abs(kept) < 1e-30)
    np.testing.assert_array_equal(fp.unpack_lower(fp.pack_lower(kept_w), 70), kept_w)
    assert not kept_v[:, 1].any()


def test_shrinkage():
    rng = np.random.default_rng(0)
    cov = np.stack([np.cov(rng.standard_normal((4, 9))) for _ in range(3)])
    average = cov.mean(0)
    np.testing.assert_allclose(fp.shrink_covariance(cov, average, 0, 0), cov)
    np.testing.assert_allclose(fp.shrink_covariance(cov, average, 1, .5),
                               np.stack([average + .5 * np.trace(average) / 4 * np.eye(4)] * 3))


def test_factors_are_the_directions_in_which_places_vary_together():
    rng = np.random.default_rng(0)
    m, n, c = 600, 6, 5
    u = np.linalg.qr(rng.standard_normal((n * c, 2)))[0].T
    # covariance I + u^T diag(81, 25) u
    x = rng.standard_normal((m, n * c)) + (rng.standard_normal((m, 2)) * [9, 5]) @ u
    x = x.reshape(m, n, c).astype(np.float16)
    fold = np.arange(m) % 5
    left = x.copy()
    v = fp.fit_factors(left, fold, 2)
    assert v.dtype == np.float32 and v.shape == (2, n, c)
    flat = v.reshape(2, -1).astype(float)
    gain = np.linalg.norm(flat, axis=1) ** 2
    np.testing.assert_allclose(gain, 1 - np.array([82, 26]) ** -.5, atol=.02)
    np.testing.assert_allclose(np.abs(flat @ u.T) / np.sqrt(gain), np.eye(2), atol=.06)
    # the symmetric inverse root of the covariance whitens all places at once
    root = linalg.fractional_matrix_power(np.eye(n * c) + u.T @ np.diag([81, 25]) @ u, -.5)
    whole = np.stack([fp.remove_factors(i, v.astype(float)) for i in x.astype(float)]).reshape(m, -1)
    np.testing.assert_allclose(whole, x.reshape(m, -1).astype(float) @ root, atol=.8)
    np.testing.assert_allclose(np.cov(left.reshape(m, -1).astype(float).T), np.eye(n * c), atol=.35)


def test_denoiser_in_torch_numpy_and_numba_agree(trained):
    p = {k: v.astype(np.float64) for k, v in trained.denoiser.items()}
    n, c = trained.mean.shape
    x = np.random.default_rng(0).standard_normal((2, n, c))
    steps = trained.timesteps[:-1]
    tensors = {k: torch.from_numpy(v.copy()) for k, v in trained.denoiser.items()}
    for step in steps:
        want = fp._room("training").torch_denoise(torch, tensors, t(x).float(),
                                                  torch.full((2,), int(step))).numpy()
        assert np.abs(want).max() > .01  # trained: not zero
        for i in range(2):
            np.testing.assert_allclose(fp.denoise(p, x[i], int(step)), want[i], rtol=1e-4, atol=1e-5)
    reference = fp.ddim_invert(x[0], lambda y, s: fp.denoise(p, y, s), trained.timesteps)
    got = fp._nll_of(x[:1].astype(np.float32), trained.denoiser, trained.timesteps, "v")[0]
    np.testing.assert_allclose(got, .5 * (reference ** 2).sum(-1), rtol=1e-4)


def test_training_lowers_the_held_out_loss_and_is_repeatable(trained, washers):
    s = trained.summary
    assert s["loss"] < s["loss_start"] and 0 < s["iterations"] <= s["iterations_run"] <= 200
    again = fp.fit(washers, size=96, iterations=200, copies=2)
    for name, a in trained.denoiser.items():
        np.testing.assert_allclose(again.denoiser[name], a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left_out", [None, 3])
def test_a_gaussian_without_a_fold_is_that_of_the_other_rows(left_out):
    rng = np.random.default_rng(0)
    features, fold = rng.normal(5, 2, (60, 4, 3)).astype(np.float16), np.arange(60) % 10
    settings = fp.Settings(shrink=0.2, floor=0.05)
    mean, whitener = fitting.Gaussians(features, fold, False).without(left_out, settings)
    others = features[fold != left_out].astype(np.float64) if left_out is not None else features.astype(float)
    cov = np.stack([np.cov(others[:, i].T, bias=True) for i in range(4)])
    cov = np.stack([fp.shrink_covariance(own, cov.mean(0), .2, .05) for own in cov])
    np.testing.assert_allclose(mean, others.mean(0), rtol=1e-5)
    np.testing.assert_allclose(whitener, np.linalg.inv(np.linalg.cholesky(cov)), rtol=1e-3, atol=1e-5)
    mean, scale = fitting.Gaussians(features, fold, True).without(left_out, settings)
    np.testing.assert_allclose(mean, np.tile(others.mean((0, 1)), (4, 1)), rtol=1e-5)
    np.testing.assert_allclose(scale, np.tile(1 / others.std((0, 1)), (4, 1)), rtol=1e-4)
