"""What the Ascend tests run in a worker of MindFormers' newer network (`use_legacy: False`): building it, no more."""

from mindformers import MindFormerConfig, build_context
from mindformers.models import build_network


def biases(yaml_path: str) -> dict:
    """Parameters of the network that a YAML describes whose names end in `bias`: with its add_qkv_bias, and without.

    Returns:
        with, without: the names.
        dtypes: of all parameters of the first, without repetition.
    """
    config = MindFormerConfig(yaml_path)
    config.context.device_target = "CPU"
    build_context(config)
    config.model.pretrained_model_dir = config.pretrained_model_dir  # as MindFormers' Trainer does
    found = {}
    for key in ("with", "without"):
        if key == "without":
            del config.model.model_config["add_qkv_bias"]
        parameters = list(build_network(config.model).get_parameters())
        found[key] = [parameter.name for parameter in parameters if parameter.name.endswith("bias")]
        found.setdefault("dtypes", sorted({str(parameter.dtype) for parameter in parameters}))
    return found
