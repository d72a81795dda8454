"""Whatever goes wrong, and whenever: no result or a whole one, one clear line, and nothing of the user's lost."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
from checkpoint_fixtures import (
    dims,
    model_contents,
    peak_of,
    read_contents,
    run_script,
    under_ms_names,
    write_model,
    write_sparse,
)
from qwen15.checkpoint import atomic, file_writer
from qwen15.checkpoint.atomic import partial_path
from qwen15.checkpoint.reader import open_ranks
from qwen15.conversion import run as running
from qwen15.conversion.hugging_face import Output, plan_to_mindspore
from qwen15.conversion.reslice import Reslicing, plan_transform
from qwen15.conversion.run import run
from qwen15.conversion.slices import Slicing
from qwen15.errors import UserError
from qwen15.family import FAMILY
from test_convert import to_hugging_face, to_mindspore

FORMS = {"file": {}, "bin": {}, "shards": {"shard_bytes": 9000}, "ranks": {"slicing": Slicing(2, False)}}
_EVENTS = ("pwrite", "rename", "unlink", "ftruncate", "fsync", "makedirs", "rmdir")


def target_of(form, folder):
    """Where a form of result goes."""
    return folder / {"file": "out.ckpt", "bin": "out.bin", "shards": "out", "ranks": "out"}[form]


def contents_of(form, target, sizes):
    """What a result holds, under Hugging Face's names, or None when there is no result."""
    if not target.exists():
        return None
    if form == "ranks":
        ranks = open_ranks(target)
        from qwen15 import naming
        found = {}
        for w in naming.weights(sizes):
            slices, axis = [rank.read(w.ms) for rank in ranks], w.axis(2, False)
            found[w.hf] = ("BF16", w.shape, (slices[0] if axis is None else np.concatenate(slices, axis)).tobytes())
        return found
    found = read_contents(target)
    if form == "bin":
        return found
    from qwen15.naming import ms_to_hf
    return {ms_to_hf(name): entry for name, entry in found.items()}


def convert(form, source, target, overwrite=False):
    """Make one form of result."""
    if form == "bin":
        from qwen15.conversion.hugging_face import plan_to_hugging_face
        plan = plan_to_hugging_face(str(source), Output(str(target)))
    else:
        plan = plan_to_mindspore(str(source), Output(str(target), **FORMS[form]))
    try:
        return run(plan, verify=False, overwrite=overwrite)
    finally:
        plan.close()


def dies_at(event, work):
    """Run `work` in a child process that ends, as if killed, right before its `event`-th change of the file system.

    Returns:
        Whether it died; False when it had fewer events and ended well.
    """
    child = os.fork()
    if child == 0:
        left = [event]

        def counted(function):
            def call(*arguments, **keywords):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*arguments, **keywords)
            return call

        try:
            for name in _EVENTS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WEXITSTATUS(status) in (0, 9), status
    return os.WEXITSTATUS(status) == 9


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_killed_at_any_moment_there_is_no_result_or_a_whole_one(tmp_path, form, overwrite, monkeypatch):
    monkeypatch.setattr(running, "RECORD_EVERY_BYTES", 4000)
    sizes = dims(layers=1)
    new = write_model(tmp_path / "new", sizes, model_contents(sizes, seed=1), shards=2)
    old = write_model(tmp_path / "old", sizes, model_contents(sizes, seed=2), shards=2)
    sources = {"new": tmp_path / "new", "old": tmp_path / "old"}
    if form == "bin":
        for name in sources:
            to_mindspore(sources[name], tmp_path / f"{name}-ms")
            sources[name] = tmp_path / f"{name}-ms"
    place = tmp_path / "place"
    total = 0
    while True:  # how many events there are
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if not dies_at(total, lambda: convert(form, sources["new"], target_of(form, place))):
            break
        total += 25
    rng = random.Random(0)
    points = set(rng.sample(range(total), min(total, 5))) | set(range(max(0, total - 35), total, 4))
    for point in sorted(points):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        target = target_of(form, place)
        if overwrite:
            convert(form, sources["old"], target)
        dies_at(point, lambda to=target: convert(form, sources["new"], to, overwrite))
        found = contents_of(form, target, sizes)
        assert found == new or found == (old if overwrite else None), point
        convert(form, sources["new"], target, overwrite=True)
        assert contents_of(form, target, sizes) == new
        left = [name for name in os.listdir(place) if name.startswith(".")]
        assert left in ([], [".out.qwen15-partial"] if found == new else []), (point, left)


