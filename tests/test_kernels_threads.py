"""Which CPUs and memory nodes a process has, and how many threads the kernels run on where nobody says: cores, cpusets
and a container's CPU quota count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import MODULE
from qwen15.machine import cpu_quota, default_threads, processors


def control_groups(root, own, files):
    """Faked /proc and /sys/fs/cgroup: `own` is /proc/self/cgroup, `files` maps paths to contents."""
    for path, text in {"proc/self/cgroup": own, **{f"cgroup/{path}": text for path, text in files.items()}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return cpu_quota(str(root / "proc"), str(root / "cgroup"))


@pytest.mark.parametrize("own, files, wanted", (
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {}, None),
    ("0::/user/job\n", {"user/job/cpu.max": "max 100000\n", "user/cpu.max": "400000 100000\n"}, 4.0),
    ("0::/user/job\n", {"user/job/cpu.max": "200000 100000\n", "user/cpu.max": "400000 100000\n"}, 2.0),
    ("4:cpu,cpuacct:/job\n3:memory:/job\n", {"cpu/job/cpu.cfs_quota_us": "250000\n",
                                             "cpu/job/cpu.cfs_period_us": "100000\n"}, 2.5),
    ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("0::/\n", {"cpu.max": "damaged\n"}, None),
))
def test_a_containers_quota_is_read(tmp_path, own, files, wanted):
    assert control_groups(tmp_path, own, files) == wanted


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(str(tmp_path / "none"), str(tmp_path / "none")) is None


def cpus_in(root, cores, siblings=1, nodes=(), sockets=1):
    """A faked /sys/devices/system: `cores` cores of `siblings` hyper-threads, numbered as Linux does: first threads
    first; `nodes` are lists of CPUs."""
    for cpu in range(cores * siblings):
        topology = root / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        core = cpu % cores
        (topology / "core_id").write_text(f"{core // sockets}\n")
        (topology / "physical_package_id").write_text(f"{core % sockets}\n")
    for number, text in enumerate(nodes):
        (root / "node" / f"node{number}").mkdir(parents=True)
        (root / "node" / f"node{number}" / "cpulist").write_text(f"{text}\n")
    return str(root)


def test_hyper_threads_of_a_core_are_found_and_count_once(tmp_path):
    found = processors(range(8), cpus_in(tmp_path, 4, 2))
    assert found.cores == ((0, 4), (1, 5), (2, 6), (3, 7)) and found.cpus == tuple(range(8))
    assert default_threads(found)[0] == 4


def test_a_cpuset_leaves_only_its_own_cores_and_nodes(tmp_path):
    root = cpus_in(tmp_path, 16, nodes=("0-7", "8-15"))
    found = processors({1, 2, 3}, root)
    assert found.cores == ((1,), (2,), (3,)) and found.nodes == {0: (1, 2, 3)}
    assert default_threads(found)[0] == 3
    assert processors({6, 7, 8}, root).nodes == {0: (6, 7), 1: (8,)}


def test_cores_of_one_socket_are_neighbours(tmp_path):
    root = cpus_in(tmp_path, 4, 2, ("0,2,4,6", "1,3,5,7"), sockets=2)
    found = processors(range(8), root)
    assert found.cores == ((0, 4), (2, 6), (1, 5), (3, 7)) and found.nodes == {0: (0, 2, 4, 6), 1: (1, 3, 5, 7)}


def test_a_system_that_tells_nothing_has_one_node_and_a_core_for_each_cpu(tmp_path):
    found = processors({0, 3}, str(tmp_path / "none"))
    assert found.cores == ((0,), (3,)) and found.nodes == {0: (0, 3)}


@pytest.mark.parametrize("listed", ("", "damaged", "0-", "-3"))
def test_a_damaged_list_of_cpus_is_no_node(tmp_path, listed):
    assert processors({0, 1}, cpus_in(tmp_path, 2, nodes=(listed,))).nodes == {0: (0, 1)}


@pytest.mark.parametrize("cores, siblings, quota, wanted, why", (
    (2, 1, None, 2, "2 cores"), (1, 1, None, 1, "1 core"), (11, 1, None, 11, "11 cores"),
    (16, 1, None, 15, "one is left"), (16, 2, None, 16, "16 cores"), (8, 1, 3.9, 3, "a CPU quota of 3.9"),
    (8, 1, 0.5, 1, "a CPU quota of 0.5"), (2, 1, 16.0, 2, "2 cores"), (16, 1, 15.0, 15, "one is left"),
    (16, 1, 12.0, 12, "a CPU quota of 12"), (300, 1, None, 256, "256 threads at most")))
def test_as_many_threads_as_cores_one_left_of_many_and_no_more_than_the_quota(tmp_path, cores, siblings, quota, wanted,
                                                                             why):
    count, reason = default_threads(processors(range(cores * siblings), cpus_in(tmp_path, cores, siblings)), quota)
    assert count == wanted and why in reason


def test_a_process_is_given_threads_by_its_affinity(tmp_path):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: affinity has nothing to take away")
    program = ("import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
               "from qwen15.kernels import library\nprint(library.load().threads)")
    assert run_python(program, QWEN15_THREADS=None) == "1"


def test_threads_stay_on_their_node_and_memory_comes_from_all():
    """Two made-up nodes of one CPU each; the thread that calls is left where it is."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU: there are no two nodes to make up")
    program = f"""
import os
import numpy as np
from qwen15.kernels import library
kernels = library.load()
kernels.threads = 2
kernels.bandwidth(np.zeros(1 << 20, np.uint8))
before = set(os.listdir("/proc/self/task"))
refused = kernels.spread_over({{0: [{cpus[0]}], 1: [{cpus[1]}]}})
kernels.bandwidth(np.zeros(1 << 20, np.uint8))
mine, = set(os.listdir("/proc/self/task")) - before
print(sorted(os.sched_getaffinity(int(mine))), sorted(os.sched_getaffinity(0)))
print("memory", refused or open("/proc/self/numa_maps").read().count("interleave"))
"""
    where, memory = run_python(program).splitlines()
    assert where == f"{cpus[1:2]} {cpus}"
    if len(processors().nodes) < 2:
        pytest.skip("one memory node: there is none to take memory from in turn")
    assert int(memory.split()[1]) > 0


def test_weights_of_two_sockets_come_from_both():
    nodes = processors().nodes
    if len(nodes) < 2:
        pytest.skip("one memory node")
    program = """
import re
import numpy as np
from qwen15.kernels import library
library.load()
held = np.ones(1 << 26, np.uint8)
line, = (text for text in open("/proc/self/numa_maps") if text.startswith(f"{held.ctypes.data & -4096:x} "))
print(len(re.findall(r" N[0-9]+=", line)))
"""
    assert int(run_python(program)) == len(nodes)


def run_python(program, **variables):
    """What a Python process of its own prints."""
    environ = {**os.environ, "PYTHONPATH": str(MODULE), **variables}
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={name: value for name, value in environ.items() if value is not None}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
