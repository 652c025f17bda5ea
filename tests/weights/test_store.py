"""Base folders: exact round trips, and no way to open a damaged or foreign one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sst_jax
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model.config import ModelConfig
from sst_jax.weights.huggingface import open_folder
from sst_jax.weights.source import digest, fill_base
from sst_jax.weights.store import is_base_folder, load_base, read_header, save_base, verify
from tests.support import checkpoints

CONFIG = ModelConfig(PRESETS["tiny"]).to_dict()
FACTS = {"layout": "multimodal", "digest": "ab" * 32, "dtype": "bfloat16"}
FILES = {"tokenizer.json": b'{"model": 1}', "tokenizer.model": bytes(range(256))}


def params():
    rng = np.random.default_rng(0)
    return {
        "base": {
            "embed": {"embedding": rng.standard_normal((11, 6)).astype(ml_dtypes.bfloat16)},
            "layers": {"q": {"kernel": jnp.asarray(rng.standard_normal((3, 6, 4)), jnp.bfloat16)}},
            "packed": {"codes": rng.integers(0, 255, (3, 8), dtype=np.uint8), "scale": np.ones((3, 2), np.float32)},
        },
        "adapter": {"q": {"a": jnp.asarray(rng.standard_normal((3, 6, 2)), jnp.float32)}},
        "blend": {"theta": jnp.zeros((3, 6)), "gain": np.float32(1.5) * np.ones((), np.float32)},
    }


def flat(tree):
    return {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture
def folder(tmp_path):
    return save_base(tmp_path / "base", CONFIG, params(), FACTS, FILES)


def test_round_trip_is_exact(folder):
    config, loaded, facts = load_base(folder)
    assert flat(loaded) == flat(params())
    assert (facts, ModelConfig.from_dict(config)) == (FACTS, ModelConfig(PRESETS["tiny"]))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert is_base_folder(folder)
    assert not is_base_folder(folder.parent)
    assert read_header(folder)["arrays"]["base/layers/q/kernel"] == {"shape": [3, 6, 4], "dtype": "bfloat16"}
    assert [path.name for path in folder.parent.iterdir()] == ["base"]


def test_only_the_base_is_converted(folder):
    loaded = load_base(folder, "float32")[1]
    assert loaded["base"]["embed"]["embedding"].dtype == np.float32
    np.testing.assert_array_equal(
        loaded["base"]["embed"]["embedding"], params()["base"]["embed"]["embedding"].astype(np.float32)
    )
    assert loaded["base"]["packed"]["codes"].dtype == np.uint8
    loaded = load_base(folder, "bfloat16")[1]
    assert loaded["base"]["packed"]["scale"].dtype == ml_dtypes.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves([loaded["adapter"], loaded["blend"]])} == {"float32"}
    with pytest.raises(InputError, match="float16"):
        load_base(folder, "float16")


def test_shardings_place_the_arrays(folder):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = load_base(folder, sharding=sharding)[1]
    assert all(isinstance(leaf, jax.Array) and leaf.sharding == sharding for leaf in jax.tree.leaves(loaded))
    assert flat(loaded) == flat(params())
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return sharding

    load_base(folder, sharding=place)
    assert asked == {path: tuple(spec["shape"]) for path, spec in read_header(folder)["arrays"].items()}


def test_a_folder_written_from_four_devices_opens_on_one(tmp_path):
    code = """
