"""config.json and generation_config.json values of the published dense Qwen models, which YAML files are held
against."""


def config(hidden, intermediate, layers, heads, kv_heads, vocab, *, theta=1e6, eps=1e-6, tied=False, eos=151643,
           longest=32768, **more):
    """A config.json of the Qwen2ForCausalLM architecture."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocab, "rms_norm_eps": eps, "rope_theta": theta,
            "torch_dtype": "bfloat16", "max_position_embeddings": longest, "bos_token_id": 151643, "eos_token_id": eos,
            "tie_word_embeddings": tied, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21,
            **more}


QWEN1_5 = {
    "0_5b": config(1024, 2816, 24, 16, 16, 151936, tied=True),
    "1_8b": config(2048, 5504, 24, 16, 16, 151936),
    "4b": config(2560, 6912, 40, 20, 20, 151936, theta=5e6),
    "7b": config(4096, 11008, 32, 32, 32, 151936),
    "14b": config(5120, 13696, 40, 40, 40, 152064),
    "32b": config(5120, 27392, 64, 40, 8, 152064),
    "72b": config(8192, 24576, 80, 64, 64, 152064),
    "110b": config(8192, 49152, 80, 64, 8, 152064),
}
"""The size as in the names of the shipped YAML files; base and chat differ in nothing that the network reads."""

_SMALL_CHAT = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.1}
_LARGE_CHAT = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
QWEN1_5_CHAT = {size: _SMALL_CHAT if size in ("0_5b", "1_8b", "4b") else _LARGE_CHAT for size in QWEN1_5}
"""generation_config.json of the chat models; a value that the file leaves out is transformers' default (top_k 50)."""

OTHERS = {
    "Qwen2-0.5B": config(896, 4864, 24, 14, 2, 151936, tied=True, longest=131072, sliding_window=131072),
    "Qwen2-1.5B-Instruct": config(1536, 8960, 28, 12, 2, 151936, tied=True, eos=151645),
    "Qwen2-7B": config(3584, 18944, 28, 28, 4, 152064, longest=131072, sliding_window=131072),
    "Qwen2-72B": config(8192, 29568, 80, 64, 8, 152064, longest=131072, eps=1e-5, sliding_window=131072),
    "Qwen2.5-0.5B-Instruct": config(896, 4864, 24, 14, 2, 151936, tied=True, eos=151645),
    "Qwen2.5-1.5B": config(1536, 8960, 28, 12, 2, 151936, tied=True, longest=131072, sliding_window=131072,
                           use_mrope=False),
    "Qwen2.5-3B-Instruct": config(2048, 11008, 36, 16, 2, 151936, tied=True, eos=151645),
    "Qwen2.5-7B-Instruct": config(3584, 18944, 28, 28, 4, 152064, eos=151645),
    "Qwen2.5-14B": config(5120, 13824, 48, 40, 8, 152064, longest=131072, eps=1e-5, sliding_window=131072,
                          use_mrope=False),
    "Qwen2.5-32B": config(5120, 27648, 64, 40, 8, 152064, longest=131072, eps=1e-5, sliding_window=None,
                          use_mrope=False),
    "Qwen2.5-72B-Instruct": config(8192, 29568, 80, 64, 8, 152064, eos=151645),
}
"""The same architecture under other names."""
