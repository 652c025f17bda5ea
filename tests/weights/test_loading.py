"""One resolver: each thing that MODEL may be is a reference of its kind, and knows what opening it gives."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import sst_jax
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.inference.model import Model
from sst_jax.weights import huggingface, loading
from sst_jax.weights.provenance import Origin, Provenance
from tests.support import checkpoints

pytestmark = pytest.mark.optimised  # random bases are known by their bits

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1_0"
KINDS = {
    "base": loading.BaseFolder,
    "base_nf4": loading.BaseFolder,
    "run": loading.RunFolder,
    "adapter": loading.AdapterFolder,
    "sst": loading.HuggingFaceFolder,
    "merged": loading.HuggingFaceFolder,
}


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("name", KINDS)
def test_a_reference_knows_from_headers_what_opening_gives(name):
    reference = loading.resolve(FIXTURES / name)
    assert type(reference) is KINDS[name]
    assert reference.source is None  # none of them is a plain checkpoint
    dtype, backbone = reference.dtype, reference.backbone
    opened = reference.open(dtype)
    assert opened.config.backbone == backbone
    assert opened.params["base"]["embed"]["embedding"].dtype == dtype
    assert opened.provenance.quantize == ("nf4" if name == "base_nf4" else "none")


def test_a_plain_folder_and_a_preset(tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "plain", checkpoints.random_state())
    reference = loading.resolve(folder)
    assert type(reference) is loading.HuggingFaceFolder
    assert reference.source.kind == "huggingface"
    assert reference.dtype == huggingface.open_folder(folder).dtype
    preset = loading.resolve("random:tiny")
    assert (preset.dtype, preset.backbone, preset.source) == ("float32", PRESETS["tiny"], None)
    hub = loading.resolve("google/gemma-3-1b-pt")
    assert type(hub) is loading.HubId
    assert hub.backbone == PRESETS["1b"]


def test_what_is_none_of_them_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"")
    for name, message in (
        (tmp_path / "nowhere", "does not exist: give a folder"),
        (tmp_path / "empty", "is neither a Hugging Face folder"),
        (tmp_path / "weights.bin", "is a file, but not a GGUF file"),
        ("random:nothing", "random:nothing is unknown; presets are"),
        ("x" * 5000, r"^x{80}\.\.\.: File name too long$"),
    ):
        with pytest.raises(InputError, match=message):
            loading.resolve(name)


def test_a_run_names_itself_when_its_base_is_gone(tmp_path):
    for file in ("config.json", "base.json"):
        content = json.loads((FIXTURES / "run" / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | ({"path": "/gone"} if file == "base.json" else {})))
    with pytest.raises(InputError, match=r"the base of run .*, /gone \(from base.json\), cannot be opened: /gone does"):
        print(loading.resolve(tmp_path).dtype)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (3, "recipe=3 is malformed"),
        ([["kind"]], "recipe=.* is malformed"),
        ({"data": ["format"]}, r"recipe\.data=.* is malformed"),
        ({"data": {"format": ["plain"]}}, r"recipe\.data\.format=.* is malformed"),
    ],
    ids=str,
)
def test_a_malformed_recipe_of_a_run_is_named(tmp_path, recipe, message):
    run = shutil.copytree(FIXTURES / "run", tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "recipe": recipe}))
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        loading.open_model(run, "float32")


@pytest.mark.parametrize(("key", "value"), [("quantize", ["none"]), ("digest", {"a": {}}), ("path", 3)], ids=str)
def test_a_malformed_base_of_a_run_is_named(tmp_path, key, value):
    run = shutil.copytree(FIXTURES / "run", tmp_path / "run")
    content = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(InputError, match=rf"base\.json: {key}=.* is not text"):
        loading.open_model(run, "float32")


def test_a_provenance_survives_json_and_reads_what_0_1_0_wrote():
    for name in KINDS:
        found = loading.resolve(FIXTURES / name).open("float32").provenance
        assert Provenance.from_json(json.loads(json.dumps(found.to_json()))) == found
    header = json.loads((FIXTURES / "base" / "sst_jax.json").read_text())["facts"]
    base = loading.resolve(FIXTURES / "base").open("float32").provenance
    assert base.source == Origin(header["kind"], header["path"], header["digest"]) == base.origin
    assert (base.kind, base.unquantised) == ("base", base.identity)
    nf4 = loading.resolve(FIXTURES / "base_nf4").open("float32").provenance
    assert nf4.unquantised == nf4.source
    recorded = json.loads((FIXTURES / "run" / "base.json").read_text())
    assert loading.resolve(FIXTURES / "run").open("float32").provenance.base_record() == recorded
    stream = json.loads((FIXTURES / "adapter" / "stream.json").read_text())
    adapter = loading.resolve(FIXTURES / "adapter").open("float32").provenance
    assert (adapter.export_record(), adapter.prompt_format) == (stream["base"], stream["prompts"])


def test_what_save_writes_has_the_keys_of_0_1_0(tmp_path):
    model = sst_jax.load("random:tiny-llama", "float32")
    model.save(tmp_path / "base")
    ours = json.loads((tmp_path / "base" / "sst_jax.json").read_text())["facts"]
    theirs = json.loads((FIXTURES / "base" / "sst_jax.json").read_text())["facts"]
    assert list(ours) == list(theirs)


def test_malformed_records_are_named():
    for record in ({"step": "three"}, {"path": 3}, {"recipe": []}):
        (key,) = record
        with pytest.raises(InputError, match=f"here: {key}=.* is malformed"):
            Provenance.from_json(record, "here")
    with pytest.raises(InputError, match="here: source is malformed"):
        Provenance.from_json({"source": {"path": 3}}, "here")


def test_facts_of_a_model_still_give_a_dict_with_a_warning():
    opened = loading.open_model("random:tiny", "float32")
    model = Model(*opened[:3], dataclasses.replace(opened.provenance, prompt_format="chat"))
    with pytest.warns(DeprecationWarning, match="provenance"):
        facts = model.facts
    assert (facts["kind"], facts["path"], facts["prompts"]) == ("random", "random:tiny", "chat")
    assert Model(opened.config, opened.params, ByteTokenizer()).prompt_format == "plain"
    assert Model(opened.config, opened.params, ByteTokenizer()).prompt_format == "plain"


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
def test_a_run_on_random_weights_opens_in_either_type_with_the_weights_it_was_trained_on(tmp_path, trained_in):
    """Another type draws other numbers: those that the run has on record are cast to the type asked for."""
    run = shutil.copytree(FIXTURES / "run", tmp_path / "run")
    drawn = loading.open_model("random:tiny-llama", trained_in)
    recorded = json.loads((run / "base.json").read_text())
    digest = drawn.provenance.digest
    (run / "base.json").write_text(json.dumps({**recorded, "digest": digest, "dtype": trained_in}))
    for dtype in ("float32", "bfloat16"):
        opened = loading.open_model(run, dtype)
        assert opened.provenance.digest == digest
        for found, leaf in zip(
            jax.tree.leaves(opened.params["base"]), jax.tree.leaves(drawn.params["base"]), strict=True
        ):
            np.testing.assert_array_equal(found, leaf.astype(dtype))
    (run / "base.json").write_text(json.dumps({**recorded, "digest": "0" * 64}))
    with pytest.raises(InputError, match="is not the base that"):
        loading.open_model(run, "float32")
