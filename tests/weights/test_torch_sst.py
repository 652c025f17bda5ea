"""The PyTorch modelling files of an sst export against ours and against the mechanism written plainly (`naive`)."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.inference.model import load
from sst_jax.model import rules as forwards
from sst_jax.model.config import StreamConfig
from sst_jax.model.fields import written_name
from tests.support import naive, toys
from tests.support.torch_exports import SHALLOW, apart, model, open_torch, torch_model, write

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

WILD = {"alpha_range": (0.0, 1.0)}
RICH = {**WILD, "state": "block", "decay": 0.4, "initial": "own", "gain": 1.3, "learn_gain": True}


def run(loaded, tokens, **settings):
    with torch.no_grad():
        return loaded(torch.as_tensor(np.asarray(tokens)).long(), **settings).logits.numpy()


def oracle(ours, tokens, depths):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), ours.params)
    return naive.logits(ours.config, params, tokens, depths, bos_id=toys.BOS)


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize("fields", toys.covering(), ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_option_gives_the_numbers_of_the_plain_mechanism(tmp_path, fields):
    ours = model(fields)
    loaded = torch_model(ours, tmp_path / "sst")
    tokens = toys.tokens(9)
    tokens[[0, 4]] = toys.BOS
    assert apart(run(loaded, tokens[None], depth=3)[0], oracle(ours, tokens, 3)) <= 1e-4
    # Decoding: a prompt of five, whose last position and all later ones take three iterations.
    depths = [1, 1, 1, 1, 3, 3, 3, 3, 3]
    steps = []
    with torch.no_grad():
        out = loaded(torch.tensor(tokens[None, :5]).long(), depth=depths[:5], use_cache=True)
        for position in range(5, 9):
            steps.append(out.logits[0, -1].numpy())
            token = torch.tensor(tokens[None, position : position + 1]).long()
            out = loaded(token, depth=3, past_key_values=out.past_key_values)
    expected = oracle(ours, tokens, depths)
    assert apart(np.stack([*steps, out.logits[0, -1].numpy()]), expected[4:]) <= 1e-4


RECIRCULATION = {
    "links": ((3, 1),), "timing": "same", "site": "output", "state": "block", "norm": "match", "alpha": 0.15,
    "ramp": 10, "readout": "first",
}  # fmt: skip
LINKED = [
    {**WILD, "links": ((3, 1), (2, 0)), "initial": "own", "learn_gain": True},
    {**RECIRCULATION, "initial": "skip_bos"},
    {"gate": "tanh", "links": ((2, 1), (3, 3)), "timing": "next", "kv": "first", "state": "block", "ramp": 3},
]


@pytest.mark.parametrize("fields", LINKED, ids=["both", "recirculation", "next"])
def test_links_give_the_numbers_of_the_plain_mechanism(tmp_path, fields):
    """A text at depth 2; then decoded, a prompt of five, whose last position and all later ones take two iterations."""
    ours = model(fields, SHALLOW)
    loaded = torch_model(ours, tmp_path / "sst")
    tokens, depths = toys.tokens(9), [1, 1, 1, 1, 2, 2, 2, 2, 2]
    tokens[[0, 4]] = toys.BOS
    assert apart(run(loaded, tokens[None], depth=2)[0], oracle(ours, tokens, 2)) <= 1e-4
    expected, steps = oracle(ours, tokens, depths), []
    with torch.no_grad():
        out = loaded(torch.tensor(tokens[None, :5]).long(), depth=depths[:5], use_cache=True)
        for position in range(5, 9):
            steps.append(out.logits[0, -1].numpy())
            token = torch.tensor(tokens[None, position : position + 1]).long()
            out = loaded(token, depth=2, past_key_values=out.past_key_values)
    assert apart(np.stack([*steps, out.logits[0, -1].numpy()]), expected[4:]) <= 1e-4
    assert apart(oracle(model(None, SHALLOW), tokens, 1), oracle(ours, tokens, 2)) > 1e-3


def test_iterations_are_marked_as_ours_are(tmp_path):
    """A text at depth 3, then decoded with depths that differ."""
    ours = model({**WILD, "iteration_embedding": 3}, SHALLOW)
    drawn = np.random.default_rng(1).standard_normal((2, SHALLOW.d_model)).astype(np.float32)
    ours.params["blend"]["iteration"] = jnp.asarray(drawn)
    loaded, tokens, depths, steps, cache = (
        torch_model(ours, tmp_path / "sst"),
        toys.tokens(6),
        [1, 4, 2, 3, 1, 2],
        [],
        None,
    )
    assert apart(run(loaded, tokens[None], depth=3)[0], oracle(ours, tokens, 3)) <= 1e-4
    with torch.no_grad():
        for token, depth in zip(tokens, depths, strict=True):
            out = loaded(torch.tensor([[int(token)]]), depth=depth, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, -1].numpy())
    assert apart(np.stack(steps), oracle(ours, tokens, depths)) <= 1e-4
    assert np.array_equal(load(tmp_path / "sst").params["blend"]["iteration"], drawn)


def test_windows_of_a_run_are_those_of_its_export(tmp_path):
    """A text, and decoded position by position; what opens the folder again has the windows too."""
    ours = model(WILD, dataclasses.replace(SHALLOW, attention_window=(2, 3, 1, 4)))
    folder = tmp_path / "sst"
    loaded, tokens = torch_model(ours, folder), toys.tokens(12)
    expected, steps, cache = oracle(ours, tokens, 2), [], None
    assert apart(run(loaded, tokens[None], depth=2)[0], expected) <= 1e-4
    assert apart(oracle(model(WILD, SHALLOW), tokens, 2), expected) > 1e-2
    with torch.no_grad():
        for token in tokens:
            out = loaded(torch.tensor([[int(token)]]), depth=2, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, -1].numpy())
    assert apart(np.stack(steps), expected) <= 1e-4
    assert load(folder).config.backbone.windows == (2, 3, 1, 4)
    for kind in ("merged", "adapter"):
        with pytest.raises(InputError, match=f"attention_window.*--format {kind} cannot say"):
            write(ours, tmp_path / kind, kind)


@pytest.mark.slow
def test_a_late_state_in_an_early_layer_writes_the_same_text(tmp_path):
    """64 tokens, greedy, at depth 2, from both; and passes of the stack give what ours do."""
    ours = model({**RECIRCULATION, "timing": "both", "readout": "last", "alpha": 0.3}, SHALLOW)
    loaded = torch_model(ours, tmp_path / "sst")
    prompt = toys.tokens(7).tolist()
    (answer,) = ours.generate([prompt], depth=2, max_new_tokens=64)
    theirs = loaded.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, depth=2)[0, len(prompt) :]
    assert theirs.tolist()[: len(answer.tokens)] == answer.tokens
    assert len(answer.tokens) == 64 or answer.finished
    tokens = toys.tokens(1, 9)
    for name in ("two_pass", "k_pass:3"):
        settings = {"forward": name.split(":")[0], "passes": int((name + ":2").split(":")[1]), "depth": 2}
        assert apart(run(loaded, tokens, **settings), ours.logits(tokens, name, depth=2)) <= 1e-5
    with pytest.raises(ValueError, match="local"):
        run(loaded, tokens, forward="local")


def test_a_link_at_alpha_0_is_the_plain_export(tmp_path):
    """Fixed at 0, and as a gate from zero."""
    tokens = toys.tokens(1, 9)
    fixed = torch_model(model({**RECIRCULATION, "alpha": 0.0}, SHALLOW), tmp_path / "fixed")
    plain = run(fixed, tokens, forward="plain")
    assert np.array_equal(run(fixed, tokens), plain)
    gated = torch_model(model({"gate": "tanh", "links": ((3, 1),)}, SHALLOW), tmp_path / "gated")
    opened = run(gated, tokens)
    with torch.no_grad():
        gated.model.stream.theta.zero_()
    plain = run(gated, tokens, forward="plain")
    assert np.array_equal(run(gated, tokens), plain)
    assert apart(opened, plain) > 1e-3


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
    ("fields", "forward", "settings"),
    [
        (WILD, "plain", {}),
        (WILD, "two_pass", {}),
        (WILD, "k_pass", {"passes": 3}),
        (WILD, "local", {"passes": 3}),
        (WILD, "exact", {"depth": 4}),
        (WILD, "two_pass", {"depth": 2}),
        (RICH, "two_pass", {}),
        (RICH, "local", {"passes": 2}),
        ({**RICH, "decay": 0.0, "propagate": "shift", "layers": (0, 2)}, "k_pass", {"passes": 3}),
    ],
)
def test_every_forward_gives_our_logits(tmp_path, fields, forward, settings):
    ours = model(fields, SHALLOW)
    tokens = toys.tokens(2, 40, vocabulary=262)
    expected = ours.logits(tokens, forward=forward, **settings)
    for attention in ("sdpa", "eager"):
        loaded = torch_model(ours, tmp_path / attention, attn_implementation=attention)
        assert apart(run(loaded, tokens, forward=forward, **settings), expected) <= 1e-4
    if forward != "plain":
        assert apart(run(loaded, tokens, forward="plain"), expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "forward", "depth"),
    [(WILD, "two_pass", 1), ({**RICH, "pass1_grad": False}, "two_pass", 1), (RICH, "exact", 2)],
)
def test_gradients_of_every_parameter_are_ours(tmp_path, fields, forward, depth):
    """Of theta and gain, of LoRA kept apart, and of the backbone."""
    ours = model(fields, SHALLOW)
    tokens = toys.tokens(2, 12, vocabulary=262)
    weights = np.random.default_rng(1).standard_normal((2, 12, 262)).astype(np.float32)

    def loss(params):
        out = forwards.logits(ours.config, params, jnp.asarray(tokens), forward=forward, depth=depth)
        return (out * weights).sum()

    expected = toys.quick_jit(jax.grad(loss))(ours.params)
    loaded = torch_model(ours, tmp_path / "sst", keep_lora=True)
    out = loaded(torch.tensor(tokens).long(), forward=forward, depth=depth, use_cache=False).logits
    (out * torch.tensor(weights)).sum().backward()
    grads = {name: parameter.grad.numpy() for name, parameter in loaded.named_parameters()}
    for name, leaf in expected["blend"].items():
        assert apart(grads[f"model.stream.{name}"], leaf) <= 1e-4, name
    for layer in range(SHALLOW.num_layers):
        for name, path in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            there = f"model.layers.{layer}.{path}"
            assert apart(grads[f"{there}.weight"].T, expected["base"]["layers"][name]["kernel"][layer]) <= 1e-4
            for side in "AB":
                leaf = expected["adapter"][name][f"lora_{side.lower()}"][layer]
                assert apart(grads[f"{there}.lora_{side}.weight"].T, leaf) <= 1e-4
    assert apart(grads["model.embed_tokens.weight"], expected["base"]["embed"]["embedding"]) <= 1e-4


def test_the_loss_of_labels_is_that_of_our_logits_and_of_gradient_checkpointing(tmp_path):
    ours = model(WILD, SHALLOW)
    tokens = toys.tokens(2, 24, vocabulary=262)
    logits = np.asarray(ours.logits(tokens, forward="two_pass"))[:, :-1]
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], axis=-1)
    loaded = torch_model(ours, tmp_path / "sst").train()
    ids = torch.tensor(tokens).long()
    losses, grads = [], []
    for reentrant in (None, False, True):
        if reentrant is not None:
            loaded.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loaded.zero_grad()
        out = loaded(ids, labels=ids, forward="two_pass")
        out.loss.backward()
        losses.append(float(out.loss.detach()))
        grads.append(loaded.model.stream.theta.grad.clone())
    assert losses[0] == pytest.approx(-picked.mean(), rel=1e-5)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    assert all(apart(grad, grads[0]) <= 1e-5 for grad in grads[1:])


def test_the_config_says_which_forward_runs_unless_told(tmp_path):
    loaded = torch_model(model(WILD, SHALLOW), tmp_path / "sst")
    tokens = toys.tokens(1, 12, vocabulary=262)
    exact, two_pass = run(loaded, tokens, forward="exact"), run(loaded, tokens, forward="two_pass")
    assert np.array_equal(run(loaded, tokens), exact)
    loaded.config.sst["forward"] = "two_pass"
    assert np.array_equal(run(loaded, tokens), two_pass)
    assert apart(two_pass, exact) > 1e-3


def test_a_trainer_may_warm_alpha_up(tmp_path):
    ours = model({"alpha_range": (0.1, 0.9), "alpha_init": 0.5, "alpha_warmup": 10}, SHALLOW)
    loaded = torch_model(ours, tmp_path / "sst")
    tokens = toys.tokens(1, 12, vocabulary=262)
    loaded.model.stream.warmth = 0.3
    expected = forwards.logits(
        ours.config, ours.params, jnp.asarray(tokens), forward="two_pass", alpha_warmup_fraction=jnp.float32(0.3)
    )
    assert apart(run(loaded, tokens, forward="two_pass"), expected) <= 1e-4


# ------------------------------------------------------------------------------------------------- generating


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, theirs) with strong states, to generate with."""
    ours = model(WILD)
    return ours, torch_model(ours, tmp_path_factory.mktemp("pair") / "sst")


