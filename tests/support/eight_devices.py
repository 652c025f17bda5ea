"""What a mesh changes, measured in a process of its own, as the number of devices is fixed when JAX starts.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/support/eight_devices.py CASE ... > differences.json

A case is MESH:FORWARD:STORAGE or MESH:decode:STORAGE with MESH=DATA,FSDP,TENSOR. Printed for each are the largest
differences of an array from that of a mesh of one device, as relative norms; so for MESH:kernel:NAME, of a
kernel for attention. MESH:restored:MESH is saved on the first mesh and read on the second, MESH:gathered:FORWARD counts
all-gathers' bytes at two lengths of rows. For STORAGE=float64 JAX_ENABLE_X64=1 must be set. With STACKS_BY_KIND=1 the
backbone is one of Gemma 4's kind, whose global layers have heads of their own.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.data.loader import Layout, rows
from sst_jax.data.prompts import Example
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.inference import prefill
from sst_jax.inference.model import Model
from sst_jax.lab.planning.collectives import sent
from sst_jax.model import sharding
from sst_jax.model.config import BackboneConfig
from sst_jax.model.kernels import KERNELS
from sst_jax.model.quantization import storages
from sst_jax.training.optimizer import OptimizerConfig, make_optimizer
from sst_jax.training.step import ForwardConfig, batch_losses, init_state, train_step
from sst_jax.weights.checkpoint import Checkpoints
from tests.support import toys

# Every axis that the table cuts divides by 8, but for a few that do not and stay whole.
BACKBONE = BackboneConfig(
    num_layers=3,
    layer_types=("local", "global", "local"),
    d_model=128,
    d_ff=512,
    num_heads=16,
    num_kv_heads=8,
    head_dim=8,
    vocab_size=272,
    window=6,
    query_pre_attn_scalar=9.0,
    max_positions=600,
)
if os.environ.get("STACKS_BY_KIND"):
    BACKBONE = dataclasses.replace(
        BACKBONE, family="gemma4", global_head_dim=16, global_num_kv_heads=4, values_from_keys=True,
        rope_angles_global=5, logit_cap=2.0, norm_offset=0.0, v_norm=True, layer_scalar=True, query_pre_attn_scalar=1.0,
    )  # fmt: skip
ROWS, LENGTH = 8, 24
CONFIG = toys.config({"learn_gain": True}, backbone=BACKBONE, rank=4)


def batch():
    tokens = toys.tokens(ROWS, LENGTH, vocabulary=BACKBONE.vocab_size)
    segments = np.ones_like(tokens)
    segments[:, 9:] = 2
    segments[:, 20:] = np.arange(ROWS)[:, None] % 2 * 2  # padding in every other row
    positions = np.concatenate([np.arange(9), np.arange(LENGTH - 9)]).astype(np.int32)
    answers = (np.random.default_rng(0).random(tokens.shape) < 0.5) & (segments > 0)
    return {
        "tokens": tokens, "segment_ids": segments, "answer_mask": answers, "positions": np.tile(positions, (ROWS, 1)),
    }  # fmt: skip


def parameters(storage):
    params = toys.params(CONFIG, "float32" if storage == "nf4" else storage)
    if storage == "nf4":
        params["base"]["layers"] = storages.quantise_layers(params["base"]["layers"])
    return params


def placed(params):
    params = sharding.device_put_sharded(params)
    return params["base"], {name: params[name] for name in ("adapter", "blend")}


def gradients(forward, batch, dtype="float32"):
    """Losses [B, T] and the gradients of their sum, as a function to be jitted."""

    def loss(trainable, base):
        losses = batch_losses(CONFIG, ForwardConfig(forward, dtype=dtype), base, trainable, batch)
        return losses.sum(), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=0), 10)


def stepped(forward, storage):
    """Parameters, moments and metrics after two train steps."""
    base, trainable = placed(parameters(storage))
    state = sharding.device_put_sharded(init_state(trainable, OPTIMIZER))
    out = (sharding.shardings(jax.sharding.get_mesh(), state), None)
    step = functools.partial(train_step, CONFIG, ForwardConfig(forward), OPTIMIZER)
    step = jax.jit(step, donate_argnums=0, out_shardings=out)
    for _ in range(2):
        state, metrics = step(state, base, sharding.device_put_sharded(batch()), jax.random.key(0))
    assert step._cache_size() == 1
    return {"trainable": state.trainable, "metrics": metrics}


def trained(forward, storage):
    base, trainable = placed(parameters(storage))
    dtype = "float64" if storage == "float64" else "float32"
    (_, losses), gradient = gradients(forward, sharding.device_put_sharded(batch()), dtype)(trainable, base)
    return {"losses": losses, "gradient": gradient}


def decoded(storage):
    """Logits of whole rows, and the text that caches give."""
    base, trainable = placed(parameters(storage))
    model = Model(CONFIG, {"base": base, **trainable}, ByteTokenizer())
    prompts = [list(row[: 5 + number]) for number, row in enumerate(batch()["tokens"])]
    answers = model.generate(prompts, depth=[1, 2] * (ROWS // 2), max_new_tokens=6)
    tokens = np.zeros((ROWS, prefill.SMALLEST), np.int32)
    _, cache = prefill.prefill(
        CONFIG,
        model.params,
        tokens,
        np.full(ROWS, 9, np.int32),
        capacity=prefill.SMALLEST,
    )
    for part in (*cache.kv, *[cache.state] * (jax.sharding.get_mesh().shape["tensor"] == 1)):
        assert np.prod(part.sharding.shard_shape(part.shape)) * jax.sharding.get_mesh().size == part.size
    return {"logits": model.logits(batch()["tokens"]), "tokens": [answer.tokens for answer in answers]}


def attended(name):
    """A kernel's output and gradient, for rows of two documents and a window."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, 128, heads, 128)).astype(np.float32) for heads in (8, 4, 4))
    segments = np.repeat([[1, 2]], 64, axis=1) * np.ones((4, 1), np.int32)

    documents = sharding.device_put_sharded({"segment_ids": segments})["segment_ids"]

    def loss(q, k, v):
        out = KERNELS[name](q, k, v, documents, 0.1, 20)
        return jnp.square(out).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return {"out": out, "gradient": gradient}


