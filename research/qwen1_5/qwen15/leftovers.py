"""Entries of a checkpoint that are no weights: what each is, by its name, so that leaving it out can be told."""

import re
from typing import Dict, Iterable, List, Optional, Tuple

_KINDS = (
    (re.compile(r"\.(key_cache|value_cache)$"), "KV caches"),
    (re.compile(r"^(adam_[mv]\.|moment[12s]?\.|moments\.|accum\.|accu_grads\.|fp32_params\.|vhat\.|exp_avg)"),
     "optimizer states"),
    (re.compile(r"^(global_step|epoch_num|step_num|loss_scale|scale_sense|learning_rate|beta[12]_power|"
                r"current_iterator_step|last_overflow_iterator_step|append_info.*|network|hyper_param.*)$"), "training counters"),
    (re.compile(r"(rotary_emb\.inv_freq|freqs_c(os|is)|freqs_sin|swap_mask)$"), "RoPE tables"),
)


def kind_of(name: str) -> Optional[str]:
    """What an entry is that predicting does not need; None when it is not known to be any such thing."""
    return next((kind for pattern, kind in _KINDS if pattern.search(name)), None)


def sort_out(names: Iterable[str]) -> Tuple[Dict[str, List[str]], List[str]]:
    """(kind -> names of entries that can be left out, names of entries that nothing explains)."""
    known: Dict[str, List[str]] = {}
    unknown: List[str] = []
    for name in names:
        kind = kind_of(name)
        if kind is None:
            unknown.append(name)
        else:
            known.setdefault(kind, []).append(name)
    return known, unknown
