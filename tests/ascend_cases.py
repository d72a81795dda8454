"""What the Ascend tests run in a worker: MindFormers' network under emulation beside Hugging Face's, from one
checkpoint."""

import contextlib
import functools
import io
import os
import random
from dataclasses import replace
from unittest import mock

import ascend_emulation
import convert_weight
import mindspore as ms
import numpy as np
from qwen15 import device, naming
from qwen15.ascend import check, contracts
from qwen15.checkpoint.quantised import MIDDLE, dequantise, pack
from qwen15.commands import make_yaml
from qwen15.config import load as configuration
from qwen15.errors import UserError
from qwen15.generation.engine import Engine
from qwen15.generation.request import Limits, Request
from qwen15.network import weights
from qwen15.network.mindformers import MindFormersNetwork

# Operators run one after the other where they are called: MindSpore's queues between threads spin while they wait, and
# took four fifths of the processor time.
ms.runtime.launch_blocking()

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 160}
THETA, EPS = 1e6, 1e-6
SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS = 64, 8, 32
LIMITS = Limits(SIZES["vocab_size"], SEQ_LENGTH, NUM_BLOCKS, BLOCK_SIZE)


QUANTISED_SIZES = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
"""Large enough for groups of 128 inputs in every matrix."""


def make_hugging_face(folder: str, kv_heads: int, tied: bool, seed: int = 0, sizes=SIZES):
    """A small random Qwen2 whose biases and norm weights are not the usual zeros and ones, saved in `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=THETA,
                                         rms_norm_eps=EPS,
                                         max_position_embeddings=SEQ_LENGTH, bos_token_id=0, eos_token_id=0,
                                         **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.08)
        # Small enough that eps counts in the first norm.
        model.model.embed_tokens.weight.mul_(0.1)
    model.save_pretrained(folder)
    return model


def mutate(folder: str, mutation: str) -> list:
    """Damage the checkpoint in `folder`, or return the options that do; `mutation` says how."""
    from safetensors.numpy import load_file, save_file

    if mutation == "theta":
        return ["model.model_config.theta=10000.0"]
    if mutation == "norms":
        return ["model.model_config.layernorm_compute_type=bfloat16"]
    if mutation == "eps":
        return ["model.model_config.rms_norm_eps=1.0e-5"]
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    layer = "model.layers.1."
    if mutation == "gate_up":
        gate, up = f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    elif mutation.endswith("_bias"):
        name = f"{layer}self_attn.{mutation[0]}_proj.bias"
        tensors[name] = np.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return []


class Recorded:
    """A network that keeps the logits of every call, by sequence length."""

    def __init__(self, network):
        self._network = network
        self.supports_cached_prefill = network.supports_cached_prefill
        self.rank, self.ranks, self.vocab_size = network.rank, network.ranks, network.vocab_size
        self.agree, self.largest, self.find_non_finite = network.agree, network.largest, network.find_non_finite
        self.rows = []

    def prefill(self, input_ids, query_lens, context_lens, block_tables, slot_mapping):
        logits = self._network.prefill(input_ids, query_lens, context_lens, block_tables, slot_mapping)
        self.rows.append((block_tables, logits))
        return logits

    def decode(self, input_ids, context_lens, block_tables, slot_mapping):
        logits = self._network.decode(input_ids, context_lens, block_tables, slot_mapping)
        self.rows.append((block_tables, logits))
        return logits


def quantise_file(path: str, quantised: dict) -> dict:
    """Quantise the matrices in a converted checkpoint; returns the tensors of each, by suffix.

    Args:
        path: the .safetensors file.
        quantised: 'layers' and 'table' -> arguments of `quantise`.
    """
    from safetensors.numpy import load_file, save_file

    tensors, made = load_file(path), {}
    for name in list(tensors):
        kind = "table" if name in (naming.EMBEDDING.ms, naming.HEAD.ms) else "layers"
        if tensors[name].ndim == 2 and kind in quantised:
            made[name] = quantise(tensors.pop(name).astype(np.float32), **quantised[kind])
            tensors.update({name + suffix: array for suffix, array in made[name].items()})
    save_file(tensors, path)
    return made


def _give_dequantised(model, made: dict, dtype: str) -> None:
    """Give Hugging Face's model what the quantised matrices mean, scales and whole tables rounded to `dtype`."""
    import torch

    def rounded(array):
        return torch.from_numpy(array.astype(np.float32)).to(getattr(torch, dtype)).to(torch.float32)

    state = model.state_dict()
    for name, stored in made.items():
        table = name in (naming.EMBEDDING.ms, naming.HEAD.ms)
        scale = stored["_scale"].astype(np.float32)
        meant = dequantise(stored[""], scale if table else rounded(scale).numpy(), "F32", stored.get("_zero"))
        state[naming.ms_to_hf(name)].copy_(rounded(meant) if table else torch.from_numpy(meant))


