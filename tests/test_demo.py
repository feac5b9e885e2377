"""The demo's generator: what it writes, and that a plate's faults are of logic."""
import numpy as np
import pytest

import make_demo


def draw(kind, i):
    return make_demo._render_plate(np.random.default_rng([7, i]), kind, 64)


def write(out, part):
    counts = "--good", "2", "--test-good", "1", "--defects-per-type", "1"
    assert make_demo.main([str(out), "--part", part, *counts, "--size", "48"]) == 0
    return {p.parent.name for p in (out / "test").rglob("*.png")}


@pytest.mark.parametrize("part", sorted(make_demo.PARTS))
def test_layout(part, tmp_path):
    out, kinds = tmp_path / "set", set(make_demo.PARTS[part])
    assert write(out, part) == kinds
    assert {p.name for p in (out / "ground_truth").iterdir()} == kinds - {"good"}
    other = min(set(make_demo.PARTS) - {part})
    assert write(out, other) == set(make_demo.PARTS[other])  # images of the part before are gone


def test_an_image_does_not_depend_on_how_many_are_drawn(tmp_path):
    make_demo.write_dataset(tmp_path / "a", 2, 1, 1, 48, part="plate")
    make_demo.write_dataset(tmp_path / "b", 1, 2, 2, 48, part="plate")
    for name in ("train/good/000.png", "test/good/000.png", "test/mixed/000.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", ["mixed", "missing", "swapped"])
def test_every_place_of_a_bad_plate_is_that_of_some_good_plate(kind):
    def ends_and_pins(image):
        """Left, right, above and below: is there an opening in the middle?"""
        at = (31, 34, 15, 18), (31, 34, 46, 49), (22, 25, 31, 34), (39, 42, 31, 34)
        return [bool(image[top:bottom, left:right, 1].mean() < 90) for top, bottom, left, right in at]
    good = {tuple(ends_and_pins(draw("good", i)[0])) for i in range(12)}
    assert len(good) == 2  # two hands
    places = np.array(sorted(good))
    assert (places[0] != places[1]).all()
    bad = {tuple(ends_and_pins(draw(kind, i)[0])) for i in range(12)}
    assert not bad & good and all(draw(kind, i)[1].any() for i in range(3)) and not draw("good", 0)[1].any()
