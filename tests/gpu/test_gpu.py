"""On a real GPU: every kernel and whole models against the CPU, graphs, memory, streams.

The checks of tests/test_cuda_emulated.py run here as they are, with CuPy in the stand-in's place. Run the
small ones under compute-sanitizer too:

    compute-sanitizer python -m pytest tests/gpu -k "kernel and not frames"
"""
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fastprior as fp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_cuda_emulated as emulated  # noqa: E402
import test_cuda_launch as launch  # noqa: E402
from emulated_cuda import source  # noqa: E402

try:
    fp.resolve_device("cuda")
    missing = None
except fp.BackendUnavailable as e:
    missing = str(e)
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

# A GPU divides and takes exponentials to a few units in the last place, and CuPy flushes float32 denormals to
# zero.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2}


class DeviceBench(emulated.Bench):
    """`Bench` on the GPU: the same checks, CuPy arrays."""

    def __init__(self, name, dtype, options):
        import cupy
        self.cuda, self.dtype, self.rng = cupy, dtype, np.random.default_rng(5)
        self.module = cupy.RawModule(code=source(name), options=options)

    def check(self, got, want, slack=4.0):
        assert got.shape == want.shape
        error = np.abs(got.get().astype(np.float64) - want).max() / max(1.0, np.abs(want).max())
        assert error < slack * emulated.TOLERANCE[self.dtype], f"error {error:.2e}"


@pytest.mark.parametrize("name, dtype", emulated.CASES)
def test_kernel_agrees_with_its_reference(name, dtype):
    run, variants = emulated.OPERATIONS[name]
    for options in variants:
        macros = emulated.macros(name, dtype, **options)
        run(DeviceBench(emulated.FILES.get(name, name), dtype, macros), **options)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("case", [
    {}, {"size": 64, "steps": 3}, {"variant": "plain", "steps": 1}, {"denoiser": False},
    {"backbone": "lite0", "size": 256, "steps": 2}],
    ids=["small", "three-steps", "plain", "no-denoiser", "lite0"])
def test_whole_model_agrees_with_the_cpu(case, precision):
    gpu, cpu = launch.model(**case, device="cuda", precision=precision)
    batch = launch.images()  # of hundreds of places one or two are at the edge of what a score is held to
    assert launch.relative(gpu.z(batch), cpu.z(batch)) < 2 * TOLERANCE[precision]
    for a, b in zip(gpu.score_batch(batch), cpu.score_batch(batch)):
        assert launch.relative(a.score, b.score) < TOLERANCE[precision]
        assert launch.relative(a.anomaly_map, b.anomaly_map) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("backbone, shape", [("tiny", (64, 96)), ("lite0", (64, 96)), ("lite2", (256, 256))])
def test_features_in_integers_are_those_of_the_reference(backbone, shape, precision):
    launch.check_features_in_integers(backbone, precision, shape)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_graph_replay_equals_eager_launches(precision):
    gpu, _ = launch.model(device="cuda", precision=precision)
    eager = gpu.z(launch.images())  # the first frame of a batch size is launched kernel by kernel
    np.testing.assert_array_equal(gpu.z(launch.images()), eager)
    gpu.z(launch.images(seed=8))
    np.testing.assert_array_equal(gpu.z(launch.images()), eager)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_score_does_not_depend_on_the_batch(precision):
    gpu, _ = launch.model("lite0", size=256, device="cuda", precision=precision)
    batch = launch.images(sizes=((300, 280),) * 70)
    together = gpu.z(batch)
    for i in (0, 7, 69):
        np.testing.assert_array_equal(gpu.z(batch[i:i + 1])[0], together[i])


def test_frames_without_end_need_no_more_memory():
    import cupy
    gpu, _ = launch.model(device="cuda", size=64)
    frames = [cupy.asarray(i) for i in launch.images()]
    want = [gpu.score(f).score for f in frames]
    cupy.cuda.Device().synchronize()
    before = cupy.get_default_memory_pool().total_bytes()
    for i in range(100_000):
        result = gpu.score(frames[i % 3])
        if i % 1000 == 0:
            assert result.score == want[i % 3]
    cupy.cuda.Device().synchronize()
    assert cupy.get_default_memory_pool().total_bytes() <= before + (1 << 20)


def test_two_streams_at_once_get_their_own_scores():
    import cupy
    gpu, _ = launch.model(device="cuda", precision="float32")
    frames = [cupy.asarray(i) for i in launch.images(sizes=((90, 90), (64, 80)))]
    want = [gpu.score(f).score for f in frames]
    wrong = []

    def work(k):
        with cupy.cuda.Stream(non_blocking=True):
            wrong.extend(s for s in [gpu.score(frames[k]) for _ in range(300)] if s.score != want[k])
    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_torch_tensors_are_scored_on_torchs_stream():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    gpu, _ = launch.model(device="cuda", precision="float32")
    image = launch.images()[0]
    want = gpu.score(image).score
    with torch.cuda.stream(torch.cuda.Stream()):
        tensor = torch.from_numpy(image).cuda()
        blank = torch.zeros_like(tensor)
        blank.copy_(tensor)  # must be seen: same stream, no synchronisation between
        assert gpu.score(blank).score == want


def test_bench_reports_every_figure():
    gpu, _ = launch.model(device="cuda", size=64)
    report = launch.engines.bench_cuda(gpu._engine(), images=(1, 4), frames=20, values=1 << 20)
    assert all(f["p50_ms"] > 0 and f["p95_ms"] >= f["p50_ms"] for f in report["batches"].values())
    assert report["rotate_density_gb_per_s"] > 0 and report["device_copy_gb_per_s"] > 0
