"""Deliberate faults in the code, one at a time in a copy of it, and the tests that must notice each.

    python tests/ascend_mutations.py [NAME ...]     # all of them, or those named; says which are noticed

A fault that no test notices is a hole in the proof of the Ascend path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fork_server import folder

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "research/qwen1_5/qwen15/"
_TIMEOUT_S = 1800

NUMBERS = "test_ascend_emulation.py -k float32_generates_the_tokens_of_hugging_face and grouped"
HALF = "test_ascend_emulation.py -k half_precision_stays and bfloat16 and not quantised"
QUANTISED = "test_ascend_emulation.py -k quantised_weights_generate and (int8_zero or 128_zero or int8_groups)"
SLICES = "test_ascend_graphs.py -k slices_are_those and 2-False"
RANKS = "test_ascend_graphs.py -k every_rank_holds_its_slice and 2-4"
GRAPHS = "test_ascend_graphs.py -k shipped_yaml_compiles and bfloat16 and 14b-"
TWICE = "test_ascend_graphs.py -k two_generations and 1"
AGREE = "test_ascend_network.py -k every_rank_learns"
REFUSED = "test_ascend_emulation.py -k lacks_a_weight"
MESSAGES = "test_ascend_installation.py"
CONVERSATION = "test_ascend_emulation.py -k conversation_that_keeps"


@dataclass(frozen=True)
class Mutation:
    """A fault: `old` becomes `new` in `file` of the package; `tests` (a file, and what of it) have to fail."""

    file: str
    old: str
    new: str
    tests: str


MF, WQ, NAMING = "network/mindformers.py", "network/weight_quant.py", "naming.py"
MUTATIONS = {
    "w1_w3_swapped": Mutation(NAMING, '"model.layers.{}.feed_forward.w1.weight", ("F"',
                              '"model.layers.{}.feed_forward.w9.weight", ("F"', NUMBERS),
    "theta": Mutation("commands/make_yaml.py", 'f"    theta: {contents.theta}"', '"    theta: 10000.0"', NUMBERS),
    "eps": Mutation("commands/make_yaml.py", "{_number(contents.rms_norm_eps)}", "1.0e-5", NUMBERS),
    "bias_dropped": Mutation(MF, "            put(name, array, held,",
                             "            array = array * ('wq.bias' not in name)\n            put(name, array, held,",
                             NUMBERS),
    "stale_block_table": Mutation(MF, "        tables[:, :block_tables.shape[1]] = block_tables",
                                  "        self._old = getattr(self, '_old', {})\n"
                                  "        block_tables = self._old.setdefault(len(block_tables), block_tables)\n"
                                  "        tables[:, :block_tables.shape[1]] = block_tables", NUMBERS),
    "slots_off_by_one": Mutation(MF, '"slot_mapping": slot_mapping}', '"slot_mapping": slot_mapping + 1}', NUMBERS),
    "wo_axis": Mutation(NAMING, '"model.layers.{}.attention.wo.weight", ("E", "HD"), ROW',
                        '"model.layers.{}.attention.wo.weight", ("E", "HD"), COLUMN', SLICES),
    "vocab_emb_dp_inverted": Mutation("network/weights.py", "rank, parallel.model_parallel, parallel.vocab_emb_dp,",
                                      "rank, parallel.model_parallel, not parallel.vocab_emb_dp,", SLICES),
    "no_dynamic_inputs": Mutation(MF, "            self.cell.set_dynamic_inputs()", "            pass", TWICE),
    "strategy_file_not_reset": Mutation(MF, 'set_auto_parallel_context(strategy_ckpt_save_file="")',
                                        "get_auto_parallel_context('device_num')", GRAPHS.replace("14b-", "72b-")),
    "every_rank_loads_the_last_slice": Mutation(MF, "Loader.of(config, checkpoint, self.rank)",
                                                "Loader.of(config, checkpoint, self.ranks - 1)", SLICES),
    "agree_without_broadcast": Mutation(MF, "        return broadcast(ids)", "        return ids", AGREE),
    "norms_in_bfloat16": Mutation(MF, "    settings.use_legacy = True",
                                  "    settings.use_legacy = True\n"
                                  "    settings.model.model_config.layernorm_compute_type = 'bfloat16'", GRAPHS),
    "norms_in_bfloat16_computed": Mutation(MF, "    settings.use_legacy = True",
                                           "    settings.use_legacy = True\n"
                                           "    settings.model.model_config.layernorm_compute_type = 'bfloat16'", HALF),
    # Ten more.
    "phase_flag_not_set": Mutation(MF, 'is_first_iteration=phase == "prefill"', "is_first_iteration=True", NUMBERS),
    "phase_not_named": Mutation(MF, "        self.cell.phase = phase\n",
                                '        self.cell.phase = "prefill"\n', TWICE),
    "lengths_without_the_new_token": Mutation(MF, '"batch_valid_length": lengths[None, :]',
                                              '"batch_valid_length": lengths[None, :] - (phase != "prefill")', NUMBERS),
    "cached_prefill_allowed": Mutation(MF, "    supports_cached_prefill = False", "    supports_cached_prefill = True",
                                       CONVERSATION),
    "missing_weight_passed_over": Mutation("checkpoint/account.py", "    if missing:\n", "    if missing and False:\n",
                                           REFUSED),
    "offset_sign": Mutation(WQ, '(middle - stored.zero.astype(np.float32), "F32")',
                            '(stored.zero.astype(np.float32) - middle, "F32")', QUANTISED),
    "nibbles_swapped": Mutation(WQ, "nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)",
                                "nibbles[:, 1::2] | (nibbles[:, 0::2] << 4)", QUANTISED),
    "int8_groups_not_turned": Mutation(WQ, "np.ascontiguousarray(stored.weight.T)",
                                       "np.ascontiguousarray(stored.weight.reshape(stored.weight.T.shape))", QUANTISED),
    "silu_of_quantised_w1_dropped": Mutation(WQ, "self.activation_flag = linear.activation_flag",
                                             "self.activation_flag = False", QUANTISED),
    "scales_of_large_groups_in_turn": Mutation(WQ, "np.repeat(array, repeat, axis=1).T",
                                               "np.tile(array, (1, repeat)).T", "test_weight_quant.py"),
    "quantised_rank_0_everywhere": Mutation("network/weights.py", "self._rank * size, (self._rank + 1) * size)",
                                            "0, size)", RANKS),
    "unsourced_cann_chosen": Mutation("device.py", "fault = found.missing or (asked",
                                      "fault = found.missing and (asked",
                                      MESSAGES + " -k not_sourced"),
    "card_0_asked": Mutation(MF, "device.require(config.device_target, card=config.device_id)",
                             "device.require(config.device_target)", MESSAGES + " -k card_that_a_run_names"),
    "heads_of_any_size": Mutation(MF, "dims.head_dim not in HEAD_DIMS", "False", MESSAGES + " -k heads_that"),
    "all_memory_counts_as_free": Mutation("generation/memory_check.py", "Available(card.free_bytes, None,",
                                          "Available(card.total_bytes, None,", MESSAGES + " -k free_memory"),
}


def noticed(mutation: Mutation) -> tuple[bool, str]:
    """Whether the tests fail on a copy of the project with this fault, and what they said last.

    Raises:
        ValueError: the text to change is not there exactly once: the table is out of date.
    """
    file = PACKAGE + mutation.file
    text = (ROOT / file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{file} holds {text.count(mutation.old)} times: {mutation.old!r}")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for folder in ("research", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "output"))
        for name in ("docs", "models", "pytest.ini", "scripts"):
            if (ROOT / name).exists():
                (copy / name).symlink_to(ROOT / name)
        changed = text.replace(mutation.old, mutation.new)
        if mutation.new.endswith('w9.weight", ("F"'):  # a swap takes two steps
            for before, after in (("w3", "w1"), ("w9", "w3")):
                changed = changed.replace(f"feed_forward.{before}.", f"feed_forward.{after}.")
        (copy / file).write_text(changed, encoding="utf-8")
        path, _, selected = mutation.tests.partition(" -k ")
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{path}", *(["-k", selected] if selected else [])]
        environ = {**os.environ, "PYTHONPATH": str(copy / "research" / "qwen1_5")}
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environ)
        except subprocess.TimeoutExpired:
            return False, f"no end within {_TIMEOUT_S} s"
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    # 1: tests failed, or could not be set up, which proves nothing; anything else: they did not run
    return done.returncode == 1 and " failed" in last and " error" not in last, last


def main(names: list[str]) -> int:
    """Try the mutations named, or all; exit code 1 when one goes unnoticed."""
    folder()  # one server for them all
    missed = []
    for name in names or MUTATIONS:
        found, last = noticed(MUTATIONS[name])
        print(f"{'noticed' if found else 'MISSED':<8} {name}: {last}", flush=True)
        missed += [] if found else [name]
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
