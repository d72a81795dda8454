"""YAML files of the original MindFormers module load unchanged, whatever generation they are of.

The files are rebuilt here from their keys, those of each generation of predict and train files.
"""

import copy

import pytest
import yaml
from qwen15.config.flags import Flag
from qwen15.config.load import load_config
from qwen15.errors import UserError

SIZES = {"batch_size": 1, "seq_length": 8192, "hidden_size": 5120, "num_layers": 40, "num_heads": 40,
         "vocab_size": 152064, "intermediate_size": 13696, "qkv_has_bias": True, "rms_norm_eps": 1e-6,
         "theta": 1000000.0}
DTYPES = {"compute_dtype": "float16", "layernorm_compute_type": "float32", "softmax_compute_type": "float16",
          "rotary_dtype": "float16", "param_init_type": "float16"}
ANSWER = {"repetition_penalty": 1, "max_decode_length": 512, "top_k": 0, "top_p": 0.8, "do_sample": False}
COPIED = {"rotary_pct": 1.0, "rotary_emb_base": 10000, "kv_channels": 128}
TOP = {"seed": 0, "output_dir": "./output", "load_checkpoint": "", "src_strategy_path_or_dir": "",
       "auto_trans_ckpt": False, "only_save_strategy": False, "resume_training": False, "use_parallel": False,
       "run_mode": "predict"}
DATASET = {"data_loader": {"type": "MindDataset", "dataset_dir": "", "shuffle": True}, "input_columns": ["input_ids"],
           "num_parallel_workers": 8, "python_multiprocessing": False, "drop_remainder": True, "batch_size": 1,
           "repeat": 1, "numa_enable": False, "prefetch_size": 1}
