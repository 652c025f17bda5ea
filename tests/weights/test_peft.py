"""Adapter folders: as PEFT reads them, and back."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sst_jax
from sst_jax import convert, export
from sst_jax.console.command import run
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.model.config import LINEARS, AdapterConfig
from sst_jax.weights import peft
from sst_jax.weights.loading import LoadedModel
from tests.support import toys
from tests.support.torch_exports import SHALLOW, apart, model, write

STREAM = {"alpha_range": (0.0, 1.0), "decay": 0.2}


def trained_on(base, targets=("down", "q", "v"), stream=STREAM):
    """A Model with a random adapter and stream over a base, as training leaves one."""
    fresh = model(stream, base.config.backbone, targets=targets)
    return Model(fresh.config, {**fresh.params, "base": base.params["base"]}, base.tokenizer, base.provenance)


@pytest.fixture
def ours(tmp_path):
    return trained_on(sst_jax.load(write(model(None, SHALLOW, rank=0), tmp_path / "base", "merged")))


def test_an_adapter_comes_back_with_its_stream_bit_for_bit(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    assert {file.suffix for file in folder.iterdir()} == {".json", ".md", ".safetensors"}
    back = sst_jax.load(folder)
    assert back.config == ours.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), back.params,
                                     ours.params))  # fmt: skip
    assert back.provenance.path == ours.provenance.path


def test_an_adapters_own_template_is_used(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    before = sst_jax.load(folder).tokenizer.chat([{"role": "user", "content": "hi"}])
    (folder / "chat_template.jinja").write_text("{{ bos_token }}[{{ messages[0].role }}] {{ messages[0].content }}")
    tokenizer = sst_jax.load(folder).tokenizer
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == tokenizer.encode("[user] hi") != before
    again = write(sst_jax.load(folder), tmp_path / "again", "adapter")  # which its base could not give it
    assert sst_jax.load(again).tokenizer.chat([{"role": "user", "content": "hi"}]) == tokenizer.encode("[user] hi")


@pytest.mark.parametrize("targets", [("down", "q", "v"), ("o",)], ids=str)
def test_peft_computes_what_we_do_with_the_stream_off(ours, tmp_path, targets):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours = trained_on(ours, targets)
    folder = write(ours, tmp_path / "adapter", "adapter")
    config = theirs.PeftConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.1)
    base = transformers.AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
    tokens = torch.tensor(toys.tokens(2, 20)).long()
    with torch.no_grad():
        before = base(tokens).logits.numpy()
        adapted = theirs.PeftModel.from_pretrained(base, folder).eval()
        got = adapted(tokens).logits.numpy()
    wrapped = {name.rpartition(".")[2].removesuffix("_proj") for name, part in adapted.named_modules()
               if hasattr(part, "lora_A")}  # fmt: skip
    assert wrapped == set(targets)
    assert apart(got, ours.logits(tokens.numpy(), forward="plain")) <= 1e-4
    assert apart(got, before) > 1e-2


def test_peft_writes_what_we_read(ours, tmp_path):
    """An adapter of PEFT's own, without anything of ours beside."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(ours.provenance.path, dtype=torch.float32)
    config = theirs.LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM",
                               init_lora_weights=False)  # fmt: skip
    adapted = theirs.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    back = sst_jax.load(tmp_path / "theirs")
    assert (back.config.backbone, back.config.stream) == (SHALLOW, None)
    assert back.config.adapter == AdapterConfig(2, 5, back.config.adapter.targets)
    assert set(back.config.adapter.targets) == {"k", "up"}
    tokens = torch.tensor(toys.tokens(1, 15)).long()
    with torch.no_grad():
        assert apart(back.logits(tokens.numpy()), adapted(tokens).logits) <= 1e-4


