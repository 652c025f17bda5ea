"""Broken weight folders at the command line: one line that names the culprit, exit code 2, nothing written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sst_jax import convert, export, generate
from sst_jax.console.command import run
from sst_jax.errors import InputError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A Hugging Face folder of the tiny random model."""
    folder = tmp_path_factory.mktemp("weights") / "good"
    assert run(export.main, ["--from", "random:tiny", "--to", str(folder), "--format", "merged"]) == 0
    return folder


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors"


def missing_shard(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00001-of-00001.safetensors"


def changed(edit):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        culprit = edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return culprit

    return damage


def unknown(tensors):
    tensors["model.layers.0.router.weight"] = np.zeros(3, np.float32)
    return "model.layers.0.router.weight"


def lacking(tensors):
    del tensors["model.layers.3.mlp.up_proj.weight"]
    return "model.layers.3.mlp.up_proj.weight"


def misshapen(tensors):
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((5, 7), np.float32)
    return "model.layers.2.self_attn.q_proj.weight"


def bad_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json"


def other_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    return "mamba"


DAMAGES = [truncated, missing_shard, changed(unknown), changed(lacking), changed(misshapen), bad_config, other_family]


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_folders_are_named(good, tmp_path, capsys, damage):
    folder, target = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(good, folder)
    culprit = damage(folder)
    for command, extra in ((convert, ["--from", str(folder), "--to", str(target)]),
                           (generate, ["--model", str(folder), "--prompt", "x"])):  # fmt: skip
        capsys.readouterr()
        assert run(command.main, extra) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert culprit in message
    assert not target.exists()


def test_a_name_out_of_a_file_cannot_break_the_line_or_steer_the_terminal(capsys):
    def main(argv):
        raise InputError("a.gguf: key one\ntwo\x1b[2J\ud800 is missing")

    assert run(main, []) == 2
    assert capsys.readouterr().err == "error: a.gguf: key one two [2J  is missing\n"


def test_the_good_folder_is_good(good, tmp_path):
    """Or the tests above would pass for another reason."""
    assert run(convert.main, ["--from", str(good), "--to", str(tmp_path / "out")]) == 0
