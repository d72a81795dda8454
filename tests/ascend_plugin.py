"""The module as MindFormers' users run it: a shipped YAML, MindFormers' own Trainer, this module's tokenizer and checkpoint."""

from mindformers import MindFormerConfig, Trainer, build_context

CPU_OPTIONS = {"use_past": False, "use_flash_attention": False, "is_dynamic": False, "use_rope_slice": True, "fused_rms_norm": False,
               "compute_dtype": "float32", "rotary_dtype": "float32", "param_init_type": "float32"}
"""What MindFormers' network needs to run on a CPU without emulation: no fused operators, no KV cache."""


def predict(yaml_path: str, vocabulary: str, checkpoint: str, sizes: dict, prompt: str, max_length: int, auto_register: bool) -> list:
    """Texts of `Trainer.predict`: with the checkpoint named only in the configuration, then with `predict_checkpoint`.

    Args:
        yaml_path: a shipped predict YAML.
        vocabulary: folder of vocab.json and merges.txt.
        checkpoint: a converted .ckpt.
        sizes: keys of model_config that make the network small.
        prompt, max_length: what to continue, and the length of the result in tokens.
        auto_register: let MindFormers find the tokenizer by REGISTER_PATH; otherwise import it.
    """
    config = MindFormerConfig(yaml_path)
    tokenizer = config.processor.tokenizer
    if auto_register:
        tokenizer.auto_register = "qwen1_5_tokenizer.Qwen2Tokenizer"
    else:
        import qwen1_5_tokenizer  # noqa: F401  registers itself
    tokenizer.vocab_file, tokenizer.merges_file = f"{vocabulary}/vocab.json", f"{vocabulary}/merges.txt"
    config.context.device_target = "CPU"
    config.context.postprocess_use_numpy = True  # the other sampling has no CPU kernels
    config.model.model_config.update({**CPU_OPTIONS, **sizes})
    config.load_checkpoint = checkpoint
    build_context(config)
    texts = []
    for arguments in ({}, {"predict_checkpoint": checkpoint}):
        answer = Trainer(args=config, task="text_generation").predict(input_data=prompt, max_length=max_length, do_sample=True, top_k=1,
                                                                      **arguments)
        texts.append(answer[0]["text_generation_text"][0])
    return texts