def generate(loaded, rows, **settings):
    """New tokens of each row; rows are padded on the left, as transformers wants it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = loaded.generate(ids, attention_mask=mask, do_sample=False, **settings)[:, longest:].tolist()
    ends = loaded.generation_config.eos_token_id
    lengths = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in out]
    return [row[:length] for row, length in zip(out, lengths, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 4])
def test_greedy_text_is_ours_for_64_tokens(pair, depth):
    ours, theirs = pair
    prompt = toys.tokens(11, seed=2, vocabulary=262).tolist()  # at both depths no token ends the text early
    expected = ours.generate([prompt], depth=depth, max_new_tokens=64)[0].tokens
    assert len(expected) == 64
    assert generate(theirs, [prompt], depth=depth, max_new_tokens=64) == [expected]


@pytest.mark.parametrize("prompt_depth", ["last", "none", "all"])
def test_the_prompt_iterates_where_the_config_says(tmp_path, prompt_depth):
    ours = model({**WILD, "iterate_prompt": prompt_depth, "initial": "skip_bos"}, SHALLOW)
    loaded = torch_model(ours, tmp_path / "sst")
    rows = [toys.tokens(size, seed=size, vocabulary=262).tolist() for size in (7, 12)]
    rows[1][0] = toys.BOS
    expected = []
    for row in rows:  # greedy text by the plain mechanism
        depths = {"all": [3] * len(row), "last": [1] * (len(row) - 1) + [3], "none": [1] * len(row)}[prompt_depth]
        text = list(row)
        for new in range(6):
            text.append(int(oracle(ours, text, depths + [3] * new)[-1].argmax()))
        expected.append(text[len(row) :])
    assert generate(loaded, rows, depth=3, max_new_tokens=6) == expected


def test_batches_padded_on_the_left_generate_what_each_row_does_alone(pair):
    _, theirs = pair
    rows = [toys.tokens(size, seed=size, vocabulary=262).tolist() for size in (1, 5, 19)]
    for depth in (1, 3):
        together = generate(theirs, rows, depth=depth, max_new_tokens=12)
        assert together == [generate(theirs, [row], depth=depth, max_new_tokens=12)[0] for row in rows]


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", [WILD, RICH, {**WILD, "initial": "skip_bos"}], ids=["ffn", "rich", "skip_bos"])
@pytest.mark.parametrize("settings", [{"forward": "two_pass"}, {"depth": 2}], ids=str)
def test_padding_leaves_no_trace(tmp_path, fields, side, settings):
    ours = model(fields, SHALLOW)
    loaded = torch_model(ours, tmp_path / "sst")
    rows = [toys.tokens(size, seed=size, vocabulary=262) for size in (4, 10, 17)]
    ids, mask = np.zeros((3, 17), np.int64), np.zeros((3, 17), np.int64)
    places = [slice(17 - len(row), 17) if side == "left" else slice(0, len(row)) for row in rows]
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[number, place], mask[number, place] = row, 1
    together = run(loaded, ids, attention_mask=torch.tensor(mask), **settings)
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert apart(together[number, place], run(loaded, row[None], **settings)[0]) <= 1e-5


@pytest.mark.parametrize("settings", [{"forward": "two_pass"}, {"forward": "exact"}], ids=str)
def test_packed_documents_do_not_meet(tmp_path, settings):
    loaded = torch_model(model(RICH, SHALLOW), tmp_path / "sst")
    rows = [toys.tokens(size, seed=size, vocabulary=262) for size in (5, 9, 3)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = run(loaded, np.concatenate(rows)[None], position_ids=positions, **settings)[0]
    assert apart(packed, np.concatenate([run(loaded, row[None], **settings)[0] for row in rows])) <= 1e-5


def test_a_prompt_may_be_fed_in_parts_and_a_conversation_go_on(pair):
    _, theirs = pair
    tokens = toys.tokens(2, 14, vocabulary=262)
    whole, out, got = run(theirs, tokens), None, []
    for part in (slice(0, 3), slice(3, 4), slice(4, 14)):
        with torch.no_grad():
            past = None if out is None else out.past_key_values
            out = theirs(torch.tensor(tokens[:, part]).long(), past_key_values=past, use_cache=True)
        got.append(out.logits.numpy())
    assert apart(np.concatenate(got, axis=1), whole) <= 1e-5
    first = theirs.generate(torch.tensor(tokens[:1]).long(), max_new_tokens=5, return_dict_in_generate=True, depth=2)
    more = torch.cat([first.sequences, torch.tensor(tokens[1:]).long()], dim=1)
    going_on = theirs.generate(more, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    depths = [1] * 13 + [2] * 5 + [1] * 15  # the last token of the first answer is fed with the second prompt
    logits = run(theirs, more.numpy(), depth=depths[: more.shape[1]])
    assert going_on[0, more.shape[1]] == logits[0, -1].argmax()


def test_nothing_is_remembered_of_a_plain_prompt(pair):
    _, theirs = pair
    tokens = torch.tensor(toys.tokens(1, 8, vocabulary=262)).long()
    with torch.no_grad():
        cache = theirs(tokens[:, :7], forward="plain", use_cache=True).past_key_values
        got = theirs(tokens[:, 7:], past_key_values=cache).logits[0, -1]
    assert apart(got, run(theirs, tokens, forward="plain")[0, -1]) <= 1e-5  # a first step has no state to blend in


def test_beam_search_reorders_states_and_keys_together(pair):
    _, theirs = pair
    ids = torch.tensor(toys.tokens(2, 8, vocabulary=262)).long()
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 9, "num_return_sequences": 2}
    assert torch.equal(theirs.generate(ids, **settings), theirs.generate(ids, use_cache=False, **settings))


def test_the_plain_backbone_generates_from_the_same_folder(pair):
    _, theirs = pair
    text = toys.tokens(9, vocabulary=262).tolist()
    got = generate(theirs, [text], forward="plain", max_new_tokens=12)[0]
    for token in got:
        assert token == run(theirs, [text], forward="plain")[0, -1].argmax()
        text.append(token)


@pytest.mark.parametrize("fields", [WILD, RICH, {**WILD, "norm": "match", "decay": 0.3}], ids=str)
def test_sweeps_settle_where_single_steps_arrive(tmp_path, fields):
    ours = model({**fields, "alpha_range": (0.0, 0.5)})
    folder = write(ours, tmp_path / "sst")
    tokens = toys.tokens(2, 30, vocabulary=262)
    loaded = open_torch(folder)
    swept = run(loaded, tokens)
    stream = loaded.config.sst["stream"]
    stream["prefill"] = "sequential"
    walked = run(loaded, tokens)
    assert not np.array_equal(walked, swept)
    assert apart(swept, walked) <= 1e-5
    stream |= {"prefill": "sweeps", "sweep_cap": 2}  # too few to settle: the steps are taken after all
    assert np.array_equal(run(loaded, tokens), walked)


def test_sweeps_settle_in_bfloat16(tmp_path, monkeypatch):
    """At a tolerance below the type's rounding they never would, and every layer would take single steps."""
    loaded = open_torch(write(model({"alpha": 0.2}), tmp_path / "sst"), dtype=torch.bfloat16)
    mixin = next(kind for kind in type(loaded).__mro__ if kind.__name__ == "StreamForCausalLM")
    recurrence = sys.modules[mixin.__module__]._Recurrence
    fallen_back = []
    walk = recurrence.scan_positions
    monkeypatch.setattr(recurrence, "scan_positions", lambda self, *rest: fallen_back.append(self) or walk(self, *rest))
    with torch.no_grad():
        loaded(torch.as_tensor(toys.tokens(2, 60, vocabulary=262)).long())
    assert not fallen_back


