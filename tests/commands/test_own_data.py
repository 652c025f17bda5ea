"""Rows of one's own through the commands: train, look at them, stop and resume, ask about them."""

import json
import random

import pytest

from sst_jax import dataset, evaluate, export, generate, train
from sst_jax.console.command import run
from sst_jax.inference.model import load
from tests.support import kills
from tests.support.problems import write_lines
from tests.support.runs import SMALL, TINY

AUTO = ["--config.data.name=auto", "--config.data.format=chat", "--config.data.length=96"]
COLOURS = ["red", "green", "blue", "black", "white", "pink"]


def talks(count, seed=0):
    """Conversations of one or two turns: what colour, and "and then?"."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        colour = rng.choice(COLOURS)
        talk = [{"role": "user", "content": f"Say {colour}"}, {"role": "assistant", "content": colour}]
        if rng.random() < 0.5:
            talk += [{"role": "user", "content": "Again"}, {"role": "assistant", "content": colour}]
        rows.append({"messages": talk})
    return rows


@pytest.fixture
def mixture(tmp_path):
    """Three sources of three formats, and the flags that train on them."""
    rng = random.Random(1)
    write_lines(tmp_path / "talks.jsonl", talks(20))
    pairs = [{"prompt": f"Say {colour}", "completion": colour} for colour in rng.choices(COLOURS, k=15)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(f'"Line {n}, of {n * n}"' for n in range(12)) + "\n")
    paths = ",".join(str(tmp_path / name) for name in ("talks.jsonl", "pairs.json", "texts.csv"))
    return [*AUTO, f"--config.data.path={paths}", "--config.data.weights=2.0,1.0,1.0"]


def trained(workdir, *flags):
    return run(train.main, ["--config", TINY, *SMALL, "--workdir", str(workdir), *flags])


@pytest.mark.slow
def test_a_mixture_trains_and_is_told(mixture, tmp_path, capsys):
    assert trained(tmp_path / "run", *mixture, "--config.data.heldout_share=0.2") == 0
    said = capsys.readouterr().out
    for part in (
        "talks.jsonl: 20 rows of messages (messages)",
        "pairs.json: 15 rows of prompt_completion (prompt, completion)",
        "texts.csv: 12 rows of text (text)",
        "examples of messages and prompt_completion and text; 9 held out",
    ):
        assert part in said
    assert run(generate.main, ["--model", str(tmp_path / "run"), "--question", "Say red", "--max-new-tokens", "3"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False])
def test_a_mixture_that_is_killed_resumes_bit_for_bit(mixture, tmp_path, pack):
    """At random moments, while it trains or saves, three times."""
    found = kills.kill(tmp_path / "runs", 3, 8, int(pack), [*mixture, f"--config.data.pack={pack}"])
    assert found["kills"] == 3


def test_a_path_that_would_not_be_read_is_refused(tmp_path, capsys):
    assert trained(tmp_path / "run", "--config.data.path=/does/not/exist") == 2
    error = capsys.readouterr().err
    assert "data.path=/does/not/exist is not read: data.name='words' is generated" in error
    assert "data.name=auto" in error
    assert not (tmp_path / "run").exists()


def test_dataset_shows_what_is_learned(tmp_path, capsys):
    file = write_lines(tmp_path / "talks.jsonl", [*talks(12), talks(1)[0]])
    flags = ["--config", TINY, *AUTO, f"--config.data.path={file}", "--config.data.heldout=1"]
    assert run(dataset.main, [*flags, "--show", "1", "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert "talks.jsonl: 13 rows of messages (messages)" in said
    found = json.loads((tmp_path / "found.json").read_text())
    (part,) = found["training"]
    assert (part["documents"], found["heldout"]["documents"], part["too_long"]) == (12, 1, 0)
    rows = [json.dumps(row) for row in [*talks(12), talks(1)[0]]]
    assert part["duplicates"] + found["overlap"] >= len(rows) - len(set(rows))
    (example,) = found["examples"]
    learned = [piece["text"] for piece in example["runs"] if piece["learned"]]
    assert all(text.removesuffix("<end_of_turn>") in COLOURS for text in learned)
    assert f"«{learned[0]}»" in said
    assert sum(len(piece["tokens"]) for piece in example["runs"]) == example["tokens"]
    assert run(dataset.main, [*flags, "--config.data.length=20"]) == 0
    assert "longer than data.length=20" in capsys.readouterr().out
    assert run(dataset.main, [*flags, "--show", "-1"]) == 2


@pytest.mark.slow
def test_a_task_of_ones_own_is_scored(finished, tmp_path, capsys):
    """Half of the references are what the model writes: half of its answers are right, at every depth."""
    asked = [{"prompt": f"Say {n}:", "answer": "x"} for n in range(6)]
    file, flags = tmp_path / "mine.jsonl", ["--depth", "1,2", "--max-new-tokens", "4", "--batch-size", "3"]
    command = ["--model", str(finished), "--task", str(write_lines(file, asked)), *flags, "--format", "plain"]
    assert run(evaluate.main, [*command, "--grade", "exact", "--out", str(tmp_path / "first")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "first" / "outcomes.jsonl").read_text().splitlines()]
    written = {line["id"]: line["output"] for line in lines if line["policy"] == "1"}
    right = [name for name, text in written.items() if text.strip()][:3]
    for row, name in zip(asked, written, strict=True):
        row["answer"] = written[name] if name in right else "something else"
    write_lines(file, asked)
    assert run(evaluate.main, [*command, "--grade", "exact", "--out", str(tmp_path / "second")]) == 0
    result = json.loads((tmp_path / "second" / "result.json").read_text())
    assert result["task"].endswith("mine.jsonl:exact")
    assert result["policies"]["1"]["strict"]["value"] == len(right) / 6
    assert run(evaluate.main, [*command, "--grade", "exact", "--out", str(tmp_path / "first")]) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    (tmp_path / "grade.py").write_text("def grade(text, row):\n    return row['prompt'] == 'Say 1:'\n")
    code = ["--grade", f"python:{tmp_path}/grade.py", "--out", str(tmp_path / "code")]
    assert run(evaluate.main, [*command, *code]) == 2
    assert "add --allow-code" in capsys.readouterr().err
    assert run(evaluate.main, [*command, *code, "--allow-code"]) == 0
    assert json.loads((tmp_path / "code" / "result.json").read_text())["policies"]["2"]["strict"]["value"] == 1 / 6


@pytest.mark.slow
@pytest.mark.optimised
def test_a_model_of_forty_rows_of_messages_ends_its_answers_itself(tmp_path):
    """At depth 1 and 4, by what the template ends a turn with."""
    file = write_lines(tmp_path / "talks.jsonl", talks(40))
    flags = [
        *AUTO, f"--config.data.path={file}", "--config.train.steps=150", "--config.optimizer.learning_rate=0.02",
        "--config.data.batch_size=8", "--config.train.eval_every=150", "--config.train.save_every=150",
        "--config.adapter.dropout=0.0",
    ]  # fmt: skip
    assert trained(tmp_path / "run", *flags) == 0
    model = load(tmp_path / "run")
    asked = [[{"role": "user", "content": f"Say {colour}"}] for colour in COLOURS]
    prompts, written = [model.tokenizer.chat(messages) for messages in asked], {}
    for depth in (1, 4):
        answers = model.generate(prompts, depth=depth, max_new_tokens=24)
        assert [answer.finished for answer in answers] == [True] * len(COLOURS), [answer.text for answer in answers]
        written[depth] = answers
    assert_the_server_stops(model, asked, written)
    assert_the_export_stops(tmp_path, prompts, written)


def assert_the_server_stops(model, asked, written):
    """Over the wire every answer ends by itself, and is the session's."""
    pytest.importorskip("uvicorn", reason="the server is an extra: sst-jax[serve]")
    from sst_jax.serving.queue import Engine
    from tests.support.server import start

    engine = Engine(model, rows=4, capacity=128)
    client, server, thread = start(engine)
    for depth, answers in written.items():
        for messages, answer in zip(asked, answers, strict=True):
            body = {"messages": messages, "max_tokens": 24, "temperature": 0, "depth": depth}
            status, found = client.send("POST", "/v1/chat/completions", body)
            assert status == 200, found
            (choice,) = found["choices"]
            assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", answer.text)
    server.should_exit = True
    thread.join(20)
    engine.close(10)


def assert_the_export_stops(folder, prompts, written):
    """PyTorch's own `generate` ends where ours does, by the eos ids in the folder."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.support.torch_exports import open_torch

    assert run(export.main, ["--from", str(folder / "run"), "--to", str(folder / "sst"), "--format", "sst"]) == 0
    exported = open_torch(folder / "sst")
    for depth, answers in written.items():
        for prompt, answer in zip(prompts, answers, strict=True):
            found = exported.generate(torch.tensor([prompt]), depth=depth, max_new_tokens=24, do_sample=False)[0]
            new = found[len(prompt) :].tolist()
            assert len(new) < 24
            assert new[-1] in exported.generation_config.eos_token_id
            assert new == answer.tokens or new[:-1] == answer.tokens
