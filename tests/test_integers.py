"""Backbones in integers: engine and reference compute the very same features, whatever the CPU."""
import dataclasses
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

import fastprior as fp
from conftest import ROOT

KERNELS = "_resize", "_mbconv_integer", "_pool_integer", "_frame", "_help"
LIMIT = (1 << 24) - 1  # of sums
SHAPES = (64, 64), (64, 96), (176, 80), (48, 16), (16, 240)  # the last three are odd at a stride of 16


def in_plain_operations(dot, lanes, folder):
    """kernels/cpu.py with words of the layout that `dot` names, in operations that any CPU has."""
    name = f"integers_{dot}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / "__init__.py",
                                                  submodule_search_locations=[str(ROOT / "kernels")])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    cpu = importlib.import_module(f"{name}.cpu")
    host = cpu._host

    def patched():
        found = host()
        vars(cpu).update(_LANES=lanes, _TILE=lanes // 2, **cpu._words_of(dot, lanes))
        return found
    cpu._host = patched
    cpu._KERNELS[:] = [k for k in cpu._KERNELS if k.fields is None or k.__name__ in KERNELS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        cpu.load_kernels("integers")
    return cpu


LAYOUTS = "pairs", "quads", "signed quads"


@pytest.fixture(scope="module", params=[None, *LAYOUTS], ids=["this CPU", *LAYOUTS])
def cpu(request, tmp_path_factory):
    """The engine as it is, and all layouts of words. Around all memory lie bytes of 255: what is read there
    shows in a result, what is written there here."""
    module = fp._cpu_engines() if request.param is None else in_plain_operations(
        request.param, 8, tmp_path_factory.mktemp("integers"))
    assert module is not None
    aligned, made, guard = module._aligned, [], 1024

    def guarded(shape, dtype=np.float32):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = aligned(size + 2 * guard, np.uint8)
        raw[:guard] = raw[guard + size:] = 255
        made.append((raw, guard, guard + size))
        return raw[guard:guard + size].view(dtype).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_aligned", guarded)
        patch.setenv("NUMBA_NUM_THREADS", "3")
        yield module
    assert made and all((raw[:start] == 255).all() and (raw[stop:] == 255).all() for raw, start, stop in made)


def features(cpu, net, images, shape, threads=1, shifts=None, cell=16):
    """What an engine computes in memory that held NaN, (B, N, C) a view."""
    e, views = cpu.Engine(threads), views_of(net, shape, cell)
    for (x, _), (grid, blocks) in zip(e.features(net, shape, views, net.taps), views, strict=True):
        e.keep(x, math.prod(grid), sum(net.blocks[i].channels[2] for i in blocks))
    e.finish()
    e._image_table(images, [(0, 0)] * len(images), [None] * len(images))  # the memory grows now
    line, pixels = e._line, fp._round_up((shape[0] + 1) * ((shape[1] + 1) * 3 + 1) // 2, 16)
    e._memory[:, :line] = e._memory[:, line + pixels:] = e.prepare(len(images))[...] = np.nan
    return e.run(images, outputs=True, shifts=shifts).outputs


def views_of(net, shape, cell=16):
    return ((shape[0] // cell, shape[1] // cell), net.stages), ((shape[0] // 8, shape[1] // 8), net.fine)


def reference(net, images, shape, shifts=None, cell=16):
    shifts, views = shifts or [(0, 0)] * len(images), views_of(net, shape, cell)
    views = zip(*(net.features(net.pixels(a, shape, s), *views) for a, s in zip(images, shifts)))
    return [np.stack(view) for view in views]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == np.float32 and np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


# -- random networks -----------------------------------------------------------------------------------

def layer(rng, name, shape, largest, most, spread, fill=None):
    """Weights up to `most` in magnitude for inputs up to `largest`: outputs reach both limits and beyond.

    fill: all weights of that sign, and a bias that makes the sum as large as is allowed.
    """
    count, channels = int(np.prod(shape[:-1])), shape[-1]
    if fill:
        w = np.full(shape, fill * min(most, LIMIT // (count * largest)))
        b = fill * (LIMIT - count * largest * np.abs(w).reshape(-1, channels)[0])
        b = b if fill > 0 else -b // 2
    else:
        ends, most = min(most, LIMIT // largest), min(most, LIMIT // (2 * count * largest))
        w = rng.integers(-most, most + 1, shape)
        b = rng.integers(-1, 2, channels) * most * largest * int(np.sqrt(count)) // 4
        if ends > most and channels > 3:  # one channel with as large a weight as is allowed
            w[..., 0] = b[0] = 0
            w.reshape(-1, channels)[count // 2, 0] = rng.choice([-ends, ends])
    size = np.sqrt(count) * largest * max(most, 1) / 3
    return {f"{name}_w": w.astype(np.float32), f"{name}_b": b.astype(np.float32),
            f"{name}_m": np.float32(spread / size * rng.uniform(.3, 2, channels))}


def network(seed, blocks, fill=None):
    """blocks: (expanded, out, kernel, stride); the first has no expansion, its channels are the stem's."""
    rng = np.random.default_rng(seed)
    made, channels = [], blocks[0][0]
    for i, (mid, out, kernel, stride) in enumerate(blocks):
        p = {}
        if i:
            inputs = (1023, 127)[(i + seed) % 2]
            p = {"input_m": np.array([inputs / 20000, inputs], np.float32)}
            p |= layer(rng, "expand", (channels, mid), inputs, 127, 2047, fill)
        p |= layer(rng, "dw", (kernel, kernel, mid), 2047, 32767, 255, fill)
        p |= layer(rng, "project", (mid, out), 255, 127, 20000, fill)
        made.append(fp.InvertedResidual(p, stride, fp.RELU6, stride == 1 and channels == out and i > 0))
        channels = out
    stages = tuple(sorted({0, len(blocks) // 2, len(blocks) - 1}))
    stem = layer(rng, "stem", (3, 3, 3, blocks[0][0]), 510, 32767, 2047, fill)
    net = fp.Backbone("random", (.5,) * 3, (.5,) * 3, fp.RELU6, stem["stem_w"], stem["stem_b"], tuple(made),
                      stages, stem["stem_m"], rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float32))
    fp._check_backbone(net)
    return net


NETWORKS = {
    "odd": [(7, 5, 3, 1), (13, 9, 3, 2), (29, 9, 5, 1), (31, 17, 5, 2), (51, 17, 3, 1), (33, 25, 3, 2),
            (75, 25, 5, 1)],
    "narrow": [(1, 1, 5, 1), (1, 3, 5, 2), (3, 3, 3, 1), (9, 1, 3, 2), (2, 2, 5, 2), (17, 2, 3, 1)],
    "early strides": [(33, 24, 5, 2), (96, 40, 3, 2), (64, 40, 5, 1), (120, 48, 5, 2), (130, 48, 3, 1)],
}


def pictures(count, seed):
    """Of several sizes, smaller and larger than networks take; the smallest sides that an image may have."""
    rng = np.random.default_rng(seed)
    sizes = [(8, 300), (250, 8), (8, 8), (64, 96), *rng.integers(30, 260, (count, 2))]
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes[:count]]


# -- engine and reference ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_engine_computes_the_reference(cpu, name, shape):
    net, images = network(7, NETWORKS[name]), pictures(5, 1)
    shifts = [(0., 0.), *map(tuple, np.random.default_rng(2).uniform(-.05, .05, (4, 2)))]
    want = reference(net, images, shape, shifts)
    assert all(len(np.unique(view)) > min(view.size // 4, 18) for view in want)
    for threads, batches in ((1, (5,)), (2, (1, 5)), (3, (2,))):  # an image a thread, and bands
        for batch in batches:
            got = features(cpu, net, images[:batch], shape, threads, shifts[:batch])
            assert_same(got, [view[:batch] for view in want])


@pytest.mark.parametrize("fill", [1, -1])
def test_extremes(cpu, fill):
    """Weights and pixels at the ends of their ranges: sums just below 2^24, outputs clipped."""
    blocks = [(32, 16, 3, 1), (256, 16, 5, 2), (128, 16, 3, 2), (96, 16, 5, 1), (320, 16, 5, 2)]
    net = network(5, blocks, fill)
    images = [np.full((64, 64, 3), v, np.uint8) for v in (0, 1, 127, 128, 254, 255)]
    assert_same(features(cpu, net, images, (64, 64), 2), reference(net, images, (64, 64)))


def test_the_largest_cell(cpu):
    """Its sums are beyond int32."""
    net = network(5, [(4, 2, 3, 1), *[(2, 2, 3, 2)] * 3], 1)
    net = dataclasses.replace(net, stages=(0, 3), scales=np.ones(4, np.float32))
    image, shape = np.full((64, 64, 3), 255, np.uint8), (1024, 1024)
    want = reference(net, [image], shape, cell=1024)
    assert want[0].shape == (1, 1, 4) and want[0].max() * 512 ** 2 > 2 ** 31
    assert_same(features(cpu, net, [image], shape, cell=1024), want)


def test_ties_go_to_even_and_residuals_saturate(cpu):
    net = network(7, [(8, 8, 3, 1), *[(16, 8, 3, stride) for stride in (2, 1, 1, 2, 2)]])
    for block in net.blocks:
        for name, a in block.arrays.items():
            if name in ("dw_m", "project_m", "expand_m"):
                a[...] = 30. if name == "project_m" else 2.0 ** -9  # exact halves; projections beyond 32767
    images = pictures(4, 2)
    want = reference(net, images, (64, 64))
    assert_same(features(cpu, net, images, (64, 64), 2), want)
    assert np.abs(want[0]).max() >= .9 * 32767 * net.scales.min()


@pytest.fixture(scope="module")
def lite0():
    """Quantised on images, and in ranges that most outputs leave; images and their features."""
    net, images, q = fp.load_backbone("lite0"), pictures(3, 3), fp._room("quantization")
    usual, ranged = q.quantize_on(net, images, fp.Settings(size=64))
    assert usual.integer and len(ranged) == 3
    nets = usual, q.quantize_backbone(net, np.full(len(net.blocks), .5))
    return images, [(net, reference(net, images, (64, 96))) for net in nets]


def test_lite0_quantised(cpu, lite0):
    images, nets = lite0
    for net, want in nets:
        for threads in (1, 2):
            assert_same(features(cpu, net, images, (64, 96), threads), want)


def test_scores_do_not_depend_on_the_rest_of_memory(cpu):
    """Two frames one after another, a large image first: nothing of the first shows."""
    net, small, large = network(3, NETWORKS["odd"]), pictures(1, 4)[0], np.full((500, 700, 3), 9, np.uint8)
    e = cpu.Engine(1)
    e.keep(e.features(net, (64, 64), views_of(net, (64, 64)), net.taps)[0][0], 16, sum(net.channels))
    e.finish()
    for image in (small, large, small):
        np.testing.assert_array_equal(e.run([image], outputs=True).outputs[0],
                                      reference(net, [image], (64, 64))[0])


# -- the reference -------------------------------------------------------------------------------------

def requantized(total, m, low, high):
    """int64 -> int64; the product is exact in float64, then rounded twice."""
    assert np.abs(total).max() < 1 << 24
    y = (total.astype(np.float64) * m.astype(np.float64)).astype(np.float32)
    return np.clip(np.round(y.astype(np.float64)), low, high).astype(np.int64)


def convolved(x, w, stride, pads, depthwise=False):
    """int64 (H, W, C) by (k, k, C) or (k, k, C, M)."""
    x, k = np.pad(x, (pads[0], pads[1], (0, 0))), len(w)
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (0, 1))[::stride, ::stride]
    return np.einsum("yxcij,ijc->yxc" if depthwise else "yxcij,ijcm->yxm", windows, w)


def same(n, k, stride):
    total = max((-(-n // stride) - 1) * stride + k - n, 0)
    return total // 2, total - total // 2


def test_reference_equals_a_computation_in_int64():
    net, shape, whole = network(9, NETWORKS["odd"]), (48, 80), lambda a: a.astype(np.int64)  # noqa: E731
    for image, shift in zip(pictures(3, 5), ((0, 0), (.03, -.02), (0, .01))):
        x = whole(image)
        for axis, (n_out, s) in enumerate(zip(shape, shift)):
            start, weight = fp.fixed_point_taps(x.shape[0], n_out, s)
            assert (weight.sum(1) == 4096).all() and (weight >= 0).all() and (weight == np.rint(weight)).all()
            near = fp.resize_taps(x.shape[0], n_out, s)
            assert (start == near[0]).all() and np.abs(weight / 4096 - near[1]).max() <= 1 / 4096
            x = np.stack([np.tensordot(whole(w), x[i:i + len(w)], 1) for i, w in zip(start, weight)])
            x = ((x + 8192 >> 14) - 510 if axis else x + 128 >> 8).swapaxes(0, 1)
        np.testing.assert_array_equal(net.pixels(image, shape, shift), x)
        y = convolved(x, whole(net.stem_w), 2, [same(n, 3, 2) for n in shape])
        y, maps = requantized(y + whole(net.stem_b), net.stem_m, 0, 2047), {}
        for i, block in enumerate(net.blocks):
            p, x = block.arrays, y
            if i:
                m, most = p["input_m"].astype(np.float64)
                a = np.round((x * m).astype(np.float32).astype(np.float64))
                y = np.clip(a, -most, most).astype(np.int64) @ whole(p["expand_w"]) + whole(p["expand_b"])
                y = requantized(y, p["expand_m"], 0, 2047)
            w = whole(p["dw_w"])
            pads = [same(n, len(w), block.stride) for n in y.shape[:2]]
            y = convolved(y, w, block.stride, pads, True) + whole(p["dw_b"])
            y = requantized(y, p["dw_m"], 0, 255) @ whole(p["project_w"]) + whole(p["project_b"])
            y = requantized(y, p["project_m"], -32767, 32767)
            y = np.clip(y + x, -32767, 32767) if block.skip else y
            maps[i] = y
        for view, (grid, blocks) in zip(net.features(net.pixels(image, shape, shift), *views_of(net, shape)),
                                        views_of(net, shape)):
            parts = []
            for i in blocks:
                (h, w, c), (down, across) = maps[i].shape, grid
                total = maps[i].reshape(down, h // down, across, w // across, c).sum((1, 3))
                factor = net.scales[i] / np.float32(h // down * (w // across))
                parts.append(total.astype(np.float32) * factor)
            np.testing.assert_array_equal(view, np.concatenate(parts, -1).reshape(-1, view.shape[-1]))


# -- files ---------------------------------------------------------------------------------------------

def decoded(header, arrays):
    with fp._decoding("some.npz"):
        return fp.Backbone.from_arrays(header, arrays)


def test_a_backbone_survives_its_file(tmp_path):
    net = network(2, NETWORKS["odd"])
    fp._write_npz(tmp_path / "b.npz", net.header(), net.to_arrays())
    header, arrays = fp._read_npz(tmp_path / "b.npz")
    again, images = decoded(header, arrays), pictures(1, 5)
    assert again.integer
    assert_same(reference(again, images, (64, 64)), reference(net, images, (64, 64)))
    types = {name: a.dtype for name, a in arrays.items()}
    assert types["stem_w"] == types["block0_dw_w"] == np.int16 and types["block1_expand_w"] == np.int8
    assert types["block1_project_b"] == np.int32 and types["stem_m"] == types["scales"] == np.float32
    for name, a in arrays.items():
        wrong = a.astype({"i": np.float32, "f": np.int32}[a.dtype.kind])
        for changed in ({name: wrong}, {name: a[..., None]}, {name: np.repeat(a, 2, -1)}):
            with pytest.raises(fp.ModelError):
                decoded(header, arrays | changed)
        with pytest.raises(fp.ModelError):
            decoded(header, {k: a for k, a in arrays.items() if k != name})
    with pytest.raises(fp.ModelError):
        decoded(header | {"integer": False}, arrays)


def test_sums_beyond_float32_are_refused():
    net = network(1, [(8, 8, 3, 1), (8, 520, 3, 2), (8, 8, 3, 2), (8, 8, 3, 2)])
    header, arrays = net.header(), net.to_arrays()
    decoded(header, arrays)
    for name, value, message in (
            ("block3_project_b", 1 << 24, r"2\^24"), ("block3_dw_w", 32767, r"2\^24"),
            ("stem_w", -32768, r"2\^24"), ("block3_expand_b", -(1 << 31), r"2\^24"),
            ("block2_dw_m", 200, "dw_m"), ("block0_project_m", -1, "_m"), ("block0_project_m", np.nan, "_m"),
            ("block3_input_m", 128, "input_m"), ("stem_m", 128, "stem_m"), ("scales", 0, "scales"),
            ("scales", np.inf, "scales")):
        with pytest.raises(fp.ModelError, match=message):
            decoded(header, arrays | {name: np.full_like(arrays[name], value)})
    with pytest.raises(fp.ModelError, match="input_m"):  # a limit that no kernel knows
        decoded(header, arrays | {"block3_input_m": np.float32([.05, 500])})
    for change in ({"act": fp.SILU}, {"mean": (.4,) * 3}):
        with pytest.raises(fp.ModelError):
            decoded(header | change, arrays)
    w = np.zeros((8, 8), np.int32)  # at the very limit, and one beyond
    for bias in (0, 1):
        most = {"block1_dw_w": np.zeros((3, 3, 8), np.int16), "block1_dw_b": w[0] + LIMIT + bias}
        if bias:
            with pytest.raises(fp.ModelError, match="16777216"):
                decoded(header, arrays | most)
        else:
            decoded(header, arrays | most)


def test_a_model_with_integers_is_the_same_after_its_file_and_without_numba(washers, tmp_path, monkeypatch):
    prior = fp.fit(washers, size=64, iterations=0, copies=0)
    prior.save(tmp_path / "m.npz")
    again = fp.Prior.load(tmp_path / "m.npz")
    images = [fp.load_image(p) for p in fp.find_images(washers / "test")[:5]]
    assert again.backbone.integer
    scores = [r.score for r in prior.score_batch(images)]
    assert scores == [r.score for r in again.score_batch(images)]
    monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    slow = [r.score for r in fp.Prior.load(tmp_path / "m.npz").score_batch(images)]
    np.testing.assert_allclose(slow, scores, rtol=2e-4, atol=2e-4)


# -- instructions that this CPU may lack ---------------------------------------------------------------

CODE = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import fastprior as fp
from llvmlite import binding
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
m = fp._engines("cpu")
def compile_only(machine, part):
    class Machine:
        def emit_object(self, module):
            print(machine.emit_assembly(module))
            sys.exit()
    original(Machine(), part)
original, m._compile_kernels = m._compile_kernels, compile_only
m._read_object = lambda path: None
m._KERNELS[:] = [k for k in m._KERNELS if k.fields is None or k.__name__ == "_mbconv_integer"]
"""


def compiled(code, name, features):
    """Assembly of `_mbconv_integer` for a CPU (Numba makes code for it too) after `code` has run."""
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", CODE + code + "m._load_kernels('integers')"],
                          env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr[-500:]
    return done.stdout


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.parametrize("name, lanes, features", [
    ("sapphirerapids", 16, "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd,+avx512vnni,+avx2,+fma"),
    ("alderlake", 8, "+avx2,+fma,+avxvnni")])
def test_vnni_is_compiled_to_its_instructions(name, lanes, features):
    """vpdpbusd for products, vpdpwssd for pairs; what they compute is held to `quads` and `pairs` above."""
    code = compiled(f"""
def host():
    vars(m).update(_LANES={lanes}, _TILE={lanes // 2}, **m._words_of("vpdpbusd", {lanes}))
    return {name!r}, {features!r}
m._host = host
""", name, features)
    assert min(code.count("vpdpbusd"), code.count("vpdpwssd")) > 20
    assert "vpmaddubsw" not in code


def test_arm_is_compiled_to_dot_products():
    """sdot for products, smlal for pairs; what they compute is held to `signed quads` above."""
    binding = pytest.importorskip("llvmlite.binding")
    triple = "aarch64-unknown-linux-gnu"
    binding.initialize_all_targets()
    try:
        binding.Target.from_triple(triple)
    except RuntimeError as e:
        pytest.skip(f"this LLVM makes no code for Arm ({e})")
    code = compiled(f"""
binding.get_process_triple = binding.get_default_triple = lambda: {triple!r}
binding.Target.from_default_triple = classmethod(lambda cls: cls.from_triple({triple!r}))
binding.get_host_cpu_features = binding.targets.FeatureMap  # nothing of dot products, whatever the CPU
for name, dot in ("cortex-a72", "pairs"), ("apple-m1", "sdot"), ("neoverse-n1", "sdot"):
    binding.get_host_cpu_name = lambda: name
    m._host.cache_clear()
    m._host()
    assert m._DOT == dot, (name, m._DOT)
""", "neoverse-n1", "")
    assert min(len(re.findall(rf"\t{name}\t", code)) for name in ("sdot", "smlal", "smlal2")) > 20
    assert not re.search(r"\tmla\t.*4s", code)  # a product of two i32
    called, own = (set(re.findall(p, code, re.M)) for p in (r"\tbl\t(\w+)", r"^(\w+):"))
    assert called - own <= fp._engines("cpu")._OUTSIDE and "memset" in called