@pytest.mark.parametrize("form", ["file", "shards", "ranks"])
def test_killed_by_a_signal_there_is_no_result_or_a_whole_one(tmp_path, module_dir, form):
    sizes = dims(hidden=512, intermediate=2048, layers=4, vocab=8000)
    contents = write_model(tmp_path / "hf", sizes, model_contents(sizes), shards=3)
    target = target_of(form, tmp_path)
    flags = {"file": [], "shards": ["--max_shard_size", "4MB"],
             "ranks": ["--model_parallel", "2", "--vocab_emb_dp", "False"]}[form]
    command = [sys.executable, str(module_dir / "convert_weight.py"), "--torch_ckpt_dir", str(tmp_path / "hf"),
               "--mindspore_ckpt_path", str(target), *flags]
    rng = random.Random(1)
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.15 + 0.3 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            assert contents_of(form, target, sizes) == contents
            break
    assert subprocess.run(command + ["--overwrite"], stdout=subprocess.DEVNULL).returncode == 0
    assert contents_of(form, target, sizes) == contents


def test_an_interrupted_sharded_conversion_is_taken_up_again(tmp_path, monkeypatch):
    contents = write_model(tmp_path / "hf", dims())
    options = Output(str(tmp_path / "ms"), shard_bytes=6000)

    def attempt(fail_at=None):
        calls = []
        original = running.transfer

        def transfer(*arguments):
            calls.append(1)
            if fail_at is not None and len(calls) > fail_at:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(running, "transfer", transfer)
        plan = plan_to_mindspore(str(tmp_path / "hf"), options)
        try:
            return run(plan), len(calls), len(plan.files)
        finally:
            monkeypatch.setattr(running, "transfer", original)
            plan.close()

    with pytest.raises(KeyboardInterrupt):
        attempt(fail_at=3)
    assert not (tmp_path / "ms").exists()
    partial = partial_path(str(tmp_path / "ms"))
    kept = sorted(name for name in os.listdir(partial) if name.endswith(".safetensors") and not name.startswith("."))
    assert len(kept) == 3
    inodes = {name: os.stat(os.path.join(partial, name)).st_ino for name in kept}
    result, calls, files = attempt()
    assert (result.resumed, calls) == (3, files - 3)
    assert all(os.stat(tmp_path / "ms" / name).st_ino == inode for name, inode in inodes.items())
    assert read_contents(tmp_path / "ms") == under_ms_names(contents)
    assert sorted(os.listdir(tmp_path)) == ["hf", "ms"]


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("what", ["slices", "ckpt slices", "cut anew", "one file of a folder"])
def test_work_on_files_that_are_written_together_is_taken_up_inside_of_them(tmp_path, monkeypatch, what, attempts):
    write_model(tmp_path / "hf", dims(), shards=2)
    to_mindspore(tmp_path / "hf", tmp_path / "two", slicing=Slicing(2, True))

    def plan(target):
        if what == "cut anew":
            return plan_transform(Reslicing(str(tmp_path / "two"), str(target), parts=2, vocab_emb_dp=False))
        options = Output(str(target)) if what == "one file of a folder" else \
            Output(str(target), slicing=Slicing(2, False), form="ckpt" if what == "ckpt slices" else None)
        return plan_to_mindspore(str(tmp_path / "hf"), options)

    monkeypatch.setattr(running, "RECORD_EVERY_BYTES", 2500)
    moved, original = [], running.transfer
    for _ in range(attempts):
        started = []

        def transfer(moves, *rest, started=started):
            if len(started) == 2:
                raise KeyboardInterrupt
            started.append(moves)
            original(moves, *rest)
            moved.extend(move.label for move in moves)

        monkeypatch.setattr(running, "transfer", transfer)
        with pytest.raises(KeyboardInterrupt):
            run(plan(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(running, "transfer", lambda moves,
                        *rest: (moved.extend(move.label for move in moves), original(moves, *rest)))
    again = plan(tmp_path / "out")
    result = run(again, verify=True)
    assert moved == [move.label for move in again.moves]  # every tensor once
    assert result.resumed == 0 and 5000 < result.resumed_bytes < again.read_bytes
    monkeypatch.undo()
    run(plan(tmp_path / "undisturbed"))
    names = sorted(os.path.relpath(os.path.join(root, name), tmp_path / "out") for root, _,
                   names in os.walk(tmp_path / "out")
                   for name in names)
    assert len(names) >= 6 and not any(name.startswith(".") for name in names)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


@pytest.mark.parametrize("script", ["convert_weight.py", "transform_ckpt.py"])
def test_killed_while_it_writes_slices_it_goes_on_from_the_last_record(tmp_path, module_dir, script):
    sizes = dims(hidden=512, intermediate=2048, layers=6, vocab=8000)
    contents = write_model(tmp_path / "hf", sizes, model_contents(sizes), shards=3)
    target, record = tmp_path / "out", tmp_path / ".out.qwen15-partial" / ".plan.json"
    if script == "transform_ckpt.py":
        to_mindspore(tmp_path / "hf", tmp_path / "ms", slicing=Slicing(2, True))
        flags = ["--src_ckpt_dir", str(tmp_path / "ms"), "--dst_ckpt_dir", str(target)]
    else:
        flags = ["--torch_ckpt_dir", str(tmp_path / "hf"), "--mindspore_ckpt_path", str(target)]
    program = ("import runpy, sys, time; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
               "from qwen15.conversion import run as running; running.RECORD_EVERY_BYTES = 4 * 10 ** 6\n"
               "begin = running.Record.begin\n"
               # So that the signal comes between two
               "running.Record.begin = lambda *rest: (begin(*rest), time.sleep(0.05))\n"
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    command = [sys.executable, "-c", program, str(module_dir / script), *flags, "--model_parallel", "2",
               "--vocab_emb_dp", "False"]
    kills, before = 0, -1
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not record.exists() or moves_of(record) <= before):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists()
        assert moves_of(record) > before  # every run gets further
        before = moves_of(record)
        kills += 1
    done = subprocess.run(command + ["--verify"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 0 and "were done by an interrupted run, 0 of 2 files whole" in done.stderr, done.stderr
    assert contents_of("ranks", target, sizes) == contents


def moves_of(record):
    """How many tensors a record says are done, and their files begun."""
    try:
        return json.loads(record.read_text())["moves"]
    except FileNotFoundError:
        return -1


def test_an_interruption_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capsys, module_dir):
    write_model(tmp_path / "hf", dims())
    monkeypatch.syspath_prepend(str(module_dir))
    import convert_weight
    flags = ["--torch_ckpt_dir", str(tmp_path / "hf"), "--mindspore_ckpt_path", str(tmp_path / "ms"),
             "--max_shard_size", "6kB"]
    with monkeypatch.context() as patched:
        patched.setattr(running, "transfer", interrupt_after(running.transfer, 2))
        with pytest.raises(KeyboardInterrupt):
            convert_weight.main(flags)
    kept = tmp_path / ".ms.qwen15-partial"
    assert f"are kept in {kept}: the same command goes on from there\n" in capsys.readouterr().err and kept.is_dir()
    convert_weight.main(flags)
    assert re.search(r"kB of .* kB were done by an interrupted run, 2 of \d+ files whole", capsys.readouterr().err)
    assert not kept.exists()


def test_work_on_another_source_is_not_taken_up(tmp_path, monkeypatch):
    write_model(tmp_path / "hf", dims())
    monkeypatch.setattr(running, "transfer", interrupt_after(running.transfer, 2))
    with pytest.raises(KeyboardInterrupt):
        to_mindspore(tmp_path / "hf", tmp_path / "ms", shard_bytes=6000)
    monkeypatch.undo()
    other = write_model(tmp_path / "hf", dims(), model_contents(dims(), seed=9))
    assert to_mindspore(tmp_path / "hf", tmp_path / "ms", shard_bytes=6000).resumed == 0
    assert read_contents(tmp_path / "ms") == under_ms_names(other)


def interrupt_after(function, calls):
    """`function`, which from the given call on ends as Ctrl-C does."""
    left = [calls]

    def call(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments)
    return call


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path, module_dir):
    sizes = dims(hidden=512, intermediate=4096, layers=4, vocab=20000)
    write_model(tmp_path / "hf", sizes, model_contents(sizes))
    (tmp_path / "o").mkdir()
    command = [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
               str(module_dir / "convert_weight.py"), "--torch_ckpt_dir", str(tmp_path / "hf"), "--mindspore_ckpt_path",
               str(tmp_path / "o" / "x.ckpt")]
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        while not os.listdir(tmp_path / "o") and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
        if process.returncode == 130:
            assert errors == "interrupted\n" and os.listdir(tmp_path / "o") == []
            return
        shutil.rmtree(tmp_path / "o")  # it was faster than we are
        (tmp_path / "o").mkdir()
    pytest.fail("the conversion always ended before the signal")


# ---- disks ----

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], stderr=subprocess.PIPE) \
        if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_little_room_is_told_before_anything_is_written(tmp_path, small_disk, module_dir):
    sizes = dims(vocab=5000)
    write_model(tmp_path / "hf", sizes, model_contents(sizes))
    for flags in ((), ("--dry_run",)):
        done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                          small_disk / "x.ckpt", *flags)
        assert done.returncode == 2 and "needs 67" in done.stderr and "of disk, 262.14 kB are free" in done.stderr
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_fills_up_on_the_way_leaves_no_result(tmp_path, small_disk, monkeypatch, form):
    sizes = dims(vocab=3000)
    write_model(tmp_path / "hf", sizes, model_contents(sizes))
    source = tmp_path / "hf"
    if form == "bin":
        to_mindspore(tmp_path / "hf", tmp_path / "ms")
        source = tmp_path / "ms"
    target = target_of(form, small_disk)
    monkeypatch.setattr(running, "check_space", lambda *_: None)  # as if another program wrote meanwhile
    with pytest.raises(UserError, match="No space left.*Make room") as error:
        convert(form, source, target)
    assert error.value.exit_code == 1 and not target.exists()
    if form != "shards":  # shards that are whole are kept for the next run
        assert [name for name in os.listdir(small_disk) if not name.startswith(".")] == []


