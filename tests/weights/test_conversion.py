"""Conversion gives the numbers of reading all at once, interrupted or not, in bounded memory; and back out."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import sst_jax
from sst_jax import convert, export
from sst_jax.console.command import run
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model.config import BackboneConfig
from sst_jax.weights import huggingface, key_map, store
from sst_jax.weights.conversion import Conversion
from sst_jax.weights.source import fill_base
from tests.support import checkpoints

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


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder in three shards, with the byte tokenizer."""
    made = checkpoints.write_checkpoint(tmp_path / "source", checkpoints.random_state(BACKBONE), BACKBONE, shards=3)
    for name, content in ByteTokenizer().files().items():
        (made / name).write_bytes(content)
    return made


def stream(folder, target, quantize="none", dtype="bfloat16", progress=None):
    source = huggingface.open_folder(folder)
    return Conversion(target, source, dtype, quantize).run(lambda: {"kind": "huggingface"}, progress=progress)


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4_double"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_folder_holds_what_reading_all_at_once_gives(folder, tmp_path, dtype, quantize):
    target = stream(folder, tmp_path / "out", quantize, dtype)
    _, params, _ = store.load_base(target)
    base = fill_base(huggingface.open_folder(folder), dtype, quantize=quantize)
    assert jax.tree.structure(params["base"]) == jax.tree.structure(base)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), params["base"], base))
    stacks = store.open_stacks(target)
    for name, leaf in base["layers"].items():
        for part, value in leaf.items():
            assert np.array_equal(stacks["layers"][name][part][3], value[3])
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_conversion_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(done, total):
        if done == 40:
            raise Killed

    with pytest.raises(Killed):
        stream(folder, tmp_path / "out", "nf4", progress=kill)
    assert not (tmp_path / "out").exists()
    reads = []
    original = huggingface._read
    monkeypatch.setattr(
        huggingface, "_read", lambda file, name, *rest: reads.append(name) or original(file, name, *rest)
    )
    source = huggingface.open_folder(folder)
    stream(folder, tmp_path / "out", "nf4")
    assert len(reads) == len(source.headers) - 40
    whole = stream(folder, tmp_path / "whole", "nf4")
    ours, theirs = (store.load_base(path)[1] for path in (tmp_path / "out", whole))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_what_a_kill_left_half_written_is_written_again(folder, tmp_path):
    """A file that is not what the record says, a record that breaks off, and a line too few."""

    class Killed(BaseException):
        pass

    def kill(done, total):
        if done == 60:
            raise Killed

    with pytest.raises(Killed):
        stream(folder, tmp_path / "out", "nf4_double", progress=kill)
    stage = tmp_path / ".out.converting"
    record = stage / "written.jsonl"
    *lines, last = record.read_text().splitlines(keepends=True)
    assert len(lines) == 59
    record.write_text("".join(lines[1:]) + last[: len(last) // 2])
    victim = stage / next(iter(json.loads(lines[5])["sha256"]))
    victim.write_bytes(victim.read_bytes()[:-1])
    stream(folder, tmp_path / "out", "nf4_double")
    whole = stream(folder, tmp_path / "whole", "nf4_double")
    names = [
        sorted(file.relative_to(top) for file in top.rglob("*") if file.is_file()) for top in (tmp_path / "out", whole)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.suffix != ".json" and "params" in name.parts and name.name[0].isdigit():
            assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    store.verify(tmp_path / "out")


def test_the_beginning_of_another_conversion_is_refused(folder, tmp_path):
    def kill(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(folder, tmp_path / "out", progress=kill)
    with pytest.raises(InputError, match="another conversion"):
        stream(folder, tmp_path / "out", "nf4")


def test_damage_is_noticed_by_both_ways_of_reading(folder, tmp_path):
    target = stream(folder, tmp_path / "out")
    victim = target / "params" / "base.layers.q.kernel" / "2.0.0"
    content = bytearray(victim.read_bytes())
    content[7] ^= 1
    victim.write_bytes(content)
    for read in (store.load_base, store.open_stacks):
        with pytest.raises(InputError, match=r"2\.0\.0 is damaged"):
            read(target)


@pytest.mark.parametrize("text_only", [False, True])
def test_the_vision_tower_goes_through_untouched_or_not_at_all(tmp_path, text_only):
    state = checkpoints.random_state(BACKBONE, layout="multimodal")
    tower = {
        "vision_tower.a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "multi_modal_projector.b": np.ones(3),
    }
    config = huggingface.config_json(BACKBONE, "bfloat16", "multimodal") | {"mm_tokens_per_image": 9}
    source = checkpoints.write_checkpoint(tmp_path / "source", {**state, **tower}, BACKBONE, config)
    for name, content in ByteTokenizer().files().items():
        (source / name).write_bytes(content)
    # How pictures become its input goes where the tower goes.
    processors = {"preprocessor_config.json": b'{"size": 28}', "processor_config.json": b'{"image_seq_length": 1}'}
    for name, content in processors.items():
        (source / name).write_bytes(content)
    flags = ["--text-only"] if text_only else []
    assert run(convert.main, ["--from", str(source), "--to", str(tmp_path / "base"), *flags]) == 0
    out = ["--to", str(tmp_path / "out"), "--format", "merged", *flags]
    assert run(export.main, ["--from", str(tmp_path / "base"), *out]) == 0
    assert (
        run(export.main, ["--from", str(source), "--to", str(tmp_path / "straight"), "--format", "merged", *flags]) == 0
    )
    for name, content in processors.items():
        for folder in ("out", "straight"):
            file = tmp_path / folder / name
            assert not file.exists() if text_only else file.read_bytes() == content
    written = load_file(tmp_path / "out" / "model.safetensors")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    if text_only:
        assert exported["model_type"] == "gemma3_text"
        assert set(written) == set(key_map.expected(BACKBONE))
    else:
        assert exported["mm_tokens_per_image"] == 9
        assert set(written) == {*state, *tower}
        assert all(
            written[key].dtype == value.dtype and np.array_equal(written[key], value) for key, value in tower.items()
        )
    assert all(np.array_equal(written[key], state[key]) for key in state if key in written)


def test_the_vision_tower_is_found_beside_an_export_with_a_stream(tmp_path):
    config = huggingface.config_json(BACKBONE, "float32", "multimodal")
    tower = {"vision_tower.a.weight": np.arange(6, dtype=np.float32)}
    state = checkpoints.random_state(BACKBONE, layout="multimodal")
    source = checkpoints.write_checkpoint(tmp_path / "source", {**state, **tower}, BACKBONE, config)
    for name, content in ByteTokenizer().files().items():
        (source / name).write_bytes(content)
    sst_jax.load(source).with_stream().save(tmp_path / "base")
    out = ["--to", str(tmp_path / "merged"), "--format", "merged"]
    assert run(export.main, ["--from", str(tmp_path / "base"), *out]) == 0
    again = sst_jax.load(tmp_path / "merged")
    assert again.config.stream is not None
    assert np.array_equal(
        load_file(again.save(tmp_path / "again") / store.VISION)["vision_tower.a.weight"], np.arange(6)
    )


def sparse_checkpoint(folder, backbone):
    """The real keys, shapes and shard sizes of a multimodal checkpoint, all zeros and all holes on disk."""
    folder.mkdir()
    shards, index = [[]], {}
    for key, entry in key_map.expected(backbone).items():
        size = int(np.prod(entry.shape)) * 2
        if sum(part[2] for part in shards[-1]) + size > 4.95e9:
            shards.append([])
        shards[-1].append((key_map.relayout(key, "multimodal"), list(entry.shape), size))
    for number, shard in enumerate(shards, 1):
        name, end, header = f"model-{number:05d}-of-{len(shards):05d}.safetensors", 0, {}
        for key, shape, size in shard:
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end, index[key] = end + size, name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": index}))
    config = huggingface.config_json(backbone, "bfloat16", "multimodal")
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in ByteTokenizer().files().items():
        (folder / name).write_bytes(content)
    return folder


def watched(*arguments, kill_at=None):
    """(exit code, peak anonymous memory in GiB) of `python -m sst_jax....`; killed when `kill_at()` is true."""
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as file:
            found = [line for line in file if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) if found else 0)
        if kill_at is not None and kill_at():
            process.kill()
        time.sleep(0.05)
    return process.returncode, peak / 2**20


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory from /proc")
def test_a_4b_checkpoint_converts_both_ways_in_bounded_memory_and_survives_a_kill(tmp_path):
    source = sparse_checkpoint(tmp_path / "4b", PRESETS["4b"])
    stage = tmp_path / ".base.converting" / "params" / "base.layers.down.codes"
    command = ("sst_jax.convert", "--from", source, "--to", tmp_path / "base", "--quantize", "nf4")
    code, _ = watched(*command, kill_at=lambda: (stage / "9.0.0").exists())
    assert code == -9
    code, inwards = watched(*command)
    assert code == 0
    code, outwards = watched(
        "sst_jax.export",
        "--from",
        tmp_path / "base",
        "--to",
        tmp_path / "out",
        "--format",
        "merged",
        "--merge-base",
        "dequantized",
    )
    assert code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
    print(f"peak anonymous memory: {inwards:.2f} GiB in, {outwards:.2f} GiB out")
    assert inwards <= 4.0
    assert outwards <= 6.0
    huggingface.open_folder(tmp_path / "out")
