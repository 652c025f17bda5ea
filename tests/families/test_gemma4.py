"""What Gemma 4 has beyond what every family shows: towers that go along, bfloat16, two spellings of config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import BY_NAME
from sst_jax.inference.policies import flat
from sst_jax.inference.prefill import capacity_for
from sst_jax.inference.sampling import Sampling
from sst_jax.inference.session import Request, Session
from sst_jax.model import rules
from sst_jax.model.config import ModelConfig
from sst_jax.weights.exporting import ExportOptions, export_model
from sst_jax.weights.hub_config import backbone_from_config, config_json
from sst_jax.weights.huggingface import open_folder
from sst_jax.weights.loading import open_model
from sst_jax.weights.source import fill_base
from tests.support import toys

TINY = BY_NAME["gemma4"].tiny


def plain_logits(folder, tokens, dtype="float32"):
    base = jax.tree.map(jnp.asarray, fill_base(open_folder(folder), dtype))
    config = ModelConfig(open_folder(folder).backbone, dtype=dtype)
    params = {"base": base, "adapter": {}, "blend": {}}
    return np.asarray(rules.logits(config, params, tokens, forward="plain"), np.float32)


_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
}  # fmt: skip
# (names of transformers' classes, config of the whole but its text, what keys beside the text's begin with)
WHOLE = {
    "gemma4": ("Gemma4", {"vision_config": _VISION}, {"vision_tower", "embed_vision"}),
    "gemma4_unified": (
        "Gemma4Unified",
        {
            "vision_config": {"patch_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16},
            "audio_config": {"audio_embed_dim": 24},
        },
        {"embed_vision", "embed_audio"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
def test_what_reads_pictures_goes_along_from_a_sharded_folder_and_back(family, tmp_path):
    """Every tensor bit for bit, and the text's logits are the whole model's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (prefix, parts, beside), backbone = WHOLE[family], BY_NAME[family].tiny
    text = {**config_json(backbone, "float32"), "vocab_size_per_layer_input": 8}
    config = getattr(transformers, f"{prefix}Config")(text_config=text, **parts, image_token_id=5, video_token_id=6)
    torch.manual_seed(0)
    whole = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, buffer in whole.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7 + 0.1 * int(name.split(".")[3]))
    whole.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    for name, content in ByteTokenizer().files().items():
        (tmp_path / "in" / name).write_bytes(content)
    source = open_folder(tmp_path / "in")
    assert source.backbone == backbone
    assert len(source.files) > 2
    tokens = toys.tokens(1, 40, vocabulary=262)
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor(tokens).long()).logits.numpy()
    assert np.abs(plain_logits(tmp_path / "in", tokens) - expected).max() <= 2e-5
    export_model(open_model(tmp_path / "in", "float32"), tmp_path / "out", ExportOptions("merged", "float32"))
    again, report = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    state = again.state_dict()
    assert beside == {key.split(".")[1] for key in state if key.startswith("model.")} - {"language_model"}
    for key, value in whole.state_dict().items():
        assert torch.equal(state[key], value), key
    assert type(again) is type(whole)


def answers(config, params, requests):
    """Tokens of requests that are admitted to one session one after the other."""
    rows, new = len(requests), requests[0].max_new_tokens
    session = Session(config, params, rows=rows, capacity=capacity_for(40), chunk=4)
    found = {}
    for request in requests:
        reading = session.prefill_prompt(request)
        try:
            while True:
                next(reading)
        except StopIteration as stopped:
            row, first = session.admit(request, stopped.value)
        found[row] = first.tokens[0].tolist()
    while len(found[0]) < new:
        for row, tokens in enumerate(session.step().tokens.tolist()):
            found[row] += tokens
    return [found[row] for row in range(rows)]


@pytest.mark.slow
def test_rows_of_a_session_do_not_depend_on_each_other():
    """Prompts shorter and longer than the window, at depths of their own, in caches of two shapes."""
    config = toys.config({"alpha_range": (0.0, 1.0)}, TINY)
    params = toys.params(config)
    requests = [
        Request(tuple(toys.tokens(size, seed=size, vocabulary=262)), 9, flat(depth), Sampling(1.0), seed=depth)
        for size, depth in ((5, 3), (21, 1))
    ]
    together = answers(config, params, requests)
    assert together == [answers(config, params, [request])[0] for request in requests]
    assert together[0] != answers(config, params, [dataclasses.replace(requests[0], policy=flat(1))])[0]


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**config_json(TINY, "bfloat16"))
    theirs = transformers.Gemma4ForCausalLM(config).to(torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path)
    tokens = toys.tokens(1, 64, vocabulary=262)
    with torch.no_grad():
        narrow = theirs(torch.tensor(tokens).long()).logits.float().numpy()
        wide = theirs.float()(torch.tensor(tokens).long()).logits.numpy()
    ours = plain_logits(tmp_path, tokens, "bfloat16")
    distance = np.linalg.norm(narrow - wide)
    print(f"transformers {distance:.3g}, ours {np.linalg.norm(ours - wide):.3g}, of {np.linalg.norm(wide):.3g}")
    assert np.linalg.norm(ours - wide) <= 2 * distance


def test_config_json_is_read_in_the_hubs_spelling_and_in_transformers():
    hub = config_json(TINY, "float32")
    assert (hub["global_head_dim"], hub["num_global_key_value_heads"]) == (32, 1)
    assert hub["rope_parameters"]["full_attention"]["partial_rotary_factor"] == 0.25
    own = {"head_dim": 32, "num_key_value_heads": 1}
    theirs = {name: value for name, value in hub.items() if "global" not in name}
    assert backbone_from_config({**theirs, "per_layer_config": {"2": own, "05": own}}) == TINY
    one_shape = backbone_from_config({**theirs, "per_layer_config": {}})
    assert (one_shape.global_head_dim, one_shape.global_num_kv_heads) == (16, None)
    own_values = backbone_from_config({**hub, "attention_k_eq_v": False})
    assert own_values == dataclasses.replace(TINY, values_from_keys=False, global_num_kv_heads=None)
    for wrong in (
        {"2": own},
        {"2": own, "5": {}},
        {"1": own, "2": own, "5": own},
        {"2": {"window": 3}, "5": own},
        [own],
    ):
        with pytest.raises(InputError, match="per_layer_config"):
            backbone_from_config({**theirs, "per_layer_config": wrong})


def test_what_the_smaller_members_and_the_mixture_need_is_said():
    for field, value, words in (
        ("hidden_size_per_layer_input", 256, "embeddings of their own"),
        ("num_kv_shared_layers", 18, "keys and values of others"),
        ("enable_moe_block", True, "mixtures of experts"),
    ):
        text = {**config_json(TINY, "float32"), field: value}
        with pytest.raises(InputError, match=f"text_config: {field}={value} is unsupported.*{words}"):
            backbone_from_config({"model_type": "gemma4", "text_config": json.loads(json.dumps(text))})
