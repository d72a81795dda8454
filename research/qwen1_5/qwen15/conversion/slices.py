"""How a checkpoint lies in slices over ranks: which axis of which weight, and how to find that out from a folder."""

import os
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from .. import naming
from ..checkpoint import origin
from ..checkpoint.reader import Checkpoint, closed_on_error, folder_of, open_checkpoint, open_ranks, rank_folders
from ..config.hf_config import CONFIG_FILE, HfConfig, dims_from_hf_config
from ..errors import UserError
from ..naming import Dims, Weight


@dataclass(frozen=True)
class Slicing:
    """Tensor parallelism over `parts` ranks, as MindFormers' LlamaForCausalLM cuts it.

    Attributes:
        parts: ranks; 1 is a whole checkpoint.
        vocab_emb_dp: every rank keeps embedding and head whole; False cuts them along the vocabulary.
    """

    parts: int
    vocab_emb_dp: bool

    def axis(self, weight: Weight) -> Optional[int]:
        """The axis a weight is cut along, None where every rank has the whole."""
        return weight.axis(self.parts, self.vocab_emb_dp)

    def check(self, dims: Dims) -> None:
        """Refuse a number of ranks that the model does not divide by.

        Raises:
            UserError: with the arithmetic.
        """
        if self.parts < 1:
            raise UserError(f"must be at least 1, not {self.parts}", "--model_parallel")
        reason = naming.indivisible(dims, self.parts)
        if reason is not None:
            fitting = [parts for parts in range(1, dims.num_kv_heads + 1) if naming.indivisible(dims, parts) is None]
            raise UserError(reason, "--model_parallel",
                            f"This model can be cut over {', '.join(map(str, fitting))} ranks.")


def config_folder(path: str) -> Optional[str]:
    """The folder of a checkpoint's config.json: beside it, or above its `rank_x` folder; None when there is none."""
    folder = folder_of(path)
    for candidate in (folder, os.path.dirname(os.path.abspath(folder))):
        if os.path.isfile(os.path.join(candidate, CONFIG_FILE)):
            # Only a rank folder looks at its parent: any other folder's parent is somebody else's.
            if candidate == folder or os.path.basename(os.path.abspath(folder)).startswith("rank_"):
                return candidate
    return None


def open_slices(path: str, config_path: Optional[str], vocab_emb_dp: Optional[bool], strict: bool = True
                ) -> Tuple[List[Checkpoint], Slicing, Optional[HfConfig], str]:
    """Open a MindSpore checkpoint, whole or in slices, and find out how it is cut.

    Args:
        path: file, folder of shards, or folder of `rank_x` slices.
        config_path: the model's config.json or its folder; None looks for it beside the checkpoint.
        vocab_emb_dp: how embedding and head are held; None finds out.
        strict: refuse slices that are not cut as MindFormers' network is; a strategy file may say otherwise.

    Returns:
        The ranks in order (one if it is whole), the slicing, the configuration if there is one, and the folder in which
        small files lie beside the checkpoint.

    Raises:
        UserError: it cannot be opened, or the embedding fits neither way of holding it.
    """
    config, beside = None, config_folder(path)
    if config_path is not None:
        config = dims_from_hf_config(config_path)
    elif beside is not None:
        config = dims_from_hf_config(beside)
    ranks = open_ranks(path) if rank_folders(path) else [open_checkpoint(path, ("safetensors", "ckpt"))]
    with closed_on_error(ranks):
        origin.check_together(ranks)
        folder = beside or folder_of(path)
        slicing = _slicing(ranks, config, vocab_emb_dp) if strict else Slicing(len(ranks), True)
        return ranks, slicing, config, folder


def _slicing(ranks: Sequence[Checkpoint], config: Optional[HfConfig], vocab_emb_dp: Optional[bool]) -> Slicing:
    parts = len(ranks)
    if parts == 1:
        return Slicing(1, True if vocab_emb_dp is None else vocab_emb_dp)
    embedding = ranks[0].infos.get(naming.EMBEDDING.ms)
    if embedding is None or not embedding.shape:
        raise UserError(f"{naming.EMBEDDING.ms} is missing", ranks[0].path, "Are these slices of a Qwen1.5 checkpoint?")
    if config is None:
        found = _same_start(ranks, naming.EMBEDDING.ms)
    else:
        vocab = config.dims.vocab_size
        if embedding.shape[0] not in (vocab, vocab // parts if vocab % parts == 0 else vocab):
            raise UserError(f"the embedding has {embedding.shape[0]} rows; {config.where} and {parts} ranks make it "
                            f"{vocab}" + (f" or {vocab // parts}" if vocab % parts == 0 else ""), ranks[0].path,
                            "Take config.json and slices from one model.")
        found = embedding.shape[0] == vocab
    if vocab_emb_dp is not None and vocab_emb_dp != found and (config is None or config.dims.vocab_size % parts == 0):
        raise UserError(f"the slices hold the embedding as vocab_emb_dp {found} does, not {vocab_emb_dp}",
                        ranks[0].path, "Leave --src_vocab_emb_dp out, or correct it.")
    return Slicing(parts, found)


def _same_start(ranks: Sequence[Checkpoint], name: str) -> bool:
    """Whether the first two ranks' tensors begin with the same row: what tells a copy from a cut."""
    first, second = (rank.infos.get(name) for rank in ranks[:2])
    if first is None or second is None or first.shape != second.shape or not first.shape[0]:
        return False
    return ranks[0].read(name, 0, 0, 1).tobytes() == ranks[1].read(name, 0, 0, 1).tobytes()


def infer_dims(ranks: Sequence[Checkpoint], slicing: Slicing) -> HfConfig:
    """The sizes that a checkpoint's own shapes tell. How a width divides into heads is not among them: each is 1 wide.

    Raises:
        UserError: the tensors needed for it are missing or have no such shapes.
    """
    infos, where = ranks[0].infos, ranks[0].path

    def size(name: str, axis: int, cut: bool) -> int:
        info = infos.get(name)
        if info is None or len(info.shape) <= axis:
            raise UserError(f"{name} is {'missing' if info is None else 'not a matrix'}", where,
                            "Is this a Qwen1.5 checkpoint under MindSpore's names?")
        return info.shape[axis] * (slicing.parts if cut else 1)

    layers = 1 + max((int(name.split(".")[2]) for name in infos if naming.ms_to_hf(name) and ".layers." in name),
                     default=-1)
    first = "model.layers.0."
    dims = Dims(hidden_size=size("model.norm_out.weight", 0, False),
                intermediate_size=size(first + "feed_forward.w1.weight", 0, True), num_layers=layers,
                num_heads=size(first + "attention.wq.weight", 0, True),
                num_kv_heads=size(first + "attention.wk.weight", 0, True), head_dim=1,
                vocab_size=size(naming.EMBEDDING.ms, 0, not slicing.vocab_emb_dp),
                tie_word_embeddings=naming.HEAD.ms not in infos)
    return HfConfig(dims=dims, rms_norm_eps=1e-6, rope_theta=1e6, torch_dtype=None, max_position_embeddings=None,
                    bos_token_id=None, eos_token_ids=(), pad_token_id=None, where=where)