TRAINING = {
    "train_dataset": DATASET, "train_dataset_task": {"type": "CausalLanguageModelDataset", "dataset_config": DATASET},
    "runner_wrapper": {"type": "MFTrainOneStepCell", "use_clip_grad": True,
                       "scale_sense": {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 65536}},
    "optimizer": {"type": "FP32StateAdamWeightDecay", "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1},
    "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1e-5, "warmup_ratio": 0.01, "total_steps": -1},
    "callbacks": [{"type": "MFLossMonitor"}, {"type": "CheckpointMointor", "prefix": "qwen2"}, {"type": "ObsMonitor"}],
    "recompute_config": {"recompute": False, "select_recompute": False, "mp_comm_recompute": False}}
COMMON = {
    "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "qwen2_14b"},
    "runner_config": {"epochs": 5, "batch_size": 1, "sink_mode": True, "sink_size": 2},
    "parallel_config": {"data_parallel": 1, "model_parallel": 1, "pipeline_stage": 1, "micro_batch_num": 1,
                        "vocab_emb_dp": True, "gradient_aggregation_group": 4},
    "micro_batch_interleave_num": 1,
    "processor": {"return_tensors": "ms", "type": "Qwen2Processor", "tokenizer": {
        "model_max_length": 32768, "vocab_file": "/path/vocab.json", "merges_file": "/path/merges.txt",
        "unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "type": "Qwen2Tokenizer"}},
    "context": {"mode": 0, "device_target": "Ascend", "enable_graph_kernel": False,
                "graph_kernel_flags": "--opt_level=0", "ascend_config": {"precision_mode": "must_keep_origin_dtype"},
                "max_call_depth": 10000,
                "max_device_memory": "59GB", "save_graphs": False, "save_graphs_path": "./graph", "device_id": 0},
    "parallel": {"parallel_mode": 1, "gradients_mean": False, "enable_alltoall": False, "full_batch": True,
                 "search_mode": "sharding_propagation", "enable_parallel_optimizer": False,
                 "strategy_ckpt_config": {"save_file": "./ckpt_strategy.ckpt", "only_trainable_params": False},
                 "parallel_optimizer_config": {"gradient_accumulation_shard": False,
                                               "parallel_optimizer_threshold": 64}}}


def build(model, top=(), training=False, **sections):
    made = {**TOP, **dict(top), **copy.deepcopy(COMMON), **(copy.deepcopy(TRAINING) if training else {})}
    made["model"] = {"model_config": {"type": "LlamaConfig", **SIZES, **DTYPES, **ANSWER, **model},
                     "arch": {"type": "LlamaForCausalLM"}}
    for name, changes in sections.items():
        made[name] = {**made.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return made


FILES = {
    "infer, r1.0": build({"emb_dropout_prob": 0.0, "eos_token_id": 151643, "pad_token_id": 151643, "use_past": True,
                          "use_flash_attention": False, "use_paged_attention": False, "use_past_shard": False,
                          "offset": 0, "checkpoint_name_or_path": "", "compute_in_2d": True, **COPIED}, training=True),
    "predict, April 2024": build({"emb_dropout_prob": 0.0, "eos_token_id": 151643, "pad_token_id": 151643,
                                  "bos_token_id": 151643, "use_past": True, "use_flash_attention": True,
                                  "block_size": 16, "num_blocks": 1024, "use_past_shard": False, "use_kbk_infer": True,
                                  "offset": 0,
                                  "checkpoint_name_or_path": "", "is_dynamic": True, "qkv_concat": False, **COPIED},
                                 training=True),
    "predict chat, r1.3": build({"emb_dropout_prob": 0.0, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
                                 "bos_token_id": 151644, "n_kv_heads": 40, "max_position_embeddings": 32768,
                                 "use_past": True, "use_flash_attention": True, "block_size": 32, "num_blocks": 1024,
                                 "offset": 0, "checkpoint_name_or_path": "", "is_dynamic": True,
                                 "use_past_shard": False,
                                 "auto_map": {"AutoTokenizer": ["qwen1_5_tokenizer.Qwen2Tokenizer", None]}}),
    "predict chat, r1.5": build({"emb_dropout_prob": 0.0, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
                                 "bos_token_id": 151643, "use_past": True, "use_flash_attention": True,
                                 "block_size": 32, "num_blocks": 1024, "offset": 0, "is_dynamic": True,
                                 "qkv_concat": False,
                                 "temperature": 0.7, "tie_word_embeddings": False},
                                processor={"tokenizer": {
                                    "type": "Qwen2Tokenizer", "auto_register": "qwen1_5_tokenizer.Qwen2Tokenizer",
                                    "vocab_file": "/path/vocab.json", "merges_file": "/path/merges.txt",
                                    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}}),
    "fine-tuning": build({"emb_dropout_prob": 0.0, "eos_token_id": 151643, "pad_token_id": 151643, "use_past": False,
                          "use_flash_attention": True, "fine_grain_interleave": 2, "offset": 0, "is_dynamic": False,
                          "max_position_embedding": 8192, "extend_method": "None", "compute_in_2d": True, **COPIED},
                         top={"do_eval": False, "eval_step_interval": -1, "eval_epoch_interval": 50,
                              "run_mode": "predict", "auto_tune": False, "filepath_prefix": "./autotune",
                              "autotune_per_step": 10,
                              "profile": False, "profile_start_step": 1, "profile_stop_step": 10, "layer_scale": False,
                              "init_start_profile": False, "profile_communication": False, "profile_memory": True,
                              "layer_decay": 0.65, "lr_scale_factor": 256, "remote_save_url": "obs"}, training=True,
                         metric={"type": "PerplexityMetric"}, eval_dataset=DATASET,
                         eval_dataset_task={"type": "CausalLanguageModelDataset", "dataset_config": DATASET},
                         eval_callbacks=[{"type": "ObsMonitor"}],
                         parallel_config={"use_seq_parallel": True, "optimizer_shard": True},
                         parallel={"strategy_ckpt_save_file": "./ckpt_strategy.ckpt"},
                         context={"jit_config": {"jit_level": "O1"}, "memory_optimize_level": "O0",
                                  "mempool_block_size": "57GB"}),
}


@pytest.fixture
def write(tmp_path):
    def write(contents):
        path = tmp_path / "original.yaml"
        path.write_text(yaml.safe_dump(contents, sort_keys=False))
        return str(path)
    return write


@pytest.mark.parametrize("name", FILES)
def test_an_original_file_loads_unchanged(write, name):
    config = load_config(write(FILES[name]), environ={})
    wanted = FILES[name]["model"]["model_config"]
    assert config.model.dims.num_kv_heads == 40  # from num_heads where the file has no n_kv_heads
    assert config.model.param_init_type == "float16"
    assert config.model.block_size * config.model.num_blocks >= config.model.seq_length
    assert config.generation.max_length == wanted["max_decode_length"]
    assert config.device_target == "Ascend"
    effective = config.effective
    for key, value in wanted.items():
        assert effective["model"]["model_config"].get(key, value) == value, key
    assert effective["context"]["ascend_config"] == {"precision_mode": "must_keep_origin_dtype"}


@pytest.mark.parametrize("name", FILES)
def test_keys_without_effect_are_named_once_in_one_line(write, name):
    notes = load_config(write(FILES[name]), environ={}).notes
    said = [note for note in notes if "no effect on prediction" in note]
    assert len(said) == 1 and "\n" not in said[0]
    names = said[0].partition(": ")[2].split(", ")
    assert len(names) == len(set(names))
    wanted = FILES[name]["model"]["model_config"]
    for key in ("rotary_pct", "rotary_emb_base", "kv_channels", "emb_dropout_prob", "use_past_shard", "use_kbk_infer",
                "max_position_embeddings", "auto_map", "compute_in_2d"):
        assert (key in names) == (key in wanted), key
    for section in ("trainer", "runner_config", "optimizer", "train_dataset", "callbacks", "lr_schedule"):
        assert (section in names) == (section in FILES[name]), section
    assert not {"seq_length", "theta", "use_past", "top_k", "vocab_file"} & set(names)


def test_a_training_file_is_told_that_this_module_predicts(write):
    with pytest.raises(UserError) as caught:
        load_config(write({**FILES["fine-tuning"], "run_mode": "finetune"}), environ={})
    assert "Set run_mode to predict (--run_mode predict)" in str(caught.value)
    path = write({**FILES["fine-tuning"], "run_mode": "finetune"})
    config = load_config(path, [Flag("run_mode", "--run_mode", "predict")], environ={})
    assert config.run_mode == "predict"


def test_a_typo_in_an_original_file_is_still_found(write):
    wrong = copy.deepcopy(FILES["predict, April 2024"])
    wrong["context"]["max_device_memroy"] = "58GB"
    with pytest.raises(UserError) as caught:
        load_config(write(wrong), environ={})
    assert "Did you mean max_device_memory?" in str(caught.value)
