"""A folder with tokenizer.json alone, as transformers 5 saves it: the same ids; what Qwen2 does not do is refused."""

import json
import shutil

import pytest
from qwen15.config.flags import Flag
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.text.tokenizer import Qwen2Tokenizer

TEXTS = ["Hello  world\r\n\n 12345 isn't it?", "你好，世界 e\u0301 \u3000x", "<|im_start|>user\n<|im_end|>", "🎉 a\tb"]


@pytest.fixture(scope="module")
def saved(small_model, tmp_path_factory):
    """The small model's tokenizer in tokenizer.json and a tokenizer_config.json that lists no tokens; transformers'."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    theirs = transformers.AutoTokenizer.from_pretrained(small_model)
    theirs.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(small_model / "config.json", folder)
    return folder, theirs


def test_ids_and_roles_equal_those_of_transformers_and_of_the_two_files(saved, small_model):
    folder, theirs = saved
    ours, of_two_files = Qwen2Tokenizer.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(small_model)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) == of_two_files.encode(text), text
        assert ours.encode(text, control_tokens=False) == of_two_files.encode(text, control_tokens=False)
    assert ours.control_token_ids == of_two_files.control_token_ids and len(ours) == len(theirs)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.chat_template == theirs.chat_template


def test_the_qwen_vocabulary_from_tokenizer_json(qwen_vocabulary, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2TokenizerFast(str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt"),
                                             additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.end_of_text_id, ours.im_start_id, ours.im_end_id, len(ours)) == (151643, 151644, 151645, 151646)
    ours.save_vocabulary(str(tmp_path))
    plain = Qwen2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert [plain.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_a_checkpoint_is_run_with_it_and_a_file_that_is_given_wins(saved, small_model, tmp_path):
    folder, _ = saved

    def files(*flags):
        found = load_config(None, [Flag("load_checkpoint", "--load_checkpoint", str(tmp_path)), *flags]).tokenizer
        return found.vocab_file, found.merges_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = str(tmp_path / "tokenizer.json")
    assert files() == (whole, whole)
    shutil.copy(small_model / "vocab.json", tmp_path)
    assert files() == (whole, whole)  # merges.txt is missing
    vocab = Flag("processor.tokenizer.vocab_file", "--vocab_file", str(small_model / "vocab.json"))
    assert files(vocab) == (str(small_model / "vocab.json"), None)
    shutil.copy(small_model / "merges.txt", tmp_path)
    assert files() == (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))


def change(value, keys, new):
    """A copy of JSON with one value replaced."""
    if not keys:
        return new
    copy = value.copy()
    copy[keys[0]] = change(copy[keys[0]], keys[1:], new)
    return copy


@pytest.mark.parametrize("keys, new, said", [
    (("normalizer",), None, "normalizer is 'None'"),
    (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), r"\w+", "pattern.Regex is "),
    (("pre_tokenizer",), {"type": "ByteLevel"}, "pre_tokenizer.type is 'ByteLevel'"),
    (("model", "type"), "Unigram", "model.type is 'Unigram'"),
    (("model", "byte_fallback"), True, "model.byte_fallback is 'True'"),
    (("model",), [], "has no model, so it is no tokenizer.json"),
    (("model", "vocab"), [], "not a vocabulary"),
    (("model", "merges"), [["a"]], "merge 1 is"),
    (("model", "merges"), [], "has no merges"),
    (("added_tokens",), [{"content": "x"}], "not a list of tokens with their ids"),
])
def test_what_qwens_tokenizer_does_not_do_is_refused_by_its_name(saved, tmp_path, keys, new, said):
    found = json.loads((saved[0] / "tokenizer.json").read_text("utf-8"))
    found["model"].update(vocab={"a": 0}, merges=[["a", "a"]])
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(found, keys, new)), "utf-8")
    with pytest.raises(UserError) as caught:
        Qwen2Tokenizer.from_pretrained(tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
