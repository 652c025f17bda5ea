"""Which base a model stands on: revisions of hub ids, bases that lie elsewhere now, and digests that guard both."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

import sst_jax
from sst_jax import convert, export, generate, train
from sst_jax.console.command import run as run_command
from sst_jax.errors import InputError
from sst_jax.weights import loading, peft
from sst_jax.weights.provenance import BaseRecord
from tests.support import toys
from tests.support.torch_exports import SHALLOW, apart, model, write
from tests.weights.test_peft import trained_on
from tests.weights.test_version_0_1_0 import RECIPE

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1_0"
FIRST, SECOND = "a" * 40, "b" * 40  # commits
TOKENS = toys.tokens(1, 15)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of acme/tiny: main is its first commit, v2 the second, with other weights."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    for seed, commit in enumerate((FIRST, SECOND)):
        write(model(None, SHALLOW, rank=0, seed=seed), repository / "snapshots" / commit, "merged")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "refs" / "v2").write_text(SECOND)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def logits(*args, **settings):
    return np.asarray(sst_jax.load(*args, **settings).logits(TOKENS, forward="plain"))


def test_a_revision_of_a_hub_id_is_opened_and_recorded(hub):
    for name, commit in (("acme/tiny", FIRST), ("acme/tiny@v2", SECOND), (f"acme/tiny@{SECOND}", SECOND)):
        opened = sst_jax.load(name)
        assert (opened.provenance.path, opened.provenance.revision) == ("acme/tiny", commit)
        np.testing.assert_array_equal(opened.logits(TOKENS), logits(hub / "snapshots" / commit))
    assert apart(logits("acme/tiny"), logits("acme/tiny@v2")) > 0.1
    with pytest.raises(InputError, match=r"no folder acme/tiny@v9 here.*acme/tiny is not cached \(revision v9\)"):
        sst_jax.load("acme/tiny@v9")
    assert "revision" not in sst_jax.load(hub / "snapshots" / FIRST).provenance.to_json()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True), ("owner/name@main", True), ("owner/name@refs/pr/3", True), ("owner/name@v1.0-rc", True),
        ("owner/name@", False), ("owner@v1/name", False), ("owner/name@@a", False), ("/owner/name@a", False),
        ("owner/name@a/../b", False),
    ],
)  # fmt: skip
def test_what_a_hub_id_is(name, expected):
    assert loading.is_hub_id(name) == expected


def test_an_adapters_revision_is_the_one_that_peft_opens(hub, tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(hub / "snapshots" / SECOND, dtype=torch.float32)
    lora = theirs.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, revision="v2"
    )
    theirs.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "acme/tiny"}))
    adapted = theirs.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        assert apart(logits(tmp_path / "adapter"), adapted(torch.tensor(TOKENS).long()).logits) <= 1e-4
    # Without a digest no other revision may stand in for it.
    (hub / "refs" / "v2").unlink()
    with pytest.raises(InputError, match=r"the base of adapter .*acme/tiny.*revision v2"):
        sst_jax.load(tmp_path / "adapter")


def test_exports_record_the_revision_and_open_at_it_when_main_has_moved(hub, tmp_path):
    ours = trained_on(sst_jax.load("acme/tiny"))
    folder = write(ours, tmp_path / "adapter", "adapter")
    config = json.loads((folder / peft.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", FIRST)
    assert json.loads((folder / "stream.json").read_text())["base"]["revision"] == FIRST
    assert f"acme/tiny at revision `{FIRST}`" in (folder / "README.md").read_text()
    named = write(ours, tmp_path / "named", "adapter", base_name="other/copy@v3")
    config = json.loads((named / peft.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("other/copy", "v3")

    (hub / "refs" / "main").write_text(SECOND)
    np.testing.assert_array_equal(logits(folder), ours.logits(TOKENS, forward="plain"))
    # The commit is gone and the weights are the same under main: the digest says so.
    (hub / "refs" / "main").write_text("c" * 40)
    (hub / "snapshots" / FIRST).rename(hub / "snapshots" / ("c" * 40))
    np.testing.assert_array_equal(logits(folder), ours.logits(TOKENS, forward="plain"))
    (hub / "refs" / "main").write_text(SECOND)
    with pytest.raises(InputError, match=r"acme/tiny is not the base that .*adapter was trained on"):
        sst_jax.load(folder)


def test_a_converted_base_remembers_the_revision(hub, tmp_path):
    assert run_command(convert.main, ["--from", "acme/tiny@v2", "--to", str(tmp_path / "base")]) == 0
    assert json.loads((tmp_path / "base" / "sst_jax.json").read_text())["facts"]["revision"] == SECOND
    opened = sst_jax.load(tmp_path / "base")
    assert opened.provenance.revision is None
    assert opened.provenance.origin.revision == SECOND
    sst_jax.load("acme/tiny@v2").save(tmp_path / "copy")
    assert sst_jax.load(tmp_path / "copy").provenance.origin == opened.provenance.origin


def test_an_adapter_whose_folder_is_gone_opens_by_the_bases_name(hub, tmp_path):
    shutil.copytree(hub / "snapshots" / FIRST, tmp_path / "base")
    ours = trained_on(sst_jax.load(tmp_path / "base"))
    folder = write(ours, tmp_path / "adapter", "adapter", base_name="acme/tiny")
    other = write(ours, tmp_path / "other", "adapter", base_name="acme/tiny@v2")
    shutil.rmtree(tmp_path / "base")
    np.testing.assert_array_equal(logits(folder), ours.logits(TOKENS, forward="plain"))
    with pytest.raises(InputError, match=r"acme/tiny is not the base that .*other was trained on"):
        sst_jax.load(other)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """(A run and an adapter of 0.1.0 whose base was a folder, where that lies now)."""
    folder = tmp_path_factory.mktemp("moved")
    source = sst_jax.load("random:tiny-llama", "float32")
    write(source, folder / "base", "merged")
    now = sst_jax.load(folder / "base", "float32")
    record = {"path": "/gone/base", "digest": now.provenance.digest, "kind": "huggingface"}
    run, adapter = (shutil.copytree(FIXTURES / name, folder / name) for name in ("run", "adapter"))
    edit(run / "base.json", lambda content: content | record)
    edit(adapter / "stream.json", lambda content: content | {"base": content["base"] | record})
    edit(adapter / peft.CONFIG, lambda content: content | {"base_model_name_or_path": "/gone/base"})
    edit(run / "config.json", lambda content: content["recipe"]["model"].update(source="/gone/base") or content)
    return run, adapter, folder / "base"


def edit(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.optimised
@pytest.mark.parametrize("which", [0, 1], ids=["run", "adapter"])
def test_another_place_of_a_base_is_named_and_guarded_by_its_digest(moved, tmp_path, which):
    folder, base = moved[which], moved[2]
    with pytest.raises(InputError, match=r"/gone/base.* cannot be opened: .*--base names another place of it"):
        sst_jax.load(folder, "float32")
    found = sst_jax.load(folder, "float32", base=base)
    assert found.provenance.path == str(base)
    with np.load(FIXTURES / "logits.npz") as recorded:
        expected = recorded[("run", "adapter")[which]]
        np.testing.assert_allclose(found.logits(recorded["tokens"], forward="plain"), expected, rtol=0, atol=1e-5)
    assert loading.resolve(folder, base).dtype == "float32"
    write(model(None, found.config.backbone, rank=0), tmp_path / "false", "merged")
    with pytest.raises(InputError, match=r"false is not the base that .* was trained on: its digest is"):
        sst_jax.load(folder, "float32", base=tmp_path / "false")
    with pytest.raises(InputError, match=r"/gone/too.* cannot be opened: /gone/too does not exist"):
        sst_jax.load(folder, "float32", base="/gone/too")


def test_what_stands_by_itself_has_no_other_base(moved, hub):
    for name in (moved[2], "random:tiny", "acme/tiny"):
        with pytest.raises(InputError, match=r"--base here: .* is no run and no adapter"):
            sst_jax.load(name, base="here")


@pytest.mark.slow
def test_commands_take_the_place_of_a_base(moved, tmp_path, capsys):
    run, _, base = moved
    asked = ["--prompt", "hi", "--max-new-tokens", "2", "--dtype", "float32"]
    assert run_command(generate.main, ["--model", str(run), *asked]) == 2
    assert "--base names another place" in capsys.readouterr().err
    assert run_command(generate.main, ["--model", str(run), "--base", str(base), *asked]) == 0
    written = ["--to", str(tmp_path / "merged"), "--format", "merged"]
    assert run_command(export.main, ["--from", str(run), "--base", str(base), *written]) == 0
    assert "logits of the export against the model's" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumes_on_the_base_where_it_lies_now(moved, tmp_path, capsys):
    run, _, base = moved
    knobs = [f"--config.{key}={value}" for key, value in (RECIPE | {"model.source": "/gone/base"}).items()]
    command = ["--config", "configs/tiny.py", *knobs]
    assert run_command(train.main, [*command, "--workdir", str(tmp_path / "new"), "--base", str(base)]) == 2
    assert "is for a run that resumes" in capsys.readouterr().err
    copy = shutil.copytree(run, tmp_path / "run")
    assert run_command(train.main, [*command, "--workdir", str(copy)]) == 2
    assert run_command(train.main, [*command, "--workdir", str(copy), "--base", str(base)]) == 0
    assert (copy / "base.json").read_text() == (run / "base.json").read_text()


def test_names_of_a_recorded_base():
    assert loading.names_of(BaseRecord("acme/tiny", None, None, "v2")) == ["acme/tiny@v2"]
    assert loading.names_of(BaseRecord("acme/tiny", "0" * 64, None, "v2")) == ["acme/tiny@v2", "acme/tiny"]
    assert loading.names_of(BaseRecord("acme/tiny", "0" * 64, None)) == ["acme/tiny"]
    assert loading.names_of(BaseRecord("/a/folder", None, None, "main")) == ["/a/folder"]
