"""Cached decoding against `exact` over the whole text: values, batches, depths, sampling, stopping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sst_jax
from sst_jax.errors import InputError
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.kv_cache import init_cache
from sst_jax.inference.policies import probe
from sst_jax.inference.sampling import Sampling, sample, sampling_params
from tests.support import toys
from tests.support.decoding import generate as generate_tokens


def with_prompt(stream, **more):
    return toys.config({**stream, **more})


def generate(config, params, prompts, depth, **settings):
    defaults = {"max_new_tokens": 12, "sampling": Sampling(), "seeds": range(len(prompts)), "stop_ids": ()}
    pieces = generate_tokens(config, params, prompts, depth=depth, pad_id=0, **{**defaults, **settings})
    return np.concatenate([piece.tokens for piece in pieces], axis=1)[:, : settings.get("max_new_tokens", 12)]


STEP = toys.quick_jit(decode_step_at_depth, "config", "start")
PROMPTS = [toys.tokens(1, size, seed=size)[0].tolist() for size in (4, 11, 7)]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("kv", ["overwrite", pytest.param("first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_depend_on_each_other(kv, temperature):
    """Mixed lengths and depths; also with sampling, each row from its own seed."""
    config = with_prompt({"kv": kv}, alpha=0.3)
    params = toys.params(config)
    settings = {"sampling": Sampling(temperature)}
    together = generate(config, params, PROMPTS, [1, 4, 2], seeds=[5, 6, 7], **settings)
    for row, (prompt, depth) in enumerate(zip(PROMPTS, [1, 4, 2], strict=True)):
        alone = generate(config, params, [prompt], [depth], seeds=[5 + row], **settings)
        assert alone[0].tolist() == together[row].tolist()
    assert (together[0] != generate(config, params, PROMPTS[:1], [4], seeds=[5], **settings)[0]).any()


LATE_TO_EARLY = {"links": ((5, 2),), "state": "block", "site": "output"}


@pytest.mark.parametrize("mode", ["all", "none", "last"])
@pytest.mark.parametrize("link", [{}, pytest.param(LATE_TO_EARLY, marks=pytest.mark.slow)], ids=["own", "link"])
def test_which_positions_of_a_prompt_are_iterated(mode, link):
    """Against the independent reference, which takes a depth for every position."""
    from tests.support import naive

    config = with_prompt(link, alpha=0.3, iterate_prompt=mode)
    params = toys.params(config)
    prompt, depth, new = PROMPTS[1], 3, 5
    out = generate(config, params, [prompt], [depth], max_new_tokens=new)[0].tolist()
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    size = len(prompt)
    depths = {"all": [depth] * (size + new), "none": [1] * size + [depth] * new}
    depths["last"] = [1] * (size - 1) + [depth] * (new + 1)
    hidden = naive.hidden(config, wide, prompt + out, depths[mode])
    logits = hidden @ wide["base"]["embed"]["embedding"].T
    assert logits[size - 1 : size - 1 + new].argmax(-1).tolist() == out


def test_prompts_that_are_iterated_go_with_others_of_another_depth():
    config = with_prompt({}, alpha=0.3, iterate_prompt="all")
    params = toys.params(config)
    prompts, depths = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]], [4, 1, 1, 4]
    together = generate(config, params, prompts, depths)
    for row, (prompt, depth) in enumerate(zip(prompts, depths, strict=True)):
        assert generate(config, params, [prompt], [depth])[0].tolist() == together[row].tolist()
    assert together[0].tolist() != together[2].tolist()


def test_a_row_ends_at_a_stop_token_and_the_others_go_on():
    config = with_prompt({}, alpha=0.3)
    params = toys.params(config)
    free = generate(config, params, PROMPTS, [1, 1, 1], max_new_tokens=30)
    stop = int(free[0, 4])
    first = [int(np.argmax(row == stop)) if stop in row else len(row) for row in free]
    out = generate(config, params, PROMPTS, [1, 1, 1], max_new_tokens=30, stop_ids=(stop,))
    for row, ends in enumerate(first):
        kept = out[row][out[row] >= 0]
        assert kept.tolist() == free[row, : ends + 1].tolist()


def test_bfloat16_states_decode_as_their_rounded_exact_does(float64):
    """In float64, as in float32 a state now and then is rounded to the other side, and later ones follow it."""
    config = with_prompt({"dtype": "bfloat16"}, alpha=0.3)
    unrounded = with_prompt({}, alpha=0.3)
    params, text = toys.params(config, "float64"), toys.tokens(1, 20)
    whole, exact = (
        np.asarray(toys.hidden_in_float64(each, params, text, forward="exact")) for each in (config, unrounded)
    )
    cache = init_cache(toys.in_float64(config), 1, 32)
    for place in range(20):
        hidden, cache = STEP(toys.in_float64(config), params, text[:, place], cache, jnp.array([1]))
        assert cache.state.dtype == jnp.bfloat16
        np.testing.assert_allclose(hidden, whole[:, place], atol=1e-11)
    assert np.abs(exact - whole).max() > 1e-3


@pytest.mark.parametrize("sampling", [Sampling(0.7, top_k=1), Sampling(2.0, top_p=1e-6), Sampling(1e-4)])
def test_cut_to_one_token_sampling_is_greedy(sampling):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 40)), jnp.float32)
    assert (
        sample(sampling_params([sampling] * 6, range(6)), logits, jnp.zeros(6, jnp.int32)).tolist()
        == logits.argmax(-1).tolist()
    )


@pytest.mark.parametrize(
    ("sampling", "kept"), [(Sampling(1.0), 5), (Sampling(0.5), 5), (Sampling(1.0, 3), 3), (Sampling(1.0, top_p=0.7), 2)]
)
def test_frequencies_are_those_of_the_cut_softmax(sampling, kept):
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    expected = p ** (1 / sampling.temperature)
    expected[kept:] = 0
    expected /= expected.sum()
    rows = sampling_params([sampling] * 20_000, range(20_000))
    drawn = np.asarray(sample(rows, jnp.tile(jnp.log(jnp.asarray(p)), (20_000, 1)), jnp.zeros(20_000, jnp.int32)))
    found = np.bincount(drawn, minlength=5) / 20_000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 20_000))
    assert (found[kept:] == 0).all()


@pytest.fixture(scope="module")
def model():
    return sst_jax.load("random:tiny").with_stream(alpha=0.05)


def test_model_generates_the_argmax_of_its_own_logits(model):
    prompt = model.tokenizer.encode("12 + 7 =")
    out = model.generate([prompt], max_new_tokens=6)[0]
    logits = model.logits([prompt + out.tokens])
    assert np.argmax(logits[0, len(prompt) - 1 : -1], -1).tolist() == out.tokens
    assert out.prompt_tokens == len(prompt)
    assert out.text == model.tokenizer.decode(out.tokens)


def test_streamed_pieces_add_up_to_the_text_and_stop_strings_end_it(model):
    pieces = list(model.generate_iter("12 + 7 =", max_new_tokens=40, temperature=1.5, seed=3))
    ended = next(piece.generation for piece in pieces if piece.generation)
    assert "".join(piece.text for piece in pieces) == ended.text
    readable = [character for character in ended.text[2:] if character.isascii() and character.isprintable()]
    stop = readable[0]
    cut = model.generate("12 + 7 =", max_new_tokens=40, temperature=1.5, seed=3, stop=[stop])[0]
    assert cut.text == ended.text[: ended.text.index(stop)]
    assert cut == model.generate("12 + 7 =", max_new_tokens=40, temperature=1.5, seed=3, stop=stop)[0]
    assert cut.tokens == ended.tokens[: len(cut.tokens)]
    assert stop in model.tokenizer.decode(cut.tokens)
    assert stop not in model.tokenizer.decode(cut.tokens[:-1])
    assert len(cut.depths) == len(cut.tokens)
    assert cut.finished


def test_seeds_make_sampling_reproducible(model):
    draw = functools.partial(model.generate, ["a", "a"], max_new_tokens=12, temperature=1.0)
    one, two, other = draw(seed=1), draw(seed=1), draw(seed=9)
    assert [row.tokens for row in one] == [row.tokens for row in two]
    assert one[0].tokens != one[1].tokens != other[0].tokens


def test_samples_share_one_prefill_and_draw_apart(model, monkeypatch):
    from sst_jax.inference import session

    seen = []
    original = session.prefill
    monkeypatch.setattr(
        session, "prefill", lambda *args, **kwargs: seen.append(args[2].shape) or original(*args, **kwargs)
    )
    settings = {"max_new_tokens": 8, "temperature": 1.0, "depth": [1, 3]}
    found = model.generate(["a", "bc"], n=3, seed=4, **settings)
    assert seen == [(2, 64)]
    assert [each.depth for each in found] == [1, 1, 1, 3, 3, 3]
    assert len({tuple(each.tokens) for each in found[:3]}) == 3
    for number, each in enumerate(found):
        prompt, depth = ("a", 1) if number < 3 else ("bc", 3)
        alone = model.generate(prompt, seed=4 + number, **{**settings, "depth": depth})[0]
        assert each == alone


def test_answers_record_the_depths_they_took(model):
    (flat,) = model.generate("x", depth=3, max_new_tokens=5)
    assert (flat.depth, flat.depths) == (3, [3] * len(flat.tokens))
    (policy,) = model.generate("x", depth="first_token:3", max_new_tokens=5)
    assert (policy.depth, policy.depths) == ("first_token:3", [3] + [1] * (len(policy.tokens) - 1))
    with pytest.raises(InputError, match="depth=3 needs a model with a stream"):
        model.without_stream().generate("x", depth=3, max_new_tokens=5)


def test_save_and_load_keep_everything(model, tmp_path):
    again = sst_jax.load(model.save(tmp_path / "model"))
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again.params, model.params))
    with pytest.raises(InputError, match="not empty"):
        model.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda model: model.with_stream(alhpa=0.1), "alhpa"),
        (lambda model: model.with_stream(alpha=2.0), "stream.alpha"),
        (lambda model: model.logits([[0, 999]]), "999"),
        (lambda model: model.logits([[0.5]]), "integers"),
        (lambda model: model.logits([[1, 2], [3]]), "rows of one length"),
        (lambda model: model.logits([[1, 2]], forward="exakt"), "exakt"),
        (lambda model: model.logits([[1, 2]], forward="two_pass", passes=3), "passes=3"),
        (lambda model: model.logits([[1, 2]], depth=0), "depth=0"),
        (lambda model: model.logits([[1, 2]], segment_ids=[[1]]), "segment_ids"),
        (lambda model: model.generate([]), "no prompts"),
        (lambda model: model.generate(["a", "b"], depth=[1]), "depth has 1"),
        (lambda model: model.generate(["a"], depth=0), "depth=0"),
        (lambda model: model.generate(["a"], depth="deep"), "depth='deep'"),
        (lambda model: model.generate(["a"], n=0), "n=0"),
        (lambda model: model.generate(["a", "b"], n=2, seed=[1, 2]), "seed has 2"),
        (lambda model: model.generate([[]]), "empty"),
        (lambda model: model.generate([[5, 6]], chat=True), "chat"),
    ],
)
def test_bad_calls_are_named(model, call, culprit):
    with pytest.raises(InputError, match=culprit):
        call(model)


def test_names_of_version_0_1_0_still_work_and_say_what_they_are_now(model):
    with pytest.warns(DeprecationWarning, match="generate_iter"):
        old = list(model.stream("x", max_new_tokens=3))
    assert old == list(model.generate_iter("x", max_new_tokens=3))
    with pytest.warns(DeprecationWarning, match="prompt_format"):
        assert model.prompts == model.prompt_format == "plain"
    with pytest.warns(FutureWarning, match="iterate_prompt"):
        renamed = model.with_stream(prompt="all")
    assert renamed.config == model.with_stream(iterate_prompt="all").config
    assert renamed.config.to_dict()["stream"]["prompt"] == "all", "files keep the key that 0.1.0 reads"
    assert type(renamed.config).from_dict(renamed.config.to_dict()).stream == renamed.config.stream


def test_a_selecting_policy_without_a_stream_is_refused(model):
    with pytest.raises(InputError, match="needs a model with a stream"):
        model.without_stream().generate("x", depth=probe(lambda states: 2), max_new_tokens=3)


@pytest.mark.wrong_types
@pytest.mark.parametrize("depth", ["until_stable:0.1:3", "until_confident:0.9:3", "first_token:3", probe(lambda _: 2)])
def test_a_known_text_is_never_scored_at_a_depth_that_its_policy_does_not_name(model, depth):
    with pytest.raises(InputError, match="a known text is scored at one depth"):
        model.logits([[1, 2, 3]], depth=depth)


@pytest.mark.parametrize("rule", ["until_stable", "until_confident"])
def test_a_prompt_that_iterates_whole_has_no_halting_rule(model, rule):
    whole = model.with_stream(iterate_prompt="all")
    with pytest.raises(InputError, match=f"one depth, which {rule}"):
        whole.generate("x", depth=f"{rule}:0.5:3", max_new_tokens=2)
