"""Bytes a run needs on each card or machine, before anything is loaded: `python -m qwen15 memory` prints the table."""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

from .. import device, naming
from ..config.load import Config, ModelConfig, ParallelConfig, add_flags, flags_from, load_config
from ..errors import UserError
from ..family import FAMILY, yaml_name
from .engine import PREFILL_CHUNK_TOKENS

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GIB = 2 ** 30
CPU_RUNTIME_BYTES = GIB // 2
"""Resident set of a process that has imported MindSpore 2.9.0 and NumPy (0.39 GiB measured), and its graph."""
CARD_RESERVE_BYTES = 5 * GIB
"""What CANN, HCCL and the card's own system take of it: the YAML files leave 59 GB of 64 GB cards to MindSpore."""
RANKS = (1, 2, 4, 8)
BEGIN, END = "<!-- begin: python -m qwen15 memory -->", "<!-- end: python -m qwen15 memory -->"


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


@dataclass(frozen=True)
class Available:
    """Bytes a rank may use.

    Attributes:
        free_bytes: for this rank now; None when nothing says.
        whole_bytes: for all ranks that share the machine, used or not; None on Ascend, where each has its own card.
        what: where the numbers come from.
    """

    free_bytes: Optional[int]
    whole_bytes: Optional[int]
    what: str


