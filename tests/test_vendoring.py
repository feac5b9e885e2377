"""One file and a model, in an empty folder, with everything optional made unimportable."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fastprior as fp
from conftest import ROOT

OPTIONAL = ("torch", "cupy", "typer", "rich", "PIL", "timm", "sklearn", "matplotlib", "onnxruntime")

SCORE = """
import json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import numpy as np
import fastprior as fp
prior = fp.Prior.load("model.npz")
images = np.load("images.npy")
results = prior.score_batch(list(images))
print(json.dumps([fp.__file__, prior.backend, [r.score for r in results], [float(r.anomaly_map.max()) for r in results]]))
"""


@pytest.fixture
def alone(tmp_path, model_file, pictures):
    folder = tmp_path / "tool"
    folder.mkdir()
    shutil.copy(ROOT / "fastprior.py", folder)
    shutil.copy(model_file, folder / "model.npz")
    np.save(folder / "images.npy", np.stack([pictures[0], pictures[2], pictures[4]]))
    return folder


def python(folder, code, *args, **environment):
    done = subprocess.run([sys.executable, "-P", "-c", "import sys; sys.path.insert(0, '.')\n" + code, *args], cwd=folder,
                          capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("without", [(), ("numba",), ("scipy", "numba")], ids=["numba", "no-numba", "numpy-alone"])
def test_a_copied_file_scores(alone, without, trained, pictures):
    text = python(alone, SCORE, ",".join(OPTIONAL + without))
    file, backend, scores, peaks = json.loads(text)
    assert file == str(alone / "fastprior.py") and backend == ("numpy" if "numba" in without else "numba")
    for image, score, peak in zip((pictures[0], pictures[2], pictures[4]), scores, peaks):
        want = trained.score(image)
        assert score == pytest.approx(want.score, rel=1e-4, abs=1e-4)
        assert peak == pytest.approx(float(want.anomaly_map.max()), rel=1e-3)


def test_kernels_are_compiled_once_and_kept(alone, tmp_path):
    cache, code = tmp_path / "cache", "import fastprior as fp, sys\nfp._CpuEngine()\nprint('numba' in sys.modules)"
    assert python(alone, code, XDG_CACHE_HOME=str(cache)) == "True\n"
    file, = (cache / "fastprior").iterdir()
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert python(alone, code, XDG_CACHE_HOME=str(cache)) == "False\n"  # Numba is not even imported
    assert file.stat().st_mtime_ns == written
    (alone / "good.npz").write_bytes(whole)
    quick = ("import fastprior as fp\nkept = fp._read_npz('good.npz')\n"  # 20 s saved each time
             "fp._compile_kernels = lambda m: print('compiled') or (kept[0]['names'], kept[1]['object'].tobytes())\n")
    file.write_bytes(whole[:5000])  # a spoilt file is compiled anew
    assert python(alone, quick + code, XDG_CACHE_HOME=str(cache)) == "compiled\nFalse\n" and file.stat().st_size == len(whole)
    with (alone / "fastprior.py").open("a") as f:
        f.write("# another version\n")
    assert python(alone, quick + code, XDG_CACHE_HOME=str(cache)) == "compiled\nFalse\n" and len(list(file.parent.iterdir())) == 2
    # as root nothing is read-only: a folder below a file can't be made
    text = python(alone, quick + SCORE, ",".join(OPTIONAL), XDG_CACHE_HOME=str(file))
    assert text.startswith("compiled") and json.loads(text.splitlines()[1])[1] == "numba"


def test_import_is_light():
    text = python(ROOT, "import fastprior; print(sorted({m.split('.')[0] for m in sys.modules}))")
    loaded = set(eval(text))
    assert not loaded & {*OPTIONAL, "numba", "llvmlite", "scipy"}


def test_scoring_imports_neither_torch_nor_the_rest(alone, trained, pictures):
    trained.score(pictures[0])  # so that the kernels are compiled
    text = python(alone, SCORE.replace("print(", "print(sorted({m.split('.')[0] for m in sys.modules})); print("), "none")
    assert set(eval(text.splitlines()[0])) & {*OPTIONAL, "numba", "scipy"} == set()


def test_what_is_missing_is_named(alone, model_file):
    code = SCORE.replace('prior.score_batch(list(images))', 'None\ntry: prior.score("x.png")\nexcept fp.FastPriorError as e: print(e)')
    assert "pip install pillow" in python(alone, code.replace("print(json", "0 and print(json"), ",".join(OPTIONAL))
    code = "import fastprior as fp\ntry: fp.load_backbone('lite0')\nexcept fp.FastPriorError as e: print(e)"
    assert "copy the folder weights/" in python(alone, code)
    code = "import fastprior as fp\ntry: fp._kernel_source('product')\nexcept fp.FastPriorError as e: print(e)"
    assert "copy the folder kernels/" in python(alone, code)


def test_without_typer_the_command_says_so(alone):
    done = subprocess.run([sys.executable, "-c", "import sys; sys.modules['typer'] = None; import fastprior; fastprior.main()"],
                          cwd=alone, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install typer" in done.stderr


def test_every_threshold_is_the_same_in_the_copy(alone, trained):
    code = "import fastprior as fp; print(fp.Prior.load('model.npz').threshold.value)"
    assert float(python(alone, code)) == fp.conformal_threshold(trained.calibration["scores"], .01).value
