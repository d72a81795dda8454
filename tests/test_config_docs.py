"""The pages on configuration name every flag and key, and quote messages that the program really prints."""

import os
import re

import pytest
from qwen15.config import keys
from qwen15.config.flags import FLAG_FIELDS, Flag
from qwen15.config.load import load_config
from qwen15.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULE = os.path.join(ROOT, "research", "qwen1_5")
PAGES = ("configuration.md", "configuration_en.md")


def page(name):
    with open(os.path.join(ROOT, "docs", name), encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_and_every_key_that_is_read_is_on_the_page(name):
    text = page(name)
    assert [field.name for field in FLAG_FIELDS if f"`{field.name}`" not in text] == []
    words = set(re.findall(r"[A-Za-z_0-9]+", text))
    used = [row.name for row in keys.KEYS.values() if row.role == keys.USED]
    minor = {"bos_token", "errors", "padding_side", "truncation_side", "add_prefix_space", "add_bos_token",
             "add_eos_token",
             "split_special_tokens", "clean_up_tokenization_spaces", "additional_special_tokens"}
    assert [key for key in used if key.rpartition(".")[2] not in words | minor] == []


@pytest.mark.parametrize("name", PAGES)
def test_quoted_values_and_their_places_are_real(name):
    config = load_config(os.path.join(MODULE, "predict_qwen1_5_0_5b.yaml"),
                         [Flag("model.model_config.top_k", "--top_k", 20)], environ={})
    quoted = re.findall(r"^(\S+) = (\S+) +# (\S+)$", page(name), re.M)
    assert len(quoted) == 3
    for key, value, source in quoted:
        found = config.effective
        for part in key.split("."):
            found = found[part]
        assert repr(found) == value
        assert os.path.basename(config.sources[key]) == source


@pytest.mark.parametrize("name", PAGES)
def test_quoted_errors_are_real(name, tmp_path, monkeypatch):
    with open(os.path.join(MODULE, "predict_qwen1_5_14b.yaml"), encoding="utf-8") as file:
        lines = file.read().splitlines()
    monkeypatch.chdir(tmp_path)

    def complaint(changed, *flags):
        (tmp_path / "predict_qwen1_5_14b.yaml").write_text("\n".join(changed))
        with pytest.raises(UserError) as caught:
            load_config("predict_qwen1_5_14b.yaml", flags, environ={})
        return f"error: {caught.value}"

    quoted = re.findall(r"^error: .*$", page(name), re.M)
    typo = [line.replace("rms_norm_eps", "rms_norm_epsilon") for line in lines]
    text = [line.replace("block_size: 32", "block_size: '32'") for line in lines]
    assert quoted[0] == complaint(typo)
    assert quoted[1] == complaint(text)
    assert quoted[2] == complaint(lines, Flag("model.model_config.seq_length", "--seq_length", 20000))
    assert len(quoted) == 3


@pytest.mark.parametrize("name", PAGES)
def test_every_file_the_page_names_is_shipped(name):
    named = set(re.findall(r"`(predict_qwen1_5_\w+\.yaml)`", page(name)))
    assert named and all(os.path.isfile(os.path.join(MODULE, file)) for file in named)
