"""Bases in NF4 through the commands: convert, train, generate, export."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import sst_jax
from sst_jax import analyze, convert, export
from sst_jax.console.command import run
from sst_jax.model.quantization import storages
from tests.support.runs import train_small
from tests.support.torch_exports import apart, open_torch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model as a float32 folder, and that folder converted to NF4."""
    root = tmp_path_factory.mktemp("bases")
    assert run(convert.main, ["--from", "random:tiny", "--to", str(root / "plain")]) == 0
    assert run(convert.main, ["--from", str(root / "plain"), "--to", str(root / "nf4"), "--quantize", "nf4"]) == 0
    return root


@pytest.fixture(scope="module")
def run_on_nf4(folders, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "on-nf4"
    assert train_small(workdir, f"--config.model.source={folders / 'nf4'}") == 0
    return workdir


def trees_equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_a_converted_folder_is_what_loading_with_quantize_gives(folders, tmp_path, kind):
    from sst_jax.weights.loading import open_model

    target = tmp_path / kind
    assert run(convert.main, ["--from", str(folders / "plain"), "--to", str(target), "--quantize", kind]) == 0
    model, opened = sst_jax.load(target), open_model("random:tiny", "float32", kind)
    assert trees_equal(model.params["base"], opened.params["base"])
    assert storages.kind_of(model.params["base"]) == model.provenance.quantize == opened.provenance.quantize == kind
    assert model.params["base"]["embed"]["embedding"].dtype == np.float32
    # Another type for the floats leaves the quantised linears bit for bit.
    narrow = sst_jax.load(target, "bfloat16").params["base"]
    assert narrow["embed"]["embedding"].dtype == jax.numpy.bfloat16
    assert trees_equal(narrow["layers"]["q"], opened.params["base"]["layers"]["q"])


@pytest.mark.slow
def test_training_quantises_as_it_reads_and_resumes(folders, run_on_nf4, tmp_path):
    reading = tmp_path / "reading"
    assert train_small(reading, f"--config.model.source={folders / 'plain'}", "--config.model.quantize=nf4") == 0
    base = json.loads((reading / "base.json").read_text())
    assert base["quantize"] == "nf4"
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (reading, run_on_nf4))
    assert ours["heldout_loss"] == theirs["heldout_loss"]
    assert ours["heldout_after"] < ours["heldout_before"]
    assert storages.kind_of(sst_jax.load(reading).params["base"]) == "nf4"


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["original", "dequantized"])
def test_export_merges_onto_the_base_that_is_asked_for(folders, run_on_nf4, tmp_path, capsys, choice):
    target, out = tmp_path / "merged", tmp_path / "out.json"
    arguments = ["--from", str(run_on_nf4), "--to", str(target), "--format", "merged", "--merge-base", choice]
    assert run(export.main, [*arguments, "--dtype", "float32", "--json", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    trained = sst_jax.load(run_on_nf4).without_stream()
    layers = trained.params["base"]["layers"]
    if choice == "original":
        layers = sst_jax.load(folders / "plain").params["base"]["layers"]
        assert 0.05 < result["gap"]["all"] < 0.15
        assert f"{result['gap']['all']:.2%} away" in printed
    else:
        layers = storages.dequantise(layers, np.float32)
        assert result["gap"] is None
    trained.params["base"] = {**trained.params["base"], "layers": layers}
    tokens = [trained.tokenizer.encode("three and four")]
    merged = np.asarray(sst_jax.load(target).logits(tokens, forward="plain"))
    expected = np.asarray(trained.logits(tokens))
    assert np.abs(merged - expected).max() <= 1e-4 * np.abs(expected).max()
    gap = result["logit_gap"]["relative"]
    assert gap > 1e-3 if choice == "original" else gap < 1e-5
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        theirs = loaded.eval()(torch.tensor(tokens)).logits.numpy()
    assert np.abs(theirs - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_a_run_on_nf4_keeps_its_numbers_with_the_stream_on(run_on_nf4, tmp_path):
    """As a PyTorch model over the dequantised weights, and as an adapter that finds its NF4 base again."""
    trained = sst_jax.load(run_on_nf4)
    arguments = ["--from", str(run_on_nf4), "--to", str(tmp_path / "adapter"), "--format", "adapter"]
    assert run(export.main, arguments) == 0
    back = sst_jax.load(tmp_path / "adapter")
    assert back.provenance.quantize == "nf4"
    assert back.config == trained.config
    assert trees_equal(back.params, trained.params)
    torch = pytest.importorskip("torch")
    arguments = ["--from", str(run_on_nf4), "--to", str(tmp_path / "sst"), "--format", "sst"]
    assert run(export.main, [*arguments, "--merge-base", "dequantized", "--dtype", "float32"]) == 0
    tokens = [trained.tokenizer.encode("three and four")]
    with torch.no_grad():
        got = open_torch(tmp_path / "sst")(torch.tensor(tokens), depth=2).logits
    assert apart(got, trained.logits(tokens, depth=2)) <= 1e-4


def test_export_says_when_the_original_is_gone_or_another(folders, tmp_path, capsys):
    root = pathlib.Path(shutil.copytree(folders, tmp_path / "bases"))
    assert run(convert.main, ["--from", str(root / "plain"), "--to", str(root / "mine"), "--quantize", "nf4"]) == 0
    arguments = ["--from", str(root / "mine"), "--to", str(tmp_path / "out"), "--format", "merged"]
    (root / "plain").rename(root / "moved")
    assert run(export.main, arguments) == 2
    assert "--merge-base dequantized" in capsys.readouterr().err
    assert run(convert.main, ["--from", "random:tiny", "--to", str(root / "plain"), "--dtype", "bfloat16"]) == 0
    assert run(export.main, arguments) == 2
    assert "is not what" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(export.main, [*arguments, "--merge-base", "dequantized"]) == 0


def test_refusals_in_one_line(folders, tmp_path, capsys):
    arguments = ["--from", str(folders / "nf4"), "--to", str(tmp_path / "x"), "--quantize", "nf4_double"]
    assert run(convert.main, arguments) == 2
    assert "stored as nf4" in capsys.readouterr().err
    assert train_small(tmp_path / "run", "--config.model.quantize=int8") == 2
    assert "model.quantize='int8'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_copy_of_a_quantised_base_is_merged_onto_the_first_original(folders, tmp_path, capsys):
    """What stands on NF4 and is saved whole knows the weights that the first of them was quantised from."""
    sst_jax.load(folders / "nf4").with_stream(alpha=0.03).save(tmp_path / "copy")
    sst_jax.load(tmp_path / "copy").save(tmp_path / "second")
    found = json.loads((tmp_path / "second" / "sst_jax.json").read_text())["facts"]
    assert found["path"] == sst_jax.load(folders / "nf4").provenance.source.path
    for folder in (tmp_path / "copy", tmp_path / "second"):
        out = tmp_path / f"{folder.name}.json"
        arguments = ["--from", str(folder), "--to", str(tmp_path / f"merged-{folder.name}"), "--format", "merged"]
        assert run(export.main, [*arguments, "--dtype", "float32", "--json", str(out)]) == 0
        assert 0.05 < json.loads(out.read_text())["gap"]["all"] < 0.15
        said = capsys.readouterr().out
        assert "The weights are the original ones of nf4" in said
        assert "LoRA was" not in said
        merged = sst_jax.load(tmp_path / f"merged-{folder.name}").params["base"]["layers"]
        assert trees_equal(merged, sst_jax.load(folders / "plain").params["base"]["layers"])


def test_the_original_of_a_chain_of_quantised_bases(folders):
    from sst_jax.weights.originals import open_original

    provenance = sst_jax.load(folders / "nf4").provenance
    assert provenance.stored == "nf4"
    chained = dataclasses.replace(provenance, source=provenance.identity)
    assert open_original(chained, "float32").provenance.quantize == "none"


@pytest.mark.slow
def test_errors_of_the_forwards_are_measured_on_a_quantised_base(folders, tmp_path):
    arguments = ["approximation", "--model", str(folders / "nf4"), "--out", str(tmp_path / "out"), "--batch", "1"]
    settings = ["--alphas", "0.01,0.04", "--forwards", "two_pass", "--lengths", "24"]
    assert run(analyze.main, [*arguments, *settings]) == 0
    (line,) = json.loads((tmp_path / "out" / "result.json").read_text())["orders"]
    assert line["logits"] == pytest.approx(2, abs=0.25)


def test_rounding_a_quantised_base_leaves_its_linears(folders):
    """In bfloat16 only what a bfloat16 model would have is narrower: weights out of codes are bfloat16 numbers."""
    from sst_jax.weights.loading import open_model

    base = open_model("random:tiny", "float32", "nf4_double").params["base"]
    narrow = storages.cast(base, "bfloat16")
    assert narrow["embed"]["embedding"].dtype == jax.numpy.bfloat16
    assert trees_equal(narrow["layers"]["gate"], base["layers"]["gate"])
    assert narrow["layers"]["gate"]["scale_low"].dtype == np.float32
