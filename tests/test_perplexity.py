"""`qwen15 perplexity`: transformers' figure, in one process, and one line for each mistake."""

from __future__ import annotations

import inspect
import json
import math

import pytest
from qwen15.commands import perplexity
from qwen15.commands.perplexity import combine, windows
from qwen15.errors import UserError


def test_windows_cover_every_token_once():
    for count, size, stride in ((10, 4, 2), (11, 4, 3), (3, 8, 8), (9, 3, 3), (8, 4, 4)):
        seen = [token for w in windows(count, size, stride) for token in range(w.last - w.new, w.last)]
        assert seen == list(range(count))
        assert all(0 < w.new <= w.last - w.first <= size for w in windows(count, size, stride))


def test_a_text_that_is_predicted_evenly_has_the_number_of_choices_as_perplexity():
    assert combine([(w, math.log(8)) for w in windows(100, 20, 7)]).perplexity == pytest.approx(8)


def theirs(folder, text, size, stride):
    """The loop of transformers' guide to the perplexity of models of fixed length, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.Qwen2Tokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    total, tokens, seen = 0.0, 0, 0
    for first in range(0, ids.shape[1], stride):
        last = min(first + size, ids.shape[1])
        labels = ids[:, first:last].clone()
        labels[:, :-(last - seen)] = -100
        with torch.no_grad():
            loss = model(ids[:, first:last], labels=labels).loss.item()
        counted = int((labels != -100).sum()) - 1
        total, tokens, seen = total + loss * counted, tokens + counted, last
        if last == ids.shape[1]:
            return math.exp(total / tokens)


def test_perplexity_of_a_small_real_model_is_transformers(small_model, tmp_path, capsys):
    text = inspect.getsource(json.JSONEncoder)[:1500] + "\n人工智能是计算机科学的一个分支。\n"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert perplexity.main([str(tmp_path / "text.txt"), "--load_checkpoint", str(small_model), "--device_target",
                            "CPU", "--window", "128", "--stride", "48", "--seq_length", "256", "--json", "--options",
                            "model.model_config.param_init_type=float32",
                            "model.model_config.compute_dtype=float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] > 4 and found["window"] == 128
    assert found["perplexity"] == pytest.approx(theirs(small_model, text, 128, 48), abs=1e-3)


@pytest.mark.parametrize("arguments, message", [
    (["--window", "9999"], "--window: 9999 tokens are more than seq_length"),
    (["--window", "64", "--stride", "65"], "--stride: 65 is more than the window"),
    (["--stride", "0"], "--stride: 0 tokens never"),
])
def test_sizes_that_cannot_be(arguments, message, small_model, tmp_path):
    (tmp_path / "text.txt").write_text("Gravity is a force.")
    with pytest.raises(UserError) as caught:
        perplexity.main([str(tmp_path / "text.txt"), "--load_checkpoint", str(small_model), *arguments])
    assert message in str(caught.value)


def test_a_text_that_is_not_utf_8_or_too_short(small_model, tmp_path):
    (tmp_path / "text.txt").write_bytes("重力".encode("gb18030"))
    with pytest.raises(UserError, match="is not UTF-8 at byte 0.*iconv"):
        perplexity.main([str(tmp_path / "text.txt"), "--load_checkpoint", str(small_model)])
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(UserError, match="too few to predict any"):
        perplexity.main([str(tmp_path / "text.txt"), "--load_checkpoint", str(small_model)])
    with pytest.raises(UserError, match="/dev/zero: has more than 268435456 bytes"):
        perplexity.main(["/dev/zero", "--load_checkpoint", str(small_model)])
    with pytest.raises(UserError, match="nothing.txt: cannot be read: No such file"):
        perplexity.main([str(tmp_path / "nothing.txt"), "--load_checkpoint", str(small_model)])
