"""The structure: who may import whom, and what stays light."""

import ast
import subprocess
import sys

import pytest
from conftest import MODULE, ROOT

PACKAGE = MODULE / "qwen15"

LAYERS = [
    ["errors"],
    ["naming", "tensors", "shard", "blocks", "stream", "wire", "bpe", "device", "foreground", "leftovers", "pages"],
    ["casting", "family", "hf_config", "sampling"],
    ["tensorfile", "template"],
    ["config"],
    ["kernels"],
    ["ops"],
    ["model", "weights"],
    ["network"],
    ["engine"],
    ["ranks", "session"],
    ["results", "reporting", "dry_run"],
    ["batch", "repl"],
    ["predict"],
]
"""From the bottom up: a module imports only from layers below its own. Modules that are not listed are free."""


def imports(path):
    """Modules of the package that a file imports, at any depth, as top-level names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = len(path.relative_to(PACKAGE).parts)
            if node.level == inside and node.module is None:
                found.update(alias.name for alias in node.names)
            elif node.level == inside:
                found.add(node.module.split(".")[0])
            elif node.level < inside:
                found.add(path.relative_to(PACKAGE).parts[0])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found.update(name for name in names if name)
    return found


def files_of(module):
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def test_imports_run_downwards_only():
    layer_of = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    wrong = []
    for module, number in layer_of.items():
        for path in files_of(module):
            for other in imports(path) - {module}:
                if layer_of.get(other, -1) >= number:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert wrong == []


def test_every_inner_module_says_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert first and first.splitlines()[0].endswith((".", ":")), path


def test_the_engine_knows_no_text_and_the_model_no_kernel():
    assert not {"qwen1_5_tokenizer", "chat", "template", "stream", "tokenizers", "tiktoken"} & imports(PACKAGE / "engine.py")
    assert "kernel" not in "".join(
        line for line in (PACKAGE / "model.py").read_text(encoding="utf-8").splitlines(True) if "import" in line)


HEAVY = ("mindspore", "mindformers", "torch", "transformers")
LIGHT = {
    "converting to MindSpore": "import convert_weight, qwen15.conversion",
    "converting back": "import convert_reversed, qwen15.conversion",
    "slicing": "import transform_ckpt, qwen15.transform",
    "the command line": "import qwen15.predict, qwen15.batch, qwen15.repl, qwen15.dry_run",
    "the Python interface": "from qwen15 import load, generate, convert",
    "the tokenizer": "import qwen1_5_tokenizer",
    "the launcher": "import qwen15.launch",
    "configuration": "import qwen15.config, qwen15.memory, qwen15.make_yaml",
    "the package": "import qwen15",
}


@pytest.mark.parametrize("what", LIGHT)
def test_no_heavy_import_for(what):
    code = f"{LIGHT[what]}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=MODULE, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_path_of_anybodys_machine_is_in_the_project():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = tuple("/" + place + "/" for place in ("root", "work", "home/ubuntu"))
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".yaml", ".cpp", ".h", ".toml", ".ini") and path.exists():
            text = path.read_text(encoding="utf-8")
            assert not any(place in text for place in places), name
