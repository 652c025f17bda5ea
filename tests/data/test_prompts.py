"""Examples: the prompt is generation's prompt, the mask is the answer, and the tokens say what the text says."""

import json

import numpy as np
import pytest

from sst_jax.data.documents import Problem, result_only
from sst_jax.data.problems import word_problems
from sst_jax.data.prompts import FORMATS, answer_text, prompt_tokens, read_prompts, render
from sst_jax.data.records import read_csv
from sst_jax.errors import InputError
from tests.support.problems import load_gsm8k

PROBLEM = Problem("p/1", " How many are 2 and 3? ", "2 + 3 = 5.", "5")


@pytest.fixture(params=["byte", "gemma"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_plain(tokenizer):
    example = render(PROBLEM, tokenizer, "plain")
    assert example.tokens.dtype == np.int32
    assert example.answer_mask.dtype == bool
    assert example.id == "p/1"
    assert tokenizer.decode(example.tokens) == "Question: How many are 2 and 3?\nAnswer: 2 + 3 = 5.\n#### 5"
    assert tokenizer.decode(example.tokens[~example.answer_mask]) == "Question: How many are 2 and 3?\nAnswer:"
    assert example.tokens[-1] == tokenizer.eos_id
    assert example.answer_mask[-1]


def test_chat(tokenizer):
    example = render(PROBLEM, tokenizer, "chat")
    turns = [{"role": "user", "content": PROBLEM.question}, {"role": "assistant", "content": answer_text(PROBLEM)}]
    assert example.tokens.tolist() == tokenizer.chat(turns, add_generation_prompt=False)
    assert tokenizer.decode(example.tokens[example.answer_mask]) == "2 + 3 = 5.\n#### 5"
    # Generation ends with <end_of_turn>: the newline of the template behind it is not scored.
    scored = example.tokens[example.answer_mask]
    assert scored[-1] == tokenizer.piece_id("<end_of_turn>")
    newline = tokenizer.encode_text("\n")
    assert example.tokens[-len(newline) :].tolist() == newline
    assert not example.answer_mask[-1]


@pytest.mark.parametrize("format", FORMATS)
def test_prompt_is_the_same_for_training_and_generation(tokenizer, format):
    for problem in [PROBLEM, *word_problems("train", 20)]:
        example = render(problem, tokenizer, format)
        prompt = prompt_tokens(problem.question, tokenizer, format)
        first = int(np.argmax(example.answer_mask))
        assert example.tokens[:first].tolist() == prompt
        assert prompt[0] == tokenizer.bos_id
        assert example.tokens.tolist().count(tokenizer.bos_id) == 1
        # One contiguous answer, ended by a token that stops generation, and no stop inside it.
        answer = example.tokens[example.answer_mask].tolist()
        assert example.answer_mask[first : first + len(answer)].all()
        assert [token in tokenizer.stop_ids for token in answer] == [False] * (len(answer) - 1) + [True]


def test_tokenised_apart_as_well_as_together(gemma, gsm8k_folder):
    """The split between prompt and answer costs no tokens: a space stays with the word behind it."""
    for problem in load_gsm8k(str(gsm8k_folder), "test")[:300]:
        text = f"Question: {problem.question}\nAnswer: {answer_text(problem)}"
        assert render(problem, gemma).tokens.tolist() == [*gemma.encode(text), gemma.eos_id]


def test_other_formats_are_refused(byte):
    for call in (lambda: render(PROBLEM, byte, "xml"), lambda: prompt_tokens("x", byte, "xml")):
        with pytest.raises(InputError, match=r"data\.format='xml' is not one of 'plain', 'chat'"):
            call()


def test_an_answer_without_its_steps_is_the_result_alone(tokenizer):
    (problem,) = result_only([PROBLEM])
    example = render(problem, tokenizer, "plain")
    assert tokenizer.decode(example.tokens) == "Question: How many are 2 and 3?\nAnswer: 5"


ODD = "a\u2028b\x85c\x0bd"  # what `str.splitlines` would split, and JSON and text files do not


def test_prompt_files_end_their_lines_where_others_do(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": ODD, "id": 3}, ensure_ascii=False) + "\n\n", "utf-8")
    assert read_prompts(str(tmp_path / "a.jsonl")) == [{"prompt": ODD, "id": 3}]
    (tmp_path / "a.txt").write_text(f"one\n\n{ODD}\n", "utf-8")
    assert [record["prompt"] for record in read_prompts(str(tmp_path / "a.txt"))] == ["one", ODD]


def test_csv_cells_end_where_others_end_them(tmp_path):
    (tmp_path / "a.csv").write_text(f'Question,Answer\r\n{ODD},"two\nlines"\r\nx,y\r\n', "utf-8", newline="")
    rows = [value for _, _, value in read_csv(tmp_path / "a.csv")]
    assert rows == [{"Question": ODD, "Answer": "two\nlines"}, {"Question": "x", "Answer": "y"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "x", "id": 3},
            r"--prompts .*a\.jsonl, line 2: the row has 'question', 'id', and needs text under",
        ),
        ({"prompt": 3}, r"a\.jsonl, line 2: the row has 'prompt', and needs text under 'prompt'"),
        (["x"], r"a\.jsonl, line 2: not a JSON object"),
    ],
)
def test_a_prompt_file_of_other_rows_is_named_by_line_and_keys(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        read_prompts(str(tmp_path / "a.jsonl"))
