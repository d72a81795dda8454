"""A model and a smaller one that says the same: what lies between them adds nothing."""

from __future__ import annotations

import shutil

from command_fixtures import YAML
from conftest import random_model

SIZES = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 6144, "num_attention_heads": 4,
         "num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1}


def make_twins(folder, small_model):
    """A float32 model of 8 layers of which all but the first add zero, the first alone as its draft (a quarter of the
    bytes), and the YAML of the former; gives (YAML, draft)."""
    model = random_model(folder / "random", num_hidden_layers=8, **SIZES)
    for layer in model.model.layers[1:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder / "random")
    draft = random_model(folder / "draft", num_hidden_layers=1, **SIZES)
    draft.load_state_dict(model.state_dict(), strict=False)
    draft.save_pretrained(folder / "draft")
    for place in ("random", "draft"):
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(small_model / name, folder / place)
    path = folder / "predict.yaml"
    path.write_text(YAML.format(folder=folder / "random"))
    return path, folder / "draft"
