"""The account of a checkpoint against a model: every weight found, all else explained, or a refusal that says what.

Missing, misshapen, surplus, tied and left out mean the same whether a checkpoint is loaded or converted, because both
ask here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import numpy as np

from .. import family, naming
from ..errors import UserError
from ..naming import Dims, Weight
from .leftovers import sort_out
from .quantised import COMPANIONS, Scheme, scheme_of
from .reader import Checkpoint
from .tensors import element_count

_COMPARED_BYTES = 4 * 2 ** 20
"""What is compared at once of two tensors that should be equal."""
FOREIGN_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale_inv|absmax|quant_state\..+)$")
"""Names of tensors that other tools' quantised checkpoints have and no other."""


@dataclass(frozen=True)
class Expected:
    """What a checkpoint should hold.

    Attributes:
        dims: the model's sizes.
        sizes_from: where they are written, for messages: 'the YAML', a config.json.
        names: whose names the tensors have: 'hf', 'ms', or 'either'.
        parts: ranks that the checkpoint is cut for, of which it is one slice; 1 where it is whole.
        vocab_emb_dp: every rank has embedding and head whole.
    """

    dims: Dims
    sizes_from: str
    names: str = "either"
    parts: int = 1
    vocab_emb_dp: bool = True

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """What the checkpoint should have of a weight, unquantised."""
        return weight.slice_shape(self.parts, self.vocab_emb_dp)


@dataclass(frozen=True)
class Account:
    """What a checkpoint holds.

    Attributes:
        stored: a weight's MindSpore name -> its name in the checkpoint; all of the model, in the network's order.
        schemes: MindSpore name -> how it is quantised, for the weights that are.
        tied_head: the stored name of a head that equals the embedding, where the two are tied and one is enough.
        left_out: kind -> names of entries that are no weights.
    """

    stored: Mapping[str, str]
    schemes: Mapping[str, Scheme]
    tied_head: Optional[str]
    left_out: Mapping[str, list[str]]


def take_account(checkpoint: Checkpoint, expected: Expected) -> Account:
    """Match a checkpoint's tensors with a model's weights. Contents are read only to compare a tied head.

    Raises:
        UserError: a weight is missing or has another shape, a tensor belongs to no weight, a quantised one is not
            whole, or a tied head differs from the embedding.
    """
    weights = {weight.ms: weight for weight in naming.weights(expected.dims)}
    stored, surplus = _match(checkpoint, weights, expected)
    theirs = _own_names(stored, expected)
    schemes = {}
    for name, weight in weights.items():
        if name in stored:
            scheme = scheme_of(checkpoint.infos, stored[name], expected.shape(weight), checkpoint.path)
            if scheme is not None:
                schemes[name] = scheme
    companions = {stored[name] + suffix for name in schemes for suffix in COMPANIONS}
    surplus = [name for name in surplus if name not in companions]
    _refuse_misshapen(checkpoint, {name: w for name, w in weights.items() if name in stored and name not in schemes},
                      stored, expected)
    missing = [getattr(weight, theirs) for name, weight in weights.items() if name not in stored]
    if missing:
        raise UserError(f"{_listed(missing)} missing ({len(weights) - len(missing)} of {len(weights)} weights found)",
                        checkpoint.path, _missing_hint(checkpoint, missing, expected))
    tied_head = _tied_head(checkpoint, surplus, stored, expected)
    if tied_head is not None:
        surplus = [name for name in surplus if name != tied_head and name not in _with_companions(tied_head)]
    left_out, unknown = sort_out(surplus, checkpoint.others)
    if unknown:
        raise UserError(f"{_listed(unknown)} no weight of this model", checkpoint.path,
                        _surplus_hint(unknown[0], expected))
    return Account({name: stored[name] for name in weights}, schemes, tied_head, left_out)


def _match(checkpoint: Checkpoint, weights: Mapping[str, Weight], expected: Expected
           ) -> tuple[dict[str, str], list[str]]:
    """MindSpore name -> stored name, and the stored names that are no weight's."""
    stored: dict[str, str] = {}
    surplus = []
    for found in checkpoint.infos:
        name: Optional[str] = found
        if expected.names != "ms":
            name = naming.hf_to_ms(found)
        if name is None and expected.names == "either":
            name = found
        if name is None or name not in weights:
            surplus.append(found)
        elif name in stored:
            raise UserError(f"holds both {stored[name]} and {found}, names of the same weight", checkpoint.path)
        else:
            stored[name] = found
    return stored, surplus


