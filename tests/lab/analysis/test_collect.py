"""Collecting states: forced text against token-by-token decoding, controls, resuming, and the page that comes of it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.weights.provenance import Provenance
from tests.support import naive, toys

pytest.importorskip("sklearn")
pytest.importorskip("diptest")

import sst_jax
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.halting_probe import fingerprint
from sst_jax.inference.model import Model
from sst_jax.inference.prefill import prefill
from sst_jax.lab.analysis import analysis, collect, collection, controls
from sst_jax.model import decoder

STEP = jax.jit(decode_step_at_depth, static_argnames=("config", "start"))


class Tokens(ByteTokenizer):
    """The toys' 61 tokens; nothing here reads text."""

    pad_id, bos_id = 0, toys.BOS


def toy(**stream):
    config = toys.config({"alpha": 0.3, **stream})
    return Model(config, toys.params(config), Tokens(), Provenance(digest="toy"))


def texts(*sizes, prompt=5):
    rows = [toys.tokens(1, prompt + size, seed=size)[0].tolist() for size in sizes]
    return [collect.Text(f"text {size}", row[:prompt], row[prompt:]) for size, row in zip(sizes, rows, strict=True)]


def by_decoding(model, text, depth):
    """States that caches hold after every position [T, L, D], and the logits there, token by token."""
    config, params = model.config, model.params
    prefix, inputs, _ = collect.split(model, text, text.given)
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prefix)] = prefix
    deep = depth if config.stream.iterate_prompt == "all" else 1
    hidden, cache = prefill(config, params, tokens, np.array([len(prefix)]), capacity=128, depth=deep)
    states, logits = [], []
    for token in inputs:
        hidden, cache = STEP(config, params, jnp.array([token]), cache, jnp.array([depth]))
        states.append(np.asarray(cache.state[:, 0]))
        logits.append(np.asarray(decoder.head(config, params, hidden)[0]))
    return np.stack(states), np.stack(logits)


@pytest.mark.parametrize(
    ("stream", "depth"),
    [
        ({"state": "block"}, 4),
        pytest.param({"state": "ffn", "iterate_prompt": "none"}, 4, marks=pytest.mark.slow),
        pytest.param({"state": "block", "links": ((5, 1),), "site": "output"}, 2, marks=pytest.mark.slow),
        pytest.param({"state": "block", "kv": "first"}, 3, marks=pytest.mark.slow),
        pytest.param({"state": "ffn", "iterate_prompt": "all", "norm": "rms"}, 2, marks=pytest.mark.slow),
        pytest.param({"state": "block", "initial": "skip_bos"}, 1, marks=pytest.mark.slow),
    ],
)
def test_forced_text_equals_token_by_token_decoding(stream, depth):
    """With state="block" a layer's state is its output, so decoding's caches show the outputs of all layers."""
    model = toy(alpha=0.1, **stream)  # the upper end of the published range
    what = "output" if stream["state"] == "block" else "memory"
    settings = collect.Settings((1, depth) if depth > 1 else (1,), what=what, rounding=False, controls=0, batch=2)
    some = texts(14, 9)  # beyond the window, and of different lengths
    runner = collect.TextRunner(model, settings, 64)
    batch = collect.Batch.of(model, some, [text.given for text in some], (64, 64))
    (found,) = runner(batch, depth)
    for row, text in enumerate(some):
        states, logits = by_decoding(model, text, depth)
        mine = found.row(row, int(batch.counts[row]))
        assert np.linalg.norm(mine.states - states) <= 1e-5 * np.linalg.norm(states)
        assert mine.top_ids[:, 0].tolist() == logits.argmax(-1).tolist()
        likeliest = -np.sort(-logits, axis=-1)[:, : collect.TOP]
        assert np.linalg.norm(mine.top_logits - likeliest) <= 1e-5 * np.linalg.norm(likeliest)


