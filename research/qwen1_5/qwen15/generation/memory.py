"""Bytes that a run needs on each card or machine: arithmetic on the configuration, nothing is read or loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, List, Optional, Tuple

from .. import device, naming
from ..config.schema import Config, ModelConfig, ParallelConfig
from ..errors import UserError
from ..machine import Available
from .scheduler import PIECE_TOKENS, WHOLE_PROMPTS_TOKENS

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GIB = 2 ** 30
CPU_RUNTIME_BYTES = GIB // 2
"""Resident set of a process that has imported MindSpore 2.9.0 and NumPy (0.39 GiB measured), and its graph."""
CARD_RESERVE_BYTES = 5 * GIB
"""What CANN, HCCL and the card's own system take of it: the YAML files leave 59 GB of 64 GB cards to MindSpore."""


@dataclass(frozen=True)
class Held:
    """How the operators hold weights and cache.

    Attributes:
        dtype: of the matrices; None is the model's `param_init_type`.
        cache_dtype: of the KV cache; None is the model's `compute_dtype`.
        reference: by the reference operators: attention writes its scores out, products are summed in float64.
        weights: bytes of a rank's (table and head, other weights), where the checkpoint itself says so because it is
            quantised; then `dtype` says nothing.
    """

    dtype: Optional[str] = None
    cache_dtype: Optional[str] = None
    reference: bool = False
    weights: Optional[Tuple[int, int]] = None


AS_CONFIGURED = Held()
REFERENCE = Held("float32", "float32", True)
"""The reference operators compute in float32 whatever the model's dtype is."""


@dataclass(frozen=True)
class Need:
    """Bytes one rank needs.

    Attributes:
        embedding_bytes: token embedding and, where it is not the same weight, the output head.
        layer_bytes: all other weights.
        cache_bytes: the KV cache, both halves, all layers.
        rope_bytes: cos and sin tables.
        workspace_bytes: activations of the largest prefill, and logits; see `workspace_bytes`.
        runtime_bytes: Python and MindSpore themselves, on CPU; on Ascend they live outside max_device_memory.
    """

    embedding_bytes: int
    layer_bytes: int
    cache_bytes: int
    rope_bytes: int
    workspace_bytes: int
    runtime_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return self.embedding_bytes + self.layer_bytes

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.weight_bytes + self.cache_bytes + self.other_bytes

    @property
    def other_bytes(self) -> int:
        """What is neither weights nor KV cache."""
        return self.rope_bytes + self.workspace_bytes + self.runtime_bytes

    def __str__(self) -> str:
        return (f"weights {gib(self.weight_bytes)} + KV cache {gib(self.cache_bytes)} + workspace "
                f"{gib(self.other_bytes)} = {gib(self.total_bytes)}")