def _own_names(stored: Mapping[str, str], expected: Expected) -> str:
    """'hf' or 'ms': whose names a missing weight should have had."""
    if expected.names != "either":
        return expected.names
    return "hf" if any(name != found for name, found in stored.items()) else "ms"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _refuse_misshapen(checkpoint: Checkpoint, weights: Mapping[str, Weight], stored: Mapping[str, str],
                      expected: Expected) -> None:
    wrong = [weight for name, weight in weights.items()
             if checkpoint.infos[stored[name]].shape != expected.shape(weight)]
    if not wrong:
        return
    weight, found = wrong[0], checkpoint.infos[stored[wrong[0].ms]].shape
    what = (f"{stored[weight.ms]} has shape {list(found)}, {expected.sizes_from} makes it "
            f"{list(expected.shape(weight))}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    why = _cut_otherwise(weight, found, expected) or _another_model(checkpoint, stored, expected)
    raise UserError(what + (f": {why}" if why else ""), checkpoint.path,
                    "Take weights, sizes and slices from one model.")


def _cut_otherwise(weight: Weight, found: tuple[int, ...], expected: Expected) -> Optional[str]:
    if expected.parts == 1:
        return None
    for parts in (1, 2, 4, 8, 16):
        for whole_vocabulary in (True, False):
            if parts != expected.parts and weight.axis(parts, whole_vocabulary) is not None and \
                    found == weight.slice_shape(parts, whole_vocabulary):
                return f"this slice was cut for {parts} ranks, not {expected.parts}"
    if found == weight.slice_shape(expected.parts, not expected.vocab_emb_dp):
        return f"it was sliced with vocab_emb_dp {not expected.vocab_emb_dp}, not {expected.vocab_emb_dp}"
    return None


def _another_model(checkpoint: Checkpoint, stored: Mapping[str, str], expected: Expected) -> Optional[str]:
    sizes = {"num_layers": sum(1 for name in stored if name.endswith(".attention_norm.weight"))}
    embedding = stored.get(naming.EMBEDDING.ms)
    if embedding and expected.parts == 1 and len(checkpoint.infos[embedding].shape) == 2:
        sizes["vocab_size"], sizes["hidden_size"] = checkpoint.infos[embedding].shape
    dims = expected.dims
    theirs = family.looks_like(sizes)
    ours = family.looks_like({"hidden_size": dims.hidden_size, "intermediate_size": dims.intermediate_size,
                              "num_layers": dims.num_layers})
    if theirs is None or theirs == ours:
        return None
    return f"the checkpoint looks like Qwen1.5-{theirs}" + (f", not {ours}" if ours else "")


def _missing_hint(checkpoint: Checkpoint, missing: Sequence[str], expected: Expected) -> str:
    if list(missing) in ([naming.HEAD.hf], [naming.HEAD.ms]):
        return f"If the head is the embedding, {expected.sizes_from} must say tie_word_embeddings true."
    if any(FOREIGN_QUANTISED.search(name) for name in checkpoint.infos):
        return ("These are tensors of GPTQ, AWQ or the like, and nothing beside them says which: put config.json (with "
                "quantization_config), quantize_config.json or quantization_config.json of the same model there.")
    if expected.names == "hf" and any(naming.ms_to_hf(name) not in (None, name) for name in checkpoint.infos):
        return "These are MindSpore's names: convert_reversed.py goes from there to Hugging Face."
    if expected.names == "ms" and any(naming.hf_to_ms(name) not in (None, name) for name in checkpoint.infos):
        return "These are Hugging Face's names: convert_weight.py goes from there to MindSpore."
    concatenated = next((name for name in checkpoint.infos if _is_concatenated(name)), None)
    if concatenated:
        return (f"{concatenated} is of qkv_concat, whose two layouts share their names and shapes: convert again from "
                "Hugging Face.")
    return f"Is the checkpoint complete, and is {expected.sizes_from} of the same model?"


def _is_concatenated(name: str) -> bool:
    return "w_qkv" in name or "w_gate_hidden" in name


def _surplus_hint(name: str, expected: Expected) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= expected.dims.num_layers:
        return f"{expected.sizes_from} has {expected.dims.num_layers} layers; take it from the weights' own model."
    if "lora" in name:
        return "Merge adapters into the weights first."
    if _is_concatenated(name):
        return "It was converted with qkv_concat; convert it again from Hugging Face without."
    if FOREIGN_QUANTISED.search(name):
        return "It is of a quantised model, the weights beside it are not: take all files from one model."
    return "Only dense Qwen1.5 and Qwen2 models are read."


def _with_companions(name: str) -> list[str]:
    return [name] + [name + suffix for suffix in COMPANIONS]


def _tied_head(checkpoint: Checkpoint, surplus: Sequence[str], stored: Mapping[str, str],
               expected: Expected) -> Optional[str]:
    """The stored head of a tied model, which may be there, but then it must be the embedding."""
    names = {"hf": [naming.HEAD.hf], "ms": [naming.HEAD.ms]}.get(expected.names, [naming.HEAD.hf, naming.HEAD.ms])
    head = next((name for name in surplus if name in names), None)
    if head is None or not expected.dims.tie_word_embeddings:
        return None
    embedding = stored[naming.EMBEDDING.ms]
    if not same_contents(checkpoint, head, embedding):
        raise UserError(f"{head} differs from {embedding}, though tie_word_embeddings is true", checkpoint.path,
                        f"Set tie_word_embeddings false in {expected.sizes_from} to keep both.")
    return head


def same_contents(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors are equal bit for bit, and so are the scales, zero points and orders that they may have."""
    infos = checkpoint.infos
    for left, right in zip(_with_companions(one), _with_companions(other)):
        if left not in infos and right not in infos:
            continue
        if left not in infos or right not in infos or not _same(checkpoint, left, right):
            return False
    return True


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.infos[one], checkpoint.infos[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not element_count(a.shape):
        return False
    for start in range(0, a.nbytes, _COMPARED_BYTES):
        nbytes = min(_COMPARED_BYTES, a.nbytes - start)
        left, right = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        checkpoint.read_into(one, start, left)
        checkpoint.read_into(other, start, right)
        if not np.array_equal(left, right):
            return False
    return True
