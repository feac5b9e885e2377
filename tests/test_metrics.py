"""Metrics against pair counts, scikit-learn, and a slow AUPRO that follows the definition word by word."""
import doctest
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import fastprior as fp

benchmark = fp._room("benchmark")

TOLERANCE = 1e-12  # all sides sum in float64; they differ in the order of at most some thousand terms


def naive_aupro(masks, maps, max_fpr):
    """Every distinct threshold, every region, one at a time; the area segment by segment."""
    thresholds = np.unique(np.concatenate([np.ravel(m) for m in maps]))[::-1]
    normal = sum(np.sum(np.logical_not(mask)) for mask in masks)
    curve = [(0.0, 0.0)]
    for threshold in thresholds:
        false, overlaps = 0, []
        for mask, scores in zip(masks, maps):
            flagged = scores >= threshold
            false += np.sum(flagged & np.logical_not(mask))
            label, count = ndimage.label(mask, structure=[[1, 1, 1], [1, 1, 1], [1, 1, 1]])
            for region in range(1, count + 1):
                overlaps.append(np.sum(flagged & (label == region)) / np.sum(label == region))
        curve.append((false / normal, np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x1 > max_fpr:  # the last segment, cut at max_fpr
            if x0 < max_fpr:
                y_end = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
                area += (max_fpr - x0) * (y0 + y_end) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


def aupro(*arguments):
    return benchmark.pixel_metrics(*arguments)["aupro"]


def samples(seed, n=300, levels=None):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < .3
    scores = rng.standard_normal(n) + labels
    return labels, scores if levels is None else np.round(scores * levels) / levels


def images(seed, levels=None, dtype=np.float32):
    """Seven maps of four sizes: good ones, blobs, borders, corners, diagonals, one pixel, all but one."""
    rng = np.random.default_rng(seed)
    masks = [np.zeros(shape, bool) for shape in [(12, 9), (7, 15), (12, 9), (8, 8), (1, 20), (8, 8), (3, 3)]]
    masks[1][2:5, 3:9] = masks[1][6, 14] = masks[1][0, :2] = True
    masks[2][0, :] = masks[2][5:, 8] = True
    masks[3][np.arange(8), np.arange(8)] = True  # one region, if diagonals connect
    masks[4][0, [0, 7, 8, 19]] = True
    masks[6][:] = True
    masks[6][2, 0] = False
    maps = [rng.standard_normal(m.shape) + ndimage.gaussian_filter(m * 2., .5) for m in masks]
    if levels is not None:
        maps = [np.round(m * levels) / levels for m in maps]
    return masks, [m.astype(dtype) for m in maps]


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


# levels: None, no ties; 4 and 1, ever more ties; 1/8, almost everything tied
LEVELS = [None, 4, 1, 1 / 8]


@pytest.mark.parametrize("levels", LEVELS)
def test_image_metrics_follow_their_definitions(levels):
    labels, scores = samples(0, levels=levels)
    a, b = scores[labels, None], scores[~labels]
    f1 = [f1_score(labels, scores >= t) for t in np.unique(scores)]
    got = benchmark.image_metrics(labels, scores)
    assert got == pytest.approx({"image_auroc": np.mean((a > b) + (a == b) / 2), "image_f1_max": max(f1),
                                 "image_ap": average_precision_score(labels, scores)}, abs=TOLERANCE)


def test_image_metrics_accept_lists_integers_and_pixels():
    labels, scores = samples(1, n=96, levels=4)
    expected = benchmark.image_metrics(labels, scores)
    assert benchmark.image_metrics(labels.astype(int).tolist(), scores.tolist()) == expected
    halves = scores.reshape(8, 12).astype(np.float16)
    assert benchmark.image_metrics(labels.reshape(8, 12) * 1., halves) == expected
    assert benchmark.image_metrics(labels, (scores * 4).astype(np.int64)) == expected


def test_metrics_are_python_floats():
    values = [*benchmark.image_metrics([0, 1], [0, 1]).values(),
              *benchmark.pixel_metrics([np.eye(2)], [np.eye(2)]).values()]
    assert [type(v) for v in values] == [float] * 6 and values == [1.0] * 6


@pytest.mark.parametrize("max_fpr", [.01, .05, .3, .77, 1])
@pytest.mark.parametrize("levels", LEVELS)
def test_aupro_follows_the_definition(levels, max_fpr):
    masks, maps = images(0, levels)
    assert aupro(masks, maps, max_fpr) == pytest.approx(naive_aupro(masks, maps, max_fpr), abs=TOLERANCE)


@pytest.mark.parametrize("levels", LEVELS)
def test_pixel_metrics_follow_their_definitions(levels):
    masks, maps = images(1, levels)
    got = benchmark.pixel_metrics(masks, maps)
    expected = {"pixel_auroc": roc_auc_score(flat(masks), flat(maps)),
                "pixel_ap": average_precision_score(flat(masks), flat(maps)),
                "aupro": naive_aupro(masks, maps, .3)}
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, abs=TOLERANCE)


def test_pixel_metrics_of_more_maps_than_one_sort_takes():
    masks, maps = map(sum, zip(*(images(seed, 4) for seed in range(6))), ([], []))  # 42 maps
    got = benchmark.pixel_metrics(masks, maps)
    assert got["pixel_auroc"] == pytest.approx(roc_auc_score(flat(masks), flat(maps)), abs=TOLERANCE)
    assert got["pixel_ap"] == pytest.approx(average_precision_score(flat(masks), flat(maps)), abs=TOLERANCE)
    assert got["aupro"] == pytest.approx(naive_aupro(masks, maps, .3), abs=TOLERANCE)


def test_aupro_of_known_curves():
    mask = np.zeros((2, 10), bool)
    mask[0, 0] = mask[0, 5:9] = True  # regions of 1 and 4 pixels, 15 normal ones
    scores = np.zeros((2, 10))
    assert aupro([mask], [scores]) == pytest.approx(.15, abs=TOLERANCE)  # one tie: the diagonal, cut at .3
    assert aupro([mask], [mask * 1.]) == 1  # every region before any normal pixel
    assert aupro([mask], [-1. * mask]) == 0  # every normal pixel before any region
    scores[0, 0] = 1  # the small region counts as much as the large one
    assert aupro([mask], [scores], 1) == pytest.approx(.75, abs=TOLERANCE)
    scores[1, :6] = 2  # FPR .4 before anything of a region, then up to .5, then the diagonal to (1, 1)
    assert aupro([mask], [scores], .4) == 0
    assert aupro([mask], [scores], .7) == pytest.approx(.3 * (.5 + .75) / 2 / .7, abs=TOLERANCE)


def test_diagonal_neighbours_are_one_region():
    mask = np.zeros((4, 6), bool)
    mask[0, 1] = mask[1, 0] = mask[2, 1] = True  # a chain of three pixels, connected by corners only
    mask[0:2, 4] = True
    scores = np.zeros(mask.shape)
    scores[0:2, 4] = 1  # one of two regions is found; of four, were corners not to connect
    assert aupro([mask], [scores], 1) == pytest.approx(.75, abs=TOLERANCE)


def test_regions_do_not_join_across_images_or_edges():
    a, b = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    a[2], b[0], b[2, 3] = True, True, True
    scores = [np.zeros((3, 4)), np.zeros((3, 4))]
    scores[0][2] = 1  # one of three regions, though it would touch the second one if images were stacked
    assert aupro([a, b], scores, 1) == pytest.approx((1 / 3 + 1) / 2, abs=TOLERANCE)


RISING = {"exp": np.exp, "affine": lambda m: 5 * m - 40, "cube": lambda m: m ** 3}


@pytest.mark.parametrize("transform", RISING.values(), ids=RISING)
@pytest.mark.parametrize("levels", [None, 4])
def test_rising_transforms_change_nothing(transform, levels):
    masks, maps = images(2, levels, np.float64)
    labels, scores = samples(2, levels=levels)
    risen = [transform(m) for m in maps]
    assert benchmark.pixel_metrics(masks, risen) == benchmark.pixel_metrics(masks, maps)
    assert benchmark.image_metrics(labels, transform(scores)) == benchmark.image_metrics(labels, scores)


def test_order_of_images_and_reflection_change_nothing():
    masks, maps = images(3, 4)
    turned = [[m[::-1, ::-1].T for m in arrays[::-1]] for arrays in (masks, maps)]
    turned = benchmark.pixel_metrics(*turned)
    assert turned == pytest.approx(benchmark.pixel_metrics(masks, maps), abs=TOLERANCE)


@pytest.mark.parametrize("odd", range(4), ids=["good map", "defect map", "all", "none"])
def test_float64_maps_keep_their_precision(odd):
    step = 1e-12  # lost in float32
    masks = [np.zeros((1, 4), bool), np.array([[False, True, False, True]])]
    maps = [np.ones((1, 4)), np.ones((1, 4))]
    if odd in (0, 2):
        maps[0] += step * np.array([[-1, 0, 1, 1]])
    if odd in (1, 2):
        maps[1] += step * np.array([[0, 2, -2, 1]])
    stored = [m.astype(np.float32) if np.all(m == 1) else m for m in maps]
    expected = pytest.approx(roc_auc_score(flat(masks), flat(maps)), abs=TOLERANCE)
    assert benchmark.pixel_metrics(masks, stored)["pixel_auroc"] == expected


def test_negative_zero_is_zero():
    assert benchmark.pixel_metrics([[[0, 1, 0]]], [[[0., -0., -0.]]])["pixel_auroc"] == .5


def test_inputs_are_left_alone():
    masks, maps = images(4)
    before = [m.copy() for m in masks + maps]
    for array in masks + maps:
        array.setflags(write=False)
    benchmark.pixel_metrics(masks, maps)
    benchmark.image_metrics(flat(masks), flat(maps))
    assert all(np.array_equal(a, b) for a, b in zip(before, masks + maps))


def test_memory_is_that_of_some_maps():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((64, 256, 256), np.float32)  # 16 MiB
    masks = np.zeros(maps.shape, bool)
    masks[::2, :40, :40] = True  # 51 200 pixels, 90 bytes each: 4.4 MiB
    tracemalloc.start()
    try:
        benchmark.pixel_metrics(masks, maps)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 90 * masks.sum() + 3 * maps[:16].nbytes  # one int64 argsort of all pixels would be 32 MiB


SAMPLE_ERRORS = {
    "lengths": ([0, 1], [.1, .2, .3], r"expected one score per label, got labels \(2,\) and scores \(3,\)"),
    "shapes": ([[0, 1]], [.1, .2], "one score per label"),
    "empty": ([], [], "got 0 anomalous and 0 normal"),
    "normal only": ([0, 0], [.1, .2], "got 0 anomalous and 2 normal"),
    "anomalous only": ([1, 1, 1], [.1, .2, .3], "got 3 anomalous and 0 normal"),
    "labels of -1": ([-1, 1], [.1, .2], r"labels of 0 \(normal\) and 1 \(anomalous\)"),
    "labels of nan": ([np.nan, 1], [.1, .2], "labels of 0"),
    "labels of str": (["good", "bad"], [.1, .2], "labels of 0"),
    "nan": ([0, 1], [np.nan, .2], "got 1 NaN or infinite of 2"),
    "inf": ([0, 1], [-np.inf, np.inf], "got 2 NaN or infinite of 2"),
    "str": ([0, 1], ["a", "b"], "expected real numbers"),
    "complex": ([0, 1], [1j, 2.], "expected real numbers"),
}


@pytest.mark.parametrize("labels, scores, message", SAMPLE_ERRORS.values(), ids=SAMPLE_ERRORS)
def test_wrong_samples_are_refused(labels, scores, message):
    with pytest.raises(fp.ShapeError, match=message) as caught:
        benchmark.image_metrics(labels, scores)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


MASK, SCORES = np.eye(3, dtype=bool), np.arange(9.).reshape(3, 3)
PIXEL_ERRORS = {
    "empty": ([], [], {}, "got 0 anomalous and 0 normal"),
    "one map more": ([MASK], [SCORES, SCORES], {}, "got 1 masks and 2 maps"),
    "sizes": ([MASK, MASK], [SCORES, SCORES[:2]], {}, r"image 1: .*labels \(3, 3\) and scores \(2, 3\)"),
    "no image axis": (MASK, SCORES, {}, r"image 0: expected mask and map \(H, W\), got \(3,\)"),
    "channel axis": (MASK[None, ..., None], SCORES[None, ..., None], {}, r"expected mask and map \(H, W\)"),
    "normal only": ([~MASK & MASK], [SCORES], {}, "got 0 anomalous and 9 normal"),
    "anomalous only": ([MASK | ~MASK], [SCORES], {}, "got 9 anomalous and 0 normal"),
    "mask of 255": ([MASK * 255], [SCORES], {}, "image 0: .*mask > 127"),
    "nan": ([MASK, MASK], [SCORES, SCORES * [1, np.nan, 1]], {}, "image 1: .*got 3 NaN or infinite of 9"),
    "max_fpr 0": ([MASK], [SCORES], {"max_fpr": 0}, r"max_fpr in \(0, 1\], got 0"),
    "max_fpr 30": ([MASK], [SCORES], {"max_fpr": 30}, "got 30"),
    "max_fpr nan": ([MASK], [SCORES], {"max_fpr": np.nan}, "got nan"),
}


@pytest.mark.parametrize("masks, maps, options, message", PIXEL_ERRORS.values(), ids=PIXEL_ERRORS)
def test_wrong_images_are_refused(masks, maps, options, message):
    with pytest.raises(fp.ShapeError, match=message) as caught:
        benchmark.pixel_metrics(masks, maps, **options)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_examples_run():
    done = doctest.testmod(benchmark)
    assert done.attempted >= 3 and not done.failed


def test_box_metrics_by_hand():
    mask, scored = np.zeros((20, 30), bool), np.zeros((20, 30))
    mask[2:6, 3:8] = True  # 4 x 5, found by a region of 6 x 10, not by the fainter one of 1 x 1
    scored[1:7, 2:12], scored[4, 6] = 2, 5
    scored[2:4, 3], scored[1, 2] = .5, 1
    mask[12, 12] = True  # touched by a region that is not its own alone
    scored[12:15, 12:14] = 1.5
    mask[18, 25:28] = True  # missed: at the threshold is not above it
    scored[18, 25:28] = 1
    got = benchmark.box_metrics([mask, np.zeros((4, 4))], [scored, np.full((4, 4), 9)])
    assert got == {"defects_found": 2 / 3, "box_ratio": (60 / 20 + 6) / 2}
    assert benchmark.box_metrics([np.zeros((4, 4))], [np.ones((4, 4))]) == {}
    assert benchmark.box_metrics([mask], [np.zeros((20, 30))]) == {"defects_found": 0}


def test_of_two_regions_on_a_defect_the_higher_is_its_box():
    mask, scored = np.zeros((9, 20), bool), np.zeros((9, 20))
    mask[4, 2:18] = True
    scored[4, 2:5], scored[2:7, 10:14] = 3, 2
    assert benchmark.box_metrics([mask], [scored])["box_ratio"] == 3 / 16
    scored[5, 11] = 4
    assert benchmark.box_metrics([mask], [scored])["box_ratio"] == 20 / 16
