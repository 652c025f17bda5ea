"""The README.md of an export: what it is, how to run it, what it was trained on, and the base's licence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from sst_jax.families.registry import family_of
from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.types import Json
from sst_jax.weights.provenance import Origin, Provenance

PAPER = "https://arxiv.org/abs/2605.00206"

USE = {
    "sst": """\
The modelling files in this folder are plain PyTorch over transformers (5.20 or newer); `trust_remote_code` runs them
and nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("2 + 2 =", return_tensors="pt")
for depth in (1, 4):  # iterations of the stack at every generated position
    print(tokenizer.decode(model.generate(**inputs, depth=depth, max_new_tokens=32)[0]))

model(**inputs).logits  # the exact recurrence; the backbone alone: forward="plain"
model(**inputs, labels=inputs["input_ids"], forward="two_pass").loss.backward()  # for training
```

**The stream runs in transformers with `trust_remote_code=True`, and nowhere else.** vLLM and SGLang do not compute it
and refuse this folder; what they open is the format `merged`, which has no stream.""",
    "merged": """\
This is the plain backbone, with LoRA folded in and without the stream that it was trained with, so it computes
something else than the trained model. The stream's parameters lie beside it (`stream.safetensors`, `stream.json`);
sst_jax reads folder and stream together.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)
```

vLLM and SGLang open the folder under the same names.""",
    "adapter": """\
A LoRA adapter for PEFT, without the stream that it was trained with, so it computes something else than the trained
model. The stream's parameters lie beside it (`stream.safetensors`, `stream.json`); sst_jax reads both over their base.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)
```""",
}


def public_name(path: str) -> str:
    """Return a base's name in public: a hub id or package as it is, a folder or file by its last name."""
    return Path(path).name if Path(path).is_absolute() else path


def model_card(
    kind: str,
    config: ModelConfig,
    provenance: Provenance,
    metrics: Sequence[Json],
    merged_onto: str | None,
) -> str:
    """Return Markdown with the hub's metadata block.

    Args:
      kind: "sst", "merged" or "adapter".
      provenance: of the model, with the recipe that its run records now.
      metrics: the run's lines of metrics.jsonl up to the exported step; none where there is no run.
      merged_onto: what is known of the weights that LoRA was folded into, one sentence.
    """
    source = provenance.origin
    base, invented = public_name(source.path or ""), source.kind == "random"
    licence, terms = family_of(config.backbone).licence or (None, "The terms of the base model bind this one too.")
    if invented:
        licence, terms = None, "The base has random weights: there are no terms to pass on."
    meta: Json = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["state-stream-transformer", "sst", "sst_jax"],
    }
    if licence:
        meta["license"] = licence
    if source.kind == "huggingface" and base == source.path:
        meta["base_model"] = base
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in meta.items()) + "---",
        f"# State Stream Transformer over {base}",
        f"Exported by sst_jax ({kind}). The mechanism: [State Stream Transformer V2]({PAPER}).",
        "## Use",
        USE[kind],
        "## Training",
        _training(provenance, metrics),
        "## Mechanism",
        _table(("option", "value"), _options(config.stream).items()) if config.stream else "No stream.",
        "## Base",
        f"{base}{_revision(source)}, sha256 `{source.digest}`{_quantised(provenance)}. {merged_onto or ''}",
        "## Licence",
        terms,
    ]
    recipe = provenance.recipe
    if recipe:
        parts += ["## Recipe", "```json\n" + json.dumps(recipe, indent=1) + "\n```"]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _revision(source: Origin) -> str:
    return "" if source.revision is None else f" at revision `{source.revision}`"


def _quantised(provenance: Provenance) -> str:
    kind = provenance.quantize
    return "" if kind == "none" else f", in {kind} while training"


def _training(provenance: Provenance, metrics: Sequence[Json]) -> str:
    recipe = provenance.recipe
    if not recipe:
        return "Nothing is recorded: this does not come from a run folder."
    stream, train, data, optimizer = (recipe.get(part, {}) for part in ("stream", "train", "data", "optimizer"))
    adapter = recipe.get("adapter", {})
    rows = {
        "steps": f"{provenance.step} of {train.get('steps')}",
        "forward": f"{stream.get('forward')}, {stream.get('passes')} passes" if stream.get("on") else "plain",
        "data": f"{_data_name(data)} {public_name(data.get('path') or '')}".strip(),
        "rows": f"{data.get('batch_size')} of {data.get('length')} tokens a step",
        "LoRA": f"rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, dropout {adapter.get('dropout')}",
        "learning rate": f"{optimizer.get('learning_rate')}, of the stream {optimizer.get('blend_learning_rate')}",
    }
    losses = {line["step"]: line["heldout_loss"] for line in metrics if "heldout_loss" in line}
    if losses:
        forward = train.get("eval_forward") if stream.get("on") else "plain"
        rows[f"held-out loss ({forward}), nats a token"] = ", ".join(
            f"{loss:.4f} at step {step}" for step, loss in sorted(losses.items())
        )
    return _table(("what", "value"), rows.items()) + "\n\nOne seed. See the recipe below for every setting."


def _data_name(data: Json) -> str:
    """Return the data set's name; "auto" without a path are the embedded problems."""
    return "words" if data.get("name") == "auto" and not data.get("path") else str(data.get("name"))


UNSET = {"alpha": "learned", "layers": "all", "links": "each layer to itself"}  # what None means, by option


def _options(stream: StreamConfig) -> dict[str, str]:
    """Return a stream's options in words, by name."""
    return {name: _in_words(value, UNSET.get(name, "none")) for name, value in dataclasses.asdict(stream).items()}


def _in_words(value: object, unset: str = "none") -> str:
    """Return a value as a reader who knows no Python writes it."""
    if value is None:
        return unset
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        pairs = all(isinstance(part, list | tuple) for part in value)
        return ", ".join(" -> ".join(map(str, part)) if pairs else str(part) for part in value)
    return str(value)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, object]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])
