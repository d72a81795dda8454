"""What can be checked before a model is loaded: prompts, memory, checkpoint headers. Imports no MindSpore."""

from __future__ import annotations

from typing import List, Sequence

from .. import device, naming, ops
from ..checkpoint.reader import open_checkpoint
from ..config.describe import guesses
from ..config.schema import Config
from ..generation import memory_check
from ..generation.session import Prompt, Session
from ..network import mindformers, weight_quant, weights
from ..progress import human_bytes


def describe(session: Session, prompts: Sequence[Prompt]) -> str:
    """What a run would do, one line a topic.

    Raises:
        UserError: what the run would have been refused for: a prompt that is too long, too little memory, a checkpoint
            that does not fit.
    """
    config = session.config
    if config.device_target == device.ASCEND:
        mindformers.check(config.model, config.device_target)
    lines = [_model_line(config), f"device: {config.device_note}", *_operator_line(config)]
    lines.append(f"tokenizer: {len(session.tokenizer)} tokens, {config.tokenizer.vocab_file}")
    if prompts:
        lines.append(_prompt_line(session, prompts))
    lines += [line[2:] for line in guesses(config)]
    lines.append(memory_check.check(config))
    lines += _checkpoint_lines(config)
    if config.speculation is not None and config.speculation.draft is not None:
        lines += [f"draft model's {line}" for line in _checkpoint_lines(config.speculation.draft)]
    return "\n".join([*lines, "dry run: nothing was loaded"])


def _model_line(config: Config) -> str:
    dims, model = config.model.dims, config.model
    return (f"model: {dims.num_layers} layers, hidden {dims.hidden_size}, {dims.num_heads} heads, {dims.num_kv_heads} "
            f"KV heads, vocabulary {dims.vocab_size}; weights {model.param_init_type}, KV cache {model.compute_dtype}, "
            f"sequences up to {model.seq_length} tokens")


def _operator_line(config: Config) -> List[str]:
    return [] if config.device_target == device.ASCEND else [f"operators: {ops.decide()[1]}"]


def _prompt_line(session: Session, prompts: Sequence[Prompt]) -> str:
    requests = session.requests(prompts)  # checks each one against the limits
    lengths = [len(request.prompt) for request in requests]
    most = max(request.limit for request in requests)
    blocks = -(-most // session.limits.block_size)
    one = len(lengths) == 1
    spread = f"{lengths[0]} tokens" if one else f"{min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all"
    return (f"{'prompt' if one else f'prompts: {len(lengths)}'}: {spread}; "
            f"with the answer up to {most} tokens = {blocks} blocks, the KV cache has {session.limits.num_blocks} "
            f"({session.limits.num_blocks // blocks} such at once)")


def _checkpoint_lines(config: Config) -> List[str]:
    """Open every rank's part and compare each tensor's name, shape and dtype with the model, from the headers alone."""
    ranks = config.parallel.model_parallel
    whole = config.auto_trans_ckpt or ranks == 1
    lines = []
    first = None
    for rank in range(1 if whole else ranks):
        path = weights.resolve_for(config, rank)
        loader = weights.Loader.of(config, path, rank)
        if config.device_target == device.ASCEND:
            weight_quant.forms(loader.schemes, {weight.ms: weight for weight in naming.weights(config.model.dims)},
                               ranks, path)
        likeness = loader.likeness()
        first = first or likeness
        likeness.refuse_other_than(first)
        reader = open_checkpoint(path)
        infos = reader.infos.values()
        dtypes = ", ".join(sorted({info.dtype for info in infos}))
        rank_name = "" if whole else f" rank {rank}"
        nbytes = sum(info.nbytes for info in infos)
        lines.append(f"checkpoint{rank_name}: {len(reader.infos)} tensors ({dtypes}), {human_bytes(nbytes)}, "
                     f"every weight there in its shape; {path}")
    return lines
