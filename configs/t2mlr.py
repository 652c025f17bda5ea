"""T2MLR (arXiv 2607.15178) from scratch: a late layer's output enters an early layer at the next token, gated from
zero.

    sst-jax train --config configs/t2mlr.py --workdir runs/t2mlr
    sst-jax train --config configs/t2mlr.py --config.task.name=parity --workdir runs/t2mlr-parity

Two layers of width 64; the upper one's output at a token is blended into the lower one at the next, h + alpha (s -
h) with alpha = tanh(theta) from 0, one a dimension: the model begins as the plain one. The paper's rule has a gate
that depends on the input and a matrix W for the state, d + tanh(g1) sig(f) d + tanh(g2) sig(f) W R, which this has
not, and trains by Jacobi sweeps (--config.stream.forward=k_pass --config.stream.passes=4); here gradients go through
the recurrence (`exact`).

Beside it the arms `plain`, `own` (SST: every layer's own state, alpha free) and `own_two_pass` (the same in two
passes). Tasks as in statetrack.py, at 1 to 16 times the trained length; what came of it is in docs/links.md. Minutes
on two cores.
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
