"""A model's config.json is read as it stands, and what the network cannot do is refused by name."""

import json
import time

import pytest
from qwen15.config.hf_config import dims_from_hf_config
from qwen15.errors import UserError

QWEN_05B = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 32768,
            "max_window_layers": 21, "hidden_act": "silu", "bos_token_id": 151643, "eos_token_id": [151645, 151643]}


def test_the_half_billion_model_is_read():
    config = dims_from_hf_config(QWEN_05B)
    assert (config.dims.hidden_size, config.dims.head_dim, config.dims.tie_word_embeddings) == (1024, 64, True)
    assert (config.rms_norm_eps, config.rope_theta, config.torch_dtype) == (1e-6, 1e6, "bfloat16")
    assert config.eos_token_ids == (151645, 151643) and config.pad_token_id is None


def test_an_absent_tie_means_untied():
    config = {key: value for key, value in QWEN_05B.items() if key != "tie_word_embeddings"}
    assert dims_from_hf_config(config).dims.tie_word_embeddings is False


def test_folder_and_file_name_the_same_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_05B), encoding="utf-8")
    assert dims_from_hf_config(tmp_path).dims == dims_from_hf_config(str(tmp_path / "config.json")).dims


def test_theta_is_found_where_transformers_5_puts_it():
    config = dict(QWEN_05B, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    del config["rope_theta"]
    assert dims_from_hf_config(config).rope_theta == 5e6


def test_what_transformers_writes_is_accepted():
    transformers = pytest.importorskip("transformers")
    ours = dims_from_hf_config(transformers.Qwen2Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, num_hidden_layers=2,
        vocab_size=128, architectures=["Qwen2ForCausalLM"], rope_theta=12345.0).to_dict())
    assert (ours.dims.head_dim, ours.dims.num_kv_heads, ours.rope_theta) == (16, 2, 12345.0)


@pytest.mark.parametrize("change, said", [
    ({"model_type": "qwen2_moe"}, "qwen2_moe"),
    ({"model_type": "llama"}, "no q/k/v biases"),
    ({"model_type": None}, "model_type None"),
    ({"num_experts": 60}, "num_experts 60"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "only rope_type default. Use the model without"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": -1}, "hidden_size -1"),
    ({"vocab_size": True}, "vocab_size True"),
    ({"num_hidden_layers": 2 ** 80}, "num_hidden_layers"),
    ({"num_key_value_heads": 5}, "not a multiple"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"torch_dtype": "float8_e4m3fn"}, "float8"),
    ({"eos_token_id": "x"}, "eos_token_id"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
])
def test_what_is_not_supported_is_refused_by_name(change, said):
    with pytest.raises(UserError) as error:
        dims_from_hf_config(dict(QWEN_05B, **change))
    assert said in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("text, said",
                         [("{", "config.json:1"), ("[1]", "list"), ("[" * 100000, "nested"), ("", "JSON")])
def test_a_damaged_file_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        dims_from_hf_config(tmp_path)


def test_a_window_that_no_layer_uses_is_no_window():
    assert dims_from_hf_config(dict(QWEN_05B, use_sliding_window=True, max_window_layers=24)).dims.num_layers == 24


@pytest.mark.parametrize("change, said", [
    ({"num_hidden_layers": 2147483647}, "num_hidden_layers 2147483647 is more than 4096"),
    ({"rms_norm_eps": 10 ** 400}, "rms_norm_eps 10000000000000000000... (401 characters) is not a positive number"),
    ({"rope_theta": 10 ** 400}, "rope_theta 10000000000000000000... (401 characters) is not a positive number"),
    ({"hidden_size": 10 ** 400}, "hidden_size 10000000000000000000... (401 characters) is not a positive whole number"),
])
def test_numbers_beyond_any_model_are_refused_at_once(change, said):
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        dims_from_hf_config({**QWEN_05B, **change})
    assert said in str(caught.value)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("text, said", [
    ('{\n "a"\uff1a 1}', "config.json:2: not valid JSON: column 5 is a fullwidth colon (U+FF1A). Write : instead."),
    ('{\n "a": 1\uff0c "b": 2}',
     "config.json:2: not valid JSON: column 8 is a fullwidth comma (U+FF0C). Write , instead."),
    ('{\u201ca\u201d: 1}', "config.json:1: not valid JSON: column 2 is an opening typographic quote (U+201C). "
                           "Write \" instead."),
    ('{"a":\u00a01}',
     "config.json:1: not valid JSON: column 6 is a non-breaking space (U+00A0). Write spaces instead."),
    ('{"a":\u30001}',
     "config.json:1: not valid JSON: column 6 is an ideographic space (U+3000). Write spaces instead."),
    ('\ufeff{"a": 1}', "config.json:1: not valid JSON: column 1 is a byte order mark (U+FEFF). Remove it."),
    ('{"a": ' + "1" * 5000 + "}", "config.json: not a configuration: holds a number of 5000 digits"),
    ('{"a": 1,\r\n}', "config.json:2: not valid JSON: "),
])
def test_what_is_no_json_is_named_with_line_and_column(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        dims_from_hf_config(tmp_path)
    assert said in str(caught.value)


def test_utf_16_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}", "utf-16")
    with pytest.raises(UserError, match="is UTF-16 text. Save it as UTF-8."):
        dims_from_hf_config(tmp_path)
