"""Our network against transformers' Qwen2ForCausalLM: logits and greedy tokens, for both operator sets."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_model
from qwen15.config.load import load_config
from qwen15.generation.blocks import BlockPool, BlockTable, table_array
from qwen15.generation.engine import Engine
from qwen15.generation.request import Limits, Request
from qwen15.network.base import rope_tables
from qwen15.network.build import build_network

torch = pytest.importorskip("torch")

SHAPES = {
    "grouped": dict(),
    "multi-head": dict(num_key_value_heads=6),
    "one KV head, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "odd sizes": dict(vocab_size=131, hidden_size=36, intermediate_size=50, num_attention_heads=3,
                      num_key_value_heads=3, rope_theta=1e4, rms_norm_eps=1e-5),
    "head size 64, tied": dict(hidden_size=256, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2,
                               tie_word_embeddings=True),
}


@pytest.fixture(params=["reference", "kernels"])
def operators(request, monkeypatch):
    """Both operator sets, one after the other."""
    if request.param == "reference":
        monkeypatch.setenv("QWEN15_KERNELS", "reference")
    else:
        monkeypatch.delenv("QWEN15_KERNELS", raising=False)
        from qwen15.ops import kernels_available

        available, why = kernels_available()
        if not available:
            pytest.skip(why)
    return request.param


def both(names, values, reference):
    """Every value with the kernels; with the reference operators, which compute and compile ten times as long, those in
    `reference`, and all of them in the slow tests."""
    kinds = [("kernels", value, ()) for value in values] + [("reference", value, ()) for value in reference] + [
        ("reference", value, pytest.mark.slow) for value in values if value not in reference]
    return pytest.mark.parametrize(f"operators, {names}", [
        pytest.param(operators, *(value if isinstance(value, tuple) else (value,)), marks=marks)
        for operators, value, marks in kinds], indirect=["operators"])


def open_network(folder, tmp_path, dtype="float32", compute_dtype=None, block_size=4, num_blocks=64):
    yaml = tmp_path / "predict.yaml"
    yaml.write_text(f"load_checkpoint: '{folder}'\nmodel:\n  model_config:\n    param_init_type: {dtype}\n"
                    f"    compute_dtype: {compute_dtype or dtype}\n    block_size: {block_size}\n"
                    f"    num_blocks: {num_blocks}\n"
                    f"    seq_length: {block_size * num_blocks}\ncontext:\n  device_target: CPU\n")
    config = load_config(str(yaml), environ={})
    return config, build_network(config, str(folder), lambda line: None)


def greedy(config, network, prompts, count):
    model = config.model
    engine = Engine(network, Limits(model.dims.vocab_size, model.seq_length, model.num_blocks, model.block_size))
    tokens = [[] for _ in prompts]
    for step in engine.generate([Request(tuple(p), len(p) + count) for p in prompts]):
        tokens[step.request].append(step.token)
    return tokens


def hf_greedy(model, prompt, tokens):
    """transformers' greedy tokens after `prompt`, as far as they agree with `tokens` and one further.

    One forward pass over prompt and tokens gives the choice at every position; by induction, all choices equal
    `tokens` exactly if generating them one by one would.
    """
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1:]
    return logits.argmax(-1).tolist()


def random_prompts(vocabulary, count, longest=40, seed=5):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, random.integers(1, longest)).tolist() for _ in range(count)]


@both("shape, count", [(shape, 64) for shape in SHAPES], reference=[("one KV head, tied", 12)])
def test_greedy_tokens_equal_transformers(shape, count, operators, tmp_path):
    model = random_model(tmp_path / "hf", **SHAPES[shape])
    config, network = open_network(tmp_path / "hf", tmp_path, num_blocks=160)
    prompts = random_prompts(model.config.vocab_size, 6)
    ours = greedy(config, network, prompts, count)
    assert ours == [hf_greedy(model, p, tokens) for p, tokens in zip(prompts, ours)]


@both("shape", ["grouped", "head size 64, tied"], reference=["grouped"])
def test_prefill_and_decode_logits_within_1e_4_over_scattered_blocks(shape, operators, tmp_path):
    model = random_model(tmp_path / "hf", **SHAPES[shape])
    _, network = open_network(tmp_path / "hf", tmp_path, block_size=3, num_blocks=40)
    pool = BlockPool(40, 3)
    np.random.default_rng(1).shuffle(pool._free)
    prompts = random_prompts(model.config.vocab_size, 3, longest=20, seed=2)
    tables = [BlockTable(pool) for _ in prompts]
    for table, prompt in zip(tables, prompts):
        table.reserve(len(prompt) + 5)
    lengths = np.array([len(p) for p in prompts], np.int32)
    logits = network.prefill(np.concatenate(prompts).astype(np.int32), lengths, lengths,
                             table_array(tables, lengths, 3),
                             np.concatenate([t.slots(0, n) for t, n in zip(tables, lengths)]))
    texts = [list(p) for p in prompts]
    for _ in range(5):
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([t])).logits[0, -1] for t in texts]).numpy()
        assert np.abs(logits - expected).max() < 1e-4
        for text, row in zip(texts, expected):
            text.append(int(row.argmax()))
        lengths = lengths + 1
        logits = network.decode(np.array([t[-1] for t in texts], np.int32), lengths, table_array(tables, lengths, 3),
                                np.concatenate([t.slots(n - 1, n) for t, n in zip(tables, lengths)]))
        known = network.largest(logits)
        assert (known is not None) == (operators == "kernels") and network.largest(logits.copy()) is None
        assert known is None or known.tolist() == logits.argmax(-1).tolist()


def test_prefill_in_pieces_gives_the_logits_of_the_whole(operators, tmp_path):
    model = random_model(tmp_path / "hf")
    _, network = open_network(tmp_path / "hf", tmp_path)
    prompt = np.array(random_prompts(199, 1, longest=40, seed=9)[0][:30] + [7] * 5, np.int32)
    pool = BlockPool(64, 4)
    table = BlockTable(pool)
    table.reserve(len(prompt))
    for start, stop in ((0, 11), (11, 12), (12, len(prompt))):
        context = np.array([stop], np.int32)
        logits = network.prefill(prompt[start:stop], np.array([stop - start], np.int32), context,
                                 table_array([table], [stop], 4), table.slots(start, stop))
    with torch.no_grad():
        expected = model(torch.tensor(prompt[None].astype(np.int64))).logits[0, -1].numpy()
    assert np.abs(logits[0] - expected).max() < 1e-4


@both("dtype", ["bfloat16", "float16"], reference=[])
def test_16_bit_logits_are_as_close_to_float32_as_transformers_own(dtype, operators, tmp_path):
    model = random_model(tmp_path / "hf", dtype=dtype, hidden_size=256, intermediate_size=640, num_attention_heads=8,
                         num_key_value_heads=4, num_hidden_layers=4)
    config, network = open_network(tmp_path / "hf", tmp_path, dtype=dtype)
    low = type(model)(model.config).to(getattr(torch, dtype)).eval()
    low.load_state_dict(model.state_dict())
    ours, theirs = [], []
    for prompt in random_prompts(199, 8, seed=4):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            right = model(ids).logits[0, -1].numpy()
            theirs.append(np.abs(low(ids).logits[0, -1].float().numpy() - right).mean())
        length = np.array([len(prompt)], np.int32)
        table = BlockTable(BlockPool(64, 4))
        table.reserve(len(prompt))
        logits = network.prefill(np.array(prompt, np.int32), length, length, table_array([table], length, 4),
                                 table.slots(0, len(prompt)))
        ours.append(np.abs(logits[0] - right).mean())
    assert np.mean(ours) <= np.mean(theirs), (np.mean(ours), np.mean(theirs))


PROMPTS = [
    "The capital of France is", "Gravity is", "def fibonacci(n):\n", "Once upon a time", "1, 2, 3, 5, 8,",
    "Water boils at",
    "Dear Sir or Madam,", "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n", "The quick brown fox",
    "In 1969, humans", "import numpy as np\n", "SELECT name FROM", "To be, or not to be", "A prime number is",
    "The largest planet", "Roses are red,", "Photosynthesis", "x = [i**2 for i in", "My favourite food is", "人工智能",
]


@pytest.mark.parametrize("operators, count, asked, judged", [
    ("kernels", 16, 8, 3), pytest.param("kernels", 64, 20, 20, marks=pytest.mark.slow),
    pytest.param("reference", 64, 20, 20, marks=pytest.mark.slow)], indirect=["operators"])
def test_small_real_model_equals_transformers(small_model, operators, count, asked, judged, tmp_path):
    """`count` tokens of each of the last `asked` prompts, and all their logits for the first `judged` of them."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2ForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(small_model)
    config, network = open_network(small_model, tmp_path, block_size=32, num_blocks=96)
    texts = PROMPTS[-asked:]
    prompts = [tokenizer(text).input_ids for text in texts]
    ours = greedy(config, network, prompts, count)
    for text, prompt, tokens in zip(texts, prompts, ours):
        assert tokens == hf_greedy(model, prompt, tokens), text
    assert greedy(config, network, prompts[:1], count) == ours[:1]
    # In float64 transformers has no rounding of its own; in float32 it is 9e-5 from that, which would be most of the
    # bound.
    model = model.double()
    for text, prompt, tokens, logits in zip(texts, prompts, ours,
                                            forced_logits(network, prompts[:judged], ours[:judged])):
        with torch.no_grad():
            expected = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1:].numpy()
        assert np.abs(logits - expected).max() < 1e-4, text


