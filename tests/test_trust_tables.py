"""examples/trust_tables.py: its shortcuts are what the product does, and its tables can be made."""
import subprocess
import sys

import numpy as np
import pytest

import fastprior as fp
import trust_tables
from conftest import ROOT

extraction = fp._room("extraction")

curation = fp._room("curation")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two products, drawn."""
    root = tmp_path_factory.mktemp("parts")
    for part in ("washer", "plate"):
        subprocess.run([sys.executable, ROOT / "examples" / "make_demo.py", root / part, "--part", part,
                        "--good", "66", "--test-good", "4", "--defects-per-type", "4", "--size", "64"],
                       check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def config():
    return fp.Settings(size=64, copies=1, factors=4)


def test_merged_is_as_if_extracted_together(parts, config):
    net, files = fp.load_backbone("lite0"), fp.find_images(parts / "plate" / "test")
    together = extraction.extract_features(files, config, net)
    parts = files[:5], files[5:]
    merged = trust_tables.merged(*(extraction.extract_features(part, config, net) for part in parts))
    assert merged.keys == together.keys
    assert merged.sources == [s if s < 5 else 4 - s for s in together.sources]
    for name in ("features", "owner", "looks", "fine"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(together, name))


@pytest.mark.parametrize("table, options", [("refits", ["--splits", "1", "--images", "40", "46"]),
                                            ("mixtures", ["--seeds", "1", "--images", "40", "46"]),
                                            ("traits", ["--splits", "2", "--images", "40", "46"]),
                                            ("products", ["--drawn", "2"])])
def test_tables(parts, table, options, tmp_path_factory, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is in the extras `bench` and `test`")
    cache = tmp_path_factory.getbasetemp() / "features"
    monkeypatch.setattr(fp._room("benchmark"), "_cache_folder", lambda: cache)
    monkeypatch.setattr(fp, "_CALIBRATED_STEPS", (2,))  # which the script changes
    monkeypatch.setattr(trust_tables, "FRAMES", 8)
    monkeypatch.setattr(trust_tables, "SHARES", (.05,))
    data = parts if table == "products" else parts / "plate"
    monkeypatch.setattr(sys, "argv", ["trust_tables.py", table, str(data), "--size", "64", *options])
    trust_tables.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and "nan" not in "".join(rows)
    if table == "refits":
        assert rows[0] == "|  | plate | all |" and rows[2].count("| 1; 4") == 2
        assert any(row.startswith("| defocused: warned") for row in rows)
    elif table == "traits":
        assert rows[2].startswith("| plate | 2; 4") and rows[3].startswith("| all | 2; 4")
        assert "| 0 of " in rows[3] and "%" in rows[3]
    elif table == "mixtures":
        assert [row.split(" | ")[0] for row in rows[2:]] == [f"| plate, {k}" for k in
                                                             ("missing", "mixed", "swapped")]
        assert all(" of 2; " in row for row in rows[2:])  # 5 % of 46
    else:
        assert "| plate, good | 4 | 0 | 4 | 0 | 0 |" in rows
        assert "| plate, unknown to the model | 4 | 4 | – | 0 | 4 |" in rows
