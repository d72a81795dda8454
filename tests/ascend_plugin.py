"""The module as MindFormers' users run it: a shipped YAML, MindFormers' own Trainer, this module's tokenizer and
checkpoint."""

import os
import sys

from mindformers import MindFormerConfig, Trainer, build_context

CPU_OPTIONS = {"use_past": False, "use_flash_attention": False, "is_dynamic": False, "use_rope_slice": True,
               "fused_rms_norm": False,
               "compute_dtype": "float32", "rotary_dtype": "float32", "param_init_type": "float32"}
"""What MindFormers' network needs to run on a CPU without emulation: no fused operators, no KV cache."""


def predict(yaml_path: str, vocabulary: str, checkpoint: str, sizes: dict, prompt: str, max_length: int,
            register_path: str) -> dict:
    """Texts of `Trainer.predict` with the YAML as it is, but for the paths, the device and the sizes.

    Args:
        yaml_path: a shipped predict YAML.
        vocabulary: folder of vocab.json and merges.txt.
        checkpoint: a converted .ckpt.
        sizes: keys of model_config that make the network small.
        prompt, max_length: what to continue, and the length of the result in tokens.
        register_path: where MindFormers finds the tokenizer's module by the YAML's auto_register and REGISTER_PATH, and
            Python does not; "" to import the module.

    Returns:
        only in the YAML: the checkpoint named in `load_checkpoint` alone.
        greedy: with `predict_checkpoint` and top_k 1.
        top_k of the YAML: sampled, top_k left to the YAML, which says 0: all tokens.
        end of text: greedy for the prompt followed by <|endoftext|>.
    """
    if register_path:
        sys.path.remove(register_path)
        os.environ["REGISTER_PATH"] = register_path
    else:
        import qwen1_5_tokenizer  # noqa: F401  registers itself
    config = MindFormerConfig(yaml_path)
    tokenizer = config.processor.tokenizer
    tokenizer.vocab_file, tokenizer.merges_file = f"{vocabulary}/vocab.json", f"{vocabulary}/merges.txt"
    config.context.device_target = "CPU"
    config.context.postprocess_use_numpy = True  # the other sampling has no CPU kernels
    config.model.model_config.update({**CPU_OPTIONS, **sizes})
    config.load_checkpoint = checkpoint
    build_context(config)
    texts = {}
    given = {"predict_checkpoint": checkpoint}
    for name, arguments in (("only in the YAML", {"top_k": 1}), ("greedy", {**given, "top_k": 1}),
                            ("top_k of the YAML", given),
                            ("end of text", {**given, "top_k": 1, "input_data": f"{prompt}<|endoftext|>"})):
        answer = Trainer(args=config, task="text_generation").predict(
            **{"input_data": prompt, "max_length": max_length, "do_sample": True, **arguments})
        texts[name] = answer[0]["text_generation_text"][0]
    return texts