import sys, numpy as np, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sst_jax.weights.store import load_base, save_base
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, PartitionSpec(None, "model"))
save_base(sys.argv[1], {}, {"base": {"x": jax.device_put(jnp.arange(96.0).reshape(3, 8, 4), spread)}}, {})
assert len(load_base(sys.argv[1], sharding=spread)[1]["base"]["x"].addressable_shards) == 4
"""
    root = Path(sst_jax.__file__).parents[1]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "base"], check=True, env=env, timeout=120, cwd=root)
    wanted = np.arange(96, dtype=np.float32).reshape(3, 8, 4)
    np.testing.assert_array_equal(load_base(tmp_path / "base")[1]["base"]["x"], wanted)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    np.testing.assert_array_equal(load_base(tmp_path / "base", sharding=one)[1]["base"]["x"], wanted)


def test_a_flipped_byte_in_any_file_is_found_and_named(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            broken = bytearray(content)
            broken[position] ^= 0x10
            file.write_bytes(bytes(broken))
            with pytest.raises(InputError) as caught:
                load_base(folder)
            if file.name != "manifest.json":  # a broken manifest may name whatever it no longer describes
                assert str(file) in str(caught.value), (file, position)
        file.write_bytes(content)
    load_base(folder)


def test_a_missing_file_is_named(folder):
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=f"{file} is missing"):
            load_base(folder)
        file.write_bytes(content)
    load_base(folder)


def test_an_unlisted_file_among_the_parameters_is_named(folder):
    (folder / "NOTES.md").write_text("mine")
    verify(folder)
    (folder / "params" / "stray").write_text("whose?")
    with pytest.raises(InputError, match="stray is not listed"):
        load_base(folder)
    load_base(folder, check=False)


def test_a_manifest_cannot_point_outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("../secret", "/etc/passwd", "params/../../secret", ""):
        (folder / "manifest.json").write_text(json.dumps({"sha256": {**manifest["sha256"], name: "0"}}))
        with pytest.raises(InputError, match="not a path inside the folder"):
            load_base(folder)
    for content in ({}, {"sha256": {}}, {"sha256": [1]}):
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"manifest\.json does not list"):
            load_base(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"sst_jax\.json: format version 2 is unknown \(this program reads 1\)"),
        ({"version": None}, "format version None is unknown"),
        ({"format": "other"}, "format 'other' is not 'sst_jax'"),
        ({"facts": 3}, "facts is missing or not an object"),
        ({"arrays": None}, "arrays is missing or not an object"),
    ],
)
def test_foreign_headers_are_refused_by_name(folder, change, message):
    header = json.loads((folder / "sst_jax.json").read_text())
    (folder / "sst_jax.json").write_text(json.dumps({**header, **change}))
    with pytest.raises(InputError, match=message):
        load_base(folder)


@pytest.mark.parametrize("spec", [{}, 3, {"shape": "x", "dtype": "float32"}, {"shape": [1], "dtype": "complex64"}])
def test_malformed_array_specs_are_refused(folder, spec):
    header = json.loads((folder / "sst_jax.json").read_text())
    header["arrays"]["base/embed/embedding"] = spec
    (folder / "sst_jax.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"arrays\.base/embed/embedding is malformed"):
        load_base(folder, check=False)


def test_other_folders_are_not_base_folders(tmp_path):
    with pytest.raises(InputError, match=r"sst_jax\.json is missing"):
        load_base(tmp_path)
    with pytest.raises(InputError, match=r"sst_jax\.json is missing"):
        load_base(tmp_path / "nowhere")


def test_saving_refuses_to_overwrite(folder):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="base is not empty"):
        save_base(folder, CONFIG, params(), FACTS)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["base"]
    (folder.parent / "empty").mkdir()
    save_base(folder.parent / "empty", CONFIG, params(), FACTS)
    load_base(folder.parent / "empty")


@pytest.mark.parametrize(
    ("params", "files", "message"),
    [
        ({}, {}, "no parameters"),
        ({"base": {}}, {}, "no parameters"),
        ({"base": {"x": 1.0}}, {}, "base/x is not an array"),
        ({"base": {"x": np.ones(3)}}, {}, "base/x is not an array of float32, bfloat16, uint8"),
        ({"base": {"a/b": np.ones(3, np.float32)}}, {}, "'a/b' under base/ must be text"),
        pytest.param(
            {"base": {3: np.ones(3, np.float32)}}, {}, "3 under base/ must be text", marks=pytest.mark.wrong_types
        ),
        ({"base": {"x": np.ones(3, np.float32)}}, {"../evil": b""}, "'../evil' is not a plain file name"),
        ({"base": {"x": np.ones(3, np.float32)}}, {"params": b""}, "'params' is not a plain"),
        ({"base": {"x": np.ones(3, np.float32)}}, {"sst_jax.json": b""}, "'sst_jax.json' is not a plain"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path, params, files, message):
    with pytest.raises(InputError, match=message):
        save_base(tmp_path / "base", CONFIG, params, FACTS, files)
    assert not list(tmp_path.iterdir())


def test_from_hugging_face_to_a_base_folder(tmp_path):
    source = open_folder(
        checkpoints.write_checkpoint(tmp_path / "hf", checkpoints.random_state(layout="multimodal"), shards=2)
    )
    base = fill_base(source, source.dtype)
    facts = {"layout": source.layout, "digest": digest(source.files), "dtype": source.dtype}
    save_base(tmp_path / "base", ModelConfig(source.backbone).to_dict(), {"base": base}, facts)
    config, loaded, found = load_base(tmp_path / "base")
    assert ModelConfig.from_dict(config).backbone == checkpoints.BACKBONE
    assert found == facts
    assert flat(loaded["base"]) == flat(base)


def test_a_base_folder_of_an_unknown_family_is_refused_by_name(tmp_path):
    config = ModelConfig(PRESETS["tiny"]).to_dict()
    config["backbone"]["family"] = "gemma9"
    params = {"base": {"embed": {"embedding": np.zeros((4, 2), np.float32)}, "layers": {}}}
    save_base(tmp_path / "base", config, params, FACTS, ByteTokenizer().files())
    with pytest.raises(InputError, match=r"backbone\.family='gemma9' is not one of 'gemma3', 'llama'"):
        sst_jax.load(tmp_path / "base")
