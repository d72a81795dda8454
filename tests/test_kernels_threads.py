"""How many threads the kernels run on by default: a container's CPU quota counts, whatever its control groups."""

from __future__ import annotations

import pytest
from qwen15.kernels import library
from qwen15.machine import cpu_quota


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


class Threads:
    """What `limit_threads` needs of a library."""

    def __init__(self, threads):
        self.threads = threads


@pytest.mark.parametrize("cores, quota, wanted", ((8, None, 8), (8, 3.9, 3), (8, 0.5, 1), (2, 16.0, 2), (4, 4.0, 4)))
def test_threads_are_whole_cpus_of_the_quota(cores, quota, wanted):
    kernels = Threads(cores)
    library.limit_threads(kernels, quota)
    assert kernels.threads == wanted