def quantise(matrix: np.ndarray, bits: int, group: int, zeros: bool) -> dict:
    """The tensors of a matrix [O, I], rounded to nearest: suffix of the name -> array.

    Args:
        matrix: float32.
        bits: 4 or 8.
        group: inputs that share a scale; 0 for whole rows.
        zeros: with zero points.
    """
    outputs, inputs = matrix.shape
    grouped = matrix.reshape(outputs, -1, group or inputs)
    low, high = (0, 15) if bits == 4 else (-128, 127)
    if zeros:
        smallest, largest = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scale = ((largest - smallest) / (high - low)).astype(np.float16)
        zero = np.clip(np.round(low - smallest / scale.astype(np.float32)), low, high)
    else:
        scale = (np.abs(grouped).max(-1) / (high - MIDDLE[bits])).astype(np.float16)
        zero = np.full(scale.shape, MIDDLE[bits])
    whole = np.clip(np.round(grouped / scale.astype(np.float32)[:, :, None]) + zero[:, :, None], low, high)
    whole = whole.reshape(outputs, inputs).astype(np.uint8 if bits == 4 else np.int8)
    stored = {"": pack(whole) if bits == 4 else whole, "_scale": scale}
    if zeros:
        stored["_zero"] = zero.astype(whole.dtype)
    return stored


def _prepare(folder: str, kv_heads: int, tied: bool, dtype: str, mutation: str = "", quantised=None):
    """(Hugging Face's model, configuration): the way of a user, make_yaml.py writes the YAML and convert_weight.py the
    checkpoint."""
    import torch

    model = make_hugging_face(folder, kv_heads, tied, sizes=QUANTISED_SIZES if quantised else SIZES)
    torch_dtype = getattr(torch, dtype)
    model = model.to(torch_dtype).to(torch.float32)
    model.to(torch_dtype).save_pretrained(folder)
    model = model.to(torch.float32)
    options = mutate(folder, mutation)
    path, converted = os.path.join(folder, "predict.yaml"), os.path.join(folder, "converted.safetensors")
    make_yaml.main(["--checkpoint", folder, "--output", path])
    convert_weight.main(["--torch_ckpt_dir", folder, "--mindspore_ckpt_path", converted])
    if quantised:
        _give_dequantised(model, quantise_file(converted, quantised), dtype)
    flags = [configuration.Flag("load_checkpoint", "--load_checkpoint", converted),
             configuration.Flag("context.device_target", "--device_target", "CPU")]
    return model, configuration.load_config(path, flags,
                                            ["context.mode=1", f"model.model_config.block_size={BLOCK_SIZE}",
                                                          f"model.model_config.num_blocks={NUM_BLOCKS}", *options])


def _network(config):
    """(MindFormers' network under emulation, how many primitives are emulated by name, the line about its weights)."""
    told = []
    network = MindFormersNetwork(config, weights.resolve(config.load_checkpoint), told.append)
    return network, ascend_emulation.emulate(network.cell), told[-1]


def refused(folder: str, tensor: str) -> str:
    """What loading says about a checkpoint that lacks a tensor."""
    from safetensors.numpy import load_file, save_file

    _, config = _prepare(folder, 2, False, "float32")
    tensors = load_file(config.load_checkpoint)
    del tensors[tensor]
    save_file(tensors, config.load_checkpoint)
    try:
        _network(config)
    except UserError as error:
        return str(error)
    raise AssertionError("the checkpoint is loaded")


