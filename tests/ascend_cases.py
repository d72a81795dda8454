"""What the Ascend tests run in a worker: MindFormers' network under emulation beside Hugging Face's, from one checkpoint."""

import os
import random

import numpy as np
import yaml

import ascend_emulation
import convert_weight
import mindspore as ms
from qwen15 import ascend_check
from qwen15 import config as configuration
from qwen15 import weights
from qwen15.engine import Engine, KeptCache, Limits, Request
from qwen15.mindformers_network import MindFormersNetwork

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160}
THETA, EPS = 1e6, 1e-6
SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS = 64, 8, 32
LIMITS = Limits(SIZES["vocab_size"], SEQ_LENGTH, NUM_BLOCKS, BLOCK_SIZE)


def make_hugging_face(folder: str, kv_heads: int, tied: bool, seed: int = 0):
    """A small random Qwen2 whose biases and norm weights are not the usual zeros and ones, saved in `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=THETA,
                                         rms_norm_eps=EPS, max_position_embeddings=SEQ_LENGTH, **SIZES)).eval()
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


def write_yaml(path: str, **model_config) -> str:
    """A predict YAML for the small model."""
    document = {"run_mode": "predict", "context": {"mode": 1, "device_target": "CPU", "max_device_memory": "2GB"},
                "model": {"arch": {"type": "LlamaForCausalLM"},
                          "model_config": {"type": "LlamaConfig", "seq_length": SEQ_LENGTH, "block_size": BLOCK_SIZE,
                                           "num_blocks": NUM_BLOCKS, "use_past": True, "is_dynamic": True,
                                           "use_flash_attention": True, **model_config}}}
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(document, file)
    return path


def mutate(folder: str, mutation: str) -> dict:
    """Damage the checkpoint in `folder`, or return the YAML values that do; `mutation` says how."""
    from safetensors.numpy import load_file, save_file

    if mutation == "theta":
        return {"theta": 1e4}
    if mutation == "eps":
        return {"rms_norm_eps": 1e-5}
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
    return {}


class Recorded:
    """A network that keeps the logits of every call, by sequence length."""

    def __init__(self, network):
        self._network = network
        self.supports_cached_prefill = network.supports_cached_prefill
        self.rank, self.vocab_size = network.rank, network.vocab_size
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


def _both(folder: str, kv_heads: int, tied: bool, dtype: str, mutation: str = ""):
    """(Hugging Face's model, MindFormers' network, lines told) from one checkpoint, the latter converted by convert_weight.py."""
    import torch

    model = make_hugging_face(folder, kv_heads, tied)
    torch_dtype = getattr(torch, dtype)
    model = model.to(torch_dtype).to(torch.float32)
    model.to(torch_dtype).save_pretrained(folder)
    model = model.to(torch.float32)
    changed = mutate(folder, mutation) if mutation else {}
    path = write_yaml(os.path.join(folder, "predict.yaml"), compute_dtype=dtype, param_init_type=dtype, rotary_dtype=dtype,
                      **changed)
    converted = os.path.join(folder, "converted.safetensors")
    convert_weight.main(["--torch_ckpt_dir", folder, "--mindspore_ckpt_path", converted, "--overwrite"])
    config = configuration.load_config(path, [configuration.Flag("load_checkpoint", "--load_checkpoint", converted)])
    told = []
    return model, MindFormersNetwork(config, weights.resolve(config.load_checkpoint), told.append), told


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

    model, network, told = _both(folder, kv_heads, tied, dtype, mutation)
    replaced = ascend_emulation.emulate(network._cell)
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
            "account": told[-1], "scattered": bool(scattered)}



def conversation(folder: str) -> list:
    """Two turns of a conversation that keeps its KV cache: (our tokens, Hugging Face's) of each."""
    import torch

    model, network, _ = _both(folder, 2, False, "float32")
    ascend_emulation.emulate(network._cell)
    engine = Engine(network, LIMITS)
    kept = KeptCache(engine)
    ids, turns = [5, 17, 99], []
    for question in ([], [3, 42, 7, 8, 120]):
        ids = ids + question
        request = Request(tuple(ids), SEQ_LENGTH, max_new_tokens=6, kept=kept)
        ours = [step.token for step in engine.generate([request])]
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
        turns.append([ours, theirs[0, len(ids):].tolist()])
        ids = ids + ours
    return turns


def check(folder: str, dtype: str, tied: bool) -> dict:
    """`ascend_check`'s own checks with the card replaced: network and operators, name -> (error, limit)."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    found = ascend_check.check_network(folder, dtype, tied=tied, device_target="CPU", options=["context.mode=1"],
                                       prepare=ascend_emulation.emulate)
    results = found["results"] + ascend_check.check_operators(dtype, ascend_emulation.emulate)
    return {result.name: [result.error, result.limit] for result in results}
