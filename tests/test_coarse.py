"""Coarse places, the means of 2 x 2: which they are, and that they are scored."""
import numpy as np
import pytest

import fastprior as fp
from damaged_models import tiny_prior


def everywhere(*grid):
    return fp.coarse_cells(np.ones(grid[0] * grid[1], bool), grid)


def test_a_coarse_place_is_two_by_two():
    assert everywhere(2, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert everywhere(14, 14).shape == (49, 4) and sorted(everywhere(14, 14).ravel()) == list(range(196))


def test_they_are_where_places_are_large():
    """And in no model of the paper's variant, whose numbers are to be the paper's."""
    for size, cell, coarse in ((448, 0, True), (256, 0, False), (256, 32, True), (448, 16, False)):
        assert fp.Settings(size=size, cell=cell).coarse is coarse
        assert fp.Settings(size=size, cell=cell, variant="plain", coarse=True).coarse is False
    assert fp.Settings(size=256, coarse=True).coarse
    with pytest.raises(fp.ShapeError, match="coarse: expected False or True, got 'yes'"):
        fp.Settings(coarse="yes").check()


def test_of_an_odd_side_the_last_two_overlap():
    cells = everywhere(2, 5)
    assert cells.tolist() == [[0, 1, 5, 6], [2, 3, 7, 8], [3, 4, 8, 9]]
    assert everywhere(3, 3).shape == (4, 4) and set(everywhere(3, 3).ravel()) == set(range(9))


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (5, 1)])
def test_a_single_row_is_counted_twice(grid):
    cells, x = everywhere(*grid), np.random.default_rng(0).standard_normal((grid[0] * grid[1], 3))
    assert cells.min() == 0 and cells.max() == len(x) - 1 and len(cells) == (max(grid) + 1) // 2
    for own, y in zip(cells, fp.coarsen(x, cells)):
        np.testing.assert_allclose(y, x[np.unique(own)].mean(0))


def test_what_is_outside_gives_way_to_what_is_inside():
    inside = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    cells = fp.coarse_cells(inside.ravel(), inside.shape)  # counted among the four inside
    assert cells.tolist() == [[0, 0, 0, 2], [1, 1, 1, 1], [3, 3, 3, 3]]
    for seed in range(20):
        grid = np.random.default_rng(seed).integers(1, 8, 2)
        inside = np.random.default_rng(seed).random(grid) < .4
        cells = fp.coarse_cells(inside.ravel(), tuple(grid))
        assert set(cells.ravel()) == set(range(inside.sum()))  # each place inside is in one


def test_they_count_among_the_worst_and_not_in_the_map():
    prior = tiny_prior()
    n, m = len(prior.mean), len(prior.cells)
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    z, want = prior.z([image])[0], prior.score(image)
    assert z.shape == (n + m,) and m == n // 4
    for calibration in prior.calibrations.values():
        calibration["offset"] = np.where(np.arange(n + m) < n, calibration["offset"], 1e4).astype("f4")
    prior._built.clear()
    got = prior.score(image)
    assert got.score > 1e3 > want.score
    np.testing.assert_array_equal(got.anomaly_map, want.anomaly_map)
