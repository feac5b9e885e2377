"""What pip installs: a wheel's files, `fastprior bench --data` from them, the newest numba that was tried."""
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A wheel of this checkout, unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is in the extra `test`")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fastprior.py"):
        shutil.copy(ROOT / name, folder / "source")
    for name in ("kernels", "weights", "examples"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder,
                    folder / "source"], check=True, capture_output=True)
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_what_is_imported_and_read_and_no_scripts(site):
    files = {str(p.relative_to(site)) for p in site.rglob("*") if p.is_file() and ".dist-info" not in str(p)}
    code = {f for f in files if f.endswith(".py") and not f.startswith("fastprior_kernels/")}
    rooms = {f"fastprior_examples/{name}.py" for name in (
        "__init__", "backbones", "benchmark", "commands", "console", "curation", "export", "extraction",
        "fitting", "folders", "kept", "quantization", "ray_score", "region", "report", "tiles", "training",
        "watch")}
    assert code == {"fastprior.py", *rooms}
    kernels = {f"fastprior_kernels/{p.name}" for p in (ROOT / "kernels").iterdir()
               if p.suffix in (".py", ".cu", ".cuh")}
    assert {f for f in files if f.startswith("fastprior_kernels/")} == kernels
    weights = {"lite0.npz", "lite2.npz", "demo.npz", "README.md", "LICENSE-efficientnet"}
    assert {f[18:] for f in files if f.startswith("fastprior_weights/")} == weights


def test_bench_with_data_runs_from_the_installed_files(site, tmp_path):
    rng = np.random.default_rng(0)
    for kind, tone in (("good", 90), ("bad", 190)):
        (tmp_path / "part" / kind).mkdir(parents=True)
        for i in range(10):
            image = rng.normal(tone, 8, (64, 64)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "part" / kind / f"{i}.png")
    code = "import fastprior; print(fastprior.__file__); fastprior.main()"
    options = ["--data", "part", "--variants", "gaussian", "--steps", "1", "--size", "64", "--batch", "1"]
    done = subprocess.run([sys.executable, "-c", code, "bench", *options], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(site / "fastprior.py")
    assert "| lite0 | gaussian | 1 | 1.0000 |" in done.stdout


def test_numba_is_bounded_by_the_newest_that_was_tried():
    """To move the bound: raise the pin in constraints.txt, run the tests, and let this one say the bound."""
    major, minor = re.search(r"^numba==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M).groups()
    bound = re.search(r'"numba>=[\d.]+,<([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert bound == f"{major}.{int(minor) + 1}"
