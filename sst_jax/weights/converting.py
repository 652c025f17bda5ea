"""A foreign checkpoint made into a base folder: what `convert` does with a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.numpy import save

from sst_jax.console.progress import bar
from sst_jax.data.template_file import use_template_file
from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.files import digest
from sst_jax.types import Json
from sst_jax.weights import calibrate, store
from sst_jax.weights.conversion import Conversion
from sst_jax.weights.provenance import Provenance
from sst_jax.weights.references import NO_TOWER, vision_tensors
from sst_jax.weights.source import Source


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """How a checkpoint is stored.

    dtype             type of what is not quantised: "float32" or "bfloat16"
    quantize          storage of the linears (`model/quantization`)
    calibrate         a file of texts to quantise for, see `calibrate.read_texts`; None: for the weights alone
    calibrate_tokens  tokens of these texts
    text_only         whether a vision tower is left out
    chat_template     file of a Jinja template for chats, which is stored; None: the checkpoint's own
    """

    dtype: str
    quantize: str = "none"
    calibrate: str | None = None
    calibrate_tokens: int = 32_768
    text_only: bool = False
    chat_template: str | None = None


def convert_source(
    source: Source, location: str, target: Path, options: ConvertOptions, revision: str | None = None
) -> Provenance:
    """Convert a foreign checkpoint into a base folder, a tensor at a time.

    Args:
        source: the checkpoint, of which only headers have been read.
        location: how others may refer to it.
        target: the base folder: new or empty.
        options: how it is stored.
        revision: of a hub id, the commit whose files these are.

    Returns:
        Its provenance, as the base folder records it.

    Raises: InputError as `Conversion` and `calibrate.read_texts`.
    """
    tokenizer, texts = load_tokenizer(source.path, required=False), None
    if options.chat_template is not None:
        use_template_file(tokenizer, options.chat_template, "--chat-template")
    tokenizer.set_rows(source.backbone.vocab_size)
    if options.calibrate is not None:
        texts = calibrate.read_texts(options.calibrate, tokenizer, options.calibrate_tokens)
    files = tokenizer.files()
    tower = NO_TOWER if options.text_only else vision_tensors(source)
    if tower.tensors:
        files |= {store.VISION: save(tower.tensors, metadata={"format": "pt"}), **tower.files}
    known = Provenance(
        source.kind,
        location,
        layout=source.layout,
        quantize=options.quantize,
        calibration=texts.facts if texts else None,
        vision_config=tower.config or None,
        revision=revision,
    )
    del tower
    # Hashing takes as long as converting and needs no more than a core: both at once.
    with ThreadPoolExecutor(1) as pool, bar(None, "converting", unit="tensor") as meter:
        identity = pool.submit(digest, source.files)

        def facts() -> Json:
            return dataclasses.replace(known, digest=identity.result()).conversion_record()

        def update(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        Conversion(target, source, options.dtype, options.quantize, texts).run(facts, files, update)
        return dataclasses.replace(known, digest=identity.result())
