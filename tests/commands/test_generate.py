"""generate, convert and export (merged): what they print and write, and what they refuse."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import sst_jax
from sst_jax import convert, export, generate
from sst_jax.console.command import run

QUESTION = "Ann has 3 boxes of 4 pens. How many pens has she?"


def test_generate_streams_what_the_model_says(finished, tmp_path, capsys):
    out = tmp_path / "answers.json"
    arguments = ["--model", str(finished), "--question", QUESTION, "--depth", "3", "--max-new-tokens", "9"]
    assert run(generate.main, [*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr()
    answer = json.loads(out.read_text())["answers"][0]
    assert answer["text"] in printed.out
    assert answer["depth"] == 3
    assert len(answer["tokens"]) <= 9
    assert "tokens in" in printed.err
    model = sst_jax.load(finished)
    expected = model.generate(f"Question: {QUESTION}\nAnswer:", depth=3, max_new_tokens=9)[0]
    assert answer["tokens"] == expected.tokens


@pytest.mark.parametrize(("tokens", "said"), [(1, "1 token in"), (2, "2 tokens in")])
def test_one_token_is_not_told_in_the_plural(finished, capsys, tokens, said):
    arguments = ["--model", str(finished), "--question", QUESTION, "--max-new-tokens", str(tokens)]
    assert run(generate.main, arguments) == 0
    assert said in capsys.readouterr().err


def test_generate_answers_a_file_of_prompts_in_one_batch(finished, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo and a half\n")
    out = tmp_path / "answers.json"
    arguments = ["--model", str(finished), "--prompts", str(prompts), "--max-new-tokens", "4", "--json", str(out)]
    assert run(generate.main, arguments) == 0
    answers = json.loads(out.read_text())["answers"]
    assert [answer["prompt"] for answer in answers] == ["one", "two and a half"]
    solo = sst_jax.load(finished).generate("two and a half", max_new_tokens=4)[0]
    assert answers[1]["tokens"] == solo.tokens


@pytest.mark.slow
def test_generate_writes_answers_to_jsonl_as_they_finish(finished, tmp_path, capsys):
    """Samples of prompts from JSONL, in batches that split a prompt's samples, with a policy of depths."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "one\\ntwo", "id": 7}\n\n{"prompt": "three"}\n')
    arguments = ["--model", str(finished), "--prompts", str(prompts), "--out", str(out), "--n", "3", "--batch", "2"]
    more = ["--max-new-tokens", "6", "--temperature", "1", "--seed", "5", "--depth", "first_token:3"]
    assert run(generate.main, [*arguments, *more]) == 0
    assert "first_token:3" in capsys.readouterr().err
    answers = sorted(map(json.loads, out.read_text().splitlines()), key=lambda each: (each["index"], each["sample"]))
    assert [(each["index"], each["sample"]) for each in answers] == [(i, j) for i in range(2) for j in range(3)]
    assert answers[0]["prompt"] == "one\ntwo"
    expected = sst_jax.load(finished).generate(
        ["one\ntwo", "three"], n=3, max_new_tokens=6, temperature=1.0, seed=5, depth="first_token:3"
    )
    assert [each["tokens"] for each in answers] == [each.tokens for each in expected]
    assert all(each["depths"] == [3] + [1] * (len(each["tokens"]) - 1) for each in answers)
    assert run(generate.main, [*arguments, *more]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "x"}\n{', "line 2"),
        ('{"text": "x"}', "text under 'prompt'"),
        ("[1]", "line 1"),
        ('{"prompt": 3}', "text under 'prompt'"),
    ],
)
def test_generate_names_the_line_of_a_bad_prompt(content, culprit, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert run(generate.main, ["--model", "nowhere", "--prompts", str(file)]) == 2
    message = capsys.readouterr().err
    assert culprit in message
    assert str(file) in message


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--model", "nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["--model", "random:huge", "--prompt", "x"], "random:huge"),
        (["--model", "random:tiny", "--prompt", "x", "--depth", "0"], "depth=0"),
        (
            ["--model", "random:tiny", "--prompt", "x", "--depth", "until_stable:0.1"],
            "until_stable:TOL:I, until_confident:P:I",
        ),
        (["--model", "random:tiny", "--prompt", "x", "--n", "0"], "--n 0"),
        (["--model", "random:tiny", "--prompt", "x", "--batch", "0"], "--batch 0"),
        (["--model", "random:tiny", "--prompt", "x", "--depth", "2"], "needs a model with a stream"),
        (["--model", "random:tiny", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--model", "random:tiny", "--prompt", "x", "--max-new-tokens", "99999"], "4096 positions"),
        (["--model", "random:tiny", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["--model", "random:tiny", "--prompt", "x", "--top-p", "2"], "top_p=2.0"),
        (["--model", "random:tiny", "--prompts", "/no/prompts.txt"], "/no/prompts.txt"),
        (["--model", "random:tiny", "--prompt", "x", "--format", "chat"], "--format goes with --question"),
        (["--model", "runs/typo", "--prompt", "x"], "there is no folder runs/typo here"),
        (["--model", "random:tiny"], "--prompt"),
        (["--prompt", "x"], "--model"),
        (["--model", "random:tiny", "--prompt", "x", "--depht", "2"], "--depht"),
    ],
)
def test_generate_refuses_in_one_line(arguments, culprit, capsys):
    assert run(generate.main, arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert culprit in message


def test_convert_keeps_every_array_and_the_run_answers_alike(finished, tmp_path, capsys):
    target = tmp_path / "base"
    assert run(convert.main, ["--from", str(finished), "--to", str(target)]) == 0
    ours, theirs = sst_jax.load(finished), sst_jax.load(target)
    assert ours.config == theirs.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), ours.params, theirs.params))
    tokens = [ours.tokenizer.encode(QUESTION)]
    assert np.array_equal(ours.logits(tokens), theirs.logits(tokens))


