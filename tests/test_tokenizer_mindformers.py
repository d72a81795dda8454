"""Qwen2Tokenizer inside MindFormers: registered, built from a YAML, one of its own tokenizers, with the same ids."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from ascend_worker import Worker
from conftest import MODULE
from qwen15.text.tokenizer import Qwen2Tokenizer
from tokenizer_corpus import BLANKS, CONTROL_TOKENS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mindformers") is None, reason="mindformers is not installed")

TEXTS = ["Hello world", "", "中文 and <|im_end|> more text", f"a{BLANKS}b" * 3,
         "e\u0301 👨\u200d👩 \ud83d" + CONTROL_TOKENS[0]]


def after_mindformers(code, tmp_path, *arguments, path=(str(MODULE),)):
    """Run `code` in a process that has imported MindFormers, and read its JSON line."""
    worker = Worker(tmp_path)
    try:
        said = worker.call("ascend_worker.run_code", code=code, arguments=[*map(str, arguments)], path=list(path))
    finally:
        worker.close()
    return json.loads(said.strip().splitlines()[-1])


def in_python(code, tmp_path, *arguments, **environment):
    """Run `code` in a process of its own (MindFormers writes a log folder where it runs) and read its JSON line."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True,
                          env={**os.environ, "PYTHONPATH": str(MODULE), "LOG_MF_PATH": str(tmp_path),
                               "OM_MODULES_CACHE": str(tmp_path / "modules"), "HOME": str(tmp_path), **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


BUILD = """
from mindformers.models import build_tokenizer
tokenizer = build_tokenizer({"type": "Qwen2Tokenizer", "vocab_file": sys.argv[1], "merges_file": sys.argv[2],
                             "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 32768})
"""
REPORT = """
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.models.tokenization_utils_base import BatchEncoding
import numpy as np
texts = json.loads(sys.argv[3])
batch = tokenizer(texts, padding=True, return_tensors="ms")
print(json.dumps({
    "is_mindformers": isinstance(tokenizer, PreTrainedTokenizer), "is_encoding": isinstance(batch, BatchEncoding),
    "sizes": [tokenizer.vocab_size, len(tokenizer), tokenizer.model_max_length],
    "ids": [tokenizer.encode(text) for text in texts], "call": [tokenizer(text)["input_ids"] for text in texts],
    "batch": batch["input_ids"].asnumpy().tolist(), "mask": batch["attention_mask"].asnumpy().tolist(),
    "dtype": str(batch["input_ids"].dtype),
    "left": tokenizer(texts, padding="max_length", max_length=8, truncation=True)["input_ids"],
    "pair": tokenizer("a", "b<|im_end|>")["input_ids"], "pairs": tokenizer([("a", "b"), ("c", "d")])["input_ids"],
    "plain": tokenizer("x<|im_end|>", control_tokens=False)["input_ids"],
    "text": tokenizer.decode(batch["input_ids"][2], skip_special_tokens=True),
    "texts": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
    "nested": tokenizer.decode([[9707], [1879]]), "padded": tokenizer.decode([9707, 151936]),
    "roles": [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.im_end_id, tokenizer.bos_token_id],
    "special": [tokenizer.all_special_tokens, tokenizer.all_special_ids],
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True),
    "bytes": tokenizer.token_bytes(9707).decode(), "tokens": tokenizer.tokenize(texts[2]),
    "saved": [tokenizer.save_pretrained("saved", save_name="any"), tokenizer.save_pretrained("saved", save_json=True)],
    "again": type(tokenizer).from_pretrained("saved").encode(texts[2]),
    "added": [tokenizer.add_tokens(["<x>"]), tokenizer.encode("a<x>b"), tokenizer.decode([151646]), len(tokenizer)],
    "added special": [tokenizer.add_special_tokens({"additional_special_tokens": ["<y>"]}), tokenizer.encode("<y>b"),
                      tokenizer.decode([151647, 65], skip_special_tokens=True)],
}))
"""
ORDERS = {
    "ours first": ("import sys, json, qwen1_5_tokenizer\n", BUILD),
    "MindFormers first": ("import sys, json, mindformers.models, qwen1_5_tokenizer\n", BUILD),
    "directly": ("import sys, json, mindformers\n", """
from qwen1_5_tokenizer import Qwen2Tokenizer
tokenizer = Qwen2Tokenizer(vocab_file=sys.argv[1], merges_file=sys.argv[2], unk_token="<|endoftext|>",
                           pad_token="<|endoftext|>", model_max_length=32768)
"""),
}


@pytest.mark.parametrize("order", ORDERS)
def test_type_in_a_yaml_builds_it(order, qwen_vocabulary, tmp_path):
    files = str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt")
    run = in_python if order == "ours first" else after_mindformers
    seen = run("".join(ORDERS[order]) + REPORT, tmp_path, *files, json.dumps(TEXTS))
    plain = Qwen2Tokenizer(*files)
    ids = [plain.encode(text) for text in TEXTS]
    assert seen["is_mindformers"] and seen["is_encoding"]
    assert seen["sizes"] == [151643, 151646, 32768]
    assert seen["ids"] == seen["call"] == ids
    padded = plain(TEXTS, padding=True)
    assert (seen["batch"], seen["mask"], seen["dtype"]) == (padded.input_ids, padded.attention_mask, "Int32")
    assert seen["left"] == plain(TEXTS, padding="max_length", max_length=8, truncation=True).input_ids
    assert seen["pair"] == [64, 65, 151645] and seen["pairs"] == [[64, 65], [66, 67]]
    assert seen["plain"] == plain.encode("x<|im_end|>", control_tokens=False)
    assert seen["text"] == plain.decode(ids[2], skip_special_tokens=True) == "中文 and  more text"
    assert seen["texts"] == [plain.decode(row, skip_special_tokens=True) for row in ids]
    assert (seen["nested"], seen["padded"], seen["bytes"]) == (["Hello", " world"], "Hello", "Hello")
    assert seen["roles"] == [151643, 151643, 151645, None]
    assert seen["special"] == [list(CONTROL_TOKENS), [151643, 151644, 151645]]
    assert seen["chat"] == plain.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert seen["tokens"] == plain.tokenize(TEXTS[2])
    assert seen["again"] == ids[2] and len(seen["saved"][0]) == 3
    assert seen["added"] == [1, [64, 151646, 65], "<x>", 151647]
    assert seen["added special"] == [1, [151647, 65], "b"]


def test_auto_register_builds_it(qwen_vocabulary, tmp_path):
    folder = str(MODULE)
    named = BUILD.replace('{"type"', '{"auto_register": "qwen1_5_tokenizer.Qwen2Tokenizer", "type"')
    code = f"import json, os, sys\nos.environ['REGISTER_PATH'] = {folder!r}\n{named}" + """
from mindformers.models.tokenization_utils import PreTrainedTokenizer
print(json.dumps([tokenizer.encode("Hello world<|im_end|>"), isinstance(tokenizer, PreTrainedTokenizer)]))
"""
    # With run_mindformer.py --register_path the folder is importable too, with REGISTER_PATH alone it is not
    for path in ([], [folder]):
        seen = after_mindformers(code, tmp_path, qwen_vocabulary / "vocab.json", qwen_vocabulary / "merges.txt",
                                 path=path)
        assert seen == [[9707, 1879, 151645], True]


def test_a_wrong_file_is_one_clear_line_through_mindformers_too(qwen_vocabulary, tmp_path):
    code = "import sys, json, qwen1_5_tokenizer\ntry:\n    " + BUILD.strip().replace("\n", "\n    ") + """
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    name, message = after_mindformers(code, tmp_path, qwen_vocabulary / "merges.txt", qwen_vocabulary / "vocab.json")
    assert name == "UserError" and "swapped" in message


def test_mindformers_trainer_predicts_with_it(qwen_vocabulary, tmp_path):
    """The whole path of the original module on a toy network: YAML keys, Trainer, pipeline, decoded text."""
    code = """
import sys, json, qwen1_5_tokenizer
from mindformers import Trainer
from mindformers.core.context import build_context
from mindformers.tools.register import MindFormerConfig
config = MindFormerConfig(**{
    "seed": 0, "run_mode": "predict", "resume_training": False, "use_parallel": False, "load_checkpoint": "",
    "auto_trans_ckpt": False, "only_save_strategy": False,
    "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "qwen1_5"},
    "runner_config": {"batch_size": 1, "epochs": 1, "sink_mode": True, "sink_size": 2},
    "parallel": {}, "parallel_config": {},
    "use_legacy": True, "context": {"mode": 0, "device_target": "CPU", "postprocess_use_numpy": True},
    "output_dir": "out",
    "processor": {"type": "Qwen2Processor", "tokenizer": {
        "type": "Qwen2Tokenizer", "vocab_file": sys.argv[1], "merges_file": sys.argv[2], "model_max_length": 64}},
    "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {
        "type": "LlamaConfig", "batch_size": 1, "seq_length": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 2,
        "vocab_size": 151936, "intermediate_size": 48, "qkv_has_bias": True, "use_past": False,
        "use_flash_attention": False, "use_rope_slice": True,
        "fused_rms_norm": False, "compute_dtype": "float32", "rotary_dtype": "float32", "param_init_type": "float32",
        "softmax_compute_type": "float32", "layernorm_compute_type": "float32",
        "pad_token_id": 151643, "eos_token_id": 151643,
        "max_decode_length": 8, "do_sample": True, "top_k": 1}}})
build_context(config)
trainer = Trainer(args=config, task="text_generation")
print(json.dumps(trainer.predict(input_data="Hello world", max_length=6, do_sample=True, top_k=1)))
"""
    answer = after_mindformers(code, tmp_path, qwen_vocabulary / "vocab.json", qwen_vocabulary / "merges.txt")
    assert answer[0]["text_generation_text"][0].startswith("Hello world")