# ---------------------------------------------------------------------------------------- types, families, refusals


def test_narrow_types_leave_alpha_and_the_adapter_wide(tmp_path):
    ours = model({**WILD, "dtype": "bfloat16"})
    tokens = toys.tokens(2, 12, vocabulary=262)
    folder = write(ours, tmp_path / "sst", "sst", keep_lora=True)
    wide, narrow = open_torch(folder), open_torch(folder, dtype=torch.bfloat16)
    assert apart(run(wide, tokens), ours.logits(tokens)) <= 1e-4  # the rounding of states is ours too
    kept = {name for name, part in narrow.named_parameters() if part.dtype == torch.float32}
    assert kept == {name for name, _ in narrow.named_parameters() if "stream" in name or "lora" in name}
    with torch.no_grad():
        rough = narrow(torch.tensor(tokens).long()).logits
    assert rough.dtype == torch.bfloat16
    assert 1e-4 < apart(rough.float(), run(wide, tokens)) < 0.1


@pytest.mark.parametrize("forward", ["exact", "two_pass"])
def test_float64_is_as_good_a_type_as_any(tmp_path, forward):
    ours = model(WILD)
    tokens = toys.tokens(2, 12, vocabulary=262)
    loaded = torch_model(ours, tmp_path / "sst", keep_lora=True, dtype=torch.float64)
    got = run(loaded, tokens, forward=forward)
    assert got.dtype == np.float64
    assert apart(got, ours.logits(tokens, forward=forward)) <= 1e-5


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("settings", [{"forward": "two_pass"}, {"depth": 3}], ids=str)
def test_other_families_are_one_more_small_file(tmp_path, preset, settings):
    ours = model(RICH, PRESETS[preset])
    tokens = toys.tokens(2, 30, vocabulary=262)
    loaded = torch_model(ours, tmp_path / "sst", keep_lora=True)
    assert loaded.config.model_type == f"sst_{PRESETS[preset].family}"
    assert apart(run(loaded, tokens, **settings), ours.logits(tokens, **settings)) <= 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forward": "three_pass"}, "three_pass"),
        ({"forward": "two_pass", "passes": 3}, "passes=3"),
        ({"forward": "plain", "depth": 2}, "depth=1"),
        ({"depth": 0}, "depth=0"),
        ({"depth": [1, 2]}, "6 positions"),
        ({"forward": "two_pass", "use_cache": True}, "use_cache=False"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        run(pair[1], toys.tokens(2, 6, vocabulary=262), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 2, "use_cache": False}, "cache"),
        ({"depth": [1, 2]}, "one number"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"deep": 2}, "deep"),
    ],
)
def test_what_generate_cannot_do_is_refused_by_name(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[1], [[5, 6, 7]], max_new_tokens=3, **settings)


