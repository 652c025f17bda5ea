"""Exports of every family, stream and all, in the releases of transformers that users may have."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sst_jax.families.registry import FAMILIES
from tests.support import toys
from tests.support.torch_exports import apart, model, write

pytest.importorskip("torch")

RELEASES = ("5.20.0", "5.21.1", "5.22.2", "5.23.0")  # the newest is what all other tests run on
STREAM = {"alpha_range": (0.0, 1.0), "iterate_prompt": "all"}
# Opens each folder that the first argument names, and writes depth 2's logits and twelve tokens beside it.
READER = """
import json, sys
import numpy as np, torch, transformers
torch.set_num_threads(1)
assert transformers.__version__ == sys.argv[2], transformers.__file__
for folder in json.loads(sys.argv[1]):
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, report)
    tokens = torch.from_numpy(np.load(folder + "/tokens.npy")).long()
    with torch.no_grad():
        logits = loaded.eval()(tokens, depth=2).logits.numpy()
    text = loaded.generate(tokens[:, :11], depth=2, max_new_tokens=12, do_sample=False)
    np.savez(folder + "/found.npz", logits=logits, text=text.numpy())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{family: (its folder, depth 2's logits, a prompt of 11 and what follows it)}."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family.name) / "sst"
        ours = model(STREAM, family.tiny)
        write(ours, folder)
        tokens = toys.tokens(1, 24, vocabulary=262)
        np.save(folder / "tokens.npy", tokens)
        (answer,) = ours.generate([tokens[0, :11].tolist()], depth=2, max_new_tokens=12)
        found[family.name] = folder, np.asarray(ours.logits(tokens, forward="exact", depth=2)), answer.tokens
    return found


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_an_export_opens_in_that_release(release, exported, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site"]
    if subprocess.run([*install, f"transformers=={release}"], capture_output=True).returncode:
        pytest.skip(f"no package index gave transformers {release}")
    folders = json.dumps([str(folder) for folder, _, _ in exported.values()])
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "code")}
    ran = subprocess.run(
        [sys.executable, "-c", READER, folders, release], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name, (folder, logits, tokens) in exported.items():
        with np.load(folder / "found.npz") as read:
            assert apart(read["logits"], logits) <= 1e-4, name
            assert read["text"][0, 11:].tolist()[: len(tokens)] == tokens, name
        (folder / "found.npz").unlink()
