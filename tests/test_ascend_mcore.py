"""The YAML for MindFormers' newer network builds one whose q, k and v have biases."""

import importlib.util
import json

import pytest
from ascend_worker import Worker
from qwen15.commands import make_yaml


@pytest.mark.version
@pytest.mark.skipif(importlib.util.find_spec("mindformers") is None, reason="needs MindFormers")
def test_the_newer_network_has_the_biases_that_config_json_does_not_name(tmp_path):
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
              "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 64,
              "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = tmp_path / "mcore.yaml"
    assert make_yaml.main(["--checkpoint", str(tmp_path), "--mcore", "--output", str(path)]) == 0
    worker = Worker(tmp_path)
    try:
        found = worker.call("ascend_mcore.biases", yaml_path=str(path))
    finally:
        worker.close()
    assert found["with"] == [f"decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in range(2)]
    assert found["without"] == [], "why the line is in the YAML: without it there is no bias, and nobody says so"
    assert found["dtypes"] == ["BFloat16", "Float32"]
