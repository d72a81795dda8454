"""Quantised checkpoints in our network: transformers' logits and tokens of the weights that they mean."""

from __future__ import annotations

import numpy as np
import pytest
from quantised_fixtures import Kind, quantised_model
from test_network import greedy, hf_greedy, open_network, operators, random_prompts

torch = pytest.importorskip("torch")

KINDS = {
    "int4, groups of 64, zero points; table int8": (Kind(4, 64, zero=True), Kind(8, 32), {}),
    "int4, groups of 32, bfloat16 scales": (Kind(4, 32, scale_dtype="BF16"), None, {}),
    "int4 in an order of its own": (Kind(4, 64, zero=True, order=True), None, {}),
    "int8, whole rows, float32 scales; tied": (Kind(8, 0, scale_dtype="F32"), None, {"tie_word_embeddings": True}),
    "int8, zero points; tied table int8": (Kind(8, 64, zero=True), Kind(8, 32), {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_transformers_on_what_the_integers_mean(kind, operators, tmp_path):
    linear, vocabulary, sizes = KINDS[kind]
    model = quantised_model(tmp_path / "q", linear, vocabulary, **sizes)
    config, network = open_network(tmp_path / "q", tmp_path, num_blocks=160)
    prompts = random_prompts(200, 20, longest=16)
    ours = greedy(config, network, prompts, 8)
    assert ours == [hf_greedy(model, prompt, tokens) for prompt, tokens in zip(prompts, ours)]
    ids = np.array(prompts[0] + prompts[1], np.int32)
    length = np.array([len(ids)], np.int32)
    logits = network.prefill(ids, length, length, np.arange(160, dtype=np.int32)[None],
                             np.arange(len(ids), dtype=np.int32))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, -1].numpy()
    assert np.abs(logits[0] - expected).max() < 1e-4