def test_a_limit_on_file_sizes_is_told_and_leaves_nothing(tmp_path, module_dir):
    sizes = dims(vocab=5000)
    write_model(tmp_path / "hf", sizes, model_contents(sizes))
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "o" / "x.ckpt",
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)))
    assert done.returncode == 1 and "File too large" in done.stderr
    assert "ulimit -f" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "o") == []


def test_a_target_that_cannot_be_written_is_told(tmp_path, small_disk, module_dir):
    write_model(tmp_path / "hf", dims())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for target in ("x.ckpt", "folder", "a/b/x.safetensors"):
        done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                          small_disk / target)
        assert done.returncode == 1 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_target_without_permission_is_told(tmp_path, module_dir):
    write_model(tmp_path / "hf", dims())
    (tmp_path / "closed").mkdir(mode=0o555)
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "closed" / "x.ckpt")
    assert done.returncode == 1 and "Permission denied" in done.stderr and "Traceback" not in done.stderr


def test_a_target_below_a_file_is_told(tmp_path, module_dir):
    write_model(tmp_path / "hf", dims())
    (tmp_path / "file").write_text("")
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "file" / "x.ckpt")
    assert done.returncode in (1, 2) and "x.ckpt" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


# ---- sources and results that change under our hands ----

def test_a_source_that_shrinks_while_it_is_read_is_told(tmp_path):
    write_model(tmp_path / "hf", dims())
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "o" / "x.ckpt")))
    os.truncate(tmp_path / "hf" / "model.safetensors", 9000)
    with pytest.raises(UserError, match="became shorter") as error:
        run(plan)
    assert error.value.exit_code == 1 and os.listdir(tmp_path / "o") == []


