"""Rows in every container: the same records from each, one place a row, and clear words for what is none."""

import json

import pytest

from sst_jax.data.records import READERS, read_file, read_hub
from sst_jax.errors import InputError
from tests.support.row_files import jsonl, write_rows

ODD = 'line\nbreak, "quotes", \u2028 and \u2029, caf\u00e9 \U0001f600'
ROWS = [{"prompt": "a", "completion": ODD}, {"prompt": ODD, "completion": "b"}, {"prompt": "c", "completion": " d "}]


@pytest.mark.parametrize("suffix", [*READERS, ".JSONL", ".Parquet"])
def test_every_container_gives_the_same_rows(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(write_rows(tmp_path / f"b{suffix.lower()}", ROWS).read_bytes())
    records = list(read_file(file))
    assert [record.value for record in records] == ROWS
    assert [record.place for record in records] == [0, 1, 2]
    assert all(record.where.startswith(f"{file}, ") for record in records)


@pytest.mark.parametrize(
    "content",
    [
        jsonl(ROWS) + b"\n",
        b"\xef\xbb\xbf" + jsonl(ROWS),
        jsonl(ROWS).replace(b"\n", b"\r\n"),
        b"\n\n" + jsonl(ROWS).replace(b"\n", b"\n \n") + b"\n\n",
    ],
    ids=["last line break", "BOM", "CRLF", "empty lines"],
)
def test_lines_may_end_and_begin_in_many_ways(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert [record.value for record in read_file(tmp_path / "a.jsonl")] == ROWS


@pytest.mark.parametrize("key", ["data", "rows"])
def test_a_json_file_may_hold_its_rows_under_a_key_or_be_lines(tmp_path, key):
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", key: ROWS}))
    (tmp_path / "b.json").write_bytes(jsonl(ROWS))
    (tmp_path / "one.json").write_text(json.dumps({"messages": [1, 2]}))
    assert [record.value for record in read_file(tmp_path / "a.json")] == ROWS
    assert [record.value for record in read_file(tmp_path / "b.json")] == ROWS
    assert [record.value for record in read_file(tmp_path / "one.json")] == [{"messages": [1, 2]}]


def test_lines_and_cells_of_ten_megabytes(tmp_path):
    rows = [{"prompt": "a", "completion": "x" * 10_000_000}]
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.json"):
        assert [record.value for record in read_file(write_rows(tmp_path / name, rows))] == rows


def test_a_place_is_that_of_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [(record.place, record.where) for record in read_file(tmp_path / "a.jsonl")] == [
        (0, f"{tmp_path}/a.jsonl, line 1"),
        (2, f"{tmp_path}/a.jsonl, line 3"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, line 1: not UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "a.jsonl: is UTF-16; save it as UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv: is UTF-16; save it as UTF-8"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv, line 3: not as many cells as the header has"),
        ("a.csv", b"a,b\n1,\xff\n", "a.csv: not UTF-8"),
        ("a.json", b"7", "a.json: holds neither a JSON array nor JSON lines"),
        ("a.json", b'[{"a": 1},', "a.json: not JSON"),
        ("a.parquet", b"PAR1 but no more", "a.parquet: not readable Parquet"),
        ("a.parquet", b"", "a.parquet: not readable Parquet"),
        ("a.txt", b"text", "a.txt: not one of the files that are read, .jsonl, "),
    ],
)
def test_what_is_no_record_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_file(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path}/{said}")


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_that_is_not_there_is_named(tmp_path, suffix):
    with pytest.raises(InputError, match="no such file"):
        list(read_file(tmp_path / f"a{suffix}"))


# ------------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A set of two configurations as the hub's cache lays it out, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    repository = tmp_path / "hub" / "datasets--acme--talks"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "refs" / "v2").write_text("1" * 40)
    for config in ("long", "short"):
        (snapshot / config).mkdir(parents=True)
        write_rows(snapshot / config / "train-00000-of-00001.parquet", [{"text": f"{config} {n}"} for n in range(3)])
        write_rows(snapshot / config / "test-00000-of-00001.parquet", [{"text": f"{config} test"}])
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "test"))
        for config in ("long", "short")
    )
    (snapshot / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    second = repository / "snapshots" / ("1" * 40)
    second.mkdir()
    write_rows(second / "train.parquet", [{"text": "second"}])
    return tmp_path


def test_a_set_in_the_hubs_cache_is_read_without_a_network(hub):
    def texts(name, config, split):
        return [record.value["text"] for record in read_hub(name, config, split, "")]

    assert texts("acme/talks", "short", "train") == ["short 0", "short 1", "short 2"]
    assert texts("acme/talks", "long", "train[1:]") == ["long 1", "long 2"]
    assert texts("acme/talks", "long", "test") == ["long test"]
    assert texts("acme/talks@v2", None, "train") == ["second"]


@pytest.mark.parametrize(
    ("name", "config", "split", "said"),
    [
        ("acme/talks", "medium", "train", "medium"),
        ("acme/talks", "long", "validation", "validation"),
        ("acme/nothing", None, "train", "acme/nothing"),
    ],
)
def test_what_the_hubs_cache_lacks_is_named_with_advice(hub, name, config, split, said):
    with pytest.raises(InputError, match=rf"(?s)^cannot read {name} \({split}\) from the hub: .*{said}.*Do this\.$"):
        list(read_hub(name, config, split, "Do this."))
