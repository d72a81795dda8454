"""What settings of sampling mean by themselves: a temperature asks for sampling, temperature 0 for none."""

from __future__ import annotations

from typing import Any, Dict, Mapping

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "no_repeat_ngram_size", "min_new_tokens")
"""The settings of sampling, under the names that keys, flags, prompts and `sampling.SamplingParams` have for them."""
_UNLIMITED = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def implied(given: Mapping[str, Any]) -> Dict[str, Any]:
    """The settings that follow from those `given` together, whatever was in force before.

    temperature 0 is the likeliest token always (do_sample False, and a temperature that divides nothing). Another
    temperature, or a top_k, top_p or min_p that leaves something out, means nothing without sampling, so it switches it
    on unless do_sample is given as well.

    Raises:
        ValueError: do_sample True with temperature 0.
    """
    temperature = given.get("temperature")
    if temperature == 0:
        if given.get("do_sample"):
            raise ValueError("do_sample True contradicts temperature 0, which takes the likeliest token always")
        return {"do_sample": False, "temperature": 1.0}
    if "do_sample" not in given and shaping(given):
        return {"do_sample": True}
    return {}


def shaping(given: Mapping[str, Any]) -> Dict[str, Any]:
    """Those of `given` that shape what is drawn: they have no effect on the likeliest token."""
    return {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p")
            if given.get(name) is not None and given[name] != _UNLIMITED.get(name)}
