"""A state stream and the plain model that matches it, from scratch, side by side, on a task whose answer is a state.

    sst-jax train --config configs/statetrack.py --workdir runs/s3
    sst-jax train --config configs/statetrack.py --config.task.name=parity --workdir runs/parity

Two layers of width 64, trained at length 12 with three seeds, tested with new words of that length and of two and four
times it. The stream trains by exact backpropagation through time with alpha free, starting from 0.5; the arm `range` is
the same with alpha in the published [0.015, 0.10]. Tasks: s3, s5, parity, mod5, sums, arithmetic, pointers. A few
minutes on two cores; docs/findings.md says what came of it. Variations: the published training too, and what iterating
at a position does to models that were trained at depth 1 or at depths 1 to 4:

    --config.arms=stream,plain,range,published
    --config.arms=stream,longer,deepened,mixed --config.test.depths="(1,2,3,4)"
"""

from sst_jax.lab.studies import scratch


def get_config():
    config = scratch.defaults()
    config.task.name = "s3"
    config.task.length = 12
    config.arms = "stream,plain,range"

    config.stream.forward = "exact"
    config.stream.alpha_range = (0.0, 1.0)
    config.stream.alpha_init = 0.5

    config.train.steps = 600
    config.train.batch_size = 128
    config.train.seeds = 3
    return config
