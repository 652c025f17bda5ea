"""T2MLR (arXiv 2607.15178) from scratch: a late layer's output enters an early layer at the next token, gated from
zero.

    sst-jax train --config configs/t2mlr.py --workdir runs/t2mlr
    sst-jax train --config configs/t2mlr.py --config.task.name=parity --workdir runs/t2mlr-parity

Two layers of width 64; the upper one's output at a token is blended into the lower one at the next, h + alpha (s -
h) with alpha = tanh(theta) from 0, one a dimension: the model begins as the plain one. The paper's rule has a gate
that depends on the input and a matrix W for the state, d + tanh(g1) sig(f) d + tanh(g2) sig(f) W R, which this has
not, and trains by Jacobi sweeps (--config.stream.forward=k_pass --config.stream.passes=4); here gradients go through
the recurrence (`exact`).

Beside it the arms `own` (SST: every layer's own state, alpha free, by `exact`), `own_two_pass` (the same in two
passes) and `plain`. Tasks as in statetrack.py, at 1 to 16 times the trained length. Measured on S3, 400 steps, three
seeds (docs/links.md): accuracy 1.000, 1.000, .993, .962, .860 at 1, 2, 4, 8, 16 times the length, `own` 1.000 up to
8 times and .998 at 16. The paper's own scores are of pretrained models, and nothing of them was repeated here.
"""

from sst_jax.lab.studies import scratch


def get_config():
    config = scratch.defaults()
    config.task.name = "s3"
    config.task.length = 12
    config.arms = "stream,own,own_two_pass,plain"

    config.stream.links = ((1, 0),)
    config.stream.timing = "next"
    config.stream.state = "block"
    config.stream.gate = "tanh"
    config.stream.forward = "exact"

    config.train.steps = 600
    config.train.batch_size = 128
    config.train.seeds = 3
    config.test.times = (1, 2, 4, 8, 16)
    return config
