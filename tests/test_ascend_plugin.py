"""MindFormers' Trainer predicts with a shipped YAML, this module's tokenizer and a checkpoint this module converted."""

import convert_weight
import pytest
from ascend_worker import PACKAGES, Worker
from conftest import require
from qwen1_5_tokenizer import Qwen2Tokenizer
from qwen15.ascend import model
from qwen15.naming import Dims

require("mindformers")

SIZES = Dims(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
             vocab_size=151936,
             tie_word_embeddings=False)
PROMPT, LENGTH = "Hello world", 10


@pytest.mark.parametrize("imported", (pytest.param(True, marks=pytest.mark.slow),
                                      pytest.param(False, marks=pytest.mark.version)),
                         ids=("imported", "REGISTER_PATH"))
def test_trainer_continues_as_the_checkpoint_says(module_dir, qwen_vocabulary, tmp_path, imported):
    tensors = model.random_weights(SIZES)
    model.save(str(tmp_path), SIZES, tensors, dtype="float32", device_target="CPU")
    checkpoint = str(tmp_path / "ms.ckpt")
    convert_weight.main(["--torch_ckpt_dir", str(tmp_path), "--mindspore_ckpt_path", checkpoint])
    worker = Worker(tmp_path)
    try:
        asked = worker.call("mindformers.tools.hub.dynamic_module_utils.get_imports",
                            filename=str(module_dir / "qwen1_5_tokenizer.py"))
        assert "qwen15" not in asked, "MindFormers would want it installed before it looks into REGISTER_PATH"
        found = worker.call(
            "ascend_plugin.predict", yaml_path=str(module_dir / "predict_qwen1_5_14b.yaml"),
            vocabulary=str(qwen_vocabulary),
            checkpoint=checkpoint, prompt=PROMPT, max_length=LENGTH, register_path="" if imported else PACKAGES,
            sizes={"seq_length": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "n_kv_heads": 2,
                   "intermediate_size": 48,
                   "vocab_size": 151936, "rms_norm_eps": model.RMS_NORM_EPS, "theta": model.THETA})
    finally:
        worker.close()
    tokenizer = Qwen2Tokenizer(str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt"))
    ids = tokenizer.encode(PROMPT)
    while len(ids) < LENGTH:
        ids.append(int(model.logits(SIZES, tensors, ids)[-1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert found["greedy"] == expected
    # What docs/ascend.md warns of: MindFormers goes on with random weights, is greedy where it should sample, and loses
    # a token.
    assert found["only in the YAML"] != expected
    assert found["top_k of the YAML"] == expected
    assert found["end of text"] == expected
