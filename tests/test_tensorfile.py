"""Every format is read and written as its own library does, and damaged files end in one clear line."""

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from checkpoint_fixtures import as_array, dims, model_contents, random_bits, write_model, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen15.checkpoint import format_bin, format_ckpt, format_safetensors, reader
from qwen15.checkpoint.reader import FORMATS, TensorFile, open_checkpoint, open_ranks
from qwen15.checkpoint.tensors import Body, TensorInfo, total_bytes
from qwen15.errors import UserError

CONTENTS = {"model.norm.weight": ("BF16", (5,), random_bits("BF16", (5,), np.random.default_rng(1))),
            "一.weight": ("F32", (4, 6), random_bits("F32", (4, 6), np.random.default_rng(2))),
            "cube": ("F16", (2, 4, 3), random_bits("F16", (2, 4, 3), np.random.default_rng(3))),
            "scalar": ("F32", (), random_bits("F32", (), np.random.default_rng(4))),
            "empty": ("F16", (0, 3), b"")}


def write(path, contents, kind=None):
    """Write a file by the steps of its format."""
    kind = kind or path.suffix[1:]
    infos = [TensorInfo.of(name, dtype, shape) for name, (dtype, shape, _) in contents.items()]
    steps = FORMATS[kind].steps(infos, {"format": "pt"} if kind == "safetensors" else {})
    crcs, done, out = {}, {}, bytearray()
    for step in steps:
        if isinstance(step, bytes):
            out += step
        elif isinstance(step, Body):
            begin = done.get(step.name, 0)
            data = contents[step.name][2][begin:begin + step.nbytes]
            done[step.name] = begin + step.nbytes
            crcs[step.name] = zlib.crc32(data, crcs.get(step.name, 0))
            out += data
        else:
            out += step.make(crcs)
    assert len(out) == total_bytes(steps)
    path.write_bytes(out)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read_again(tmp_path, kind):
    with open_checkpoint(write(tmp_path / f"x.{kind}", CONTENTS)) as file:
        assert list(file.infos) == list(CONTENTS) and not file.others
        for name, (dtype, shape, data) in CONTENTS.items():
            info, array = file.infos[name], file.read(name)
            assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, len(data))
            assert array.tobytes() == data and array.shape == shape and array.flags.aligned


@pytest.mark.parametrize("kind", FORMATS)
def test_parts_of_tensors_are_read_along_any_axis(tmp_path, kind):
    with open_checkpoint(write(tmp_path / f"x.{kind}", CONTENTS)) as file:
        for name in ("一.weight", "cube"):
            whole = file.read(name)
            for axis in range(whole.ndim):
                for start, stop in ((0, 1), (1, None), (2, 2), (0, 99)):
                    part = file.read(name, axis, start, stop)
                    expected = whole[(slice(None),) * axis + (slice(start, stop),)]
                    assert part.flags.c_contiguous and np.array_equal(part.view(np.uint8),
                                                                      np.ascontiguousarray(expected).view(np.uint8))


def test_an_aligned_tensor_is_a_view_of_the_file_and_cannot_alter_it(tmp_path):
    path = write(tmp_path / "x.safetensors", {"w": ("F32", (4, 4), bytes(64))})
    with open_checkpoint(path) as file:
        whole, part = file.read("w"), file.read("w", 0, 1, 2)
        assert not whole.flags.owndata and np.shares_memory(whole, part) and not whole.flags.writeable


def test_a_tensor_outlives_its_file(tmp_path):
    with open_checkpoint(write(tmp_path / "x.safetensors", CONTENTS)) as file:
        array = file.read("一.weight")
    assert array.tobytes() == CONTENTS["一.weight"][2]


# ---- the formats' own libraries ----

def test_the_safetensors_library_reads_what_is_written(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    write(tmp_path / "x.safetensors", CONTENTS)
    found = dict(safetensors.deserialize((tmp_path / "x.safetensors").read_bytes()))
    assert {name: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for name, e in found.items()} == CONTENTS


def test_what_the_safetensors_library_writes_is_read(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", CONTENTS)
    with open_checkpoint(tmp_path / "x.safetensors") as file:
        assert {name: (i.dtype, i.shape, file.read(name).tobytes()) for name, i in file.infos.items()} == CONTENTS


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    write(tmp_path / "x.bin", CONTENTS)
    for mapped in (False, True):
        found = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mapped)
        assert list(found) == list(CONTENTS)
        for name, (dtype, shape, data) in CONTENTS.items():
            assert {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype] == found[name].dtype
            bits = found[name].reshape(-1).view(torch.int32 if dtype == "F32" else torch.int16).numpy()
            assert tuple(found[name].shape) == shape and bits.tobytes() == data
    assert zipfile.ZipFile(tmp_path / "x.bin").testzip() is None


def test_what_torch_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    shared = torch.arange(12, dtype=torch.bfloat16)
    state = {"a": shared[:4].reshape(2, 2), "b": torch.nn.Parameter(torch.randn(3, 5)), "c": torch.tensor(7),
             "e": torch.zeros(0, 2), "tail": shared[8:], "note": "text"}
    torch.save(state, tmp_path / "x.bin")
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "y.bin")
    with open_checkpoint(tmp_path / "x.bin") as file:
        assert file.others == {"note": "str values"}
        for name, tensor in state.items():
            if name != "note":
                tensor = tensor.detach()
                wanted = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
                assert file.read(name).tobytes() == wanted.contiguous().numpy().tobytes(), name
                assert file.infos[name].shape == tuple(tensor.shape)
    with open_checkpoint(tmp_path / "y.bin") as file:
        assert set(file.infos) == {"weight", "bias"}


