"""What `speculate` asks for: guesses from the text itself, or from a draft model whose configuration is read here."""

from __future__ import annotations

import os
from typing import Callable, Optional, Sequence

from .. import device
from ..errors import UserError, did_you_mean
from ..hub.resolve import resolve
from .final import Final
from .flags import Flag
from .keys import MODEL
from .schema import Config, ModelConfig, SpeculationConfig

NGRAM, NONE = "ngram", "none"
NO_YAML = "no --config"
"""Where a value is missing that no file was given for."""
NGRAM_TOKENS, DRAFT_TOKENS = 8, 5
"""Most guesses in a step where nobody says otherwise: a draft's cost time, those of the text do not."""


def read(final: Final, model: ModelConfig, device_target: str,
         load: Callable[[Sequence[Flag]], Config]) -> Optional[SpeculationConfig]:
    """What to guess with, None for nothing.

    Args:
        final: `speculate` and `speculate_tokens` are taken from it.
        model: the model that the guesses are for.
        device_target: where it runs.
        load: makes a configuration of flags.

    Raises:
        UserError: no such folder, or a model that cannot be a draft for this one.
    """
    method, tokens = final.pick("speculate"), final.pick("speculate_tokens")
    place = final.sources["speculate"]
    if method in (None, NONE):
        if tokens is not None:
            final.notes.append(f"speculate_tokens {tokens} ({final.sources['speculate_tokens']}) has no effect without "
                               "speculate")
        return None
    if device_target == device.ASCEND:
        raise UserError(f"speculate {method}: guesses are checked on the CPU only, this run is on Ascend", place,
                        "Leave speculate out (--speculate none).")
    if method == NGRAM:
        return SpeculationConfig(final.put("speculate_tokens", tokens or NGRAM_TOKENS,
                                           final.sources["speculate_tokens"]), None)
    draft = _draft(final, model, method, place, load)
    return SpeculationConfig(final.put("speculate_tokens", tokens or DRAFT_TOKENS, final.sources["speculate_tokens"]),
                             draft)


def _draft(final: Final, model: ModelConfig, given: str, place: str,
           load: Callable[[Sequence[Flag]], Config]) -> Config:
    path = os.path.expanduser(given)
    if not os.path.exists(path):
        path = os.path.expanduser(resolve(given, final.pick("hub")) if "/" in given else given)
    if not os.path.exists(path):
        raise UserError(f"speculate {given!r} is neither {NGRAM} nor the folder of a draft model", place,
                        did_you_mean(given, (NGRAM, NONE)) or "Give an existing folder, or a model's name on a hub: "
                        "OWNER/NAME.")
    final.put("speculate", path, place)
    flags = [Flag("load_checkpoint", "speculate", path), Flag("context.device_target", "speculate", device.CPU)]
    flags += [Flag(MODEL + name, "speculate", getattr(model, name))
              for name in ("seq_length", "block_size", "num_blocks", "batch_size")]
    try:
        draft = load(flags)
    except UserError as error:
        nowhere = error.where in (None, NO_YAML)  # what is missing belongs in its config.json
        raise UserError(f"the draft model {path} cannot be used: {error.what}", place if nowhere else error.where,
                        "Give a folder with the draft's config.json." if nowhere else error.fix) from None
    final.notes.extend(f"draft model: {note}" for note in draft.notes)
    return draft
