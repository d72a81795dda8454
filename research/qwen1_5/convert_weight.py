"""Convert a Hugging Face Qwen1.5 checkpoint to MindSpore: one file, shards, or every rank's slices."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from qwen15 import start

    start.hold()

from qwen15.command_line import Parser, boolean, positive, program, whole  # noqa: E402
from qwen15.conversion.cli import add_common_flags, add_hub_flag, carry_out, options_from, require_source  # noqa: E402
from qwen15.errors import UserError, run_main  # noqa: E402


def parser():
    """The flags."""
    made = Parser(program("convert", "convert_weight.py"), __doc__, [
        "qwen15 convert --torch_ckpt_dir models/Qwen1.5-0.5B --mindspore_ckpt_path models/qwen.safetensors",
        "qwen15 convert --torch_ckpt_dir models/Qwen1.5-72B --mindspore_ckpt_path models/slices --model_parallel 4"])
    made.add_argument("--torch_ckpt_dir", default="./", metavar="PATH",
                      help="folder of the Hugging Face model (quantised ones too), one weight file with config.json "
                           "beside it, a .gguf file, or the model's name on a hub: OWNER/NAME[@REVISION] (default ./)")
    add_hub_flag(made)
    made.add_argument("--mindspore_ckpt_path", default="./transform.ckpt", metavar="PATH",
                      help="what to make: x.ckpt, x.safetensors, or a folder (default ./transform.ckpt)")
    made.add_argument("--format", choices=("ckpt", "safetensors", "folder"),
                      help="instead of going by the extension; with --model_parallel the slices' format")
    made.add_argument("--model_parallel", type=positive, metavar="N",
                      help="write rank_0 .. rank_N-1, cut for N devices")
    made.add_argument("--vocab_emb_dp", type=boolean, default=True, metavar="True|False",
                      help="with --model_parallel: every rank keeps embedding and head whole (default True)")
    made.add_argument("--quantize", choices=("int8", "int4"),
                      help="store matrices as integers; choose int8 below 2 billion weights")
    made.add_argument("--group_size", type=whole, choices=(32, 64, 128), metavar="32|64|128",
                      help="inputs that share a scale (default: 128 for int8, 64 for int4)")
    made.add_argument("--keep_head", action="store_true",
                      help="with --quantize: leave embedding and head as they are (default: int8 in groups of 32)")
    made.add_argument("--calibrate", metavar="TEXT_FILE",
                      help="with --quantize: round so that errors make up for one another on this text (GPTQ); some "
                           "pages of what the model will be asked, UTF-8")
    made.add_argument("--calibration_tokens", type=whole, metavar="N",
                      help="use at most so many tokens of the text (default 4096)")
    add_common_flags(made)
    return made


def calibration(args, folder):
    """The `calibration.run.Calibration` that the flags ask for, None without --calibrate."""
    if args.calibrate is None:
        if args.calibration_tokens is not None:
            raise UserError("means nothing without --calibrate", "--calibration_tokens", "Give --calibrate TEXT_FILE.")
        return None
    if args.quantize is None:
        raise UserError("means nothing without --quantize", "--calibrate", "Give --quantize int4 as well.")
    from qwen15.calibration.run import DEFAULT_TOKENS, Calibration

    tokens = DEFAULT_TOKENS if args.calibration_tokens is None else args.calibration_tokens
    return Calibration(args.calibrate, folder, args.mindspore_ckpt_path, tokens)


def main(argv=None):
    args = parser().parse_args(argv)
    require_source("--torch_ckpt_dir", args.torch_ckpt_dir, "./", "./config.json")
    from qwen15.checkpoint.reader import folder_of
    from qwen15.conversion.hugging_face import plan_to_mindspore, yaml_lines
    from qwen15.hub.resolve import resolve

    source = resolve(args.torch_ckpt_dir, args.hub)
    chosen = calibration(args, folder_of(source))
    options = options_from(args, args.mindspore_ckpt_path, args.model_parallel, args.vocab_emb_dp, chosen)
    plan = plan_to_mindspore(source, options)
    if carry_out(plan, args, chosen):
        print("# Lines for the predict YAML:")
        print("\n".join(yaml_lines(plan, options)))


if __name__ == "__main__":
    sys.exit(run_main(main))