def test_a_bin_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"a": torch.zeros(1), "b": Evil()}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="mkdir"):
        open_checkpoint(tmp_path / "x.bin")
    assert not (tmp_path / "was here").exists()


def test_a_transposed_tensor_in_a_bin_file_is_refused_rather_than_scrambled(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(6).reshape(2, 3).t()}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="not row-major"):
        open_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize("slice_bytes", [512 * 2 ** 20, 24])
def test_mindspore_reads_what_is_written(tmp_path, monkeypatch, slice_bytes):
    mindspore = pytest.importorskip("mindspore")
    monkeypatch.setattr(format_ckpt, "SLICE_BYTES", slice_bytes)
    contents = {name: entry for name, entry in CONTENTS.items() if name != "empty"}
    write(tmp_path / "x.ckpt", contents)
    found = mindspore.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert list(found) == list(contents)
    for name, (dtype, shape, data) in contents.items():
        assert {"BF16": mindspore.bfloat16, "F16": mindspore.float16,
                "F32": mindspore.float32}[dtype] == found[name].dtype
        assert tuple(found[name].shape) == shape and bytes(found[name].get_bytes()) == data


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("slice_kib", [512 * 1024, 1])
def test_what_mindspore_writes_is_read(tmp_path, monkeypatch, crc, slice_kib):
    mindspore = pytest.importorskip("mindspore")
    monkeypatch.setattr(mindspore.train.serialization, "SLICE_SIZE", slice_kib)
    values = {"a.weight": mindspore.Tensor(np.random.rand(7, 111), mindspore.float32),
              "b": mindspore.Tensor(np.random.rand(5), mindspore.bfloat16), "c": mindspore.Tensor(3, mindspore.int64),
              "d": mindspore.Tensor(np.random.rand(2, 2), mindspore.float16)}
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in values.items()],
                              str(tmp_path / "x.ckpt"),
                              crc_check=crc, append_dict={"epoch_num": 3, "note": "text"})
    with TensorFile(str(tmp_path / "x.ckpt")) as file:
        file.check_contents()
        assert file.others == {"note": "str values"}
        for name, value in values.items():
            assert (len(file.stored[name].segments) > 1) == (value.nbytes > slice_kib * 1024)
            assert file.read(name).tobytes() == bytes(value.get_bytes())
            assert file.infos[name].shape == tuple(value.shape)


def test_a_file_is_byte_for_byte_what_mindspore_writes(tmp_path):
    mindspore = pytest.importorskip("mindspore")
    write(tmp_path / "ours.ckpt", {name: entry for name, entry in CONTENTS.items() if name != "empty"})
    loaded = mindspore.load_checkpoint(str(tmp_path / "ours.ckpt"))
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in loaded.items()],
                              str(tmp_path / "theirs.ckpt"))
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_a_flipped_bit_is_found_where_the_file_carries_a_checksum(tmp_path):
    mindspore = pytest.importorskip("mindspore")
    path = tmp_path / "x.ckpt"
    mindspore.save_checkpoint([{"name": "a", "data": mindspore.Tensor(np.zeros(64, np.float32))}], str(path),
                              crc_check=True)
    os.chmod(path, 0o644)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with open_checkpoint(path) as file, pytest.raises(UserError, match="CRC-32"):
        file.check_contents()


# ---- folders ----

def test_shards_with_and_without_an_index_are_one_checkpoint(tmp_path):
    contents = write_model(tmp_path / "m", dims(), shards=3)
    for index in (True, False):
        if not index:
            os.unlink(tmp_path / "m" / "model.safetensors.index.json")
        with open_checkpoint(tmp_path / "m") as folder:
            assert set(folder.infos) == set(contents) and len(folder.files) == 3
            assert all(folder.read(name).tobytes() == contents[name][2] for name in contents)