def test_a_cache_without_states_is_refused(pair):
    from transformers import DynamicCache

    _, theirs = pair
    keys = torch.zeros(1, 2, 3, 10)
    cache = DynamicCache(config=theirs.config)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="DynamicCache holds no states"):
        run(theirs, [[5, 6]], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="rolled back"):
        theirs(torch.tensor([[5, 6]]), use_cache=True).past_key_values.crop(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "other"),
        ({"stream": {"mode": "ffn"}}, "mode"),
        ({"stream": {"state": "mlp"}}, "state='mlp'"),
    ],
)
def test_unknown_versions_and_options_are_refused_by_name(tmp_path, change, message):
    import json

    folder = write(model(WILD, SHALLOW), tmp_path / "sst")
    config = json.loads((folder / "config.json").read_text())
    config["sst"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_torch(folder)


def test_the_options_there_are_the_options_here(pair):
    theirs = type(pair[1].config.stream)
    fields = {field.name: field.default for field in dataclasses.fields(theirs)}
    assert fields == {written_name(field): field.default for field in dataclasses.fields(StreamConfig)}


def test_code_runs_only_when_it_is_trusted_and_only_from_the_folder(tmp_path):
    import transformers

    folder = write(model(WILD, SHALLOW), tmp_path / "sst")
    suffixes = {file.suffix for file in folder.iterdir()}
    assert suffixes == {".json", ".md", ".py", ".safetensors"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    loaded = open_torch(folder)
    assert all(
        "--" not in reference for reference in loaded.config.auto_map.values()
    )  # "--" would lead to another repo
    modules = {
        cls.__module__.rpartition(".")[2] for cls in type(loaded).__mro__ if "transformers_modules" in cls.__module__
    }
    assert modules == {"modeling_sst", "modeling_sst_gemma3"}
