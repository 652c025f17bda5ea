"""Toy models for the tests: shapes that no two axes share, and weights that leave no branch idle.

Weights come from numpy, so the same seed gives the same numbers in any dtype and inside or outside JAX's 64-bit mode.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.families.registry import BY_NAME
from sst_jax.model import rules
from sst_jax.model.config import AdapterConfig, BackboneConfig, ModelConfig, StreamConfig
from sst_jax.model.decoder import abstract_params

# Seven layers, so that a global one has local ones on both sides; the window is shorter than any text in the tests.
BACKBONE = BackboneConfig(
    num_layers=7,
    d_model=32,
    d_ff=44,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    vocab_size=61,
    window=6,
    query_pre_attn_scalar=9.0,
    rope_scale_global=8.0,
    max_positions=600,
)
# The other families, every head and norm of its own kind; Llama's scaling cuts in within the tests' lengths.
_SMALL = {"num_layers": 3, "layer_types": (), "query_pre_attn_scalar": 10.0, "rope_theta_global": 500.0}
LLAMA = dataclasses.replace(
    BACKBONE, family="llama", rope_llama3=(1.0, 4.0, 64), tied_head=False, **{**BY_NAME["llama"].block, **_SMALL}
)
QWEN3 = dataclasses.replace(BACKBONE, family="qwen3", **{**BY_NAME["qwen3"].block, **_SMALL})
# Global layers with heads of their own, and all that Gemma 4 has besides; two periods of a local and a global layer.
GEMMA4 = dataclasses.replace(
    BACKBONE, family="gemma4", num_layers=4, layer_types=("local", "global") * 2, global_head_dim=14,
    global_num_kv_heads=1, values_from_keys=True, rope_angles_global=3, logit_cap=2.0, norm_offset=0.0, v_norm=True,
    layer_scalar=True, query_pre_attn_scalar=1.0,
)  # fmt: skip
SHALLOW = dataclasses.replace(BACKBONE, num_layers=4, layer_types=("local", "global", "local", "local"))
BOS = 2


def config(stream=None, backbone=BACKBONE, rank=3, dropout=0.0):
    """A ModelConfig; `stream` is a dict of StreamConfig's fields, or None."""
    stream = None if stream is None else StreamConfig(**stream)
    return ModelConfig(backbone, stream, AdapterConfig(rank=rank, alpha=2.0 * rank, dropout=dropout), bos_id=BOS)


def in_float64(config):
    """The config with activations in float64."""
    return dataclasses.replace(config, dtype="float64")


def params(config, dtype="float32", seed=0):
    """Random parameters: norm factors away from 1, sharp attention, an adapter and alphas that differ everywhere."""
    rng = np.random.default_rng(seed)
    small = "float64" if dtype == "float64" else "float32"

    def draw(path, leaf):
        names = [part.key for part in path]
        value = rng.standard_normal(leaf.shape)
        if names[-1] == "embedding":
            value *= config.backbone.d_model**-0.5
        elif names[-1] == "scale":
            value = (
                0.3 * value + (0.5 if names[-2] in ("q_norm", "k_norm") else 0.0) + 1.0 - config.backbone.norm_offset
            )
        elif names[-1] == "theta":
            value = -1.5 + 0.7 * value
        elif names[-1] == "gain":
            value = config.stream.gain * (1.0 + 0.2 * value)
        elif names[-1] != "bias":  # kernels and LoRA factors, [L, inputs, outputs]
            value *= leaf.shape[-2] ** -0.5 * (0.3 if names[-1] == "lora_b" else 1.0)
        return jnp.asarray(value, dtype if names[0] == "base" else small)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def tokens(*shape, seed=0, vocabulary=BACKBONE.vocab_size):
    """Random token ids, none of them BOS or below."""
    return np.random.default_rng(seed).integers(BOS + 1, vocabulary, shape).astype(np.int32)


def quick_jit(function, *static):
    """jax.jit for tests that compare in float64: XLA compiles in half the time, and the code may be slow."""
    return jax.jit(function, static_argnames=static, compiler_options={"xla_backend_optimization_level": 0})


def _hidden_in_float64(config, params, tokens, **settings):
    return rules.hidden(in_float64(config), params, tokens, **settings)


hidden_in_float64 = quick_jit(_hidden_in_float64, *rules.SETTINGS, "remat")


def two_pass_slope(config, params, tokens):
    """The slope of log error over log alpha of two passes; params and a blend of one scalar in float64."""
    alphas, errors = np.geomspace(0.003, 0.05, 5), []
    for alpha in alphas:
        mine = {**params, "blend": {"theta": jnp.full(1, np.log(alpha / (1 - alpha)))}}
        two, exact = (hidden_in_float64(config, mine, tokens, forward=name) for name in ("two_pass", "exact"))
        errors.append(np.linalg.norm(two - exact))
    return float(np.polyfit(np.log(alphas), np.log(errors), 1)[0])


CHOICES = {
    "initial": ("none", "zero", "own", "skip_bos"),
    "norm": ("none", "rms", "match"),
    "granularity": ("dimension", "layer", "scalar"),
    "gain": ({"gain": 1.0}, {"gain": 0.7}, {"gain": 1.3, "learn_gain": True}),
    "state": ("ffn", "block"),
    "decay": (0.0, 0.4),
    "propagate": ("scan", "shift"),
    "kv": ("overwrite", "first"),
    "alpha": (None, 0.3),
    "layers": (None, (0, 2, 5)),
}


def covering(choices=CHOICES):
    """A short list of StreamConfig fields in which every value of an option meets every value of every other option."""
    names, rng = list(choices), np.random.default_rng(0)
    pairs = {
        (a, i, b, j)
        for n, a in enumerate(names) for b in names[n + 1 :]
        for i in range(len(choices[a])) for j in range(len(choices[b]))
    }  # fmt: skip

    def covered(row):
        return {(a, row[a], b, row[b]) for n, a in enumerate(names) for b in names[n + 1 :]} & pairs

    rows = []
    while pairs:
        draws = [{name: int(rng.integers(len(choices[name]))) for name in names} for _ in range(300)]
        row = max(draws, key=lambda row: len(covered(row)))
        if covered(row):
            pairs -= covered(row)
            fields = {name: choices[name][index] for name, index in row.items()}
            rows.append({**fields, **fields.pop("gain"), "alpha_range": (0.0, 1.0)})
    return rows
