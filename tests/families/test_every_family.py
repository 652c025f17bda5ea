"""What every family must show; a new one passes by being registered."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import BY_NAME, FAMILIES, SPLITTINGS
from sst_jax.model import decoder, rules, sharding
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.model.quantization import storages
from sst_jax.weights import gguf as gguf_reader
from sst_jax.weights import key_map, peft, references
from sst_jax.weights.hub_config import backbone_from_config, config_json
from sst_jax.weights.huggingface import open_folder, write_folder
from sst_jax.weights.source import fill_base
from tests.support import guides, toys
from tests.support.tiny_files import drawn, gguf_file, written
from tests.support.torch_exports import apart, model, open_torch, write

STREAM = {"alpha_range": (0.0, 1.0), "iterate_prompt": "all"}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


def raw(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return {key: (str(value.dtype), value.shape, value.tobytes()) for key, value in tensors.items()}


@pytest.fixture(scope="module")
def member(family, tmp_path_factory):
    """(backbone, state dict, folder) of a tiny member in float32."""
    state = drawn(family.tiny)
    return family.tiny, state, written(tmp_path_factory.mktemp(family.name) / "member", family.tiny, state)


def test_logits_are_those_of_transformers(member):
    """Of a text longer than the window, where there is one, and than what RoPE's scalings take for the original."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch: extra `torch`")
    transformers = pytest.importorskip("transformers")
    (backbone, _, folder), length = member, 530
    assert length > (backbone.window or 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert type(theirs).__name__ == BY_NAME[backbone.family].config.architecture
    tokens = toys.tokens(1, length, vocabulary=backbone.vocab_size)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens).long()).logits.numpy()
    base = jax.tree.map(jnp.asarray, fill_base(open_folder(folder), "float32"))
    params = {"base": base, "adapter": {}, "blend": {}}
    got = np.asarray(rules.logits(ModelConfig(backbone), params, tokens, forward="plain"))
    assert np.abs(expected).max() > 1
    assert np.abs(got - expected).max() <= 2e-5


def test_config_json_is_read_as_it_was_written(family):
    for name, preset in family.presets.items():
        config = json.loads(json.dumps(config_json(preset, "bfloat16")))
        assert backbone_from_config(config) == preset, name
        assert preset.family == family.name


def test_transformers_rewrites_config_json_to_the_same_backbone(family):
    transformers = pytest.importorskip("transformers")
    for name, preset in family.presets.items():
        config = json.loads(json.dumps(config_json(preset, "bfloat16")))
        again = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        assert backbone_from_config(json.loads(again.to_json_string(use_diff=False))) == preset, name
    empty = transformers.AutoConfig.for_model(family.config.model_type)
    defaults = read(json.loads(empty.to_json_string(use_diff=False)))
    assert read({"model_type": family.config.model_type}) == defaults
    assert isinstance(defaults, BackboneConfig) or family.name == "gemma4"  # whose defaults are a smaller member's


def read(config):
    """The backbone of a config, or why it is refused."""
    try:
        return backbone_from_config(config)
    except InputError as error:
        return str(error)


def test_what_the_block_does_not_compute_is_refused_by_name(family):
    config = config_json(family.tiny, "float32")
    for name in family.config.allowed:
        shown = r"\{\.\.\.\}" if name == "quantization_config" else "'nonsense'"  # whole pages, where there is one
        with pytest.raises(InputError, match=rf"{name}={shown} is unsupported"):
            backbone_from_config({**config, name: "nonsense"})


