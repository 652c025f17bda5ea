"""The whole path in under a minute: a tiny random model, embedded word problems, no downloads.

    sst-jax train --config configs/tiny.py --workdir runs/tiny

What tests use. The model has seven layers of random weights and reads bytes, so the loss falls from that of a random
model towards that of letter frequencies, and what it writes is noise. One variation: --config.stream.forward=exact.
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "random:tiny"
    config.model.dtype = "float32"

    config.adapter.rank = 8
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 4

    config.data.name = "words"
    config.data.format = "plain"
    config.data.length = 384
    config.data.batch_size = 4
    config.data.heldout = 8
    config.data.limit = 512
    config.data.overlong = "drop"

    config.train.steps = 20
    config.train.eval_every = 10
    config.train.save_every = 10
    config.train.sample_tokens = 32
    return config