def test_runs_and_iterations_agree_at_position_zero_and_part_later():
    model, some = toy(), texts(9)
    batch = collect.Batch.of(model, some, [text.given for text in some], (64, 64))
    runner = collect.TextRunner(model, collect.Settings(), 64)
    every = runner(batch, 3, every=True)
    assert len(every) == 3
    for depth in (1, 2, 3):
        (alone,) = runner(batch, depth)
        np.testing.assert_allclose(every[depth - 1].states[:, 0, 0], alone.states[:, 0, 0], atol=2e-5)
        apart = np.abs(every[depth - 1].states[:, 0, 1:9] - alone.states[:, 0, 1:9]).max()
        assert apart > 1e-3 if depth < 3 else apart < 1e-4


@pytest.mark.slow
def test_controls_change_nothing_where_there_is_no_state_and_differ_where_it_is_wrong():
    model, some = toy(), texts(12, 8)
    settings = collect.Settings((1, 3), rounding=False)
    batch = collect.Batch.of(model, some, [text.given for text in some], (64, 64))
    runner = collect.TextRunner(model, settings, 64)
    shallow, deep = runner(batch, 1)[0], runner(batch, 3)[0]
    found = controls.summarise(controls.collect_batch(runner, batch, shallow, deep))
    assert found["alpha_0"]["largest"] == 0.0
    assert found["plain"]["largest"] <= 1e-6  # two programs: their sums round differently
    assert found["alpha_0"]["argmax_changed"]["value"] == 0.0
    moves = {name: found[name]["moved"]["value"] for name in ("depth", "shuffled", "another_text", "random")}
    assert min(moves.values()) > 1e-3
    assert len({round(value, 5) for value in moves.values()}) == 4


def test_controls_between_layers_are_refused():
    model = toy(links=((5, 1),))
    with pytest.raises(InputError, match=r"--controls 10: .*links.*use --controls 0"):
        analysis.check_model(model, analysis.AnalysisConfig(task="words"))


@pytest.mark.slow
def test_a_text_alone_has_no_other_to_take_states_from():
    model, some = toy(), texts(12, 8, 6)
    settings = collect.Settings((1, 2), rounding=False)
    runner = collect.TextRunner(model, settings, 64)
    looks = []
    for several in (some[:2], some[2:]):
        batch = collect.Batch.of(model, several, [text.given for text in several], (64, 64))
        looks += controls.collect_batch(runner, batch, runner(batch, 1)[0], runner(batch, 2)[0])
    assert ["another_text" in look for look in looks] == [True, True, False]
    found = controls.summarise(looks)
    assert {name: record["problems"] for name, record in found.items()} == {
        "depth": 3, "alpha_0": 3, "plain": 3, "shuffled": 3, "random": 3, "another_text": 2,
    }  # fmt: skip


def test_the_real_states_in_their_own_places_are_no_control():
    """The swapping rule with nothing swapped is the exact recurrence."""
    model, some = toy(), texts(12, 8)
    batch = collect.Batch.of(model, some, [text.given for text in some], (64, 64))
    runner = collect.TextRunner(model, collect.Settings(), 64)
    own = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    (same,) = runner(batch, 3, intervene=collect.Swap(np.arange(2), own))
    (deep,) = runner(batch, 3)
    for row, count in enumerate(batch.counts.tolist()):
        np.testing.assert_allclose(same.row(row, count).states, deep.row(row, count).states, atol=2e-4)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_another_order_leaves_no_position_in_its_place(count):
    order = controls.another_order(np.array([count, 1]), 20, 0)
    assert sorted(order[0, :count]) == list(range(count))
    assert (order[0, :count] != np.arange(count)).all()
    assert order[0, count:].tolist() == list(range(count, 20))
    assert order[1].tolist() == list(range(20))


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """(model, texts, settings, folder) of a finished collection of five texts."""
    model, some = toy(), texts(9, 4, 7, 5, 6)
    settings = collect.Settings((1, 2), controls=1, batch=2)
    folder = tmp_path_factory.mktemp("collected") / "five"
    collection.collect(model, some, settings, folder)
    return model, some, settings, folder


