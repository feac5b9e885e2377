"""Both sizes of a copy inside another program's package: fastprior.py alone, and with kernels/ beside it.

The program has modules `kernels` and `weights` of its own, which are not ours to import or to hide.
"""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from emulated_cuda import gxx

OPTIONAL = ("torch", "cupy", "typer", "rich", "PIL", "scipy", "timm", "sklearn", "matplotlib", "onnxruntime")
MISSING = re.compile("host/vendor/kernels.* is missing: copy the folder kernels/ beside fastprior.py")

START = """
import json, sys
sys.path.insert(0, ".")
for name in sys.argv[1:]:
    sys.modules[name] = None
import numpy as np
from host.vendor import fastprior as fp
"""
SCORE = START + """
prior = fp.Prior.load("model.npz")
results = prior.score_batch(list(np.load("images.npy")))
print(json.dumps([fp.__file__, prior.backend, [r.score for r in results],
                  [float(r.anomaly_map.max()) for r in results], prior.threshold.value]))
"""


@pytest.fixture(params=["alone", "with kernels"])
def host(request, tmp_path, model_file, pictures):
    """A program with a copy in host/vendor/, its own modules of our folders' names, a model and images."""
    folder = tmp_path / "program"
    vendor = folder / "host" / "vendor"
    vendor.mkdir(parents=True)
    for package in (folder / "host", vendor):
        (package / "__init__.py").write_text("")
    for name in ("kernels", "weights"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not yours')\n")
    shutil.copy(ROOT / "fastprior.py", vendor)
    if request.param == "with kernels":
        shutil.copytree(ROOT / "kernels", vendor / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(model_file, folder / "model.npz")
    np.save(folder / "images.npy", np.stack([pictures[0], pictures[2], pictures[4]]))
    return folder


def has_kernels(host):
    return (host / "host" / "vendor" / "kernels").is_dir()


def python(folder, code, *args, **environment):
    done = subprocess.run([sys.executable, "-P", "-c", code, *args], cwd=folder, capture_output=True,
                          text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done


def check_scores(text, host, backend, trained, pictures):
    file, used, scores, peaks, threshold = json.loads(text)
    assert file == str(host / "host" / "vendor" / "fastprior.py") and used == backend
    assert threshold == trained.threshold.value
    for image, score, peak in zip((pictures[0], pictures[2], pictures[4]), scores, peaks, strict=True):
        want = trained.score(image)
        assert score == (want.score if backend == "numba" else pytest.approx(want.score, rel=1e-4, abs=1e-4))
        assert peak == pytest.approx(float(want.anomaly_map.max()), rel=1e-3)


def test_a_copy_scores(host, trained, pictures):
    trained.score(pictures[0])  # so that the kernels are compiled
    if has_kernels(host):
        done = python(host, SCORE, *OPTIONAL)
        check_scores(done.stdout, host, "numba", trained, pictures)
        assert done.stderr == ""
        done = python(host, SCORE, *OPTIONAL, "numba", "llvmlite")
        assert "numba is missing" in done.stderr
    else:
        done = python(host, SCORE, *OPTIONAL, "numba", "llvmlite")
        assert MISSING.search(done.stderr)
    check_scores(done.stdout, host, "numpy", trained, pictures)
    assert len(done.stderr.splitlines()) == 1 and "NumPy alone, slowly" in done.stderr


def test_the_host_keeps_its_modules_and_the_copy_its_own(host):
    for name in ("kernels", "weights"):
        (host / f"{name}.py").write_text("MINE = True\n")
    code = SCORE + """
before = set(sys.modules)
import kernels, weights
assert kernels.MINE and weights.MINE and {"kernels", "weights"} <= set(sys.modules) - before
print([name for name in sys.modules if "fastprior" in name and not name.startswith("__editable__")])
"""
    names = eval(python(host, code, *OPTIONAL).stdout.splitlines()[-1])
    ours = [name for name in names if name != "host.vendor.fastprior"]
    assert all(name.startswith("_fastprior_kernels_") for name in ours) and bool(ours) == has_kernels(host)


@pytest.mark.parametrize("host", ["with kernels"], indirect=True)
def test_two_copies_in_one_program_have_an_engine_each(host):
    shutil.copytree(host / "host" / "vendor", host / "host" / "other")
    code = SCORE + """
from host.other import fastprior as other
a, b = (m.Prior.load("model.npz") for m in (fp, other))
assert [m._engines("cpu").__file__ for m in (fp, other)] == [
    m.__file__.replace("fastprior.py", "kernels/cpu.py") for m in (fp, other)]
assert a.score(np.load("images.npy")[0]).score == b.score(np.load("images.npy")[0]).score
try: other.Prior.load("model.npz", device="cuda")
except other.BackendUnavailable as e: print(e)
"""
    assert "CuPy is missing" in python(host, code, *OPTIONAL).stdout.splitlines()[-1]


@pytest.mark.skipif(gxx() is None, reason="no g++ with 16-bit floats to emulate CUDA with")
def test_a_copy_with_kernels_has_the_cuda_engine(host, trained, pictures):
    code = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from emulated_cuda import FakeCupy
sys.modules["cupy"] = FakeCupy()
""" + SCORE.replace('"model.npz"', '"model.npz", device="auto"')
    missing = [name for name in OPTIONAL if name != "cupy"]
    done = python(host, code, str(ROOT / "tests"), *missing)
    if has_kernels(host):
        check_scores(done.stdout, host, "cuda", trained, pictures)
        assert done.stderr == ""
    else:
        check_scores(done.stdout, host, "numpy", trained, pictures)
    code = START + """
try: fp.Prior.load("model.npz", device="cuda")
except fp.BackendUnavailable as e: print(e)
"""
    text = python(host, code, *OPTIONAL).stdout
    assert ("CuPy is missing" if has_kernels(host) else "copy the folder kernels/") in text


def test_import_is_light(host):
    code = START + "print(sorted({m.split('.')[0] for m in sys.modules if sys.modules[m]}))"
    assert not set(eval(python(host, code).stdout)) & {*OPTIONAL, "numba", "llvmlite"}


def test_scoring_imports_nothing_that_it_does_not_need(host, trained, pictures):
    trained.score(pictures[0])
    text = python(host, SCORE + "print(sorted({m.split('.')[0] for m in sys.modules}))").stdout
    assert not set(eval(text.splitlines()[-1])) & {*OPTIONAL, "numba"}


def test_what_is_missing_is_named(host):
    code = START + """
prior = fp.Prior.load("model.npz")
for attempt in (lambda: prior.score("x.png"), lambda: fp.load_backbone("lite0"),
                lambda: fp.fit([], iterations=0)):
    try: attempt()
    except fp.FastPriorError as e: print(e)
"""
    (host / "x.png").write_bytes(b"")
    pillow, weights, examples = python(host, code, *OPTIONAL).stdout.splitlines()
    assert "pip install pillow" in pillow
    assert "vendor/weights" in weights and "copy the folder weights/" in weights
    assert "vendor/examples" in examples and "copy the folder examples/" in examples


def test_a_copy_with_weights_and_examples_trains(host):
    with_examples(host)
    shutil.copytree(ROOT / "weights", host / "host" / "vendor" / "weights")
    code = START + """
images = list(np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8))
prior = fp.fit(images, size=64, copies=1, iterations=0)
print(prior.summary["images"], np.isfinite(prior.score(images[0]).score))
"""
    hidden = (name for name in OPTIONAL if name != "scipy")
    assert python(host, code, *hidden).stdout.split() == ["12", "True"]


def with_examples(host):
    """The command needs its words; without them it says what to copy."""
    command = [sys.executable, str(host / "host" / "vendor" / "fastprior.py"), "info"]
    done = subprocess.run(command, cwd=host, capture_output=True, text=True)
    assert done.returncode == 2 and "copy the folder examples/" in done.stderr and not done.stdout
    shutil.copytree(ROOT / "examples", host / "host" / "vendor" / "examples",
                    ignore=shutil.ignore_patterns("__pycache__", "*.png", "washers"))


def test_info_says_what_scores_and_what_to_copy(host):
    with_examples(host)
    done = subprocess.run([sys.executable, str(host / "host" / "vendor" / "fastprior.py"), "info"], cwd=host,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    if has_kernels(host):
        assert facts["backend"].startswith("numba")
    else:
        for fact in ("backend", "cuda"):
            assert MISSING.search(facts[fact])
        assert "slow" in facts["backend"] and "no" in facts["cuda"]


def test_without_typer_the_command_says_so(host):
    with_examples(host)
    code = START + "fp.main()"
    done = subprocess.run([sys.executable, "-c", code, "typer"], cwd=host, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install typer" in done.stderr