def forced_logits(network, prompts, tokens):
    """For each prompt the logits (count, V) of its prefill and of decode steps given all its tokens but the last."""
    pool = BlockPool(96, 32)
    tables = [BlockTable(pool) for _ in prompts]
    for table, prompt in zip(tables, prompts):
        table.reserve(len(prompt) + len(tokens[0]))
    lengths = np.array([len(p) for p in prompts], np.int32)
    rows = [network.prefill(np.concatenate(prompts).astype(np.int32), lengths, lengths,
                            table_array(tables, lengths, 32),
                            np.concatenate([t.slots(0, n) for t, n in zip(tables, lengths)])).copy()]
    for step in np.array(tokens, np.int32).T[:-1]:
        lengths = lengths + 1
        rows.append(network.decode(step, lengths, table_array(tables, lengths, 32),
                                   np.concatenate([t.slots(n - 1, n) for t, n in zip(tables, lengths)])).copy())
    return np.stack(rows, 1)


class Conversations:
    """Sequences in a network's cache, and the next logits of each.

    Args:
        network: ours, with 64 blocks of 4.
        prompts: their beginnings.
    """

    def __init__(self, network, prompts):
        self.network, pool = network, BlockPool(64, 4)
        self.tables = [BlockTable(pool) for _ in prompts]
        self.texts = [list(prompt) for prompt in prompts]
        for table, prompt in zip(self.tables, prompts):
            table.reserve(len(prompt) + 9)
        lengths = [len(text) for text in self.texts]
        network.prefill(np.concatenate(self.texts).astype(np.int32), *[np.array(lengths, np.int32)] * 2,
                        table_array(self.tables, lengths, 4),
                        np.concatenate([t.slots(0, n) for t, n in zip(self.tables, lengths)]))

    def decode(self, token):
        """Logits after one more token."""
        for text in self.texts:
            text.append(token)
        lengths = [len(text) for text in self.texts]
        return self.network.decode(np.full(len(lengths), token, np.int32), np.array(lengths, np.int32),
                                   table_array(self.tables, lengths, 4),
                                   np.array([t.slot(n - 1) for t, n in zip(self.tables, lengths)], np.int32)).copy()


