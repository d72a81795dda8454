"""Calibrate a quantisation: layer after layer rounded against a text, kept on the disk as it goes, and taken up again.

The layers before are run in their rounded form, so that each one is rounded for what it will be given. Within a layer
the matrices are taken in the order in which the text meets them, for the same reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from .. import naming
from ..checkpoint.atomic import AtomicFolder, atomic_file, disk_bytes, partial_path, write_small
from ..checkpoint.casting import to_float32
from ..checkpoint.file_writer import Blocks, FileWriter
from ..checkpoint.format_safetensors import steps
from ..checkpoint.quantised import SCALE, ZERO, Scheme, pack
from ..checkpoint.reader import Checkpoint, TensorFile
from ..checkpoint.tensors import TensorInfo
from ..checkpoint.view import block_of
from ..config.hf_config import HfConfig
from ..conversion.plan import aligned
from ..conversion.quantise import Recipe, check_float, unfit
from ..errors import EXIT_FAILED, UserError
from ..naming import Weight
from ..text.tokenizer import Qwen2Tokenizer
from ..text_file import read_text
from .gptq import Moments, compensated
from .layer import Steps

SEQUENCE_TOKENS = 512
"""Tokens of a text that see one another; what a layer's columns do does not depend on longer reaches."""
DEFAULT_TOKENS = 4096
LEAST_TOKENS = 64
_USUAL_MOST_CHARACTERS = 32  # of a token, on average
_RECORD = ".record.json"
_STAGES = (("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"), ("attention.wo.weight",),
           ("feed_forward.w1.weight", "feed_forward.w3.weight"), ("feed_forward.w2.weight",))
"""The matrices of a layer, those together that are multiplied with the same."""


