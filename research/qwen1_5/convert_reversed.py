"""Convert a MindSpore Qwen1.5 checkpoint, whole or in slices, to Hugging Face's form."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from qwen15 import start

    start.hold()

from qwen15.command_line import Parser, boolean, program  # noqa: E402
from qwen15.conversion.cli import add_common_flags, carry_out, options_from, require_source  # noqa: E402
from qwen15.errors import run_main  # noqa: E402


def parser():
    """The flags."""
    made = Parser(program("convert-reversed", "convert_reversed.py"), __doc__, [
        "qwen15 convert-reversed --mindspore_ckpt_path models/qwen.safetensors --torch_ckpt_path models/qwen-hf"])
    made.add_argument("--mindspore_ckpt_path", default="transform.ckpt", metavar="PATH",
                      help="x.ckpt, x.safetensors, a folder of shards, or a folder of rank_x slices "
                           "(default transform.ckpt)")
    made.add_argument("--torch_ckpt_path", default="./qwen2/qwen2-hf/", metavar="PATH",
                      help="what to make: x.bin, x.safetensors, or a model folder (default ./qwen2/qwen2-hf/)")
    made.add_argument("--format", choices=("bin", "safetensors", "folder"), help="instead of going by the extension")
    made.add_argument("--config_path", metavar="PATH",
                      help="the model's config.json or its folder, if it is not beside the checkpoint")
    made.add_argument("--vocab_emb_dp", type=boolean, metavar="True|False",
                      help="how slices hold embedding and head; found out if not given")
    made.add_argument("--dequantize", action="store_true",
                      help="bfloat16 weights of a quantised checkpoint, though its original tensors can be made again")
    add_common_flags(made)
    return made


def main(argv=None):
    args = parser().parse_args(argv)
    require_source("--mindspore_ckpt_path", args.mindspore_ckpt_path, "transform.ckpt", "transform.ckpt")
    from qwen15.conversion.hugging_face import plan_to_hugging_face

    plan = plan_to_hugging_face(args.mindspore_ckpt_path, options_from(args, args.torch_ckpt_path), args.config_path,
                                args.vocab_emb_dp)
    if carry_out(plan, args):
        print(os.path.abspath(args.torch_ckpt_path))


if __name__ == "__main__":
    sys.exit(run_main(main))