def by_naive_reading(model, problem, depth, stream=True):
    """Outputs of all layers [T, L, D] and logits [T, V] at the text's positions, in float64 and by none of our code."""
    config = model.config if stream else dataclasses.replace(model.config, stream=None)
    numbers, outputs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params), {}
    start, tokens = len(problem.prefix), [*problem.prefix, *problem.inputs]
    depths = [1] * start + [depth] * len(problem.inputs)
    logits = naive.logits(config, numbers, tokens, depths, toys.BOS, outputs=outputs)
    layers = range(config.backbone.num_layers)
    states = [[outputs[layer, t, depth - 1] for layer in layers] for t in range(start, len(tokens))]
    return np.array(states), logits[start:]


def apart(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.slow
def test_a_collection_holds_what_a_naive_reading_of_every_problem_gives(collected):
    """Tokens, states, logits and the rounded states by value; `depth` of the controls by what these states say."""
    model, some, settings, folder = collected
    for problem, text in zip(collection.Collection(folder), some, strict=True):
        assert problem.id == text.id
        assert [*problem.prefix, *problem.inputs] == [*text.prompt, *text.given][:-1]
        assert problem.predicted == [*text.prompt, *text.given][len(problem.prefix) + 1 :]
        truth = [by_naive_reading(model, problem, depth) for depth in settings.depths]
        for number, (states, logits) in enumerate(truth):
            assert apart(problem.states[number], states) <= 1e-5
            assert apart(problem.top_logits[number], -np.sort(-logits, axis=-1)) <= 1e-5
            assert (problem.top_ids[number, :, 0] == logits.argmax(-1)).all()
            taken = np.take_along_axis(logits, problem.top_ids[number], axis=-1)
            assert apart(problem.top_logits[number], taken) <= 1e-5
        assert apart(*(states for states, _ in truth)) > 0.01
        # In the first layer, before the rounding of one layer is magnified by those above it.
        first, last = (apart(problem.rounded[:, 0], states[:, 0]) for states, _ in truth)
        assert 1e-4 < first < min(0.02, 0.2 * last)
        if problem.controls:
            (first, _), (last, _) = truth
            cosine = (first * last).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(last, axis=-1)
            np.testing.assert_allclose(problem.controls["depth"]["overlap"], cosine, atol=1e-5)
    assert [bool(problem.controls) for problem in collection.Collection(folder)] == [True, True, False, False, False]


class Leaky(collect.TextRunner):
    """Walks with something blended in where alpha = 0 is asked for."""

    def __call__(self, batch, depth, *, config=None, **more):
        if config is not None and config.stream is not None and config.stream.alpha == 0.0:
            config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, alpha=0.1))
        return super().__call__(batch, depth, config=config, **more)


@pytest.mark.slow
def test_controls_see_a_blend_that_alpha_0_leaves_on(collected):
    """`plain` has a run of the backbone to compare with, which no stream can move."""
    model, some, settings, folder = collected
    batch = collect.Batch.of(model, some[:2], [text.given for text in some[:2]], (64, 64))
    runner = collect.TextRunner(model, settings, 64)
    (backbone,) = runner(batch, 1, config=dataclasses.replace(model.config, stream=None))
    for row, problem in zip(range(2), collection.Collection(folder), strict=False):
        states, logits = by_naive_reading(model, problem, 1, stream=False)
        mine = backbone.row(row, int(batch.counts[row]))
        assert apart(mine.states, states) <= 1e-5
        assert apart(mine.top_logits, -np.sort(-logits, axis=-1)) <= 1e-5
    found = controls.summarise(
        controls.collect_batch(Leaky(model, settings, 64), batch, runner(batch, 1)[0], runner(batch, 2)[0])
    )
    assert found["plain"]["largest"] > 1e-4
    assert found["alpha_0"]["largest"] > 1e-4