def need(model: ModelConfig, parallel: ParallelConfig, device_target: str, held: Held = AS_CONFIGURED) -> Need:
    """Bytes of one rank.

    Args:
        model, parallel: as configured.
        device_target: 'CPU' or 'Ascend'.
        held: how weights and KV cache are held.
    """
    ranks = parallel.model_parallel
    item = ITEM_BYTES[held.dtype or model.param_init_type]
    # On CPU norm weights and biases are held in float32. MindFormers holds norms in layernorm_compute_type.
    small = 4 if device_target == device.CPU else ITEM_BYTES[model.layernorm_compute_type]
    embedding, layers = 0, 0
    dims = model.dims
    for weight in naming.weights(replace(dims, num_layers=1)):  # the layers are alike
        shape = weight.slice_shape(ranks, parallel.vocab_emb_dp)
        count = math.prod(shape) * (1 if weight.layer is None else dims.num_layers)
        if weight.cut == naming.VOCAB:
            embedding += count * item
        else:
            layers += count * (small if len(shape) == 1 else item)
    if held.weights is not None:
        embedding, layers = held.weights
    token_bytes = 2 * dims.num_layers * (dims.num_kv_heads // ranks) * dims.head_dim
    cache = token_bytes * model.block_size * model.num_blocks * ITEM_BYTES[held.cache_dtype or model.compute_dtype]
    rope_item = 4 if device_target == device.CPU else ITEM_BYTES[model.rotary_dtype]
    rope = 2 * model.seq_length * dims.head_dim * rope_item
    return Need(embedding, layers, cache, rope, workspace_bytes(model, ranks, device_target, held.reference),
                CPU_RUNTIME_BYTES if device_target == device.CPU else 0)


def workspace_bytes(model: ModelConfig, ranks: int, device_target: str, reference: bool) -> int:
    """Bytes of activations at the largest prefill, an upper estimate.

    T x (4 E + (H + 2 K) D / n + 3 F / n) x item + 2 B V x 4, where T is the most tokens of one prefill call (the engine
    feeds 512 at a time; on Ascend 2048, and a prompt is not divided), n the ranks, and item 4 bytes on CPU (float32
    between operators) or compute_dtype's on Ascend. 4 E: residual, normalised input, attention output and the sum being
    formed; 3 F: gate, up and their product. Where param_init_type is not compute_dtype, Ascend also casts one weight at
    a time.
    `reference` adds the scores, 3 x H / n x T x C x 8, of T tokens over C = seq_length cached ones, and the largest
    matrices in float64, max(2 F / n, V) x E x 8: gate and up of a layer, or the head.
    """
    dims = model.dims
    on_cpu = device_target == device.CPU
    most = PIECE_TOKENS if on_cpu else WHOLE_PROMPTS_TOKENS + model.seq_length
    tokens = min(most, model.seq_length * model.batch_size)
    item = 4 if on_cpu else ITEM_BYTES[model.compute_dtype]
    width = 4 * dims.hidden_size + (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim // ranks \
        + 3 * dims.intermediate_size // ranks
    total = tokens * width * item + 2 * model.batch_size * dims.vocab_size * 4
    if not on_cpu and model.param_init_type != model.compute_dtype:
        total += max(dims.intermediate_size // ranks, dims.vocab_size) * dims.hidden_size * item
    if reference:
        total += 3 * (dims.num_heads // ranks) * tokens * model.seq_length * 8
        total += max(2 * (dims.intermediate_size // ranks), dims.vocab_size) * dims.hidden_size * 8
    return total


def draft_need(config: Config, held: Held) -> Need:
    """Bytes of the draft model `config`, beside those of the model whose process it runs in: that of rank 0."""
    return replace(need(config.model, config.parallel, config.device_target, held), runtime_bytes=0)


def compare(config: Config, has: Available, held: Held = AS_CONFIGURED, draft: Optional[Need] = None) -> str:
    """Compare what a run needs with what there is; returns one line that says so.

    Args:
        config: of the run.
        has: what there is.
        held: how its weights and cache are held.
        draft: what its draft model needs on rank 0.

    Raises:
        UserError: it does not fit; with the numbers, the setting to change, and a value that fits.
    """
    alone = need(config.model, config.parallel, config.device_target, held)
    ranks = config.parallel.model_parallel
    per_rank = f" on each of {ranks} ranks" if ranks > 1 else ""
    wanted = f"{alone}{per_rank}"
    beside = 0
    if draft is not None:
        beside = draft.total_bytes
        where = " on rank 0" if ranks > 1 else ""
        wanted += f"; draft model: {draft}{where}; {gib(alone.total_bytes + beside)} together"
    line = f"memory: {wanted}"
    if has.free_bytes is None:
        return f"{line} (not compared: nothing says how much there is)"
    # Ranks start together: free memory changes meanwhile, the machine's total does not.
    all_ranks = alone.total_bytes * ranks + beside
    if alone.total_bytes + beside <= has.free_bytes and (has.whole_bytes is None or all_ranks <= has.whole_bytes):
        return f"{line}, of {gib(has.free_bytes)} ({has.what})"
    limit = has.free_bytes if has.whole_bytes is None else min(has.free_bytes, has.whole_bytes // ranks)
    fits_alone = beside and alone.total_bytes <= limit
    raise UserError(f"{wanted} is more than the {gib(limit)} there are ({has.what})", "memory",
                    "Leave the draft model out (--speculate ngram or none), or take a smaller one" if fits_alone
                    else remedy(config, limit, held))


def remedy(config: Config, limit_bytes: int, held: Held = AS_CONFIGURED) -> str:
    """What to change so that the run fits into `limit_bytes` a rank, as a sentence."""
    model, parallel = config.model, config.parallel

    def total(**changes: Any) -> int:
        return need(replace(model, **changes), parallel, config.device_target, held).total_bytes

    if model.batch_size > 1 and total(batch_size=1) <= limit_bytes:
        per_sequence = (total() - total(batch_size=1)) / (model.batch_size - 1)
        return f"Set --batch_size {1 + int((limit_bytes - total(batch_size=1)) / per_sequence)}"
    if total(num_blocks=0) <= limit_bytes:
        per_block = total(num_blocks=1) - total(num_blocks=0)
        blocks = (limit_bytes - total(num_blocks=0)) // per_block
        if blocks * model.block_size >= model.seq_length:
            return f"Set --options model.model_config.num_blocks={blocks}"
    steps = []
    for length in _halvings(model.seq_length):
        blocks = -(-length // model.block_size)
        if total(seq_length=length, num_blocks=blocks) <= limit_bytes:
            steps.append(f"Set --seq_length {length} --options model.model_config.num_blocks={blocks}"
                         + (f" --predict_length {length}" if config.generation.max_length > length else ""))
            break
    if not steps and model.param_init_type == "float32" and held.dtype != "float32":
        if total(param_init_type="bfloat16", compute_dtype="bfloat16") <= limit_bytes:
            steps.append("Set param_init_type and compute_dtype to bfloat16")
    if config.device_target == device.ASCEND:
        for ranks in (2, 4, 8, 16):
            spread = replace(parallel, use_parallel=True, model_parallel=ranks)
            if ranks > parallel.model_parallel and naming.indivisible(model.dims, ranks) is None \
                    and need(model, spread, config.device_target, held).total_bytes <= limit_bytes:
                steps.append(f"Run {ranks} cards: use_parallel True and model_parallel {ranks}")
                break
    if steps:
        return "; or ".join([steps[0], *(step[0].lower() + step[1:] for step in steps[1:])])
    smallest = total(seq_length=model.block_size, num_blocks=1)
    return f"Even with the smallest KV cache it takes {gib(smallest)}; use a larger machine or a smaller model."


def gib(size: float) -> str:
    """`11.52 GiB`; MindSpore's `GB` is the same 2^30 bytes."""
    return f"{size / GIB:.2f} GiB"


def _halvings(length: int) -> List[int]:
    lengths = []
    while length > 256:
        length //= 2
        lengths.append(length)
    return lengths
