"""Any dense Qwen2ForCausalLM folder gets a YAML that loads, agrees with it and fits the cards; others are refused."""

import json
import os

import convert_weight
import pytest
import yaml
from conftest import random_model
from official_configs import OTHERS, QWEN1_5, config
from qwen15 import device
from qwen15.commands import make_yaml
from qwen15.config.flags import Flag
from qwen15.config.hf_config import dims_from_hf_config
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.generation import memory
from qwen15.generation.engine import Engine
from qwen15.generation.request import Limits, Request
from qwen15.network.build import build_network

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "research", "qwen1_5")


MODELS = {**OTHERS, "Qwen1.5-0.5B": QWEN1_5["0_5b"], "Qwen1.5-32B": QWEN1_5["32b"],
          "tiny": {**config(48, 72, 3, 6, 2, 199, eos=1, longest=100), "bos_token_id": 0, "torch_dtype": "float32"}}
RANKS = {"Qwen2-72B": 4, "Qwen2.5-72B-Instruct": 4, "Qwen2.5-32B": 2, "Qwen1.5-32B": 2}


@pytest.fixture
def folder(tmp_path):
    """A downloaded model's folder, without the weights."""
    def folder(name, config, **files):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        for file, contents in files.items():
            (path / f"{file}.json").write_text(json.dumps(contents))
        return path
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_yaml_loads_and_agrees_with_the_checkpoint(folder, tmp_path, capsys, name):
    source = folder(name, MODELS[name])
    output = tmp_path / "made.yaml"
    assert make_yaml.main(["--checkpoint", str(source), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "GiB on each" in printed.err
    made = load_config(str(output), [Flag("load_checkpoint", "--load_checkpoint", str(source)),
                                     Flag("context.device_target", "--device_target", "Ascend")], environ={})
    assert made.notes == ()
    official = MODELS[name]
    assert made.model.dims == dims_from_hf_config(official).dims
    assert (made.model.theta, made.model.rms_norm_eps) == (official["rope_theta"], official["rms_norm_eps"])
    assert made.model.param_init_type == official["torch_dtype"]
    assert made.model.eos_token_id == (official["eos_token_id"],)
    assert made.model.seq_length <= official["max_position_embeddings"]
    assert made.parallel.model_parallel == RANKS.get(name, 1)
    assert memory.need(made.model, made.parallel, device.ASCEND).total_bytes <= made.max_device_memory_bytes


def test_generation_and_tokenizer_settings_come_along(folder):
    template = "{% for m in messages %}{{ \"<|im_start|>\" + m['role'] }}\n{% endfor %}"
    source = folder("chat", MODELS["Qwen1.5-0.5B"],
                    generation_config={"eos_token_id": [151645, 151643], "do_sample": True, "top_p": 0.8, "top_k": 20,
                                       "temperature": 0.7, "repetition_penalty": 1.1, "pad_token_id": 151643},
                    tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>",
                                      "unk_token": None, "model_max_length": 32768, "chat_template": template})
    made = yaml.safe_load(make_yaml.render(make_yaml.yaml_for(str(source))))
    model, tokenizer = made["model"]["model_config"], made["processor"]["tokenizer"]
    assert (model["eos_token_id"], model["pad_token_id"]) == ([151645, 151643], 151643)
    assert (model["do_sample"], model["temperature"], model["top_k"], model["top_p"], model["repetition_penalty"]) == (
        True, 0.7, 20, 0.8, 1.1)
    assert (tokenizer["eos_token"], tokenizer["unk_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer["chat_template"] == template


def test_a_shipped_file_is_what_the_command_makes_of_the_official_configuration(folder):
    """Apart from what is a matter of choice: lengths of the cache and the answer."""
    source = folder("Qwen1.5-0.5B", MODELS["Qwen1.5-0.5B"],
                    generation_config={"eos_token_id": 151643, "max_new_tokens": 2048})
    made = yaml.safe_load(make_yaml.render(make_yaml.yaml_for(str(source))))
    with open(os.path.join(MODULE, "predict_qwen1_5_0_5b.yaml"), encoding="utf-8") as file:
        shipped = yaml.safe_load(file)
    for contents in (made, shipped):
        for key in ("max_decode_length", "top_p"):
            del contents["model"]["model_config"][key]
    assert made == shipped


def test_the_number_of_ranks_can_be_chosen(folder, capsys):
    source = folder("Qwen2-7B", MODELS["Qwen2-7B"])
    assert make_yaml.main(["--checkpoint", str(source), "--model_parallel", "4"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["use_parallel"] is True
    assert (made["parallel_config"]["model_parallel"], made["parallel_config"]["vocab_emb_dp"]) == (4, False)
    with pytest.raises(UserError) as caught:
        make_yaml.main(["--checkpoint", str(source), "--model_parallel", "8"])
    assert "num_heads 28 is not divisible by model_parallel 8" in str(caught.value)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 60}, "qwen2_moe"),
    ({"num_experts": 60}, "mixture-of-experts"),
    ({"use_sliding_window": True}, "sliding window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    ({"use_mrope": True}, "use_mrope"),
    ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "qwen2_vl"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
    ({"eos_token_id": None}, "eos_token_id"),
])
def test_what_is_not_supported_is_refused_by_name(folder, changes, words):
    source = folder("other", {**MODELS["Qwen2-0.5B"], **changes})
    with pytest.raises(UserError) as caught:
        make_yaml.main(["--checkpoint", str(source)])
    assert words in str(caught.value) and str(source) in str(caught.value)


def test_a_setting_that_makes_no_sense_is_named_with_its_file(folder):
    source = folder("Qwen2-7B", MODELS["Qwen2-7B"], generation_config={"temperature": -1})
    with pytest.raises(UserError) as caught:
        make_yaml.yaml_for(str(source))
    assert f"{source / 'generation_config.json'}: temperature must be at least 0, not -1.0" in str(caught.value)


def test_a_file_that_is_there_is_not_overwritten(folder, tmp_path):
    source = folder("tiny", MODELS["tiny"])
    output = tmp_path / "mine.yaml"
    output.write_text("mine")
    with pytest.raises(UserError) as caught:
        make_yaml.main(["--checkpoint", str(source), "--output", str(output)])
    assert "is there already" in str(caught.value)
    assert output.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine.yaml", "tiny"]
    with pytest.raises(UserError) as caught:
        make_yaml.main(["--checkpoint", str(tmp_path / "none")])
    assert "is not a folder" in str(caught.value)


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_the_yaml_and_the_converted_weights_predict_what_transformers_does(tmp_path, tied):
    """Grouped queries, head tied to the embedding or not; the Ascend tests do the same with MindFormers' network."""
    torch = pytest.importorskip("torch")
    folder, path, converted = (str(tmp_path / name) for name in ("hf", "made.yaml", "converted.ckpt"))
    model = random_model(tmp_path / "hf", tie_word_embeddings=tied)
    make_yaml.main(["--checkpoint", folder, "--output", path])
    convert_weight.main(["--torch_ckpt_dir", folder, "--mindspore_ckpt_path", converted])
    made = load_config(path, [Flag("load_checkpoint", "--load_checkpoint", converted),
                              Flag("context.device_target", "--device_target", "CPU")], environ={})
    network = build_network(made, converted, lambda line: None)
    engine = Engine(network, Limits(made.model.dims.vocab_size, made.model.seq_length, made.model.num_blocks,
                                    made.model.block_size))
    prompt = [5, 17, 99, 3]
    ours = [step.token for step in engine.generate([Request(tuple(prompt), len(prompt) + 16)])]
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16,
                            pad_token_id=0)[0, len(prompt):].tolist()
    assert ours == theirs and len(ours) == 16