def compare(folder: str, kv_heads: int, tied: bool, dtype: str, mutation: str = "", generations: int = 2,
            quantised=None) -> dict:
    """Generate with MindFormers' network under emulation, driven by the engine, and compare with Hugging Face.

    Hugging Face runs in float32 on the same weights, which are rounded to `dtype` first.

    Args:
        folder: scratch.
        kv_heads, tied, dtype: of the model.
        mutation: see `mutate`.
        generations: how often to generate over one cache.
        quantised: 'layers' and 'table' -> arguments of `quantise`; Hugging Face gets the dequantised weights.

    Returns:
        largest_error: of any logit of any step, Hugging Face given the same tokens.
        typical_error: root of the mean square of the errors, which chance moves less than the largest one.
        logits_scale: largest absolute logit.
        same_tokens: greedy continuations equal those of Hugging Face's own generate.
        replaced: primitives emulated, by name.
        account: the line about the weights.
    """
    import torch

    model, config = _prepare(folder, kv_heads, tied, dtype, mutation, quantised)
    network, replaced, account = _network(config)
    recorded = Recorded(network)
    engine = Engine(recorded, LIMITS)
    blocks = engine.pool.take(NUM_BLOCKS)
    random.Random(1).shuffle(blocks)
    engine.pool.give_back(blocks)
    ids = random.Random(2)
    largest, scale, same, scattered, squares = 0.0, 0.0, True, False, []
    for _ in range(generations):
        prompts = [[ids.randrange(SIZES["vocab_size"]) for _ in range(length)] for length in (1, 11, 5, 24)]
        recorded.rows.clear()
        answers = [list(prompt) for prompt in prompts]
        for step in engine.generate([Request(tuple(prompt), SEQ_LENGTH, max_new_tokens=10) for prompt in prompts]):
            answers[step.request].append(step.token)
        scattered |= any(np.any(np.diff(row[row >= 0]) != 1) for tables, _ in recorded.rows for row in tables)
        for index, (prompt, answer) in enumerate(zip(prompts, answers)):
            ours = np.stack([logits[index] for _, logits in recorded.rows])
            with torch.no_grad():
                theirs = model(torch.tensor([answer])).logits[0, len(prompt) - 1:-1].numpy()
                expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=None,
                                          pad_token_id=0)[0].tolist()
            largest = max(largest, float(np.abs(ours - theirs).max()))
            squares.append(np.mean(np.square(ours - theirs)))
            scale = max(scale, float(np.abs(theirs).max()))
            same &= answer == expected
    return {"largest_error": largest, "typical_error": float(np.mean(squares)) ** 0.5, "logits_scale": scale,
            "same_tokens": same, "replaced": replaced,
            "account": account, "scattered": bool(scattered)}


def conversation(folder: str) -> list:
    """Two turns of a conversation: (our tokens, Hugging Face's) of each."""
    import torch

    model, config = _prepare(folder, 2, False, "float32")
    network, _, _ = _network(config)
    engine = Engine(network, LIMITS)
    ids, turns = [5, 17, 99], []
    for question in ([], [3, 42, 7, 8, 120]):
        ids = ids + question
        request = Request(tuple(ids), SEQ_LENGTH, max_new_tokens=6)
        ours = [step.token for step in engine.generate([request])]
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=None,
                                pad_token_id=0)
        turns.append([ours, theirs[0, len(ids):].tolist()])
        ids = ids + ours
    return turns


def report(arguments: list, fault: bool = False) -> list:
    """`ascend_check`'s exit code and standard output on a machine whose card is emulated; its PagedAttention is wrong
    with `fault`."""
    if fault:
        right = ascend_emulation._REPLACEMENTS["PagedAttention"]

        def wrong(primitive):
            return lambda query, *others: right(primitive)(query * 1.5, *others)

        ascend_emulation._REPLACEMENTS["PagedAttention"] = wrong
    checks = {"check_network": functools.partial(check.check_network, device_target="CPU", options=["context.mode=1"],
                                                 prepare=ascend_emulation.emulate),
              "check_operators": functools.partial(check.check_operators, prepare=ascend_emulation.emulate)}
    card = device.Ascend(("/dev/davinci0",), "/usr/local/Ascend/cann", "plugin", None)
    output = io.StringIO()
    answer = device.CardAnswer(None, 60 * 2 ** 30, 64 * 2 ** 30)
    with mock.patch.multiple(check, **checks), mock.patch.object(device, "find_ascend", lambda *_: card), \
            mock.patch.object(device, "ask", lambda *_: answer), contextlib.redirect_stdout(output):
        code = check.main(arguments)
    return [code, output.getvalue()]


def readings(dtype: str, head_dim: int) -> list:
    """[contract, other reading, what the check says of a device that does that] of every contract and reading."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    judged = []
    for contract in contracts.contracts(dtype, head_dim, ascend_emulation.emulate):
        for reading, result in contract.otherwise.items():
            line = str(check.judge(replace(contract, device=result), dtype))
            judged.append([contract.name, reading, line])
    return judged
