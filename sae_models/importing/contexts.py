"""The contexts that an imported SAE was trained on, from what its source declares; it is measured on the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations import samples as materials
from rudder.sae_models.activations.corpus import ContextRule
from rudder.sae_models.bundle.manifest import MAX_CONTEXT, BundleError, Context
from rudder.sae_models.formats.source import Declaration

# Tokens of a context, above that of any model.
MAX_SIZE = 1 << 20
SIZE, BOS, SPECIAL, POSITIONS = "context_size", "prepend_bos", "exclude_special_tokens", "seqpos_slice"


def declared_context(declared: Declaration, model: Path) -> Context:
    """Return the contexts that a source declares, in SAELens' words. BundleError: the note that cannot be meant."""
    notes = declared.notes
    size, bos = notes.get(SIZE), notes.get(BOS)
    if not (size is None or (type(size) is int and 2 <= size <= MAX_SIZE)):
        raise BundleError(f"{SIZE}: {size!r} is not a number of tokens")
    if not (bos is None or isinstance(bos, bool)):
        raise BundleError(f"{BOS}: {bos!r} is neither true nor false")
    return Context(size, bos, _excluded_positions(notes, size), _excluded_tokens(notes, model))


def _excluded_positions(notes: Mapping[str, Any], size: int | None) -> tuple[int, ...]:
    """Return the positions outside `seqpos_slice`, the arguments of a slice over the positions of a context."""
    part = notes.get(POSITIONS) or ()
    if not (isinstance(part, list | tuple) and len(part) <= 3 and all(type(n) in (int, type(None)) for n in part)):
        raise BundleError(f"{POSITIONS}: {part!r} are not the arguments of a slice")
    if not any(part):
        return ()
    start, stop, step = (*part, None, None, None)[:3]
    if size is None and ((start or 0) < 0 or stop is not None or step not in (None, 1)):
        raise BundleError(f"{POSITIONS}: {part!r} without {SIZE}: which positions are left out is not known")
    if step == 0:
        raise BundleError(f"{POSITIONS}: {part!r}: the step is 0")
    positions = range(size or start or 0)
    return tuple(sorted(set(positions) - set(positions[slice(start, stop, step)])))


def _excluded_tokens(notes: Mapping[str, Any], model: Path) -> tuple[int, ...]:
    """Return the ids in `exclude_special_tokens`; those of the model's tokenizer if it is true."""
    excluded = notes.get(SPECIAL)
    if isinstance(excluded, bool) or excluded is None:
        return tuple(sorted(set(harvest.load_tokenizer(model).all_special_ids))) if excluded else ()
    if not (isinstance(excluded, list | tuple) and all(type(n) is int and 0 <= n < MAX_CONTEXT for n in excluded)):
        raise BundleError(f"{SPECIAL}: {excluded!r} is neither true, false nor a list of token ids")
    return tuple(sorted(set(excluded)))


def windows_of(context: Context, model: Path) -> tuple[int, ContextRule]:
    """Return the length of windows, no longer than the model's context, and the rule by which to cut them."""
    limit = materials.read_model_shape(model).context or MAX_CONTEXT
    rule = ContextRule(context.prepend_bos, context.excluded_positions, context.excluded_tokens)
    return min(context.size or materials.WINDOW_LENGTH, limit), rule