@pytest.mark.parametrize("form", FORMS)
def test_a_bit_that_flips_on_its_way_to_the_disk_is_found_by_verify(tmp_path, monkeypatch, form):
    write_model(tmp_path / "hf", dims(hidden=100))
    source = tmp_path / "hf"
    if form == "bin":
        to_mindspore(tmp_path / "hf", tmp_path / "ms")
        source = tmp_path / "ms"
    original = file_writer.FileWriter._put

    def flip(self, data):
        if len(data) == 200:  # the contents of a norm; nothing else is as long
            data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
        original(self, data)

    monkeypatch.setattr(file_writer.FileWriter, "_put", flip)
    target = target_of(form, tmp_path)
    with pytest.raises(UserError, match="differs at byte"):
        if form == "bin":
            to_hugging_face(source, target)
        else:
            to_mindspore(source, target, **FORMS[form])
    assert not target.exists()


def test_two_conversions_to_one_place_do_not_mix(tmp_path, module_dir):
    write_model(tmp_path / "hf", dims())
    for target in ("x.ckpt", "folder"):
        path = str(tmp_path / target)
        holder = atomic.atomic_file(path) if "." in target else atomic.AtomicFolder(path)
        if "." in target:
            holder.__enter__()
        done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                          tmp_path / target)
        assert done.returncode == 1 and "another conversion is writing this right now" in done.stderr