@pytest.mark.parametrize("damage, said", [
    (lambda d: os.unlink(d / "model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors is missing"),
    (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json:1"),
    (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
     "'../x.safetensors'"),
    (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "no weight_map"),
    (lambda d: (os.unlink(d / "model.safetensors.index.json"), os.unlink(d / "model-00003-of-00003.safetensors")),
     "model-00003-of-00003.safetensors is missing beside"),
    (lambda d: (os.unlink(d / "model.safetensors.index.json"),
                (d / "copy.safetensors").write_bytes((d / "model-00001-of-00003.safetensors").read_bytes())),
     "is in copy.safetensors and in model-00001"),
    (lambda d: (d / "transform.ckpt").write_bytes(b"x"), "which one is meant"),
    (lambda d: os.truncate(d / "model-00001-of-00003.safetensors", 1000), "truncated"),
    (lambda d: (d / "model-00001-of-00003.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
     "git lfs pull"),
])
def test_a_broken_folder_is_named(tmp_path, damage, said):
    write_model(tmp_path / "m", dims(), shards=3)
    damage(tmp_path / "m")
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path / "m")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_index_and_shards_of_two_revisions_are_named(tmp_path):
    write_model(tmp_path / "m", dims(), shards=2)
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    for change, said in (({first: "model-00002-of-00002.safetensors"}, "should be in"),
                         ({"other": "model-00001-of-00002.safetensors"},
                         "does not hold it")):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        with pytest.raises(UserError, match=said):
            open_checkpoint(tmp_path / "m")
    del index["weight_map"][first]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not in the index"):
        open_checkpoint(tmp_path / "m")


def test_missing_and_foreign_paths_are_named(tmp_path):
    for path, said in ((tmp_path / "no", "no such file"), (tmp_path, "it is empty"),
                       (tmp_path / "x.zip", "Known extensions")):
        if path.suffix:
            path.write_bytes(b"")
        with pytest.raises(UserError, match=said):
            open_checkpoint(path)


def test_safetensors_are_preferred_to_bin_and_it_is_told(tmp_path):
    write(tmp_path / "model.safetensors", CONTENTS)
    write(tmp_path / "pytorch_model.bin", CONTENTS)
    with open_checkpoint(tmp_path) as folder:
        assert folder.files[0].kind == "safetensors" and ".bin" in folder.notes[0]


def test_slices_are_opened_in_rank_order_and_a_gap_is_named(tmp_path):
    for rank in (0, 1, 10, 2):
        (tmp_path / f"rank_{rank}").mkdir()
        write(tmp_path / f"rank_{rank}" / "x.ckpt", {"w": ("F32", (1,), np.float32(rank).tobytes())})
    with pytest.raises(UserError, match="rank_3 is missing"):
        open_ranks(tmp_path)
    os.rename(tmp_path / "rank_10", tmp_path / "rank_3")
    ranks = open_ranks(tmp_path)
    assert [rank.read("w").tolist() for rank in ranks] == [[0], [1], [2], [10]]
    with pytest.raises(UserError, match="slices .rank_0 to rank_3"):
        open_checkpoint(tmp_path)


# ---- damaged files ----

def header(text, data=b""):
    body = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(body)) + body + data


@pytest.mark.parametrize("content, said", [
    (b"", "too short"), (b"\xff" * 8, "claims"), (struct.pack("<Q", 2 ** 63) + b"{}", "claims"),
    (header(b"{"), "not JSON"), (header([]), "list"), (header(b"\xff\xfe{}"), "UTF-8"),
    (header(b"[" * 200000), "nested"),
    (header({"a": 1}), "exactly"), (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
                                    "needs 4"),
    (header({"a": {"dtype": "F32", "shape": [2 ** 62, 8], "data_offsets": [0, 8]}}, bytes(8)), "needs"),
    (header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "F99"),
    (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "shape"),
    (header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)), "shape"),
    (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "gap"),
    (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)), "after the last"),
    (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
             "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}},
            bytes(6)), "overlaps"),
    (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
     "twice"),
    (header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)), "digits"),
    (header(b'{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}', bytes(4)), "whole numbers"),
    (header({"__metadata__": {"a": 1}}), "__metadata__"),
])
def test_a_bad_safetensors_header_is_one_clear_line(tmp_path, content, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_checkpoint(path)
    assert said in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("content, said", [
    (b"", "empty"), (b"\x0a", "cut off"), (b"\x0a\xff\xff\xff\xff\x0f", "claims"), (b"\x12\x00", "no checkpoint entry"),
    (b"\x0a\x00", "without a name"), (b"\x0a\x03\x0a\x7fa", "claims"),
    (b"\x0a" + b"\x80" * 11, "too long"), (b"\x0a\x04\x0a\x02\xff\xfe", "utf-8"),
    (b"\x0a\x05\x0a\x01a\x20\x01", "unknown field 4"),
])
def test_a_bad_ckpt_file_is_one_clear_line(tmp_path, content, said):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_checkpoint(path)
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    whole = write(tmp_path / f"x.{kind}", CONTENTS).read_bytes()
    entries = format_entry_ends(whole) if kind == "ckpt" else set()
    for length in range(0, len(whole), 7):
        if length in entries:
            continue  # a .ckpt that ends between two entries is a smaller .ckpt: what is missing is found by name
        (tmp_path / f"x.{kind}").write_bytes(whole[:length])
        with pytest.raises(UserError):
            open_checkpoint(tmp_path / f"x.{kind}")


def format_entry_ends(content):
    """Where the entries of a .ckpt end."""
    from qwen15.checkpoint import wire
    ends, at = set(), 0
    while at < len(content):
        length, after = wire.read_varint(content, at + 1)
        at = after + length
        ends.add(at)
    return ends


_MUTATION = st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 255),
                               st.sampled_from(["set", "delete", "insert"])),
                     min_size=1, max_size=4)