@pytest.fixture
def whole_calls(operators, monkeypatch):
    """Counts the calls that pass all parameters; only for the kernels, which can do without."""
    if operators != "kernels":
        pytest.skip("always passes all parameters")
    from qwen15.network.cpu import CpuNetwork

    run, calls = CpuNetwork._run, []
    monkeypatch.setattr(CpuNetwork, "_run", lambda self, *arrays: (calls.append(self), run(self, *arrays))[1])
    return calls


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_decoding_without_passing_the_parameters_gives_the_same_logits(
        whole_calls, count, dtype, tmp_path, monkeypatch):
    random_model(tmp_path / "hf")
    _, network = open_network(tmp_path / "hf", tmp_path, dtype)
    prompts = random_prompts(199, count)
    short = Conversations(network, prompts)
    got = [short.decode(token) for token in (3, 50, 7, 90, 12)]
    assert len(whole_calls) == 1
    monkeypatch.setattr(network, "short", None)
    whole = Conversations(network, prompts)
    np.testing.assert_array_equal(got, [whole.decode(token) for token in (3, 50, 7, 90, 12)])
    assert len(whole_calls) == 7


@pytest.mark.version
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_without_mindspore_is_the_step_of_its_graph(whole_calls, count, tmp_path, monkeypatch):
    random_model(tmp_path / "hf")
    _, network = open_network(tmp_path / "hf", tmp_path, "bfloat16")
    prompts = random_prompts(199, count)
    without = Conversations(network, prompts)
    got = [without.decode(token) for token in (3, 50, 7)]
    monkeypatch.setattr(network.short, "run", network.short.run_in_graph)
    in_graph = Conversations(network, prompts)
    np.testing.assert_array_equal(got, [in_graph.decode(token) for token in (3, 50, 7)])