def test_a_link_where_the_scratch_file_goes_is_not_followed(tmp_path, module_dir):
    write_model(tmp_path / "hf", dims())
    (tmp_path / "precious").write_text("mine")
    os.symlink(tmp_path / "precious", partial_path(str(tmp_path / "x.ckpt")))
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "x.ckpt")
    assert done.returncode == 1 and "Traceback" not in done.stderr and (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "rank_0", "rank_0/checkpoint_0.safetensors"])
def test_a_link_where_the_scratch_folder_goes_is_not_followed(tmp_path, place):
    write_model(tmp_path / "hf", dims())
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    (precious / "thesis.txt").write_text("mine")
    (precious / "sub" / "config.json").write_text("mine")
    link = os.path.join(partial_path(str(tmp_path / "x")), place).rstrip("/")
    os.makedirs(os.path.dirname(link), exist_ok=True)
    os.symlink(precious / "thesis.txt" if place.endswith("safetensors") else precious, link)
    with pytest.raises(UserError, match="is a symbolic link") as error:
        convert("ranks", tmp_path / "hf", tmp_path / "x")
    assert error.value.exit_code == 2 and not (tmp_path / "x").exists()
    assert sorted(os.listdir(precious)) == ["sub", "thesis.txt"] and os.listdir(precious / "sub") == ["config.json"]


def test_what_others_have_in_the_scratch_folder_s_place_stays(tmp_path):
    write_model(tmp_path / "hf", dims())
    scratch = partial_path(str(tmp_path / "x"))
    os.makedirs(scratch)
    with open(os.path.join(scratch, "thesis.txt"), "w") as file:
        file.write("mine")
    with pytest.raises(UserError, match="holds thesis.txt, which this program did not write"):
        convert("ranks", tmp_path / "hf", tmp_path / "x")
    assert open(os.path.join(scratch, "thesis.txt")).read() == "mine"
    other = partial_path(str(tmp_path / "y"))
    with open(other, "w") as file:
        file.write("mine")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'y'}: cannot be written: File exists ({other})")):
        convert("ranks", tmp_path / "hf", tmp_path / "y")
    assert open(other).read() == "mine" and not (tmp_path / "y").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_a_folder_is_no_target(tmp_path, overwrite):
    write_model(tmp_path / "hf", dims())
    convert("ranks", tmp_path / "hf", tmp_path / "old")
    before = sorted((tmp_path / "old").rglob("*"))
    os.symlink(tmp_path / "old", tmp_path / "x")
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x"), slicing=Slicing(2, False)))
    with closing(plan), pytest.raises(UserError, match=f"is a symbolic link to {tmp_path}/old. Give that folder"):
        run(plan, overwrite=overwrite)
    assert sorted((tmp_path / "old").rglob("*")) == before and (tmp_path / "x").is_symlink()


def test_slices_of_another_program_are_not_overwritten(tmp_path):
    write_model(tmp_path / "hf", dims())
    work = tmp_path / "x" / "rank_0" / "my-training_rank_0-5000_4.ckpt"
    work.parent.mkdir(parents=True)
    work.write_text("weeks")
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x"), slicing=Slicing(2, False)))
    with closing(plan), pytest.raises(UserError, match="holds rank_0/my-training_rank_0-5000_4.ckpt, which this"):
        run(plan, overwrite=True)
    assert work.read_text() == "weeks"
    work.unlink()
    for prefix in ("mine_", "checkpoint_", "mine_"):  # those of a prefix that was given are this program's
        plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "y"), slicing=Slicing(2, False),
                                                              prefix=prefix))
        with closing(plan):
            if prefix == "mine_":
                run(plan, overwrite=True)
            else:
                with pytest.raises(UserError, match="holds rank_0/mine_0"):
                    run(plan, overwrite=True)


