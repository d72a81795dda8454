"""Measure what docs/tables/ascend.md states, and write it there: `python tests/ascend_facts.py
docs/tables/ascend.md`; --check compares."""

import difflib
import os
import sys
import tempfile

from ascend_worker import PACKAGES, Worker

sys.path.insert(0, PACKAGES)

from qwen15.ascend import model  # noqa: E402
from qwen15.family import FAMILY, yaml_name  # noqa: E402

CASES = (("MHA", 4, False), ("MHA, tied", 4, True), ("GQA", 2, False), ("GQA, tied", 2, True))
MUTATIONS = (("gate_up", "w1 / w3 swapped in one layer"), ("theta", "theta 1e4 for 1e6"),
             ("eps", "rms_norm_eps 1e-5 for 1e-6"),
             ("q_bias", "wq.bias of one layer dropped"), ("k_bias", "wk.bias of one layer dropped"),
             ("v_bias", "wv.bias of one layer dropped"))
QUANTISED = (("A16W8", {"bits": 8, "group": 0, "zeros": False}),
             ("A16W4, 64", {"bits": 4, "group": 64, "zeros": False}),
             ("A16W4, 128, zero points", {"bits": 4, "group": 128, "zeros": True}))
BEGIN, END = (f"<!-- {edge}: python tests/ascend_facts.py docs/tables/ascend.md -->" for edge in ("begin", "end"))
SHOWN = ("RmsNorm", "ApplyRotaryPosEmb", "ReshapeAndCache", "FlashAttentionScore", "PagedAttention", "SiLU", "MatMul")


def emulation(folder: str) -> list:
    """Errors under emulation, with and without faults."""
    lines = ["| 网络 network | float32 | float16 | bfloat16 | 贪心 token 与 Hugging Face 相同（float32） "
             "greedy tokens as Hugging Face's |",
             "|---|---|---|---|---|"]
    worker = Worker(folder)

    def compare(name: str, **arguments) -> dict:
        scratch = os.path.join(folder, name)
        os.makedirs(scratch)
        return worker.call("ascend_cases.compare", folder=scratch, **arguments)

    for label, kv_heads, tied in CASES:
        found = [compare(f"{label}-{dtype}", kv_heads=kv_heads, tied=tied, dtype=dtype)
                 for dtype in ("float32", "float16", "bfloat16")]
        errors = " | ".join(error(one) for one in found)
        lines.append(f"| {label} | {errors} | {'是 yes' if found[0]['same_tokens'] else '否 no'} |")
    lines += ["", "| 故意的错误 deliberate fault (GQA, float32) | 误差 error |", "|---|---|"]
    for mutation, label in MUTATIONS:
        found = compare(mutation, kv_heads=2, tied=False, dtype="float32", mutation=mutation, generations=1)
        lines.append(f"| {label} | {error(found)} |")
    lines += ["", "| 量化 quantised (GQA) | float32 | float16 | bfloat16 |", "|---|---|---|---|"]
    for label, scheme in QUANTISED:
        found = [compare(f"{label}-{dtype}", kv_heads=2, tied=False, dtype=dtype, quantised={"layers": scheme})
                 for dtype in ("float32", "float16", "bfloat16")]
        lines.append(f"| {label} | {' | '.join(error(one) for one in found)} |")
    worker.close()
    return lines


def error(found: dict) -> str:
    """The largest error as a fraction of the largest logit."""
    return f"{found['largest_error'] / found['logits_scale']:.1e}"


def graphs(folder: str) -> list:
    """Operators of every shipped YAML's graphs at two layers."""
    rows = {}
    workers = {}
    for size in FAMILY:
        for chat in (False, True):
            name = yaml_name(size).replace(".yaml", "_chat.yaml" if chat else ".yaml")
            ranks = _ranks(name)
            if ranks not in workers:
                os.makedirs(os.path.join(folder, f"cards{ranks}"))
                workers[ranks] = Worker(os.path.join(folder, f"cards{ranks}"))
            for dtype in ("bfloat16", "float16"):
                options = ["model.model_config.num_layers=2",
                           *(f"model.model_config.{key}={dtype}"
                             for key in ("compute_dtype", "rotary_dtype", "param_init_type"))]
                found = workers[ranks].call("ascend_graphs.graphs", yaml_path=os.path.join(PACKAGES, name),
                                            options=options, ranks=ranks)
                for phase in ("prefill", "increment"):
                    operators = found[phase]["operators"]
                    counts = tuple(operators.get(operator, 0) for operator in (*SHOWN, "AllReduce", "AllGather"))
                    rows.setdefault((phase, counts), []).append((name, dtype))
    for worker in workers.values():
        worker.close()
    lines = [f"| 图 graph | {' | '.join(SHOWN)} | AllReduce | AllGather | YAML |", "|---" * (len(SHOWN) + 4) + "|"]
    for (phase, counts), names in sorted(rows.items(), reverse=True):
        files = sorted({name[len("predict_qwen1_5_"):-len(".yaml")] for name, _ in names})
        dtypes = ", ".join(sorted({dtype for _, dtype in names}))
        lines.append(f"| {phase} | {' | '.join(map(str, counts))} | {', '.join(files)} ({dtypes}) |")
    return lines


def _ranks(name: str) -> int:
    from qwen15.config.load import load_config

    return load_config(os.path.join(PACKAGES, name), options=["context.device_target=CPU"]).parallel.model_parallel


def slices(folder: str) -> list:
    """What the auto-parallel front end makes of two layers."""
    lines = ["| model_parallel | vocab_emb_dp | 参数形状与内容有误 wrong shapes or contents | AllReduce | AllGather |",
             "|---|---|---|---|---|"]
    for ranks in (2, 4, 8):
        for vocab_emb_dp in (True, False):
            scratch = os.path.join(folder, f"slices{ranks}{vocab_emb_dp}")
            os.makedirs(scratch)
            sizes = model.dims(ranks)
            path = model.save(scratch, sizes, model.random_weights(sizes), ranks, vocab_emb_dp, "bfloat16", "CPU")
            worker = Worker(scratch)
            found = worker.call("ascend_graphs.slices", yaml_path=path, checkpoint=scratch, ranks=ranks,
                                options=["model.model_config.param_init_type=float32"])
            worker.close()
            counts = [{found[phase]["operators"].get(name, 0) for phase in ("prefill", "increment")}
                      for name in ("AllReduce", "AllGather")]
            lines.append(f"| {ranks} | {vocab_emb_dp} | {sum(map(len, found['wrong']))} / "
                         f"{ranks * len(found['shapes'])} | "
                         + " | ".join("/".join(map(str, sorted(count))) for count in counts) + " |")
    return lines


def main(arguments: list) -> int:
    """Measure, and write the figures between the markers of the page; with --check compare them with what stands
    there."""
    checking, path = "--check" in arguments, next(argument for argument in arguments if argument != "--check")
    with open(path, encoding="utf-8") as file:
        before, rest = file.read().split(BEGIN)
    there, after = rest.split(END)
    with tempfile.TemporaryDirectory() as folder:
        found = "\n".join(["", *emulation(folder), "", *graphs(folder), "", *slices(folder), ""])
    if checking:
        print("\n".join(difflib.unified_diff(there.splitlines(), found.splitlines(), path, "measured", lineterm="",
                                             n=0)))
        return int(found != there)
    with open(path, "w", encoding="utf-8") as file:
        file.write(before + BEGIN + found + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