@pytest.mark.parametrize("kind", FORMATS)
@given(mutations=_MUTATION)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_as_what_it_is_or_refused(tmp_path, kind, mutations):
    contents = {name: CONTENTS[name] for name in ("一.weight", "scalar")}
    whole = bytearray(write(tmp_path / f"x.{kind}", contents).read_bytes())
    for at, value, how in mutations:
        at %= len(whole)
        whole[at:at + (how != "insert")] = b"" if how == "delete" else bytes([value])
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(whole)
    try:
        with open_checkpoint(path) as file:
            assert all(info.nbytes <= len(whole) for info in file.infos.values())
            for name in file.infos:
                file.read(name)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("kind", FORMATS)
@given(content=st.binary(max_size=300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_or_read(tmp_path, kind, content):
    path = tmp_path / f"any.{kind}"
    path.write_bytes(content)
    try:
        open_checkpoint(path).close()
    except UserError as error:
        assert str(path) in str(error)


def test_files_that_claim_to_be_huge_allocate_nothing(tmp_path):
    """Headers that claim terabytes, in files that are sparse enough to believe it, opened under a limit on memory."""
    claims = tmp_path / "claims.safetensors"
    claims.write_bytes(struct.pack("<Q", 2 ** 40))
    os.truncate(claims, 2 ** 41)
    deep = tmp_path / "deep.ckpt"
    deep.write_bytes(b"\x0a" + b"\xff" * 5 + b"\x01" + b"\x12" + b"\xff" * 4 + b"\x01" + b"\x0a" + b"\xff" * 4 +
                     b"\x01")
    os.truncate(deep, 2 ** 42)
    bomb = tmp_path / "bomb.bin"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2 ** 28))
    flood = tmp_path / "flood.bin"
    with zipfile.ZipFile(flood, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"}" * (50 * 2 ** 20) + b".")
    with pytest.raises(UserError, match="so few tensors need at most"):
        open_checkpoint(flood)
    with zipfile.ZipFile(flood, "w") as archive:
        for number in range(400):
            archive.writestr(f"a/data/{number}", b"")
        archive.writestr("a/data.pkl", b"\x80\x02" + b"}" * 2 ** 20 + b".")
    with pytest.raises(UserError, match="more than 140[0-9]{3} instructions"):
        open_checkpoint(flood)
    with zipfile.ZipFile(flood, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    sealed = bytearray(flood.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        sealed[sealed.index(mark) + place] |= 1
    flood.write_bytes(sealed)
    with pytest.raises(UserError, match="is compressed or encrypted"):
        open_checkpoint(flood)
    memo = tmp_path / "memo.bin"
    with zipfile.ZipFile(memo, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    program = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 ** 30, 2 ** 30))\n"
               "from qwen15.checkpoint.reader import open_checkpoint; from qwen15.errors import UserError\n"
               "for path in sys.argv[1:]:\n"
               "    try: print(sorted(open_checkpoint(path).infos))\n"
               "    except UserError as error: print('refused', error)")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(reader.__file__))),
                   "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, *map(str, (claims, deep, bomb, memo))],
                          stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.startswith("refused") for line in lines] == [True, True, True, False] and lines[3] == "[]"


def test_opening_safetensors_and_bin_and_ckpt_imports_no_framework():
    program = ("import sys; import qwen15.checkpoint.reader, qwen15.conversion.hugging_face, "
               "qwen15.conversion.reslice\n"
               "print([m for m in ('mindspore', 'torch', 'transformers', 'mindformers', 'safetensors') if m in "
               "sys.modules])")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(reader.__file__)))}
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, universal_newlines=True,
                          env=environment, timeout=60)
    assert done.stdout.strip() == "[]"