class Calibration:
    """A text, and the integers that were chosen with it.

    Args:
        text_path: the text, UTF-8.
        folder: with the model's vocab.json and merges.txt.
        target: what the conversion makes; the chosen integers are kept beside it until it is whole.
        tokens: the most tokens of the text that are used.

    Raises:
        UserError: the text cannot be read, is none, or is too short.
    """

    def __init__(self, text_path: str, folder: str, target: str, tokens: int = DEFAULT_TOKENS):
        self._where = text_path
        if tokens < LEAST_TOKENS:
            raise UserError(f"{tokens} tokens are too few to calibrate with: it takes at least {LEAST_TOKENS}",
                            "--calibration_tokens", f"{DEFAULT_TOKENS} are usual.")
        text = read_text(text_path)
        there = os.listdir(folder)
        missing = [name for name in ("vocab.json", "merges.txt") if name not in there]
        if missing and "tokenizer.json" not in there:
            raise UserError(f"has no {missing[0]}, and --calibrate needs the model's tokenizer", folder,
                            "Copy the tokenizer's files into it.")
        self.ids = np.array(_first_ids(Qwen2Tokenizer.from_pretrained(folder), text, tokens), np.int64)
        if len(self.ids) < LEAST_TOKENS:
            raise UserError(f"{len(self.ids)} tokens are too few to calibrate with: it takes at least {LEAST_TOKENS}, "
                            "and some thousand are usual", text_path, "Give a longer text.")
        self.length = min(SEQUENCE_TOKENS, len(self.ids))
        self.ids = self.ids[:len(self.ids) // self.length * self.length]
        self._scratch = os.path.abspath(target) + ".calibration"
        self._opened: Dict[int, TensorFile] = {}
        self._folder: Optional[AtomicFolder] = None

    def describe(self) -> Dict[str, object]:
        """What config.json says of it."""
        return {"tokens": len(self.ids), "text_sha256": hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()}

    def note(self) -> str:
        """What a user is told beforehand."""
        return (f"calibrates with {len(self.ids)} tokens of {self._where}, in sequences of {self.length}; layers that "
                f"are done are kept in {partial_path(self._scratch)} until the result is whole")

    def memory_bytes(self, config: HfConfig) -> int:
        """Memory that it takes, about: MindSpore, one layer's matrices, H, and the text's activations."""
        d = config.dims
        widest = max(d.hidden_size, d.intermediate_size)
        activations = 4 * len(self.ids) * (2 * d.hidden_size + d.intermediate_size)
        matrices = 4 * d.hidden_size * (3 * d.intermediate_size + 4 * d.num_heads * d.head_dim)
        return 500 * 10 ** 6 + activations + 2 * matrices + 12 * widest * widest

    # ---- what a conversion asks ----

    def make(self, source: Checkpoint, config: HfConfig, recipe: Recipe) -> None:
        """Choose the integers of every layer that an interrupted run of the same has not.

        Raises:
            UserError: activations that are not finite, no room, or another run at work.
        """
        from tqdm import tqdm

        self._folder = AtomicFolder(self._scratch, [_layer(0), _hidden(0)])
        done, x = self._take_up(source, config, recipe)
        layers = config.dims.num_layers
        if done == layers:
            return
        table = source.infos[naming.EMBEDDING.hf]
        if x is None:
            x = [_rows(source, table, self.ids[first:first + self.length])
                 for first in range(0, len(self.ids), self.length)]
        work = Steps(config, self.length)
        by_layer: Dict[int, List[Weight]] = {}
        for weight in naming.weights(config.dims):
            if weight.layer is not None:
                by_layer.setdefault(weight.layer, []).append(weight)
        matrices = sum(map(len, _STAGES))
        with tqdm(total=layers * matrices, initial=done * matrices, desc="calibrating", unit=" matrices", leave=False,
                  dynamic_ncols=True, disable=None) as bar:
            for layer in range(done, layers):
                bar.set_postfix_str(f"layer {layer + 1} of {layers}")
                chosen, x = _one_layer(work, source, by_layer[layer], recipe, x, bar.update)
                # The activations first: a layer whose file exists counts as done.
                self._write(_hidden(layer + 1), {"hidden": ("F32", np.stack(x))})
                self._write(_layer(layer), chosen)
                self._remove(_hidden(layer))
        self._remove(_hidden(layers))

    def rows(self, name: str, layer: int, first: int, last: int) -> np.ndarray:
        """Rows of a chosen tensor of a layer (`P`, `P_scale`, `P_zero`), as they are stored."""
        file = self._opened.get(layer)
        if file is None:
            file = self._opened[layer] = TensorFile(os.path.join(partial_path(self._scratch), _layer(layer)))
        return block_of(file, name, (first, last), (0, file.infos[name].shape[1]))

    def kept(self) -> str:
        """What an interrupted run leaves to the next, empty where there is nothing."""
        folder = partial_path(self._scratch)
        names = [name for name in (os.listdir(folder) if os.path.isdir(folder) else ()) if name.startswith("layer-")]
        return f"{len(names)} calibrated layers, {disk_bytes(folder)} bytes, are kept in {folder}" if names else ""

    def close(self, done: bool) -> None:
        """Let go of the files; remove them where the result is whole."""
        for file in self._opened.values():
            file.close()
        self._opened = {}
        if self._folder is not None:
            if done:
                self._folder.clear()
            self._folder.close()
            self._folder = None

    # ---- the disk ----

    def _take_up(self, source: Checkpoint, config: HfConfig, recipe: Recipe) -> Tuple[int, Optional[List[np.ndarray]]]:
        """(layers that are done, the activations that the next one is given) of an earlier run of the same."""
        assert self._folder is not None
        folder = self._folder.path
        record = json.dumps([source.state(), repr(config.dims), config.rms_norm_eps, config.rope_theta, self.describe(),
                             recipe.bits, recipe.group_size], sort_keys=True).encode()
        path = os.path.join(folder, _RECORD)
        try:
            with open(path, "rb") as file:
                same = file.read() == record
        except OSError:
            same = False
        if not same:
            self._folder.clear()
            write_small(path, record)
            return 0, None
        done = 0
        while os.path.isfile(os.path.join(folder, _layer(done))):
            done += 1
        if done == config.dims.num_layers:
            return done, None
        hidden = os.path.join(folder, _hidden(done))
        if not done or not os.path.isfile(hidden):
            return 0, None
        with TensorFile(hidden) as kept:
            return done, [np.array(one) for one in kept.read("hidden")]

    def _write(self, name: str, tensors: Mapping[str, Tuple[str, np.ndarray]]) -> None:
        assert self._folder is not None
        infos = aligned([TensorInfo.of(key, dtype, array.shape) for key, (dtype, array) in tensors.items()])
        with atomic_file(os.path.join(self._folder.path, name)) as (fd, path), Blocks() as blocks:
            writer = FileWriter(fd, path, steps(infos, {}), blocks)
            for info in infos:
                writer.feed(info.name, np.ascontiguousarray(tensors[info.name][1]).data.cast("B"))
            writer.finish()

    def _remove(self, name: str) -> None:
        assert self._folder is not None
        path = os.path.join(self._folder.path, name)
        if os.path.isfile(path):
            os.unlink(path)


def _layer(number: int) -> str:
    return f"layer-{number:05d}.safetensors"


def _hidden(number: int) -> str:
    return f"hidden-{number:05d}.safetensors"


def _first_ids(tokenizer: Qwen2Tokenizer, text: str, count: int) -> List[int]:
    """The first token ids of a text, which is not read further than it has to be."""
    ids = tokenizer.encode(text[:_USUAL_MOST_CHARACTERS * count])
    if len(ids) <= count:
        ids = tokenizer.encode(text)
    return ids[:count]


def _rows(source: Checkpoint, table: TensorInfo, ids: np.ndarray) -> np.ndarray:
    """Rows of the embedding, float32 (T, E)."""
    return np.concatenate([to_float32(block_of(source, table.name, (int(i), int(i) + 1), (0, table.shape[1])),
                                      table.dtype) for i in ids])


def _one_layer(work: Steps, source: Checkpoint, weights: List[Weight], recipe: Recipe, x: List[np.ndarray],
               advance: Any) -> Tuple[Dict[str, Tuple[str, np.ndarray]], List[np.ndarray]]:
    """Round a layer's matrices; returns the tensors to keep, and what the layer makes of x."""
    prefix = len(f"model.layers.{weights[0].layer}.")
    named = {weight.ms[prefix:]: weight for weight in weights}
    w: Dict[str, np.ndarray] = {}
    for short, weight in named.items():
        if len(weight.shape) == 1:
            w[short] = _dense(source, weight)
    chosen: Dict[str, Tuple[str, np.ndarray]] = {}

    def round_stage(stage: Tuple[str, ...], inputs: Any) -> None:
        moments = Moments(named[stage[0]].shape[1])
        for one in inputs:
            moments.add(one)
        try:
            factor = moments.factor()
        except ArithmeticError as error:
            raise UserError(f"{error} before {named[stage[0]].hf}, so nothing can be calibrated", source.path,
                            "The source is damaged, or this model cannot read the text.",
                            exit_code=EXIT_FAILED) from None
        for short in stage:
            weight = named[short]
            scheme = recipe.scheme(weight)
            assert scheme is not None
            w[short] = _round(source, weight, factor, scheme, chosen)
            advance(1)

    round_stage(_STAGES[0], (work.normed(one, w["attention_norm.weight"]) for one in x))
    y = work.attend(x, w)
    round_stage(_STAGES[1], y)
    x = work.add(y, w["attention.wo.weight"], x)
    round_stage(_STAGES[2], (work.normed(one, w["ffn_norm.weight"]) for one in x))
    y = work.gate(x, w)
    round_stage(_STAGES[3], y)
    return chosen, work.add(y, w["feed_forward.w2.weight"], x)


def _round(source: Checkpoint, weight: Weight, factor: np.ndarray, scheme: Scheme,
           chosen: Dict[str, Tuple[str, np.ndarray]]) -> np.ndarray:
    """Round one matrix, put its tensors among the chosen, and return what they mean, float32 [O, I]."""
    try:
        made = compensated(_dense(source, weight), factor, scheme)
    except ValueError as error:
        raise unfit(weight.hf, error, source.path) from None
    if scheme.bits == 8:
        chosen[weight.hf] = ("I8", made.values)
    else:
        chosen[weight.hf] = ("U8", pack(made.values))
    chosen[weight.hf + SCALE] = ("F16", made.scale)
    if made.zero is not None:
        chosen[weight.hf + ZERO] = ("U8", made.zero)
    return made.dense


def _dense(source: Checkpoint, weight: Weight) -> np.ndarray:
    info = source.infos[weight.hf]
    check_float(source, info)
    return np.array(to_float32(source.read(weight.hf), info.dtype))
