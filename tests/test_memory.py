"""What a run needs is computed before anything is loaded, compared with what there is, and the remedy fits."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from command_fixtures import error_line, make_random, run
from qwen15 import device, naming
from qwen15 import machine as this_machine
from qwen15.commands import markdown_part
from qwen15.commands import memory as command
from qwen15.config.flags import Flag
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.generation import memory, memory_check

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULE = os.path.join(ROOT, "research", "qwen1_5")


def shipped(size, target="Ascend", options=(), flags=()):
    flags = [Flag("context.device_target", "--device_target", target), *flags]
    return load_config(os.path.join(MODULE, f"predict_qwen1_5_{size}.yaml"), flags, options, {})


def ranks(config, count, whole=True):
    return replace(config.parallel, use_parallel=count > 1, model_parallel=count, vocab_emb_dp=whole)


def test_the_72b_cache_and_embedding_are_as_worked_out_by_hand():
    config = shipped("72b")
    need = memory.need(config.model, config.parallel, device.ASCEND)
    # key and value, 80 layers, 16 of 64 heads of 128, 2 bytes, 512 blocks of 32 tokens
    assert need.cache_bytes == 2 * 80 * 16 * 128 * 2 * 512 * 32
    # vocab_emb_dp True: every card holds embedding and head whole
    assert need.embedding_bytes == 2 * 152064 * 8192 * 2
    assert need.rope_bytes == 2 * 8192 * 128 * 2
    assert need.total_bytes == (need.weight_bytes + need.cache_bytes + need.rope_bytes + need.workspace_bytes)


def test_a_tied_head_is_counted_once():
    config = shipped("0_5b")
    assert memory.need(config.model, config.parallel, device.ASCEND).embedding_bytes == 151936 * 1024 * 2


def test_splitting_halves_what_is_split_and_nothing_else():
    model = shipped("7b").model
    config = shipped("7b")
    one, two = (memory.need(model, ranks(config, count), device.ASCEND) for count in (1, 2))
    cut = memory.need(model, ranks(config, 2, whole=False), device.ASCEND)
    assert two.cache_bytes * 2 == one.cache_bytes
    assert two.embedding_bytes == one.embedding_bytes == 2 * cut.embedding_bytes
    norms = (2 * 32 + 1) * 4096 * 4
    assert (two.layer_bytes - norms) * 2 == one.layer_bytes - norms


def test_weights_are_the_sum_over_the_table_of_names():
    config = shipped("32b", "CPU")
    wanted = sum(4 * size if len(weight.shape) == 1 else 2 * size for weight in naming.weights(config.model.dims)
                 for size in [_product(weight.shape)])
    assert memory.need(config.model, ranks(config, 1), device.CPU).weight_bytes == wanted


def _product(shape):
    total = 1
    for size in shape:
        total *= size
    return total


def test_reference_operators_need_twice_the_weights():
    config = shipped("0_5b", "CPU")
    fused = memory.need(config.model, config.parallel, device.CPU)
    plain = memory.need(config.model, config.parallel, device.CPU, memory.REFERENCE)
    assert plain.cache_bytes == 2 * fused.cache_bytes
    assert plain.weight_bytes > 1.99 * fused.weight_bytes
    assert plain.workspace_bytes - fused.workspace_bytes == 3 * 16 * 512 * 8192 * 8 + 151936 * 1024 * 8


# --- what there is

@pytest.fixture
def machine(tmp_path):
    """A /proc and a /sys/fs/cgroup that say what they are told, in GiB."""
    def machine(total, free, limit=None, used=0, cached=0, version=2):
        proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
        for folder in (proc, cgroup, cgroup / "memory"):
            folder.mkdir(exist_ok=True)
        (proc / "meminfo").write_text(f"MemTotal:  {total * 2 ** 20} kB\nMemFree: 1 kB\n"
                                      f"MemAvailable: {int(free * 2 ** 20)} kB\nHugePages_Total:  0\n")
        if limit is not None:
            where, names = ((cgroup, ("memory.max", "memory.current")) if version == 2 else
                            (cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")))
            (where / names[0]).write_text(f"{limit * 2 ** 30}\n" if limit != "max" else "max\n")
            (where / names[1]).write_text(f"{used * 2 ** 30}\n")
            name = "total_inactive_file" if version == 1 else "inactive_file"
            (where / "memory.stat").write_text(f"anon 5\n{name} {cached * 2 ** 30}\n")
        return {"proc": str(proc), "cgroup": str(cgroup)}
    return machine


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_allows_less_than_the_machine_counts(machine, version):
    has = this_machine.memory(**machine(64, 60, limit=16, used=6, cached=4, version=version))
    assert (has.free_bytes, has.whole_bytes) == (14 * 2 ** 30, 16 * 2 ** 30)
    assert "container" in has.what


def test_without_a_limit_the_machine_counts(machine):
    for limit in (None, "max", 128):
        has = this_machine.memory(**machine(64, 60, limit=limit))
        assert (has.free_bytes, has.whole_bytes) == (60 * 2 ** 30, 64 * 2 ** 30)


def test_an_unknown_machine_is_not_compared(tmp_path):
    nowhere = str(tmp_path / "nothing")
    assert this_machine.memory(nowhere, nowhere).free_bytes is None
    config = shipped("0_5b", "CPU")
    assert "not compared" in memory_check.check(config, nowhere, nowhere)


# --- comparing

@pytest.fixture
def fused(monkeypatch):
    """As if the fused kernels ran here: weights and cache are held as they are."""
    monkeypatch.setattr(memory_check, "held", lambda config: memory.AS_CONFIGURED)


def test_a_run_that_fits_says_its_numbers(machine, fused):
    line = memory_check.check(shipped("0_5b", "CPU"), **machine(64, 60))
    size = r"\d\.\d\d GiB"
    assert re.match(rf"memory: weights 0\.86 GiB \+ KV cache 1\.50 GiB \+ workspace {size} = {size}, of 60\.00 GiB",
                    line)


def applied(config, remedy):
    """The configuration after doing what the message says."""
    options = re.findall(r"--options (\S+=\S+)", remedy)
    flags = [Flag(f"model.model_config.{key}", f"--{flag}", int(value)) for flag, key in
             (("seq_length", "seq_length"), ("predict_length", "max_decode_length"))
             for value in re.findall(rf"--{flag} (\d+)", remedy)]
    size = {1024: "0_5b", 5120: "14b"}[config.model.dims.hidden_size]
    return shipped(size, config.device_target, options, flags)


@pytest.mark.parametrize("size, free", [("0_5b", 2.5), ("0_5b", 1.9), ("14b", 36), ("14b", 30)])
def test_what_the_message_tells_to_set_fits(machine, fused, size, free):
    config = shipped(size, "CPU")
    with pytest.raises(UserError) as caught:
        memory_check.check(config, **machine(64, free))
    assert f"{free:.2f} GiB there are (the machine (MemAvailable))" in str(caught.value)
    assert caught.value.exit_code == 2
    smaller = applied(config, caught.value.fix)
    assert smaller.model != config.model
    assert "of " in memory_check.check(smaller, **machine(64, free))


def test_a_machine_that_is_too_small_is_told_so(machine, fused):
    with pytest.raises(UserError) as caught:
        memory_check.check(shipped("72b", "CPU", flags=[Flag("use_parallel", "--use_parallel", False)]),
                           **machine(64, 60))
    assert "Even with the smallest KV cache it takes 13" in caught.value.fix


def test_workers_on_one_machine_share_its_memory(machine, fused):
    both = [Flag("use_parallel", "--use_parallel", True)]
    config = shipped("7b", "CPU", ["parallel_config.model_parallel=2"], both)
    assert "on each of 2 ranks" in memory_check.check(config, **machine(64, 60))
    with pytest.raises(UserError) as caught:
        memory_check.check(config, **machine(24, 23))
    assert "on each of 2 ranks is more than the 12.00 GiB" in str(caught.value)


def test_a_card_that_is_too_small_is_told_the_number_of_cards():
    config = shipped("72b", flags=[Flag("use_parallel", "--use_parallel", False)])
    with pytest.raises(UserError) as caught:
        memory_check.check(config)
    assert "58.00 GiB there are (max_device_memory)" in str(caught.value)
    assert caught.value.fix == "Run 4 cards: use_parallel True and model_parallel 4"


NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc1                 Version: 24.1.rc1                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 86.0        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          2828 / {size}         |
+===========================+===============+====================================================+
| 1     910B4               | OK            | 86.8        39                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          59356/ {size}         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       0                 | 1712733       | python                   | 48954                   |
"""


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """size in MB -> `npu-smi` of a machine with such cards."""
    def cards(size):
        (tmp_path / "table").write_text(NPU_SMI.format(size=size))
        (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ncat {tmp_path / 'table'}\n")
        (tmp_path / "npu-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return cards


def test_a_card_smaller_than_the_yaml_says_counts(cards):
    cards(32768)
    assert "2.61 GiB, of 27.00 GiB (a card of 32.00 GiB less 5.00 GiB for CANN and HCCL)" in memory_check.check(
        shipped("0_5b"))
    with pytest.raises(UserError) as caught:
        memory_check.check(shipped("14b"))
    assert "40.07 GiB is more than the 27.00 GiB there are (a card of 32.00 GiB" in str(caught.value)
    assert caught.value.fix == ("Set --seq_length 512 --options model.model_config.num_blocks=16 --predict_length 512; "
                                "or run 2 cards: use_parallel True and model_parallel 2")


def test_a_card_as_the_yaml_says_is_counted_by_the_yaml(cards, tmp_path):
    cards(65536)
    assert "of 59.00 GiB (max_device_memory)" in memory_check.check(shipped("14b"))
    (tmp_path / "npu-smi").write_text("#!/bin/sh\necho no device; exit 1\n")
    assert "of 59.00 GiB (max_device_memory)" in memory_check.check(shipped("14b"))


def test_float32_on_a_card_is_pointed_to_bfloat16():
    options = [f"model.model_config.{name}=float32" for name in ("param_init_type", "compute_dtype")]
    with pytest.raises(UserError) as caught:
        memory_check.check(shipped("14b", options=[*options, "context.max_device_memory=50GB"]))
    assert "bfloat16" in caught.value.fix


# --- the command

def test_the_numbers_come_before_the_weights(tmp_path, small_model):
    path = make_random(tmp_path, small_model)
    done = run("--config", path, "--predict_data", "hello", "--max_new_tokens", 1)
    assert 0 <= done.stderr.find("memory: weights ") < done.stderr.find("weights: loaded ")
    refused = error_line("--config", path, "--predict_data", "hello", "--options",
                         "model.model_config.num_blocks=900000000")
    assert re.search(
        r"memory: weights .* is more than the .* GiB there are .* Set --options model.model_config.num_blocks=\d+$",
        refused)
    without_a_card = run("--config", path, "--predict_data", "hello", "--device_target", "Ascend", "--options",
                         "context.max_device_memory=59GB",
                         *(f"model.model_config.{key}=bfloat16" for key in ("param_init_type", "compute_dtype")),
                         code=2)
    assert re.search(r"memory: weights .* of 59.00 GiB \(max_device_memory\)\nerror: device_target Ascend, but ",
                     without_a_card.stderr)


def test_a_checkpoint_alone_is_a_configuration_and_flags_without_one_are_not(capsys, small_model):
    folder = str(small_model)
    assert command.main(["--load_checkpoint", folder, "--device_target", "CPU"]) == 0
    assert re.match("memory: weights .* = .* GiB, of .* GiB", capsys.readouterr().out)
    assert command.main(["--load_checkpoint", folder, "--device_target", "CPU", "--print_config"]) == 0
    assert "hidden_size = 576" in capsys.readouterr().out
    for argv in (["--seq_length", "128"], ["--options", "seq_length=128"], ["--print_config"]):
        with pytest.raises(UserError, match=f"^{argv[0]}: is about one configuration, and none is given"):
            command.main(argv)
    with pytest.raises(UserError, match="'/no/where' does not exist"):
        command.main(["--load_checkpoint", "/no/where"])


# --- the page in the docs

def test_the_table_in_the_docs_is_current():
    with open(os.path.join(ROOT, "docs", "tables", "memory.md"), encoding="utf-8") as file:
        document = file.read()
    current = markdown_part.updated(document, command.NAME, command.document_part(MODULE))
    assert document == current, "run: qwen15 memory --update docs/tables/memory.md"


def test_updating_keeps_everything_outside_the_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*markdown_part.markers(command.NAME)))
    assert command.main(["--update", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 110B | 8 * |" in text
    assert command.main(["--update", str(page)]) == 0
    assert "was current" in capsys.readouterr().err
    page.write_text("no markers")
    with pytest.raises(UserError):
        command.main(["--update", str(page)])
    assert page.read_text() == "no markers"


def test_the_table_has_every_size_and_every_number_of_cards():
    rows = re.findall(r"^\| (\S+) \| (\d)", command.table(MODULE), re.M)
    sizes = ("0.5B", "1.8B", "4B", "7B", "14B", "32B", "72B", "110B")
    assert rows == [(size, count) for size in sizes for count in "1248"]


# --- the arithmetic against a process

MEASURE = """
import sys
from qwen15.config.flags import Flag
from qwen15.config.load import load_config
from qwen15.network.build import build_network

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

import mindspore
folder = sys.argv[1]
options = ["model.model_config.seq_length=4096", "model.model_config.num_blocks=4096", "context.device_target=CPU"]
config = load_config(None, [Flag("load_checkpoint", "--load_checkpoint", folder)], options, {})
before = anonymous_bytes()
network = build_network(config, folder, lambda line: None)
print(anonymous_bytes() - before)
"""


def test_weights_are_mapped_and_an_empty_cache_costs_nothing(tmp_path):
    """86 MB of weights and 268 MB of KV cache: building the network copies neither."""
    from qwen15 import ops
    from qwen15.bench.make_checkpoint import make_checkpoint

    if ops.decide()[0] == "reference":
        pytest.skip("the reference operators hold weights and cache in float32")
    dims = naming.Dims(hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
                       vocab_size=151936, tie_word_embeddings=True)
    folder = str(tmp_path / "checkpoint")
    stored = make_checkpoint(folder, dims)
    done = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": MODULE, "GLOG_v": "3"})
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    assert stored > 80e6
    assert grown < 0.5 * stored, f"{grown / 1e6:.0f} MB for {stored / 1e6:.0f} MB of weights"


def test_the_operators_that_will_run_decide_without_importing_mindspore():
    program = ("import sys; from qwen15.generation import memory_check; from qwen15.config.load import load_config; "
               f"config = load_config({os.path.join(MODULE, 'predict_qwen1_5_0_5b.yaml')!r}, environ={{}}); "
               "print(memory_check.check(config)); assert 'mindspore' not in sys.modules")
    lines = {}
    for kernels in ("reference", "portable"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": MODULE, "QWEN15_KERNELS": kernels})
        lines[kernels] = done.stdout + done.stderr
    assert "weights 1.73 GiB + KV cache 3.00 GiB" in lines["reference"]
    if "weights 1.73" not in lines["portable"]:  # as it would be where the kernels are not built
        assert "weights 0.86 GiB + KV cache 1.50 GiB" in lines["portable"]
