"""Split, merge or cut anew a MindSpore Qwen1.5 checkpoint over ranks: offline, strategy files optional."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from qwen15 import start

    start.hold()

from qwen15.command_line import Parser, boolean, program, whole  # noqa: E402
from qwen15.conversion.cli import add_common_flags, carry_out  # noqa: E402
from qwen15.errors import UserError, run_main  # noqa: E402


def parser():
    """The flags."""
    made = Parser(program("transform", "transform_ckpt.py"), __doc__, [
        "qwen15 transform --src_ckpt_dir models/qwen.safetensors --dst_ckpt_dir models/slices --model_parallel 4",
        "qwen15 transform --src_ckpt_dir models/slices --dst_ckpt_dir models/whole.safetensors --model_parallel 1"])
    made.add_argument("--src_ckpt_dir", default="", metavar="PATH",
                      help="folder of rank_x slices, or a whole checkpoint: x.ckpt, x.safetensors, a folder of shards")
    made.add_argument("--dst_ckpt_dir", default="", metavar="PATH",
                      help="folder for rank_x slices; a whole checkpoint may also be x.ckpt or x.safetensors")
    made.add_argument("--model_parallel", type=whole, default=1, metavar="N",
                      help="cut for N ranks; 1 merges (default), unless --dst_ckpt_strategy says otherwise")
    made.add_argument("--vocab_emb_dp", type=boolean, default=True, metavar="True|False",
                      help="every rank keeps embedding and head whole (default True)")
    made.add_argument("--src_vocab_emb_dp", type=boolean, metavar="True|False",
                      help="how the source holds them; found out if not given")
    made.add_argument("--src_ckpt_strategy", default="", metavar="PATH",
                      help="strategy file of the source, or a folder of them; empty or None: not needed")
    made.add_argument("--dst_ckpt_strategy", default="", metavar="PATH",
                      help="strategy file of the result, or a folder of them; empty or None: --model_parallel decides")
    made.add_argument("--prefix", default="checkpoint_", help="start of the slices' file names (default checkpoint_)")
    made.add_argument("--config_path", metavar="PATH",
                      help="the model's config.json or its folder, if it is not beside the source")
    made.add_argument("--format", choices=("ckpt", "safetensors"), help="of the result (default: the source's)")
    add_common_flags(made, dtype=False)
    return made


def main(argv=None):
    args = parser().parse_args(argv)
    from qwen15.conversion.reslice import Reslicing, plan_transform, yaml_lines

    for flag in ("src_ckpt_dir", "dst_ckpt_dir"):
        if not getattr(args, flag):
            raise UserError("is not given", f"--{flag}", "Give a path.")
    if os.sep in args.prefix:
        raise UserError(f"{args.prefix!r} is not the start of a file name", "--prefix")
    request = Reslicing(source=args.src_ckpt_dir, target=args.dst_ckpt_dir, parts=args.model_parallel,
                      vocab_emb_dp=args.vocab_emb_dp, source_strategy=_given(args.src_ckpt_strategy),
                      target_strategy=_given(args.dst_ckpt_strategy), source_vocab_emb_dp=args.src_vocab_emb_dp,
                      config_path=args.config_path, form=args.format, prefix=args.prefix)
    plan = plan_transform(request)
    if carry_out(plan, args):
        print("# Lines for the predict YAML:")
        print("\n".join(yaml_lines(plan, request)))


def _given(path):
    return None if path in ("", "None") else path


if __name__ == "__main__":
    sys.exit(run_main(main))
