"""A model by its name on a hub: fetched from a real server on this machine, whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import convert_weight
import pytest
from command_fixtures import make_random
from conftest import MODULE
from hub_server import Hub
from official_configs import QWEN1_5
from qwen15.commands import predict
from qwen15.errors import UserError
from qwen15.hub import files, names
from qwen15.hub.huggingface import fetch as fetch_from_hugging_face
from qwen15.hub.modelscope import fetch as fetch_from_modelscope

pytest.importorskip("huggingface_hub")
RESOLVE = "import sys; from qwen15.errors import run_main; from qwen15.hub.resolve import resolve\n" \
          "import os\n" \
          "hub = os.environ.get('HUB', 'hf')\n" \
          "sys.exit(max(run_main(lambda _: print(resolve(name, hub))) for name in sys.argv[1:]))"
WEIGHTS = os.urandom(300000)


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "models" / "tiny" / "model"
    folder.mkdir(parents=True)
    for name, content in {"config.json": b"{}", "vocab.json": b'{"a": 0}', "merges.txt": b"#\n", "README.md": b"hi",
                          "model.safetensors": WEIGHTS, "pytorch_model.bin": WEIGHTS,
                          "consolidated.safetensors": WEIGHTS,
                          "onnx/model.onnx": WEIGHTS, "tokenizer_config.json": b"{ }"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with Hub(tmp_path / "models") as server:
        yield server


@pytest.fixture
def user(hub, tmp_path):
    """A user with an empty cache: `user(name)` gives the process that has looked `name` up."""
    home = tmp_path / "home"
    home.mkdir()

    class User:
        cache = home / "hub"
        environ = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
        environ.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), HF_HOME=str(home), HF_ENDPOINT=hub.url,
                       HF_HUB_DISABLE_XET="1", HF_HUB_ETAG_TIMEOUT="5", HF_HUB_DOWNLOAD_TIMEOUT="5",
                       PYTHONPATH=str(MODULE), no_proxy="127.0.0.1")

        def start(self, *names, **changes):
            return subprocess.Popen([sys.executable, "-c", RESOLVE, *names], cwd=tmp_path,
                                    env={**self.environ, **changes}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True)

        def __call__(self, *names, **changes):
            process = self.start(*names, **changes)
            process.out, process.err = process.communicate(timeout=120)
            return process

        def modelscope(self, *names, **changes):
            return self(*names, MODELSCOPE_ENDPOINT=hub.url, MODELSCOPE_CACHE=str(home / "modelscope"),
                        HUB="modelscope", **changes)

        def refused(self, name, code, **changes):
            """The one line of a look-up that fails."""
            line, = self.refusals(name, code=code, **changes)
            return line

        def refusals(self, *names, code, **changes):
            """A line for each of some look-ups that fail."""
            done = self(*names, **changes)
            assert done.returncode == code and done.out == "" and "Traceback" not in done.err, done.err
            return [line for line in done.err.splitlines() if line.startswith("error: ")]

        def weights(self):
            """Whole weights in the cache."""
            return [path for path in self.cache.rglob("model.safetensors") if path.exists()]

    return User()


def test_a_name_becomes_a_folder_with_the_files_that_are_needed(hub, user):
    done = user("tiny/model")
    assert done.returncode == 0, done.err
    folder = done.out.strip()
    assert open(os.path.join(folder, "model.safetensors"), "rb").read() == WEIGHTS
    wanted = ["config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    assert sorted(os.listdir(folder)) == wanted == sorted(set(hub.downloads()))
    assert re.search(r"tiny/model: 5 files, 300\.\d\d kB, from http://127", done.err)

    hub.asked.clear()
    again = user("tiny/model@main")
    assert again.out == done.out and not hub.downloads() and again.err == ""
    hub.close()  # the network is gone
    assert user("tiny/model", HF_HUB_OFFLINE="1").out == done.out
    without = user("tiny/model")
    assert without.out == done.out and "does not answer; the copy in the cache is used" in without.err


def test_a_folder_of_this_machine_wins(hub, user, tmp_path):
    (tmp_path / "tiny" / "model").mkdir(parents=True)
    assert user("tiny/model").out.strip() == "tiny/model" and not hub.asked


def test_a_connection_that_is_cut_goes_on_where_it_stopped(hub, user):
    hub.cut = {"model.safetensors": 100000}
    done = user("tiny/model")
    assert done.returncode == 0, done.err
    assert open(os.path.join(done.out.strip(), "model.safetensors"), "rb").read() == WEIGHTS


def test_what_was_not_fetched_whole_is_not_used(hub, user):
    hub.status["model.safetensors"] = 403
    user.refused("tiny/model", 2)
    assert user.weights() == []
    line = user.refused("tiny/model", 1, HF_HUB_OFFLINE="1")
    assert "its copy in the cache is not whole: model.safetensors is missing" in line
    hub.status.clear()
    assert user("tiny/model").returncode == 0 and user.weights()


def test_what_the_hub_refuses_is_one_line(hub, user):
    hub.status = {"tiny/s401": 401, "tiny/s404": 404}
    unknown = user.refusals("tiny/s401", "tiny/s404", "tiny/modell", "tiny/model@v9", code=2)
    assert all("is neither a file or folder here nor a model that http" in line for line in unknown[:3])
    assert "error: tiny/model@v9: has no revision 'v9'" in unknown[3]
    hub.status = {"tiny/s429": 429, "tiny/s500": 500}
    busy, broken = user.refusals("tiny/s429", "tiny/s500", code=1)
    assert "takes no more requests for now (status 429)" in busy and "answers with status 500" in broken
    assert not hub.downloads()


def test_a_hub_that_is_overloaded_is_not_asked_again_and_again(monkeypatch):
    """huggingface_hub asks a hub that answers 503 six times, in 20 s, and wraps the answer; only a lost connection is
    for this program to try again."""
    import huggingface_hub

    tried = []

    def download(*_, **__):
        tried.append(1)
        answer = OSError("503 Server Error")
        answer.response = SimpleNamespace(status_code=503)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not on this disk") from answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=()))
    with pytest.raises(UserError, match="answers with status 503") as caught:
        fetch_from_hugging_face(names.HubName("tiny/model"), print)
    assert caught.value.exit_code == 1 and len(tried) == 1


def test_the_token_is_sent(hub, user):
    hub.token = "hf_secret"
    assert "HF_TOKEN" in user.refused("tiny/model", 2)
    assert user("tiny/model", HF_TOKEN="hf_secret").returncode == 0


@pytest.mark.parametrize("sent, words", [
    (WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]), "is damaged: its digest is"),
    (WEIGHTS[:-10], "could not be fetched whole")])
def test_weights_that_are_not_what_the_hub_says_are_never_used(sent, words, hub, user):
    hub.wrong["model.safetensors"] = sent
    assert words in user.refused("tiny/model", 1)
    hub.wrong.clear()
    if "damaged" in words:
        line = user.refused("tiny/model", 1)  # it stays until the user has removed it
        os.unlink(re.search(r"error: (\S+): is damaged", line)[1])
    done = user("tiny/model")
    assert done.returncode == 0, done.err
    assert open(os.path.join(done.out.strip(), "model.safetensors"), "rb").read() == WEIGHTS


def test_two_processes_at_once_fetch_a_file_once(hub, user):
    processes = [user.start("tiny/model") for _ in range(3)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert len({out for out, _ in ends}) == 1 and hub.downloads().count("model.safetensors") == 1


def test_nobody_answers(hub, user):
    hub.close()
    assert re.search(r"cannot be fetched \(http://127\.0\.0\.1:\d+: Connection refused\), and is not in the cache",
                     user.refused("tiny/model", 1))


# -- ModelScope

@pytest.fixture
def modelscope():
    pytest.importorskip("modelscope")


def test_modelscope_gives_a_folder_with_the_files_that_are_needed(modelscope, hub, user):
    done = user.modelscope("tiny/model")
    assert done.returncode == 0, done.err
    folder = done.out.strip()
    assert open(os.path.join(folder, "model.safetensors"), "rb").read() == WEIGHTS
    assert not {"README.md", "model.onnx", "pytorch_model.bin"} & set(hub.modelscope_downloads())
    hub.asked.clear()
    assert user.modelscope("tiny/model").out == done.out and not hub.modelscope_downloads()
    hub.close()
    assert user.modelscope("tiny/model", HF_HUB_OFFLINE="1").out == done.out


@pytest.mark.slow
def test_modelscope_goes_on_after_a_connection_that_was_cut(modelscope, hub, user):
    hub.cut = {"model.safetensors": 100000}
    done = user.modelscope("tiny/model")
    assert done.returncode == 0, done.err
    assert open(os.path.join(done.out.strip(), "model.safetensors"), "rb").read() == WEIGHTS


def test_what_modelscope_refuses_is_one_line(modelscope, hub, user):
    hub.status = {"tiny/s401": 401, "tiny/s404": 404}
    done = user.modelscope("tiny/s401", "tiny/s404", "tiny/model@v9")
    assert done.returncode == 1 and done.out == "" and "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3 and all("cannot be fetched from ModelScope" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("sent", [WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]), WEIGHTS[:-10]])
def test_weights_that_are_not_what_modelscope_says_are_never_used(sent, modelscope, hub, user):
    hub.wrong["model.safetensors"] = sent
    done = user.modelscope("tiny/model")
    assert done.returncode == 1 and done.out == "" and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: tiny/model: cannot be fetched from ModelScope")
    assert user.modelscope("tiny/model", HF_HUB_OFFLINE="1").returncode == 1
    hub.wrong.clear()
    done = user.modelscope("tiny/model")
    assert open(os.path.join(done.out.strip(), "model.safetensors"), "rb").read() == WEIGHTS


@pytest.mark.slow
def test_two_processes_at_once_fetch_a_file_once_from_modelscope(modelscope, hub, user):
    changes = {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_CACHE": str(user.cache) + "_ms", "HUB": "modelscope"}
    processes = [user.start("tiny/model", **changes) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert len({out for out, _ in ends}) == 1 and hub.modelscope_downloads().count("model.safetensors") == 1


def test_names_are_looked_up_by_predicting_and_converting(hub, monkeypatch):
    """Where the look-up is a stand-in that knows one name."""
    asked = []

    def stand_in(given, hub_name):
        asked.append((given, hub_name))
        return str(hub.folder / "tiny" / "model")

    monkeypatch.setattr("qwen15.config.load.resolve", stand_in)
    monkeypatch.setattr("qwen15.hub.resolve.resolve", stand_in)
    for main, flag in ((predict.main, "--load_checkpoint"), (convert_weight.main, "--torch_ckpt_dir")):
        with pytest.raises(UserError, match="tiny/model"):  # the look-up's folder holds no network
            main([flag, "tiny/random@v2", "--hub", "modelscope"])
    assert asked == [("tiny/random@v2", "modelscope")] * 2


def test_make_yaml_takes_a_name(hub, user, tmp_path):
    """From the hub's protocol to the file: the model's name stands in it, MindFormers' network is told the folder."""
    (hub.folder / "tiny" / "model" / "config.json").write_text(json.dumps(QWEN1_5["0_5b"]))

    def run(*words, **changes):
        return subprocess.run([sys.executable, "-m", "qwen15", "make-yaml", *words], env={**user.environ, **changes},
                              cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run("--checkpoint", "tiny/model@main", "--output", "made.yaml")
    assert done.returncode == 0 and "tiny/model@main: 5 files" in done.stderr, done.stderr
    text = (tmp_path / "made.yaml").read_text()
    assert text.startswith("# tiny/model@main: written by qwen15 make-yaml") and "hidden_size: 1024" in text
    newer = run("--checkpoint", "tiny/model", "--mcore")
    assert newer.stdout.startswith("# tiny/model, for MindFormers' newer network"), newer.stderr
    folder, = (line for line in newer.stdout.splitlines() if line.startswith("pretrained_model_dir: "))
    assert str(user.cache) in folder
    from_modelscope = run("--checkpoint", "tiny/model", "--hub", "modelscope", MODELSCOPE_ENDPOINT=hub.url,
                          MODELSCOPE_CACHE=str(tmp_path / "modelscope"))
    assert "hidden_size: 1024" in from_modelscope.stdout, from_modelscope.stderr
    absent = run("--checkpoint", "tiny/nosuch")
    line, = absent.stderr.splitlines()
    assert absent.returncode == 2 and line.startswith("error: tiny/nosuch: "), absent.stderr


@pytest.mark.slow
def test_predicting_and_converting_take_names(hub, user, small_model, tmp_path):
    pytest.importorskip("mindspore")
    made = tmp_path / "made"
    made.mkdir()
    make_random(made, small_model)
    shutil.copytree(made / "random", hub.folder / "tiny" / "random")

    def run(*words):
        return subprocess.run([sys.executable, *words], cwd=MODULE, env=user.environ, capture_output=True, text=True,
                              timeout=240)

    options = ["--device_target", "CPU", "--predict_data", "hello", "--max_new_tokens", "4", "--options",
               "model.model_config.num_blocks=16"]
    by_name = run("run_qwen1_5.py", "--load_checkpoint", "tiny/random", *options)
    assert by_name.returncode == 0, by_name.stderr
    by_folder = run("run_qwen1_5.py", "--load_checkpoint", str(hub.folder / "tiny" / "random"), *options)
    assert by_name.stdout == by_folder.stdout != ""
    done = run("convert_weight.py", "--torch_ckpt_dir", "tiny/random@main", "--mindspore_ckpt_path",
               str(tmp_path / "out.safetensors"))
    assert done.returncode == 0 and (tmp_path / "out.safetensors").exists(), done.stderr


# -- names and files


@pytest.mark.parametrize("text, expected", [
    ("Qwen/Qwen1.5-0.5B-Chat", ("Qwen/Qwen1.5-0.5B-Chat", None)), ("a/b@v1.0", ("a/b", "v1.0")),
    ("a/b@refs/pr/3", ("a/b", "refs/pr/3")), ("a", None), ("a/b/c", None),
    ("./a/b", None), ("/a/b", None), ("../b", None),
    ("a/model.safetensors", None), ("a/b@", None), ("~/b", None), ("a/b c", None), ("", None)])
def test_what_is_a_name(text, expected):
    name = names.parse(text)
    assert (None if name is None else (name.repo, name.revision)) == expected


def test_one_kind_of_weights_is_taken():
    some = ["a.json", "x/y.json", "README.md", "merges.txt"]
    both = [*some, "model.safetensors", "pytorch_model.bin"]
    assert files.needed(both) == ["a.json", "merges.txt", "model.safetensors"]
    assert files.needed([*some, "pytorch_model.bin", "x.ckpt"]) == ["a.json", "merges.txt", "pytorch_model.bin"]
    slices = ["rank_0/model.safetensors", "rank_1/model.safetensors"]
    assert files.needed(slices) == slices


def test_a_shard_that_the_index_names_and_the_folder_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert files.absent(tmp_path) == "model.safetensors"
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    assert files.absent(tmp_path) == "model-2.safetensors"


def test_modelscope_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(UserError, match="modelscope is not installed"):
        fetch_from_modelscope(names.HubName("a/b"), print)


@pytest.mark.parametrize("content", [b"null", b'{"weight_map": 5}', b'{"weight_map": {"a": 5}}', b"{", b"\xff"])
def test_an_index_that_is_none_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        files.absent(str(tmp_path))
