"""The 910B graphs compile up to kernel selection with the fused operators they should have, whole and cut over
cards."""

import functools
import json
import re
import shutil
from dataclasses import replace

import pytest
from ascend_worker import Worker, WorkerError
from conftest import require
from official_configs import OTHERS, QWEN1_5
from qwen15 import naming
from qwen15.ascend import model
from qwen15.commands import make_yaml
from qwen15.config.hf_config import dims_from_hf_config
from qwen15.config.load import load_config
from qwen15.conversion import strategy

require("mindformers")

VERSION = functools.partial(pytest.param, marks=pytest.mark.version)
LAYERS = 2
TWO_LAYERS = [f"model.model_config.num_layers={LAYERS}"]
ALL_YAMLS = [f"{size}{chat}" for size in QWEN1_5 for chat in ("", "_chat")]


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """number of cards -> a worker that compiles for so many: MindSpore takes the first number it meets for good."""
    workers = {}

    def worker(count: int) -> Worker:
        if count > 1 and shutil.which("g++") is None:
            pytest.skip("no g++ to build the shim")
        if count not in workers:
            workers[count] = Worker(tmp_path_factory.mktemp(f"cards_{count}"))
        return workers[count]

    yield worker
    for started in workers.values():
        started.close()


def expected_operators(phase: str, ranks: int, vocab_emb_dp: bool, quantised: bool = False) -> dict:
    """What the docs say the graph of `LAYERS` layers is made of."""
    attention = "FlashAttentionScore" if phase == "prefill" else "PagedAttention"
    operators = {"RmsNorm": 2 * LAYERS + 1, "ApplyRotaryPosEmb": LAYERS, "ReshapeAndCache": LAYERS, attention: LAYERS,
                 "SiLU": LAYERS, "MatMul": 7 * LAYERS + 1, "Gather": 2 if phase == "prefill" else 3}
    if quantised:
        operators.update(MatMul=1, WeightQuantBatchMatmul=7 * LAYERS)
    if phase == "prefill":
        operators["CumsumExt"] = 1
    if ranks > 1:
        operators["AllReduce"] = 2 * LAYERS + (0 if vocab_emb_dp else 1)
        if not vocab_emb_dp:
            operators.update(AllGather=1, Split=1, Concat=1)
    return operators


@pytest.fixture(scope="module")
def compiled(cards):
    """(YAML, dtype) -> (configuration, what `ascend_graphs.graphs` found); base and chat are one network, compiled
    once."""
    found = {}

    def compiled(yaml_path: str, dtype: str, *more: str, quantised=None):
        options = [*TWO_LAYERS, *(f"model.model_config.{key}={dtype}"
                                  for key in ("compute_dtype", "rotary_dtype", "param_init_type")),
                   *more]
        config = load_config(yaml_path, options=[*options, "context.device_target=CPU"])
        network = repr((replace(config.model, eos_token_id=()), config.parallel, quantised))
        if network not in found:
            ranks = config.parallel.model_parallel
            found[network] = cards(ranks).call("ascend_graphs.graphs", yaml_path=yaml_path, options=options,
                                               ranks=ranks,
                                                quantised=quantised)
        return config, found[network]
    return compiled


def check_graphs(config, found, quantised: bool = False) -> None:
    assert found["left_behind"] == []
    for phase in ("prefill", "increment"):
        assert found[phase]["operators"] == expected_operators(phase, config.parallel.model_parallel,
                                                               config.parallel.vocab_emb_dp, quantised)
        assert found[phase]["norm_dtypes"] == ["FLOAT"], "norms are computed in float32 whatever the dtype of the rest"
        assert found[phase]["output"] == [[-1, config.model.dims.vocab_size]]
        assert found[phase]["inputs"] == {"tokens": [[-1, -1]], "batch_valid_length": [[-1, -1]],
                                          "block_tables": [[-1, -1]],
                                          "slot_mapping": [[-1]]}