def need(model: ModelConfig, parallel: ParallelConfig, device_target: str, held_dtype: Optional[str] = None,
         held_cache_dtype: Optional[str] = None, reference: bool = False) -> Need:
    """Bytes of one rank.

    Args:
        model, parallel: as configured.
        device_target: 'CPU' or 'Ascend'.
        held_dtype: dtype in which matrices are held; `param_init_type` by default.
        held_cache_dtype: dtype in which the KV cache is held; `compute_dtype` by default.
        reference: by the reference operators: attention writes its scores out, products are summed in float64.
    """
    ranks = parallel.model_parallel if parallel.use_parallel else 1
    item = ITEM_BYTES[held_dtype or model.param_init_type]
    embedding, layers = 0, 0
    for weight in naming.weights(model.dims):
        shape = weight.slice_shape(ranks, parallel.vocab_emb_dp)
        # On CPU norm weights and biases are held in float32. MindFormers holds norms in layernorm_compute_type.
        small = 4 if device_target == device.CPU else ITEM_BYTES[model.layernorm_compute_type]
        count = 1
        for size in shape:
            count *= size
        if weight.cut == naming.VOCAB:
            embedding += count * item
        else:
            layers += count * (small if len(shape) == 1 else item)
    dims = model.dims
    token_bytes = 2 * dims.num_layers * (dims.num_kv_heads // ranks) * dims.head_dim
    cache = token_bytes * model.block_size * model.num_blocks * ITEM_BYTES[held_cache_dtype or model.compute_dtype]
    rope_item = 4 if device_target == device.CPU else ITEM_BYTES[model.rotary_dtype]
    rope = 2 * model.seq_length * dims.head_dim * rope_item
    return Need(embedding, layers, cache, rope, workspace_bytes(model, ranks, device_target, reference),
                CPU_RUNTIME_BYTES if device_target == device.CPU else 0)


def workspace_bytes(model: ModelConfig, ranks: int, device_target: str, reference: bool = False) -> int:
    """Bytes of activations at the largest prefill, an upper estimate.

    T x (4 E + (H + 2 K) D / n + 3 F / n) x item + 2 B V x 4, where T is the most tokens of one prefill call (the engine
    feeds 2048 at a time; on Ascend a prompt is not divided), n the ranks, and item 4 bytes on CPU (float32 between
    operators) or compute_dtype's on Ascend. 4 E: residual, normalised input, attention output and the sum being formed;
    3 F: gate, up and their product. Where param_init_type is not compute_dtype, Ascend also casts one weight at a time.
    `reference` adds the scores, 3 x H / n x T x C x 8, of T tokens over C = seq_length cached ones, and the largest matrices in
    float64, max(2 F / n, V) x E x 8: gate and up of a layer, or the head.
    """
    dims = model.dims
    on_cpu = device_target == device.CPU
    tokens = min(PREFILL_CHUNK_TOKENS + (0 if on_cpu else model.seq_length), model.seq_length * model.batch_size)
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


def available(config: Config, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> Available:
    """What a rank may use: `max_device_memory`, or less on a smaller card; on CPU what the machine (or its container) has."""
    if config.device_target != device.ASCEND:
        return machine_memory(proc, cgroup)
    allowed, card = config.max_device_memory_bytes, device.card_bytes()
    if card is None or (allowed is not None and allowed <= card - CARD_RESERVE_BYTES):
        return Available(allowed, None, "max_device_memory")
    return Available(max(0, card - CARD_RESERVE_BYTES), None, f"a card of {gib(card)} less {gib(CARD_RESERVE_BYTES)} for CANN and HCCL")


def machine_memory(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> Available:
    """Memory of this machine, or of the container it runs in where that allows less."""
    fields = _meminfo(os.path.join(proc, "meminfo"))
    free, whole, what = fields.get("MemAvailable"), fields.get("MemTotal"), "the machine (MemAvailable)"
    limit = _cgroup_limit(cgroup)
    if limit is not None and (whole is None or limit[0] < whole):
        whole = limit[0]
        if free is None or limit[0] - limit[1] < free:
            free, what = max(0, limit[0] - limit[1]), "the container's memory limit"
    return Available(free, whole, what)


def check(config: Config, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> str:
    """Compare what a run needs with what there is; returns one line that says so.

    Raises:
        UserError: it does not fit; with the numbers, the setting to change, and a value that fits.
    """
    held = _held(config)
    wanted = need(config.model, config.parallel, config.device_target, **held)
    has = available(config, proc, cgroup)
    ranks = config.parallel.model_parallel
    per_rank = f" on each of {ranks} ranks" if ranks > 1 else ""
    line = f"memory: {wanted}{per_rank}"
    if has.free_bytes is None:
        return f"{line} (not compared: nothing says how much there is)"
    # Ranks start together: what is free now changes under this one's hands, what the machine has in all does not.
    all_ranks = wanted.total_bytes * ranks
    if wanted.total_bytes <= has.free_bytes and (has.whole_bytes is None or all_ranks <= has.whole_bytes):
        return f"{line}, of {gib(has.free_bytes)} ({has.what})"
    limit = has.free_bytes if has.whole_bytes is None else min(has.free_bytes, has.whole_bytes // ranks)
    raise UserError(f"{wanted}{per_rank} is more than the {gib(limit)} there are ({has.what})", "memory",
                    remedy(config, limit, held))


def remedy(config: Config, limit_bytes: int, held: Optional[Dict[str, object]] = None) -> str:
    """What to change so that the run fits into `limit_bytes` a rank, as a sentence."""
    held = held or {}
    model, parallel = config.model, config.parallel

    def total(**changes) -> int:
        return need(replace(model, **changes), parallel, config.device_target, **held).total_bytes

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
    if not steps and model.param_init_type == "float32" and held.get("held_dtype") != "float32":
        if total(param_init_type="bfloat16", compute_dtype="bfloat16") <= limit_bytes:
            steps.append("Set param_init_type and compute_dtype to bfloat16")
    if config.device_target == device.ASCEND:
        for ranks in (2, 4, 8, 16):
            spread = replace(parallel, use_parallel=True, model_parallel=ranks)
            if ranks > parallel.model_parallel and naming.indivisible(model.dims, ranks) is None \
                    and need(model, spread, config.device_target, **held).total_bytes <= limit_bytes:
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


def _held(config: Config) -> Dict[str, object]:
    """How the operators of this machine hold weights and cache (the reference operators need float32)."""
    if config.device_target != device.CPU:
        return {}
    from .. import ops

    if ops.decide()[0] != "reference":
        return {}
    return {"held_dtype": "float32", "held_cache_dtype": "float32", "reference": True}


def _meminfo(path: str) -> Dict[str, int]:
    sizes = {}
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                words = rest.split()
                if len(words) == 2 and words[1] == "kB":
                    sizes[name] = int(words[0]) * 1024
    except OSError:
        pass  # not Linux, or a sandbox without /proc: nothing is known, and `check` says so
    return sizes


def _cgroup_limit(root: str) -> Optional[Tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of this container; None where there is no limit."""
    for limit_name, usage_name, stat_name in (
            ("memory.max", "memory.current", "memory.stat"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")):
        limit, usage = (_number(os.path.join(root, name)) for name in (limit_name, usage_name))
        if limit is not None and usage is not None and limit < 2 ** 60:
            return limit, max(0, usage - _reclaimable(os.path.join(root, stat_name)))
    return None


def _number(path: str) -> Optional[int]:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: str) -> int:
    """Cached file pages, which the kernel gives back when they are wanted."""
    try:
        with open(path, encoding="ascii") as file:
            fields = dict(line.split() for line in file if len(line.split()) == 2)
    except OSError:
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def table(folder: str) -> str:
    """Bytes per card for every size on 1, 2, 4 and 8 cards, with the settings of the YAML files in `folder`."""
    lines = ["| Qwen1.5 | model_parallel | weights | KV cache | bytes a token | workspace | total "
             "| max_device_memory |", "|---|---|---|---|---|---|---|---|"]
    for size, dims in FAMILY.items():
        config = _shipped(folder, size)
        for ranks in RANKS:
            why = naming.indivisible(dims, ranks)
            if why:
                lines.append(f"| {size} | {ranks} | | | | | | {why.split(' (')[0]} |")
                continue
            parallel = replace(config.parallel, use_parallel=ranks > 1, model_parallel=ranks)
            wanted = need(config.model, parallel, device.ASCEND)
            limit = config.max_device_memory_bytes
            fits = f"{wanted.total_bytes / limit:.0%} of" if wanted.total_bytes <= limit else "does not fit into"
            shipped = " *" if ranks == config.parallel.model_parallel else ""
            tokens = config.model.block_size * config.model.num_blocks
            lines.append(f"| {size} | {ranks}{shipped} | {gib(wanted.weight_bytes)} | {gib(wanted.cache_bytes)} | "
                         f"{wanted.cache_bytes // tokens} | {gib(wanted.other_bytes)} | "
                         f"{gib(wanted.total_bytes)} | {fits} {gib(limit)} |")
    return "\n".join(lines)


def cpu_table(folder: str) -> str:
    """Bytes of one CPU process for every size: weights as stored (bfloat16) or float32, with the YAML's KV cache."""
    lines = ["| Qwen1.5 | KV cache tokens | bfloat16 | float32 weights and cache |", "|---|---|---|---|"]
    for size in FAMILY:
        config = _shipped(folder, size)
        alone = replace(config.parallel, use_parallel=False, model_parallel=1)
        exact = replace(config.model, param_init_type="float32", compute_dtype="float32")
        lines.append(f"| {size} | {config.model.block_size * config.model.num_blocks} | "
                     f"{gib(need(config.model, alone, device.CPU).total_bytes)} | "
                     f"{gib(need(exact, alone, device.CPU).total_bytes)} |")
    return "\n".join(lines)


def document_part(folder: str) -> str:
    """What stands between the markers of docs/memory.md."""
    return f"{BEGIN}\n\n{table(folder)}\n\n{cpu_table(folder)}\n\n{END}"


def updated(document: str, part: str) -> str:
    """`document` with the text between the markers replaced by `part`.

    Raises:
        ValueError: the markers are not there.
    """
    start, stop = document.index(BEGIN), document.index(END)
    return document[:start] + part + document[stop + len(END):]


def _shipped(folder: str, size: str) -> Config:
    # The table is about the files, not about the launcher this command may run under.
    return load_config(os.path.join(folder, yaml_name(size)), environ={})


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line: the table, or the need of one configuration."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser = argparse.ArgumentParser(prog="python -m qwen15 memory", description=(
        "Memory that a run needs on each card, without loading anything: a table of the shipped YAML files, or with "
        "--config one configuration compared with this machine."))
    add_flags(parser)
    parser.add_argument("--update", metavar="FILE", help="write the table between the markers of this Markdown file")
    args = parser.parse_args(argv)
    if args.config:
        config = load_config(args.config, flags_from(args), args.options)
        print(check(config))
        return 0
    if not args.update:
        print(f"{table(here)}\n\n{cpu_table(here)}")
        return 0
    try:
        with open(args.update, encoding="utf-8") as file:
            old = file.read()
        new = updated(old, document_part(here))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", args.update) from None
    except ValueError:
        raise UserError("has no table markers", args.update, f"Put {BEGIN} and {END} where it goes.") from None
    if new != old:
        beside = f"{args.update}.tmp{os.getpid()}"
        with open(beside, "w", encoding="utf-8") as file:
            file.write(new)
        os.replace(beside, args.update)
    print(f"{args.update}: {'updated' if new != old else 'was current'}", file=sys.stderr)
    return 0