@pytest.mark.slow
def test_a_killed_collection_goes_on_and_gives_the_same(collected, tmp_path, monkeypatch):
    model, some, settings, folder = collected
    again = tmp_path / "again"
    written = []

    def dying(self, number, problem, write=collection.Collection.write):
        if len(written) == 3:
            (self.path / f".{number:05d}.partial").mkdir()
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, problem)

    with monkeypatch.context() as patch:
        patch.setattr(collection.Collection, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            collection.collect(model, some, settings, again)
    assert written == [0, 1, 2]
    looked = []
    found = collection.collected_problems
    monkeypatch.setattr(collection, "collected_problems", lambda *args: looked.append(args[3]) or found(*args))
    steps = []
    collection.collect(model, some, settings, again, steps.append)
    assert looked == [range(2, 4), range(4, 5)]
    assert steps == [2, 2, 1]
    for one, other in zip(collection.Collection(folder), collection.Collection(again), strict=True):
        for name in ("states", "top_ids", "top_logits", "rounded"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.controls == other.controls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda model, some, settings: (toy(alpha=0.2), some, settings), "model"),
        (lambda model, some, settings: (model, some[:4], settings), "problems"),
        (lambda model, some, settings: (model, [some[1], some[0], *some[2:]], settings), "texts"),
        (lambda model, some, settings: (model, some, collect.Settings((1, 3), controls=1, batch=2)), "depths"),
    ],
)
def test_another_collection_is_refused(collected, change, culprit):
    *given, folder = collected
    with pytest.raises(InputError, match=f"collected with {culprit}"):
        collection.collect(*change(*given), folder)


@pytest.mark.slow
def test_states_that_are_no_numbers_are_named(collected, tmp_path):
    *_, folder = collected
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    value = collection.read_array(broken / "00001", "states")
    value[1, 2, 3, 4] = np.nan
    shutil.rmtree(broken / "00001" / "states")
    collection.write_array(broken / "00001", "states", value)
    with pytest.raises(InputError, match="states of text 4, position 2, layer 3"):
        collection.Collection(broken).read(1)
    shutil.rmtree(broken / "00002" / "states")
    with pytest.raises(InputError, match="00002/states cannot be read"):
        collection.Collection(broken).read(2)


def test_texts_that_do_not_fit_are_named():
    model, settings = toy(), collect.Settings()
    with pytest.raises(InputError, match=r"text 0.*too short"):
        collection.shape_of(model, [collect.Text("text 0", [3, 4], [])], settings)
    with pytest.raises(InputError, match="exceed the model's 600"):
        collection.shape_of(model, texts(700), settings)
    with pytest.raises(InputError, match="no texts"):
        collection.shape_of(model, [], settings)


def test_a_fingerprint_is_of_the_model_and_not_of_its_precision(tmp_path):
    folder = sst_jax.load("random:tiny").with_stream().save(tmp_path / "tiny")
    model = sst_jax.load(folder)
    assert fingerprint(model) == fingerprint(sst_jax.load(folder, "bfloat16"))
    assert fingerprint(model) != fingerprint(model.with_stream(state="block"))
    theta = model.params["blend"]["theta"]
    moved = Model(model.config, {**model.params, "blend": {"theta": theta + 1e-3}}, model.tokenizer, model.provenance)
    assert fingerprint(model) != fingerprint(moved)


def test_generated_texts_are_the_models_own():
    model = sst_jax.load("random:tiny").with_stream(alpha=0.3)
    prompts = [model.tokenizer.encode("12 + 7 =")]
    found = collection.answers(model, [collect.Text("a", prompts[0])], collect.Settings(new_tokens=9))
    assert found == [model.generate(prompts, max_new_tokens=9)[0].tokens]
    assert json.dumps(found)
