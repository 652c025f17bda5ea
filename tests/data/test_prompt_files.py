"""JSON lines are read as such under any of their names, and never asked as prompts."""

import json

import pytest

from sst_jax.data.prompts import read_prompts
from sst_jax.errors import InputError

LINES = '{"prompt": "the cat"}\n\n{"prompt": "the dog", "id": 3}\n'
RECORDS = [{"prompt": "the cat"}, {"prompt": "the dog", "id": 3}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "prompts.json", "a.Json", "a.ndjson"])
def test_json_lines_by_every_name(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert read_prompts(str(tmp_path / name)) == RECORDS


def test_arrays_and_tables_are_read_as_data_sets_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "a.csv").write_text("prompt,id\nthe cat,1\nthe dog,2\n")
    assert read_prompts(str(tmp_path / "a.json")) == RECORDS
    assert [record["prompt"] for record in read_prompts(str(tmp_path / "a.csv"))] == ["the cat", "the dog"]
    (tmp_path / "a.json").write_text('{"prompt": "one alone"}')
    assert read_prompts(str(tmp_path / "a.json")) == [{"prompt": "one alone"}]
    (tmp_path / "a.json").write_text("[3]")
    with pytest.raises(InputError, match=r"a\.json, element 1: not a JSON object"):
        read_prompts(str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.txt", "prompts"])
def test_json_lines_by_another_name_are_not_asked(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    with pytest.raises(InputError, match=rf"{name} holds JSON, an object a line: name it {name.split('.')[0]}\.jsonl"):
        read_prompts(str(tmp_path / name))
    # A prompt may hold JSON.
    (tmp_path / name).write_text(LINES + "What is this?\n")
    assert len(read_prompts(str(tmp_path / name))) == 3


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [record["prompt"] for record in read_prompts(str(tmp_path / "a.txt"))] == ["one", "two"]
