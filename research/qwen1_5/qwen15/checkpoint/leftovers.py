"""Entries of a checkpoint that are not weights: what each is, by its name, so that the user can be told of it.

The one table for all who read checkpoints: predicting skips what converting leaves out.
"""

import re
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

_KINDS = (
    (re.compile(r"\.(key_cache|value_cache)$"), "KV caches"),
    # Those of MindSpore's and MindFormers' optimizers: what they keep of a weight, before the weight's own name.
    (re.compile(r"^(adam_[mv]|lamb_[mv]|moment[12s]?|momentum_buf|mean_(grad|square)|accum(_update)?|accu_grads|"
                r"(max_)?exp_avg(_sq)?(_row|_col)?|exp_inf|vhat|linear|stat|prev|step_size|mu|eta|ax|pma_weight_\w+|fp32_params)"
                r"[._]+(model|lm_head)\."), "optimizer states"),
    (re.compile(r"^(global_step|epoch_num|step_num|loss_scale|scale_(sense|value|window(_(up|down)_count)?)|learning_rate|momentum|"
                r"beta[12]_power|(state|afactor|cov)_step|fake_(lr|param)|current_iterator_step|last_overflow_iterator_step|list_index|"
                r"graceful_(exit|init)|append_info.*|network|hyper_param.*)$"), "training counters"),
    (re.compile(r"(rotary_emb\.inv_freq|freqs_c(os|is)|freqs_sin|swap_mask)$"), "RoPE tables"),
)


def kind_of(name: str) -> Optional[str]:
    """What an entry is that predicting does not need, in the plural; None when it is not known to be any such thing."""
    return next((kind for pattern, kind in _KINDS if pattern.search(name)), None)


def sort_out(names: Iterable[str], others: Mapping[str, str]) -> Tuple[Dict[str, List[str]], List[str]]:
    """Sort the entries that are no weights.

    Args:
        names: of tensors.
        others: name -> what it is, of entries that are no tensors at all.

    Returns:
        kind -> names of entries that can be left out, and the names of tensors that nothing explains.
    """
    known: Dict[str, List[str]] = {}
    unknown: List[str] = []
    for name in names:
        kind = kind_of(name)
        if kind is None:
            unknown.append(name)
        else:
            known.setdefault(kind, []).append(name)
    for name, kind in others.items():
        known.setdefault(kind_of(name) or kind, []).append(name)
    return known, unknown


def account(known: Mapping[str, List[str]]) -> List[str]:
    """What was left out, a phrase for each kind: `2 KV caches (model.a.key_cache, model.a.value_cache)`."""
    return [f"{len(names)} {kind if len(names) > 1 else kind[:-1]} "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in sorted(known.items()) if names]