@pytest.mark.parametrize(("dtype", "kind"), [("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)])
def test_the_key_table_goes_both_ways_bit_for_bit(family, tmp_path, dtype, kind):
    folder = written(tmp_path / "in", family.tiny, drawn(family.tiny, kind), dtype)
    source = open_folder(folder)
    write_folder(tmp_path / "out", source.backbone, fill_base(source, dtype), dtype)
    assert raw(tmp_path / "out") == raw(folder)


def test_the_base_tree_is_what_the_table_says_and_is_counted(family):
    for name, preset in family.presets.items():
        tree = decoder.abstract_params(ModelConfig(preset))["base"]
        shapes = {spec.path: key_map.param_shape(spec, preset) for spec in key_map.table(preset)}
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        assert {"/".join(part.key for part in path): leaf.shape for path, leaf in leaves} == shapes, name
        assert sum(leaf.size for _, leaf in leaves) == preset.num_params, name


def test_a_bias_lies_as_its_kernels_outputs_do_and_is_not_quantised(family):
    tree = decoder.abstract_params(ModelConfig(family.tiny), jnp.bfloat16)["base"]["layers"]
    quantised = jax.eval_shape(storages.quantise_layers, tree)
    for name, leaf in tree.items():
        if "kernel" in leaf:
            assert storages.is_quantised(quantised[name])
            assert ("bias" in leaf) == ("bias" in quantised[name]) == (name in family.tiny.biased)
        if "bias" in leaf:
            assert quantised[name]["bias"] == leaf["bias"]
            path = [jax.tree_util.DictKey(part) for part in ("layers", name)]
            axes = [sharding.axes_of((*path, jax.tree_util.DictKey(last)), leaf[last].ndim) for last in leaf]
            assert {along[-1] for along in axes} == {"width"}


def test_a_multimodal_folder_is_read_for_its_text(family, member, tmp_path):
    """In both spellings of its keys; transformers finds every key of the text part there."""
    transformers = pytest.importorskip("transformers")
    if family.config.wrapper is None:
        pytest.skip("the family has no multimodal checkpoints")
    backbone, state, folder = member
    base = fill_base(open_folder(folder), "float32")
    for layout in family.layouts:
        write_folder(tmp_path / layout, backbone, base, "float32", layout)
        source = open_folder(tmp_path / layout)
        assert (source.backbone, source.layout) == (backbone, layout)
        loaded, report = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / layout, output_loading_info=True
        )
        assert not report["unexpected_keys"]
        assert all(
            key.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for key in report["missing_keys"]
        )
        theirs = loaded.state_dict()
        for key, value in state.items():
            assert np.array_equal(theirs[key_map.relayout(key, "multimodal_v5")].numpy(), value), key


# -------------------------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_is_the_same_model(family, member, tmp_path):
    if family.gguf is None:
        pytest.skip("the family has no GGUF files")
    backbone, state, folder = member
    source = gguf_reader.open_file(gguf_file(tmp_path / "tiny.gguf", family.tiny, state))
    assert source.backbone == backbone
    ours, theirs = fill_base(open_folder(folder), "float32"), fill_base(source, "float32")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-7)  # 1 + w is rounded where it is stored


def test_a_split_gguf_file_opens_by_any_of_its_parts(tmp_path, monkeypatch):
    family = BY_NAME["phi3"]
    state = drawn(family.tiny)
    gguf_file(tmp_path / "tiny.gguf", family.tiny, state, split_max_tensors=5)
    parts = sorted(tmp_path.glob("tiny-0000*-of-0000*.gguf"))
    assert len(parts) > 2
    whole = gguf_reader.open_file(gguf_file(tmp_path / "whole.gguf", family.tiny, state))
    read: list[Path] = []
    monkeypatch.setattr(references, "load_tokenizer", lambda file: read.append(file) or ByteTokenizer())
    for part in parts[:2]:
        source = gguf_reader.open_file(part)
        assert (source.path, source.files) == (parts[0], parts)
        references.GgufFile(part).tokenizer()
        assert read.pop() == parts[0]
        got, expected = fill_base(source, "float32"), fill_base(whole, "float32")
        assert jax.tree.all(jax.tree.map(np.array_equal, got, expected))
    parts[-1].rename(tmp_path / "elsewhere")
    with pytest.raises(
        InputError, match=rf"{parts[-1].name} is missing beside {parts[0].name}, one of {len(parts)} parts"
    ):
        gguf_reader.open_file(parts[0])
    parts[-1].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match=r"split\.no="):
        gguf_reader.open_file(parts[0])


def test_both_names_of_a_tensor_are_one_to_the_gguf_library(family):
    gguf = pytest.importorskip("gguf")
    if family.gguf is None:
        pytest.skip("the family has no GGUF files")
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.architecture)
    mapping = gguf.get_tensor_name_map(architecture, family.tiny.num_layers)
    both = list(zip(key_map.expected(family.tiny), key_map.expected(family.tiny, "gguf"), strict=True))
    both += zip(key_map.fused_keys(family.tiny), key_map.fused_keys(family.tiny, "gguf"), strict=True)
    parts = {part.key for parts in key_map.fused_keys(family.tiny).values() for part in parts}
    for huggingface_key, gguf_key in both:
        if huggingface_key in parts:  # no tensor has this name
            continue
        named = mapping.get_name(huggingface_key, try_suffixes=(".weight", ".bias"))
        # A buffer's key has no suffix on the hub; the converter gives it one.
        assert named == (
            gguf_key if "." + huggingface_key.rpartition(".")[2] in (".weight", ".bias") else gguf_key[:-7]
        )