LAYERS = [f"layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (1, "v"), (3, "q"))]


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"use_rslora": True}, 4),
        ({"rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp.up_proj": 7}}, 7),
        ({"alpha_pattern": {"q_proj": 3, "layers.2.mlp.up_proj": 0.5}}, 4),
        ({"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up_proj": 1}, "use_rslora": True}, 9),
        ({"layers_to_transform": [1]}, 4),
        ({"target_modules": LAYERS, "alpha_pattern": {LAYERS[1]: 0}}, 4),
    ],
    ids=["rslora", "ranks", "alphas", "all three", "one layer", "uneven layers"],
)
def test_variants_that_are_arithmetic_compute_what_peft_does(ours, tmp_path, options, rank):
    """And the merged weights are PEFT's, so that exports are too."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(ours.provenance.path, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **options}
    config = theirs.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    adapted = theirs.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "theirs")  # as trainers save it
    back = sst_jax.load(tmp_path / "theirs")
    assert back.config.adapter.rank == rank
    tokens = torch.tensor(toys.tokens(1, 15)).long()
    with torch.no_grad():
        expected = adapted(tokens).logits
        assert apart(back.logits(tokens.numpy()), expected) <= 1e-5
        assert apart(back.logits(tokens.numpy()), ours.logits(tokens.numpy(), forward="plain")) > 1e-2
        again = sst_jax.load(write(back, tmp_path / "again", "adapter"))
        assert apart(again.logits(tokens.numpy()), expected) <= 1e-5
    merged = sst_jax.load(write(back, tmp_path / "merged", "merged")).params["base"]["layers"]
    for name, module in adapted.merge_and_unload().model.layers[1].named_modules():
        if (short := name.rpartition(".")[2].removesuffix("_proj")) in ("q", "v", "up"):
            np.testing.assert_allclose(merged[short]["kernel"][1], module.weight.detach().numpy().T, atol=1e-5)


def test_factors_of_a_vision_tower_are_skipped_with_a_word(tmp_path, caplog):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    tiny = multimodal(pytest.importorskip("transformers"), torch, tmp_path)
    config = theirs.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = theirs.get_peft_model(tiny, config).eval()
    adapted.base_model.model.config._name_or_path = str(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "theirs")
    back = sst_jax.load(tmp_path / "theirs")
    assert "factors of the vision tower are left out" in caplog.text
    assert set(back.config.adapter.targets) == set(LINEARS)
    tokens = torch.tensor(toys.tokens(1, 15)).long()
    with torch.no_grad():
        assert apart(back.logits(tokens.numpy()), adapted(tokens).logits) <= 1e-5
    weights = load_file(tmp_path / "theirs" / peft.WEIGHTS)
    tower = {name: value for name, value in weights.items() if "vision" in name}
    assert tower
    save_file(tower, tmp_path / "theirs" / peft.WEIGHTS)
    with pytest.raises(InputError, match=r"holds no LoRA factors of self_attn\.q_proj"):
        sst_jax.load(tmp_path / "theirs")


def test_a_folder_with_a_whole_model_beside_an_adapter_is_the_model(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "base" / name, folder)
    assert not peft.is_adapter_folder(folder)


def test_an_adapter_of_a_multimodal_model_leaves_its_vision_tower_alone(tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tiny = multimodal(transformers, torch, tmp_path)
    ours = trained_on(sst_jax.load(tmp_path / "base"))
    assert ours.provenance.layout != "text"
    folder = write(ours, tmp_path / "adapter", "adapter")
    tokens = torch.tensor(toys.tokens(1, 20)).long()
    adapted = theirs.PeftModel.from_pretrained(tiny.eval(), folder).eval()
    wrapped = [name for name, part in adapted.named_modules() if hasattr(part, "lora_A")]
    assert len(wrapped) == 3 * SHALLOW.num_layers
    assert not any("vision" in name for name in wrapped)
    with torch.no_grad():
        assert apart(adapted(tokens).logits, ours.logits(tokens.numpy(), forward="plain")) <= 1e-4
    assert sst_jax.load(folder).config == ours.config


def multimodal(transformers, torch, folder):
    """A tiny multimodal model, and its hub folder with a tokenizer at `folder`/base."""
    text = transformers.Gemma3TextConfig(
        vocab_size=262,
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=6,
        query_pre_attn_scalar=9,
        max_position_embeddings=600,
    )
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config={"model_type": "siglip_vision_model", **vision}, mm_tokens_per_image=1
    )
    torch.manual_seed(0)
    tiny = transformers.Gemma3ForConditionalGeneration(config).float()
    tiny.save_pretrained(folder / "base")
    for file in write(model(None, SHALLOW), folder / "tokens", "merged").glob("*token*"):
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    return tiny


def test_a_merged_multimodal_model_loads_with_nothing_missing_or_left_over(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tiny = multimodal(transformers, torch, tmp_path)
    ours = trained_on(sst_jax.load(tmp_path / "base"))
    folder = write(ours, tmp_path / "merged", "merged")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    tokens = torch.tensor(toys.tokens(1, 20)).long()
    with torch.no_grad():
        assert apart(loaded.eval()(tokens).logits, ours.logits(tokens.numpy(), forward="plain")) <= 1e-4
    tower = {key: value for key, value in tiny.state_dict().items() if "vision" in key}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in tower.items())
    # The way back: the text part with its stream, and the tower once more on the way out.
    back = sst_jax.load(folder)
    assert back.config.stream == ours.config.stream
    assert apart(back.logits(tokens.numpy()), ours.logits(tokens.numpy())) <= 1e-4


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type='IA3'"),
        ({"use_dora": True}, r"use_dora=True is unsupported: merge the adapter .* \(merge_and_unload\), and open that"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj\.lora_A.* has shape \[3, 36\]; its config says rank 8"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern has 'q_proj': 0, which is malformed"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=.* must map names"),
        ({"alpha_pattern": {"(.*)*q": 8}}, "alpha_pattern has .* which is malformed"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern has .* which is malformed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"something_new": 3}, "something_new=3"),
        ({"r": 4}, r"has shape \(3, 36\), not \(4, 36\)|has shape \(36, 3\), not \(36, 4\)|has shape \(44, 3\)"),
        pytest.param({"r": "many"}, "adapter.rank='many'", marks=pytest.mark.wrong_types),
        ({"target_modules": 3}, "target_modules=3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "takes what such an adapter began with off its base"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(ours, tmp_path, changed, message):
    folder = write(ours, tmp_path / "adapter", "adapter")
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | changed))
    with pytest.raises(InputError, match=message):
        sst_jax.load(folder)


def test_a_missing_layer_an_unknown_key_and_a_missing_file_are_named(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    whole = load_file(folder / peft.WEIGHTS)
    key = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    save_file({name: value for name, value in whole.items() if name != key}, folder / peft.WEIGHTS)
    with pytest.raises(InputError, match="LoRA factors of q are missing"):
        sst_jax.load(folder)
    save_file(whole | {"base_model.model.lm_head.lora_A.weight": whole[key]}, folder / peft.WEIGHTS)
    with pytest.raises(InputError, match=r"unknown key base_model\.model\.lm_head"):
        sst_jax.load(folder)
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        sst_jax.load(folder)


def test_another_base_is_refused_and_a_lost_one_named(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    base = tmp_path / "base"
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"the base of adapter .*/adapter, .*/base, cannot be opened"):
        sst_jax.load(folder)
    write(model(None, SHALLOW, rank=0, seed=5), base, "merged")
    with pytest.raises(InputError, match=r"is not the base that .*adapter was trained on.*stream\.json records"):
        sst_jax.load(folder)


def test_the_export_command_merges_into_a_foreign_base_that_it_reads_a_layer_at_a_time(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    arguments = ["--from", str(folder), "--to", str(tmp_path / "merged"), "--format", "merged", "--dtype", "float32"]
    assert run(export.main, arguments) == 0
    tokens = toys.tokens(1, 15)
    assert apart(sst_jax.load(tmp_path / "merged").logits(tokens), ours.logits(tokens)) <= 1e-5


@pytest.mark.parametrize("key", ["quantize", "digest"])
@pytest.mark.parametrize("value", [["none"], {"none": {}}, 3], ids=str)
def test_a_record_of_the_base_that_is_not_text_is_refused(ours, tmp_path, key, value):
    file = write(ours, tmp_path / "adapter", "adapter") / "stream.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base": {**content["base"], key: value}}))
    with pytest.raises(InputError, match=rf"stream\.json: base: {key}=.* is not text"):
        sst_jax.load(tmp_path / "adapter")


def test_there_is_no_adapter_without_lora(tmp_path):
    with pytest.raises(InputError, match="no LoRA adapter"):
        write(model(STREAM, SHALLOW, rank=0), tmp_path / "adapter", "adapter")


def test_an_adapter_over_an_sst_folder_is_refused(tmp_path):
    ours = sst_jax.load(write(model(STREAM, SHALLOW), tmp_path / "sst", "sst", keep_lora=True))
    opened = LoadedModel(ours.config, ours.params, ours.tokenizer, ours.provenance)
    with pytest.raises(InputError, match="--format sst"):
        write(Model(*opened), tmp_path / "adapter", "adapter")


@pytest.mark.parametrize("begun", [True, False, "gaussian", "orthogonal"])
def test_how_an_adapter_began_is_no_matter_where_its_base_stayed_as_it_was(ours, tmp_path, begun):
    folder = write(ours, tmp_path / "adapter", "adapter")
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | {"init_lora_weights": begun}))
    assert sst_jax.load(folder).config == ours.config


def test_factors_in_half_precision_become_float32(ours, tmp_path):
    folder = write(ours, tmp_path / "adapter", "adapter")
    factors = {name: part.astype(np.float16) for name, part in load_file(folder / peft.WEIGHTS).items()}
    save_file(factors, folder / peft.WEIGHTS, {"format": "pt"})
    model = sst_jax.load(folder)
    assert {part.dtype for part in jax.tree.leaves(model.params["adapter"])} == {np.dtype(np.float32)}
    model.save(tmp_path / "saved")
    assert sst_jax.load(tmp_path / "saved").config == ours.config


def test_a_multimodal_base_keeps_its_tower_through_every_copy(tmp_path):
    """Saved, converted from what was saved, and exported again: the tower and its type are the first one's."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    multimodal(transformers, torch, tmp_path)
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    trained_on(sst_jax.load(tmp_path / "base")).save(tmp_path / "saved")
    assert run(convert.main, ["--from", str(tmp_path / "saved"), "--to", str(tmp_path / "copy")]) == 0
    arguments = ["--from", str(tmp_path / "copy"), "--to", str(tmp_path / "out"), "--format", "merged"]
    assert run(export.main, [*arguments, "--dtype", "bfloat16", "--no-measure-gap"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    given = load_file(tmp_path / "base" / "model.safetensors")
    tower = {name: part for name, part in given.items() if "vision" in name}
    assert tower
    assert all(np.array_equal(written[name], part) for name, part in tower.items())
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 28
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"bfloat16"}
    arguments = ["--from", str(tmp_path / "saved"), "--to", str(tmp_path / "text"), "--text-only"]
    assert run(convert.main, arguments) == 0
    assert not (tmp_path / "text" / "vision.safetensors").exists()
