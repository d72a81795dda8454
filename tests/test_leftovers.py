"""What is no weight is known by its name: what MindSpore's own optimizers and networks leave in a checkpoint, and
nothing else."""

import numpy as np
import pytest
from qwen15 import naming
from qwen15.checkpoint.leftovers import account, kind_of, sort_out
from qwen15.family import FAMILY

WEIGHTS = ("model.layers.0.attention.wo.weight", "lm_head.weight")
OPTIMIZERS = ("Adagrad", "Adam", "AdamOffload", "AdamWeightDecay", "LazyAdam", "FTRL", "LARS", "Lamb", "Momentum",
              "ProximalAdagrad", "RMSProp",
              "SGD", "AdaMax", "Rprop", "ASGD", "AdaFactor")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_mindspores_optimizers_keep_is_known(name):
    mindspore = pytest.importorskip("mindspore")
    nn = mindspore.nn
    weights = [mindspore.Parameter(mindspore.Tensor(np.zeros((4, 4), np.float32)), name=weight) for weight in WEIGHTS]
    if name == "LARS":
        optimizer = nn.LARS(nn.SGD(weights, 0.1))
    elif name == "Momentum":
        optimizer = nn.Momentum(weights, 0.1, 0.9)
    else:
        optimizer = getattr(nn, name)(weights,
                                      **{"RMSProp": {"centered": True}, "Lamb": {"learning_rate": 0.1}}.get(name, {}))
    kept = [parameter.name for parameter in optimizer.get_parameters() if parameter.name not in WEIGHTS]
    assert any(kind_of(entry) == "optimizer states" for entry in kept)
    assert {entry: kind_of(entry) for entry in kept
            if kind_of(entry) not in ("optimizer states", "training counters")} == {}


@pytest.mark.parametrize("name", ["adamw.AdamW", "fused_adamw.FusedAdamW"])
def test_what_mindformers_optimizers_keep_is_known(name):
    mindspore = pytest.importorskip("mindspore")
    pytest.importorskip("mindformers")
    import importlib
    module, kind = name.split(".")
    optimizer_of = getattr(importlib.import_module(f"mindformers.core.optim.{module}"), kind, None)
    if optimizer_of is None:
        pytest.skip(f"this version of MindFormers has no {name}")
    weights = [mindspore.Parameter(mindspore.Tensor(np.zeros((4, 4), np.float32)), name=weight) for weight in WEIGHTS]
    kept = [parameter.name for parameter in optimizer_of(weights).get_parameters() if parameter.name not in WEIGHTS]
    assert kept and {entry: kind_of(entry) for entry in kept
                     if kind_of(entry) not in ("optimizer states", "training counters")} == {}


def test_no_weight_is_taken_for_something_else():
    for dims in FAMILY.values():
        for weight in naming.weights(dims):
            assert kind_of(weight.hf) is kind_of(weight.ms) is None


@pytest.mark.parametrize("name", ["model.layers.0.attention.w_qkv.weight",
                                  "model.layers.0.self_attn.q_proj.lora_A.weight", "visual.proj",
                                  "linear.weight", "accum.x", "model.layers.0.mlp.experts.0.up_proj.weight",
                                  "xmodel.norm.weight"])
def test_what_nothing_explains_is_not_explained(name):
    assert kind_of(name) is None


def test_everything_is_in_the_account_once():
    known, unknown = sort_out(["a.key_cache", "adam_m.model.norm_out.weight", "what", "b.key_cache", "c.key_cache",
                               "d.value_cache", "epoch_num"],
                              {"remark": "str values", "step_num": "Int64 values", "map": "hash map parameters",
                               "more": "str values"})
    assert unknown == ["what"]
    assert account(known) == ["4 KV caches (a.key_cache, b.key_cache, c.key_cache, ...)", "1 hash map parameter (map)",
                              "1 optimizer state (adam_m.model.norm_out.weight)", "2 str values (remark, more)",
                              "2 training counters (epoch_num, step_num)"]
