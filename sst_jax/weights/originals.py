"""What a base was made from, opened again: the unquantised weights, the vision tower."""

from __future__ import annotations

from sst_jax.errors import InputError
from sst_jax.weights.loading import find_recorded
from sst_jax.weights.provenance import BaseRecord, Origin, Provenance
from sst_jax.weights.references import NO_TOWER, LoadedModel, RandomPreset, Reference, VisionTower


def open_original(provenance: Provenance, dtype: str, *, lazy: bool = False) -> LoadedModel:
    """Return the unquantised weights that a quantised base was made from.

    Raises: InputError when they are gone, or are other ones.
    """
    origin, advice = provenance.unquantised, "or choose --merge-base dequantized"
    if not origin.path:
        raise InputError(f"{provenance.path} does not say what it was quantised from: {advice.removeprefix('or ')}")
    try:
        opened = _open_origin(origin).open(dtype, lazy=lazy)
    except InputError as error:
        raise InputError(f"the original weights of {provenance.path} cannot be opened: {error}; {advice}") from None
    if origin.digest != opened.provenance.digest:
        raise InputError(f"{origin.path} is not what {provenance.path} was quantised from: put it back, {advice}")
    if opened.provenance.quantize != "none":  # a copy of another quantised base
        return open_original(opened.provenance, dtype, lazy=lazy)
    return opened


def _open_origin(origin: Origin) -> Reference:
    """Return what a record of weights refers to, under the first of its names that is there."""
    found, _ = find_recorded([BaseRecord(str(origin.path), origin.digest, None, origin.revision)])
    return found.recorded_as(origin.digest) if isinstance(found, RandomPreset) else found


def vision_of(provenance: Provenance) -> VisionTower:
    """Return the vision tower beside a base; empty where there is none.

    Raises: InputError where the base cannot be opened.
    """
    if provenance.path is None or provenance.kind not in ("base", "huggingface"):
        return NO_TOWER
    return _open_origin(provenance.identity).vision()
