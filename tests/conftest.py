"""What several test files share: one small trained model, its images, the real data where it is."""
import signal
import sys
from pathlib import Path

import pytest

import fastprior as fp

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "examples"))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def washers(tmp_path_factory):
    """The demo's generator: 24 good images, and test images of every kind, 96 px."""
    import subprocess
    folder = tmp_path_factory.mktemp("washers")
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_demo.py"), str(folder), "--good", "24",
                    "--test-good", "4", "--defects-per-type", "2", "--size", "96"],
                   check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def trained(washers):
    """A model with a denoiser that has been trained a little."""
    return fp.fit(washers, size=96, iterations=200, copies=2)


@pytest.fixture(scope="session")
def model_file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "washer.npz"
    trained.save(path)
    return path


@pytest.fixture(scope="session")
def pictures(washers):
    """Arrays of several sizes."""
    arrays = [fp.load_image(p) for p in fp.find_images(washers / "test")]
    return [arrays[0], arrays[1][:90, :70], arrays[5], arrays[6][10:], arrays[-1]]
