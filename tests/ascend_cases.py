"""What the Ascend tests run in a worker: MindFormers' network under emulation beside Hugging Face's, from one checkpoint."""

import contextlib
import functools
import io
import os
import random
from unittest import mock

import ascend_emulation
import convert_weight
import numpy as np
from qwen15 import device
from qwen15.ascend import check
from qwen15.commands import make_yaml
from qwen15.config import load as configuration
from qwen15.errors import UserError
from qwen15.generation.engine import Engine
from qwen15.generation.request import Limits, Request
from qwen15.network import weights
from qwen15.network.mindformers import MindFormersNetwork

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160}
THETA, EPS = 1e6, 1e-6
SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS = 64, 8, 32
LIMITS = Limits(SIZES["vocab_size"], SEQ_LENGTH, NUM_BLOCKS, BLOCK_SIZE)


def make_hugging_face(folder: str, kv_heads: int, tied: bool, seed: int = 0):
    """A small random Qwen2 whose biases and norm weights are not the usual zeros and ones, saved in `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=THETA, rms_norm_eps=EPS,
                                         max_position_embeddings=SEQ_LENGTH, bos_token_id=0, eos_token_id=0, **SIZES)).eval()
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
        self.agree, self.find_non_finite = network.agree, network.find_non_finite
        self.rows = []

    def prefill(self, input_ids, query_lens, context_lens, block_tables, slot_mapping):
        logits = self._network.prefill(input_ids, query_lens, context_lens, block_tables, slot_mapping)
        self.rows.append((block_tables, logits))
        return logits

    def decode(self, input_ids, context_lens, block_tables, slot_mapping):
        logits = self._network.decode(input_ids, context_lens, block_tables, slot_mapping)
        self.rows.append((block_tables, logits))
        return logits


def _prepare(folder: str, kv_heads: int, tied: bool, dtype: str, mutation: str = ""):
    """(Hugging Face's model, configuration): the way of a user, make_yaml.py writes the YAML and convert_weight.py the checkpoint."""
    import torch

    model = make_hugging_face(folder, kv_heads, tied)
    torch_dtype = getattr(torch, dtype)
    model = model.to(torch_dtype).to(torch.float32)
    model.to(torch_dtype).save_pretrained(folder)
    model = model.to(torch.float32)
    options = mutate(folder, mutation)
    path, converted = os.path.join(folder, "predict.yaml"), os.path.join(folder, "converted.safetensors")
    make_yaml.main(["--checkpoint", folder, "--output", path])
    convert_weight.main(["--torch_ckpt_dir", folder, "--mindspore_ckpt_path", converted])
    flags = [configuration.Flag("load_checkpoint", "--load_checkpoint", converted),
             configuration.Flag("context.device_target", "--device_target", "CPU")]
    return model, configuration.load_config(path, flags, ["context.mode=1", f"model.model_config.block_size={BLOCK_SIZE}",
                                                          f"model.model_config.num_blocks={NUM_BLOCKS}", *options])


def _network(config):
    """(MindFormers' network under emulation, how many primitives are emulated by name, the line about its weights)."""
    told = []
    network = MindFormersNetwork(config, weights.resolve(config.load_checkpoint), told.append)
    return network, ascend_emulation.emulate(network.cell), told[-1]


def refused(folder: str, tensor: str) -> str:
    """What loading says about a checkpoint that lacks one tensor."""
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


def compare(folder: str, kv_heads: int, tied: bool, dtype: str, mutation: str = "", generations: int = 2) -> dict:
    """Generate with MindFormers' network under emulation, driven by the engine, and compare with Hugging Face.

    Hugging Face runs in float32 on the same weights, which are rounded to `dtype` first.

    Returns:
        largest_error: of any logit of any step, Hugging Face given the same tokens.
        logits_scale: largest absolute logit.
        same_tokens: greedy continuations equal those of Hugging Face's own generate.
        replaced: primitives emulated, by name.
        account: the line about the weights.
    """
    import torch

    model, config = _prepare(folder, kv_heads, tied, dtype, mutation)
    network, replaced, account = _network(config)
    recorded = Recorded(network)
    engine = Engine(recorded, LIMITS)
    blocks = engine.pool.take(NUM_BLOCKS)
    random.Random(1).shuffle(blocks)
    engine.pool.give_back(blocks)
    ids = random.Random(2)
    largest, scale, same, scattered = 0.0, 0.0, True, False
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
            scale = max(scale, float(np.abs(theirs).max()))
            same &= answer == expected
    return {"largest_error": largest, "logits_scale": scale, "same_tokens": same, "replaced": replaced,
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
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
        turns.append([ours, theirs[0, len(ids):].tolist()])
        ids = ids + ours
    return turns


def report(arguments: list, fault: bool = False) -> list:
    """`ascend_check`'s exit code and standard output on a machine whose card is emulated; its PagedAttention is wrong with `fault`."""
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
    with mock.patch.multiple(check, **checks), mock.patch.object(device, "find_ascend", lambda: card), \
            contextlib.redirect_stdout(output):
        code = check.main(arguments)
    return [code, output.getvalue()]