def rare(*values):
    """Values that the slow tests have: the same graph with other numbers in it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def choose(dtype, usual, version=()):
    """Every YAML with this dtype: those that are neither `usual` nor run with another MindSpore too are slow."""
    return [(VERSION if name in version else pytest.param if name in usual else rare)(name, dtype)
            for name in ALL_YAMLS]


# Tied and multi-head on one card, grouped on 8; both dtypes. Below, small ones on 2 and 4, vocabulary cut and whole.
@pytest.mark.parametrize("name, dtype", [
    *choose("bfloat16", ("0_5b", "14b_chat"), version=("14b",)), *choose("float16", ("110b_chat",))])
def test_shipped_yaml_compiles(compiled, module_dir, name, dtype):
    check_graphs(*compiled(str(module_dir / f"predict_qwen1_5_{name}.yaml"), dtype))


# Below, a small network with each of the two others.
@pytest.mark.parametrize("quantised", (rare((8, 0)), (8, 128), rare((4, 128))), ids=("A16W8", "A16W8 groups", "A16W4"))
@pytest.mark.parametrize("name", [name if name == "14b" else rare(name) for name in QWEN1_5])
def test_shipped_yaml_compiles_for_quantised_weights(compiled, module_dir, name, quantised):
    path = str(module_dir / f"predict_qwen1_5_{name}.yaml")
    check_graphs(*compiled(path, "float16", quantised=quantised), quantised=True)


@pytest.mark.slow
@pytest.mark.parametrize("quantised", ((8, 0), (8, 64), (4, 64)), ids=("A16W8", "A16W8 groups", "A16W4"))
@pytest.mark.parametrize("ranks", (1, 2, 4, 8))
@pytest.mark.parametrize("name", QWEN1_5)
def test_every_yaml_compiles_for_quantised_weights_over_any_number_of_cards(compiled, module_dir, name, ranks,
                                                                            quantised):
    """Or is refused with the numbers: what heads or groups of 64 do not divide."""
    path = str(module_dir / f"predict_qwen1_5_{name}.yaml")
    more = [f"parallel_config.model_parallel={ranks}", f"use_parallel={ranks > 1}"]
    dims = load_config(path, options=["context.device_target=CPU"]).model.dims
    if naming.indivisible(dims, ranks):
        pytest.skip(naming.indivisible(dims, ranks))
    if quantised[1] and (dims.intermediate_size // ranks % 64 or dims.hidden_size // ranks % 64):
        with pytest.raises(WorkerError, match="the operator on Ascend takes groups of 64 or 128"):
            compiled(path, "float16", *more, quantised=quantised)
        return
    check_graphs(*compiled(path, "float16", *more, quantised=quantised), quantised=True)


@pytest.mark.parametrize("name, ranks", (("Qwen2.5-0.5B-Instruct", 1), rare("Qwen2.5-7B-Instruct", 4)))
def test_yaml_of_another_model_compiles(compiled, tmp_path, name, ranks):
    """Grouped queries, tied and untied, whole and cut: written by make_yaml from config.json."""
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]), encoding="utf-8")
    path = tmp_path / "predict.yaml"
    path.write_text(make_yaml.render(make_yaml.yaml_for(str(tmp_path), ranks)), encoding="utf-8")
    config, found = compiled(str(path), "bfloat16")
    assert config.model.dims == replace(dims_from_hf_config(OTHERS[name]).dims, num_layers=LAYERS)
    check_graphs(config, found)


@pytest.mark.version
def test_float32_is_refused_by_the_operators_themselves(cards, module_dir):
    """The reason for our own refusal of float32 on Ascend."""
    said = cards(1).call("ascend_graphs.refused", yaml_path=str(module_dir / "predict_qwen1_5_14b.yaml"),
                         options=TWO_LAYERS + [f"model.model_config.{key}=float32"
                                               for key in ("compute_dtype", "rotary_dtype")])
    assert "ApplyRotaryPosEmb" in said and "Float32" in said


@pytest.mark.parametrize("dtype, head_dim, count", (
    VERSION("bfloat16", 128, 10), ("float16", 64, 15), rare("bfloat16", 64, 15), rare("float16", 128, 10)))
def test_operator_graphs_of_the_check_compile(cards, dtype, head_dim, count):
    found = cards(1).call("ascend_graphs.check_graphs", dtype=dtype, head_dim=head_dim)
    assert len(found) == count


@pytest.mark.parametrize("ranks, vocab_emb_dp, tied, whole", (
    VERSION(2, False, False, True), (4, True, True, False), rare(2, True, True, False), rare(4, False, False, True),
    rare(4, True, False, False), rare(8, True, False, True), rare(8, False, False, False), rare(8, False, True, True)))
def test_slices_are_those_of_the_front_end(cards, tmp_path, ranks, vocab_emb_dp, tied, whole):
    sizes = model.dims(ranks, tied)
    yaml_path = model.save(str(tmp_path), sizes, model.random_weights(sizes), ranks, vocab_emb_dp, "bfloat16", "CPU")
    found = cards(ranks).call("ascend_graphs.slices", yaml_path=yaml_path, checkpoint=str(tmp_path), ranks=ranks,
                              whole=whole,
                               options=["model.model_config.param_init_type=float32"])

    weights = {weight.ms: weight for weight in naming.weights(sizes)}
    caches = {name: shape for name, shape in found["shapes"].items() if name.endswith("_cache")}
    assert {name: tuple(shape) for name, shape in found["shapes"].items() if name not in caches} == {
        name: weight.slice_shape(ranks, vocab_emb_dp) for name, weight in weights.items()}
    assert len(caches) == 2 * sizes.num_layers
    assert set(map(tuple, caches.values())) == {
        (model.NUM_BLOCKS, model.BLOCK_SIZE, sizes.num_kv_heads // ranks, sizes.head_dim)}

    ours = {name: strategy.layout_of(len(weight.shape), weight.axis(ranks, vocab_emb_dp), ranks) for name,
            weight in weights.items()}
    assert found["strategy"] == {name: [list(layout.devices), list(layout.tensor_map)] for name, layout in ours.items()}

    for phase in ("prefill", "increment"):
        assert found[phase]["operators"] == expected_operators(phase, ranks, vocab_emb_dp)
    assert found["wrong"] == [[]] * ranks, "a rank holds what is not its slice"
    assert found["account"].startswith(f"weights: loaded {len(weights)} of {len(weights)}, missing 0, unexpected 0")
    assert found["left_behind"] == [] and found["lost"] == []


@pytest.mark.parametrize("ranks, bits, group", (VERSION(2, 4, 128), (4, 8, 0), rare(2, 8, 0), rare(4, 4, 64),
                                                rare(8, 8, 0)))
def test_every_rank_holds_its_slice_of_quantised_weights(cards, tmp_path, ranks, bits, group):
    """What integers, scales and offsets mean together is the slice of the dequantised weight, bit for bit."""
    sizes = model.dims(ranks)
    yaml_path = model.save(str(tmp_path), sizes, model.random_weights(sizes), ranks, False, "float16", "CPU")
    found = cards(ranks).call("ascend_graphs.slices", yaml_path=yaml_path, checkpoint=str(tmp_path), ranks=ranks,
                              quantised={"layers": {"bits": bits, "group": group, "zeros": True}},
                              options=["model.model_config.param_init_type=float32"])
    assert found["wrong"] == [[]] * ranks
    for phase in ("prefill", "increment"):
        assert found[phase]["operators"] == expected_operators(phase, ranks, False, quantised=True)
    assert found["left_behind"] == [] and found["lost"] == []


@pytest.mark.parametrize("ranks", (1, VERSION(2)))
def test_two_generations_compile_two_graphs(cards, tmp_path, ranks):
    """The engine's own calls, whatever their batch and lengths, run the prefill graph and the increment graph and no
    third."""
    sizes = model.dims(ranks)
    yaml_path = model.save(str(tmp_path), sizes, model.random_weights(sizes), ranks)
    found = cards(ranks).call("ascend_graphs.generations", yaml_path=yaml_path, checkpoint=str(tmp_path), ranks=ranks)
    one = [["prefill", False], ["increment", False], ["increment", False]]
    assert found["compiled"] == [["prefill", True], ["increment", True], ["increment", False], *one]
    for phase in ("prefill", "increment"):
        assert found[phase]["operators"] == expected_operators(phase, ranks, True)
        assert found[phase]["output"] == [[-1, sizes.vocab_size]]


@pytest.mark.version
def test_the_check_examines_the_cut_network_on_several_cards(cards):
    """Nobody computes here: every comparison fails, and none of them because it could not be made."""
    code, output = cards(2).call("ascend_graphs.report", ranks=2)
    results = re.findall(r"^  network, 2 card\(s\)(, vocabulary cut)?: (?:prefill|decode) [12] +b?float16 .* FAILED$",
                         output, re.MULTILINE)
    assert code == 1 and len(results) == 16 and results.count(", vocabulary cut") == 8, output
    assert "0 of 16 comparisons passed, 0 checks could not run" in output