# ----------------------------------------------------------------------------------------------- decoding and exports


@pytest.fixture(scope="module")
def ours(family):
    """A tiny member with a stream and an adapter."""
    return model(STREAM, family.tiny)


@pytest.fixture(scope="module")
def written_texts(ours):
    """Two texts, a prompt of 11 continued token by token at depths 1 and 2, and `exact`'s logits by depth."""
    prompt = toys.tokens(11, seed=3, vocabulary=262).tolist()
    found = ours.generate([prompt, prompt], depth=[1, 2], max_new_tokens=12)
    least = min(len(one.tokens) for one in found)  # 12, unless a text ends before
    assert least >= 3
    texts = np.array([[*prompt, *one.tokens[:least]] for one in found], np.int32)
    return texts, {depth: np.asarray(ours.logits(texts, forward="exact", depth=depth)) for depth in (1, 2)}


@pytest.mark.slow
def test_decoding_token_by_token_is_exact(written_texts):
    texts, logits = written_texts
    for row, depth in enumerate((1, 2)):
        assert logits[depth][row, 10:-1].argmax(-1).tolist() == texts[row, 11:].tolist()


@pytest.mark.slow
def test_the_pytorch_export_gives_our_logits(ours, written_texts, tmp_path):
    torch = pytest.importorskip("torch")
    texts, logits = written_texts
    fused = BY_NAME[ours.config.backbone.family].fused
    for keep_lora in (False,) if fused else (False, True):
        loaded = open_torch(write(ours, tmp_path / f"sst{keep_lora}", "sst", keep_lora=keep_lora))
        for depth, expected in logits.items():
            with torch.no_grad():
                got = loaded(torch.tensor(texts).long(), depth=depth).logits.numpy()
            assert apart(got, expected) <= 1e-4


def test_the_merged_export_is_transformers_own_class(family, ours, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write(ours, tmp_path / "merged", "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(loaded).__name__ == family.config.architecture
    # Its numbers are the reference's, as above; here what counts is that LoRA is in them.
    merged = {key: torch.from_numpy(np.array(value)) for key, value in merged_weights(ours).items()}
    state = loaded.state_dict()
    assert merged.keys() <= state.keys()
    for key, value in merged.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=2e-6)


def merged_weights(ours):
    """Every linear with its LoRA factors in it, by its key on the hub."""
    scale, base, found = ours.config.adapter.scale, ours.params["base"]["layers"], {}
    for key, entry in key_map.expected(ours.config.backbone).items():
        name, _, last = entry.row.path.removeprefix("layers/").partition("/")
        if last == "kernel":
            factors = {part: np.asarray(value)[entry.layer] for part, value in ours.params["adapter"][name].items()}
            kernel = np.asarray(base[name]["kernel"])[entry.layer]
            found[key] = (kernel + scale * factors["lora_a"] @ factors["lora_b"]).T
    for whole, parts in key_map.fused_keys(ours.config.backbone).items():
        found[whole] = np.concatenate([found.pop(part.key) for part in parts])
    return found


def test_an_adapter_is_read_back_bit_for_bit(family, ours, tmp_path):
    if family.fused:  # PEFT's factors would be of the fused linears
        for kind, options in (("adapter", {}), ("sst", {"keep_lora": True})):
            with pytest.raises(InputError, match="fuse the linears that LoRA has apart"):
                write(ours, tmp_path / kind, kind, **options)
        return
    found = peft.read_folder(write(ours, tmp_path / "adapter", "adapter"), family.tiny)
    assert found.config.adapter == ours.config.adapter
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params["adapter"], dict(ours.params["adapter"])))


# ----------------------------------------------------------------------------------------------------------- registry


def test_families_that_name_the_same_thing_mean_the_same():
    for one in FAMILIES:
        for name, splitting in one.tokens.splittings.items():
            assert SPLITTINGS[name] == splitting
    presets = [name for one in FAMILIES for name in one.presets]
    assert len(set(presets)) == len(presets)


FILES = ("families/qwen2.py", "weights/torch_sst/modeling_sst_qwen2.py", "families/registry.py")  # of sst_jax


def test_the_guide_quotes_the_files_that_it_writes():
    """Every block of code in docs/adding-a-family.md stands in one of them, line for line."""
    guides.check_quotes("adding-a-family.md", [f"sst_jax/{file}" for file in FILES], least=7)
    assert 'dataclasses.field(default=False, metadata={"since": "0.2.0"})' in guides.read_guide("adding-a-family.md")