@pytest.mark.parametrize("command", [convert, export])
def test_a_folder_with_something_in_it_is_never_overwritten(command, finished, tmp_path, capsys):
    (tmp_path / "old").write_text("good")
    extra = ["--format", "merged"] if command is export else []
    assert run(command.main, ["--from", str(finished), "--to", str(tmp_path), *extra]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]


def test_convert_names_a_damaged_file(finished, tmp_path, capsys):
    target = tmp_path / "base"
    assert run(convert.main, ["--from", str(finished), "--to", str(target)]) == 0
    victim = max((target / "params").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 4
    victim.write_bytes(content)
    capsys.readouterr()
    assert run(convert.main, ["--from", str(target), "--to", str(tmp_path / "again")]) == 2
    assert victim.name in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_merged_export_loads_in_transformers_with_our_logits(finished, tmp_path, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    target = tmp_path / "merged"
    assert run(export.main, ["--from", str(finished), "--to", str(target), "--format", "merged"]) == 0
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] - {"lm_head.weight"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours = sst_jax.load(finished).without_stream()
    text = "Question: " + QUESTION
    tokens = ours.tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(target)(text)["input_ids"] == tokens
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits.numpy()
    got = np.asarray(ours.logits([tokens]))
    assert np.abs(got - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1)
    plain = sst_jax.load("random:tiny").logits([tokens])
    assert np.abs(np.asarray(plain) - expected).max() > 1e-2  # the adapter is in there


def test_merged_export_keeps_the_stream_beside_the_weights(finished, tmp_path, capsys):
    from safetensors.numpy import load_file

    target = tmp_path / "merged"
    assert run(export.main, ["--from", str(finished), "--to", str(target), "--format", "merged"]) == 0
    model = sst_jax.load(finished)
    stored = load_file(target / "stream.safetensors")
    assert np.array_equal(stored["theta"], model.params["blend"]["theta"])
    assert json.loads((target / "stream.json").read_text())["stream"]["state"] == "ffn"
    again = sst_jax.load(target)
    tokens = [model.tokenizer.encode(QUESTION)]
    plain = model.without_stream().logits(tokens)
    np.testing.assert_allclose(again.logits(tokens, forward="plain"), plain, atol=2e-4)
    np.testing.assert_allclose(again.logits(tokens), model.logits(tokens), atol=2e-4)


def test_help_reads_well_everywhere(capsys, monkeypatch):
    from sst_jax import train

    monkeypatch.setenv("COLUMNS", "100")
    for command in (convert, export, generate, train):
        assert run(command.main, ["--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: python -m {command.__name__}" in text
        assert all(len(line) <= 120 for line in text.splitlines())


def test_importing_the_package_is_light():
    """No torch, no TensorFlow, and nothing of JAX before it is needed; torch not even when generating."""
    code = (
        "import sys, sst_jax; heavy = {'torch', 'tensorflow', 'transformers', 'datasets'};"
        "assert not {'jax', *heavy} & set(sys.modules);"
        "sst_jax.load('random:tiny').generate('x', max_new_tokens=2); assert not heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_commands_are_modules():
    root = pathlib.Path(sst_jax.__file__).parent
    named = {file.stem for file in root.glob("*.py")} - {"__init__", "__main__", "errors", "files", "types"}
    assert named >= {"train", "convert", "export", "generate"}
    for name in named:
        assert "sys.exit(run(main))" in (root / f"{name}.py").read_text()