def mesh_of(text):
    mesh = sharding.make_mesh(sharding.MeshConfig(*map(int, text.split(","))), jax.devices())
    sharding.check(mesh, BACKBONE, ROWS)
    return mesh


def measure(mesh, what, storage):
    with jax.set_mesh(mesh_of(mesh)):
        if what == "decode":
            found = decoded(storage)
        elif what == "kernel":
            found = attended(storage)
        elif what.startswith("step."):
            found = stepped(what.removeprefix("step."), storage)
        else:
            found = trained(what, storage)
        return jax.tree.map(np.asarray, found)


def restored(saved_on, read_on):
    """Differences of a train state and of the batches behind it, saved on one mesh and read on another."""
    examples = [Example(toys.tokens(9 + n, seed=n), np.ones(9 + n, bool), f"{n}") for n in range(12)]
    params = parameters("float32")

    def fresh(factor):
        trainable = {name: jax.tree.map(lambda x: x * factor, params[name]) for name in ("adapter", "blend")}
        return sharding.device_put_sharded(init_state(trainable, OPTIMIZER)), rows(examples, Layout(LENGTH, ROWS))

    with tempfile.TemporaryDirectory() as folder:
        with jax.set_mesh(mesh_of(saved_on)):
            state, iterator = fresh(1.0)
            next(iterator)
            Checkpoints(pathlib.Path(folder)).save(3, state.trainable, state.optimizer, iterator, {})
        with jax.set_mesh(mesh_of(read_on)):
            blank, elsewhere = fresh(0.0)
            trainable, optimizer, _ = Checkpoints(pathlib.Path(folder)).restore(
                3, blank.trainable, blank.optimizer, elsewhere
            )
    assert jax.tree.leaves(trainable)[0].sharding.mesh.size == mesh_of(read_on).size
    return {
        "trainable": difference(trainable, state.trainable), "optimizer": difference(optimizer, state.optimizer),
        "batch": difference(next(elsewhere), next(iterator)),
    }  # fmt: skip


def gathered(mesh, forward):
    """Bytes that a device sends in all-gathers of a gradient over rows of LENGTH, and of three times that."""
    found = {}
    with jax.set_mesh(mesh_of(mesh)):
        base, trainable = placed(parameters("nf4"))
        for times in (1, 3):
            longer = {name: np.tile(part, (1, times)) for name, part in batch().items()}
            compiled = gradients(forward, sharding.device_put_sharded(longer)).lower(trainable, base).compile()
            found[f"{times}"] = sent(compiled.as_text(), 8).get("all-gather", 0.0)
    return found


def difference(mine, theirs):
    """Largest relative norm of the difference between a leaf and its counterpart in two trees."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, mine, theirs)))


def main(cases):
    alone = functools.cache(lambda *rest: measure("1,1,1", *rest))
    results = {}
    for case in cases:
        mesh, what, rest = case.split(":")
        if what in ("restored", "gathered"):
            results[case] = {"restored": restored, "gathered": gathered}[what](mesh, rest)
        else:
            found, expected = measure(mesh, what, rest), alone(what, rest)
            results[case] = {name: difference(found[name], expected[name]) for name in found}
        print(json.dumps({case: results[case]}), file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
