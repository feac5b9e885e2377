"""A place's side apart from the input's: grid, engine against reference, tiers, files."""
import numpy as np
import pytest

import fastprior as fp
from test_cli import refused, run


def test_grid_follows_size_and_cell():
    sizes = {(256, 0): 16, (352, 0): 22, (384, 0): 12, (448, 0): 14, (448, 16): 28, (96, 48): 2}
    assert {k: fp.Settings(size=k[0], cell=k[1]).grid for k in sizes} == {k: (n, n) for k, n in sizes.items()}
    for size, cell in ((448, 24), (448, 96), (448, -32), (256, 48)):
        with pytest.raises(fp.ShapeError, match="cell: expected a multiple of 16"):
            fp.Settings(size=size, cell=cell).check()
    for tier in fp.TIERS.values():
        fp.Settings(**tier).check()


def test_coarse_cells_are_scored_as_the_reference_does(washers, pictures, tmp_path, monkeypatch):
    prior = fp.fit(washers, size=96, cell=32, copies=1, iterations=5)
    assert prior.grid == (3, 3) and prior.mean.shape[0] == 9
    prior.save(tmp_path / "m.npz")
    again = fp.Prior.load(tmp_path / "m.npz")
    fast = again.score_batch(pictures)
    monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    slow = fp.Prior.load(tmp_path / "m.npz").score_batch(pictures)
    np.testing.assert_allclose([r.score for r in fast], [r.score for r in slow], rtol=1e-3, atol=1e-3)
    for a, b in zip(fast, slow):
        np.testing.assert_allclose(a.anomaly_map, b.anomaly_map, rtol=1e-3, atol=1e-3)


def test_products_of_one_model_share_the_grid(washers):
    fine, coarse = (fp.fit(washers, size=64, cell=c, copies=0, iterations=0) for c in (16, 32))
    with pytest.raises(fp.ModelError, match="cell"):
        fp.MultiPrior({"fine": fine, "coarse": coarse})
    without = fp.fit(washers, size=64, cell=32, copies=0, iterations=0, coarse=False,
                     backbone=coarse.backbone)
    with pytest.raises(fp.ModelError, match="coarse places or none"):
        fp.MultiPrior({"with": coarse, "without": without})


def test_tier_and_cell_on_the_command_line(washers, tmp_path):
    model = tmp_path / "m.npz"
    options = "--tier", "accurate", "--size", 64, "--cell", 32, "--iterations", 0
    done = run("train", washers, "-o", model, *options)
    assert done.returncode == 0, done.stderr
    prior = fp.Prior.load(model)
    assert (prior.backbone.name, prior.settings.size, prior.grid) == ("lite2", 64, (2, 2))
    refused(run("train", washers, "-o", model, "--tier", "best"), "--tier", "fast, default, accurate", "best")
    refused(run("train", washers, "-o", model, "--cell", 24), "cell", "multiple of 16")