def at_the_end_of_moving(monkeypatch, act):
    """Do something just before a conversion puts its result in place."""
    moved = running.transfer

    def transfer(*arguments):
        moved(*arguments)
        act()

    monkeypatch.setattr(running, "transfer", transfer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_under_the_target_s_name_meanwhile_stays(tmp_path, monkeypatch, form, overwrite):
    write_model(tmp_path / "hf", dims())
    source = tmp_path / "hf"
    if form == "bin":
        to_mindspore(tmp_path / "hf", tmp_path / "ms")
        source = tmp_path / "ms"
    target = target_of(form, tmp_path / "o")
    mine = target if form in ("file", "bin") else target / "thesis.txt"
    if overwrite and mine == target:
        pytest.skip("a file of that name is what was to be overwritten")

    def act():
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")

    at_the_end_of_moving(monkeypatch, act)
    with pytest.raises(UserError, match="thesis.txt, which this" if overwrite else "appeared while this was being"):
        convert(form, source, target, overwrite=overwrite)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("form", ["file", "ranks"])
def test_a_source_that_is_written_to_meanwhile_gives_no_result(tmp_path, monkeypatch, form):
    write_model(tmp_path / "hf", dims())
    weights = tmp_path / "hf" / "model.safetensors"
    content = weights.read_bytes()
    os.utime(weights, ns=(1, 1))

    def act():
        with open(weights, "r+b") as file:
            file.seek(len(content) - 8)
            file.write(b"\0" * 8)

    at_the_end_of_moving(monkeypatch, act)
    with pytest.raises(UserError, match="has been written to while it was converted") as error:
        convert(form, tmp_path / "hf", target_of(form, tmp_path / "o"))
    assert error.value.exit_code == 1 and not target_of(form, tmp_path / "o").exists()
    monkeypatch.undo()
    at_the_end_of_moving(monkeypatch, lambda: weights.exists() and weights.unlink())  # what is open is read whole
    convert(form, tmp_path / "hf", target_of(form, tmp_path / "o"))


def test_a_file_where_a_folder_is_to_be_made_and_the_other_way_round(tmp_path):
    write_model(tmp_path / "hf", dims())
    (tmp_path / "out").write_text("mine")
    (tmp_path / "out.ckpt").mkdir()
    for form, said in (("ranks", "is a file, and a folder"), ("file", "is a folder, and a file")):
        plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(target_of(form, tmp_path)), **FORMS[form]))
        with closing(plan), pytest.raises(UserError, match=said):
            run(plan, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


# ---- memory ----

def test_memory_does_not_grow_with_the_model(tmp_path, module_dir):
    """A sparse checkpoint of 0.4 GB: the peak stays below what two of its largest tensors take, Python included."""
    sizes = dims(hidden=1024, intermediate=2048, layers=1, heads=8, kv_heads=8, head_dim=128, vocab=102400)
    write_sparse(tmp_path / "hf", sizes)
    for flags, options in ((["--mindspore_ckpt_path", str(tmp_path / "x.ckpt")], {"target": str(tmp_path / "x.ckpt")}),
                           (["--mindspore_ckpt_path", str(tmp_path / "cast"), "--dtype", "float16"],
                            {"target": str(tmp_path / "cast"), "dtype": "float16"}),
                           (["--mindspore_ckpt_path", str(tmp_path / "ranks"), "--model_parallel", "4"],
                            {"target": str(tmp_path / "ranks"), "slicing": Slicing(4, True)})):
        with closing(plan_to_mindspore(str(tmp_path / "hf"), Output(**options))) as plan:
            told_mb = plan.memory_bytes / 1e6
        peak_mb = peak_of(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", *flags) / 1e6
        assert peak_mb < told_mb < 2 * peak_mb < 300, (flags, peak_mb, told_mb)
    shutil.rmtree(tmp_path / "ranks")
    shutil.rmtree(tmp_path / "cast")
    os.unlink(tmp_path / "x.ckpt")


def test_the_plan_of_the_largest_model_needs_no_more_memory_than_a_small_one(tmp_path):
    """72B: the plan's own arithmetic, on a sparse checkpoint of its exact shapes (145 GB, no disk taken)."""
    write_sparse(tmp_path / "hf", FAMILY["72B"])
    for slicing in (None, Slicing(4, True)):
        plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "o"), slicing=slicing))
        largest = max(move.nbytes for move in plan.moves)
        assert plan.memory_bytes < 200e6 < 2 * largest + 300e6 and 144e9 < plan.read_bytes < 146e9
        plan.close()
