"""The analysis by its command: what it writes, that the page stands alone, and what it says of bad input."""

import base64
import json
import re
import shlex
import shutil
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("diptest")

import sst_jax
from sst_jax import analyze
from sst_jax.console.command import run
from sst_jax.lab.analysis.collection import read_array, write_array
from tests.support.browser import CHROMIUM, browser

pytestmark = pytest.mark.slow

VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = sst_jax.load("random:tiny").with_stream(alpha=0.3)
    return str(made.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    """The folder of an analysis of four problems."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    settings = ["--limit", "4", "--depths", "1,2,3", "--max-new-tokens", "10", "--controls", "2", "--batch-size", "2"]
    assert run(analyze.main, ["--model", model, "--task", "words", "--out", str(out), *settings]) == 0
    return out


class Page(HTMLParser):
    """Whether every tag is closed in its turn, and every attribute that could name something elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_result_holds_every_measure(report):
    result = json.loads((report / "result.json").read_text())
    assert result["problems"] == 4
    assert result["positions"] <= 40
    assert [record["depth"] for record in result["by_depth"]] == [1, 2, 3]
    assert result["by_depth"][0]["moved"]["value"] == 0.0
    cosines, changed = {1: [], 2: [], 3: []}, {1: [], 2: [], 3: []}
    for folder in sorted((report / "collected").glob("0*")):
        states, ids = (
            read_array(folder, "states")[:, :, result["layer"]].astype(np.float64),
            read_array(folder, "top_ids"),
        )
        units = states / np.linalg.norm(states, axis=-1, keepdims=True)
        for number, depth in enumerate((1, 2, 3)):
            cosines[depth] += (units[0] * units[number]).sum(-1).tolist()
            changed[depth] += (ids[0, :, 0] != ids[number, :, 0]).tolist()
    for record in result["by_depth"]:
        assert record["moved"]["value"] == pytest.approx(1 - np.mean(cosines[record["depth"]]), abs=1e-9)
        assert record["lowest_overlap"] == pytest.approx(min(cosines[record["depth"]]), abs=1e-9)
        assert record["changed"]["value"] == pytest.approx(np.mean(changed[record["depth"]]))
    assert min(cosines[3]) < 0.999
    assert len(result["modes_by_layer"]) == len(result["noise_floor"]["by_layer"]) == 7
    assert result["controls"]["alpha_0"]["largest"] == 0.0
    assert result["controls"]["plain"]["largest"] < 1e-9, "two programs of one function differ by rounding alone"
    assert sum(result["order_of_events"]["counts"].values()) == result["positions"]
    assert result["alpha"]["mean"] == pytest.approx(0.3)
    assert len(result["examples"]) == 4


def test_what_the_model_writes_at_both_depths_stands_side_by_side(model, report):
    result, page = json.loads((report / "result.json").read_text()), (report / "report.html").read_text("utf-8")
    assert len(result["continuations"]) == 3
    loaded = sst_jax.load(model, "float32")
    for found in result["continuations"]:
        assert [answer["depth"] for answer in found["answers"]] == [1, 3]
        prompt = loaded.tokenizer.encode(found["prompt"])
        for answer in found["answers"]:
            (own,) = loaded.generate([prompt], depth=answer["depth"], max_new_tokens=10)
            assert answer["text"] == own.text
            assert escape(own.text) in page
    assert "<th>prompt</th><th>depth 1</th><th>depth 3</th>" in page


def test_the_page_says_how_when_and_with_what_it_was_made(model, report, tmp_path):
    result, page = json.loads((report / "result.json").read_text()), (report / "report.html").read_text("utf-8")
    for key in ("command", "date", "version"):
        assert escape(result[key]) in page
    assert result["version"] == sst_jax.__version__
    program, command, *flags = shlex.split(result["command"])
    assert (program, command) == ("sst-jax", "analyze")
    again = [str(tmp_path / "again") if flag == str(report) else flag for flag in flags]
    assert run(analyze.main, again) == 0
    other = json.loads((tmp_path / "again" / "result.json").read_text())
    same = ("by_depth", "tokens", "continuations")
    assert [other[key] for key in same] == [result[key] for key in same]


def test_the_page_stands_alone(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", text)
    assert '<meta name="viewport"' in text
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    files = {file.read_bytes() for file in (report / "figures").iterdir()}
    assert {base64.b64decode(picture) for picture in pictures} == files
    assert len(files) >= 7
    assert page.tags.count("figcaption") == len(pictures)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_opens_at_phone_and_desktop_width(report):
    with browser() as page:
        for width in (390, 1280):
            page.open(report / "report.html", width)
            assert page.complaints() == []
            asked = page.requests()
            assert asked[0].startswith("file:")
            assert all(address.startswith("data:") for address in asked[1:])
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            widest = page.evaluate(
                "Math.max(...[...document.images].map(image => image.getBoundingClientRect().right))"
            )
            assert 0.5 * min(width, 736) < widest <= width


def test_it_goes_on_where_it_stopped_and_refuses_other_settings(model, report, capsys):
    settings = ["--limit", "4", "--max-new-tokens", "10", "--controls", "2", "--batch-size", "2"]
    arguments = ["--model", model, "--task", "words", "--out", str(report), *settings]
    before = (report / "result.json").read_text()
    assert run(analyze.main, [*arguments, "--depths", "1,2,3"]) == 0
    assert json.loads((report / "result.json").read_text()) == json.loads(before)
    assert run(analyze.main, [*arguments, "--depths", "1,4"]) == 2
    assert "depths = [1, 2, 3]" in capsys.readouterr().err


def test_given_texts_are_run_as_they_stand(model, tmp_path):
    """A .jsonl with its own texts, memories instead of outputs, iterations of one run, no bfloat16, no controls."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"id": f"line {n}", "prompt": f"{n} + 5 =", "text": f" {n + 5}, and so on"} for n in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--what", "memory", "--between", "iterations", "--no-rounding", "--controls", "0", "--depths", "1,3"]
    out = tmp_path / "out"
    assert run(analyze.main, ["--model", model, "--prompts", str(file), "--out", str(out), *flags]) == 0
    result = json.loads((out / "result.json").read_text())
    tokenizer = sst_jax.load("random:tiny").tokenizer
    assert result["positions"] == sum(len(tokenizer.encode_text(line["text"])) for line in lines)
    assert result["noise_floor"] is None
    assert result["controls"] == {}
    assert {example["id"] for example in result["examples"]} == {"line 0", "line 1", "line 2"}
    assert not (out / "collected" / "00000" / "rounded").exists()


def test_a_damaged_collection_is_named(model, report, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(report, out)
    states = read_array(out / "collected" / "00002", "states")
    states[0, 3, 1] = np.inf
    shutil.rmtree(out / "collected" / "00002" / "states")
    write_array(out / "collected" / "00002", "states", states)
    settings = ["--limit", "4", "--depths", "1,2,3", "--max-new-tokens", "10", "--controls", "2", "--batch-size", "2"]
    assert run(analyze.main, ["--model", model, "--task", "words", "--out", str(out), *settings]) == 2
    assert "position 3, layer 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--depths", "1"], "--depths 1"),
        (["--depths", "4,1"], "--depths 4,1"),
        (["--depths", "a"], "--depths a"),
        (["--task", "nothing"], "nothing"),
        (["--task", "words", "--limit", "-1"], "--limit -1"),
        (["--task", "words", "--layer", "7"], "--layer 7"),
        (["--prompts", "/no/such/file"], "/no/such/file"),
        (["--task", "words", "--probe", "/no/probe"], "/no/probe"),
        (["--task", "words", "--model", "random:tiny"], "no stream"),
    ],
)
def test_bad_flags_are_named(model, tmp_path, capsys, flags, culprit):
    usual = {"--model": model, "--out": str(tmp_path / "out")}
    if not {"--task", "--prompts"} & set(flags):
        usual["--task"] = "words"
    usual |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert run(analyze.main, [part for pair in usual.items() for part in pair]) == 2
    message = capsys.readouterr().err
    assert culprit in message
    assert message.count("\n") == 1


def test_prompts_of_which_only_some_have_texts_are_refused(model, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "text": "b"}\n{"prompt": "c"}\n')
    assert run(analyze.main, ["--model", model, "--prompts", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "prompt 2, has no text" in capsys.readouterr().err
    file.write_text('{"prompt": "a", "text": null}\n')
    assert run(analyze.main, ["--model", model, "--prompts", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "prompt 1, has no text" in capsys.readouterr().err
    file.write_text('{"prompt": "a"}\n')
    arguments = ["--model", model, "--prompts", str(file), "--out", str(tmp_path / "out"), "--text", "worked"]
    assert run(analyze.main, arguments) == 2
    assert "--text goes with --task" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--task", "words"], ["approximation"]], ids=lambda part: part[0])
def test_a_file_in_the_place_of_the_folder_is_named_before_the_work(tmp_path, capsys, more):
    (tmp_path / "out").write_text("x")
    begin = [part for part in more if part == "approximation"]
    rest = [part for part in more if part != "approximation"]
    assert run(analyze.main, [*begin, "--model", "/no/model", "--out", str(tmp_path / "out"), *rest]) == 2
    assert "--out" in capsys.readouterr().err