def test_numbers_out_of_range_do_not_reach_the_kernels(whole_calls, tmp_path):
    random_model(tmp_path / "hf")
    _, network = open_network(tmp_path / "hf", tmp_path)
    conversation = Conversations(network, [[5, 6, 7]])
    conversation.decode(8)
    binding = network._cell.binding
    logits = np.empty((1, network.vocab_size), np.float32)
    for row, complaint in (([10 ** 6, 5, 4, 0, 1], "ids"), ([1, 10 ** 6, 4, 0, 1], "positions"),
                           ([1, 5, 10 ** 6, 0, 1], "slots"), ([1, 5, 4, -1, -1], "block table"),
                           ([1, 5, 4], "no block table")):
        step = binding.step(1, len(row) - 3, logits)
        step.rows[0] = row
        with pytest.raises(RuntimeError, match=complaint):
            step.run()
    step = binding.step(1, 2, np.empty((1, 3), np.float32))
    step.rows[0] = [1, 5, 4, 0, 1]
    with pytest.raises(RuntimeError, match="the vocabulary"):
        step.run()
    with pytest.raises(ValueError, match="float32"):
        binding.step(1, 2, logits.astype(np.float64))
    with pytest.raises(ValueError, match="2 rows and 1"):
        binding.step(2, 2, logits)


def parameter_of(network, name):
    return next(p for p in network._cell.get_parameters() if p.name.endswith(name))


def test_a_weight_changed_in_place_is_used_at_once_and_one_given_other_memory_from_the_next_prompt_on(
        whole_calls, tmp_path):
    import mindspore as ms

    name = "layers.1.feed_forward.w2.weight"
    random_model(tmp_path / "hf")
    moved, changed, old = (open_network(tmp_path / "hf", tmp_path)[1] for _ in range(3))
    one, two, three = (Conversations(network, [[5, 6, 7]]) for network in (moved, changed, old))
    values = parameter_of(moved, name).asnumpy() * np.float32(1.5)
    parameter_of(moved, name).set_data(ms.Tensor(values))
    parameter_of(changed, name).asnumpy()[...] = values
    before = three.decode(8)
    np.testing.assert_array_equal(one.decode(8), before)  # the memory that the kernels know is still there
    assert np.abs(two.decode(8) - before).max() > 1e-4
    one, two = (Conversations(network, [[5, 6, 7]]) for network in (moved, changed))
    np.testing.assert_array_equal(one.decode(8), two.decode(8))


def test_two_networks_in_turn_keep_to_their_own_parameters(whole_calls, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        random_model(tmp_path / name, seed=seed)
    networks = [open_network(tmp_path / name, tmp_path)[1] for name in ("a", "b")]
    alone = []
    for network in networks:
        conversation = Conversations(network, [[5, 6, 7]])
        alone.append([conversation.decode(token) for token in (8, 9, 10)])
    in_turn = [Conversations(network, [[5, 6, 7]]) for network in networks]
    del whole_calls[:]
    for step, token in enumerate((8, 9, 10)):
        for conversation, wanted in zip(in_turn, alone):
            np.testing.assert_array_equal(conversation.decode(token), wanted[step])
    assert not whole_calls


def test_a_network_that_goes_is_forgotten_by_the_kernels(whole_calls, tmp_path):
    import gc

    from qwen15.kernels import library

    random_model(tmp_path / "hf")
    _, network = open_network(tmp_path / "hf", tmp_path)
    conversation = Conversations(network, [[5, 6, 7]])
    conversation.decode(8)
    binding, short = network._cell.binding, network.short
    number = binding.tensor().asnumpy()[0]
    assert len(library.load().bound_addresses(number)) == len(network._cell.held)
    binding.close()
    with pytest.raises(RuntimeError):
        short.run(*(np.array(value, np.int32) for value in ([9], [5], [[0, 1]], [4])))
    assert f"binding {number} is not open" in library.load().last_error
    del whole_calls[:], conversation, network, short

    _, network = open_network(tmp_path / "hf", tmp_path)
    Conversations(network, [[5, 6, 7]])
    number = network._cell.binding.tensor().asnumpy()[0]
    assert library.load().bound_addresses(number)
    del whole_calls[:], network
    gc.collect()
    assert not library.load().bound_addresses(number)


def test_rope_tables_equal_transformers():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    theirs = Qwen2RotaryEmbedding(Qwen2Config(hidden_size=256, num_attention_heads=4, rope_theta=1e6))
    cos, sin = theirs(torch.zeros(1, 1), torch.arange(3000)[None])
    ours = rope_tables(3000, 64, 1e6)
    np.testing.assert_allclose(ours[0], cos[0].numpy(), atol=3e-7)
    np.testing.assert_allclose(ours[1], sin[0].numpy(), atol=3e-7)


@pytest.mark.version
def test_parameters_bear_mindformers_names(tmp_path):
    from qwen15 import naming

    random_model(tmp_path / "hf")
    config, network = open_network(tmp_path / "hf", tmp_path)
    names = {p.name for p in network._cell.get_parameters()}
    extra = {n for n in names if n.startswith("rope.") or n.endswith((".key_cache", ".value_cache"))}
    assert names - extra == {w.ms for w in naming.weights(config.model.dims)}
