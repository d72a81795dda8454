"""The structure: wings on a ground floor, who may import whom, and what stays light."""

import ast
import subprocess
import sys

import pytest
from conftest import MODULE, ROOT

PACKAGE = MODULE / "qwen15"

GROUND = ["errors", "finding", "naming", "family", "json_file", "strict_json", "odd_characters", "whole_file",
          "command_line", "device", "installed", "machine", "cluster", "interrupts", "progress", "reporting", "start",
          "terminal", "text_file", "ray_environment"]
"""Files beside the wings that any wing may import."""
BELOW = {
    "text": [],
    "launch": [],
    "checkpoint": [],
    "hub": [],
    "config": ["hub", "kernels"],
    "kernels": [],
    "ops": ["kernels"],
    "conversion": ["checkpoint", "config", "hub"],
    "network": ["checkpoint", "config", "ops"],
    "ascend": ["network", "config", "checkpoint"],
    "calibration": ["conversion", "network", "text", "ops", "config", "checkpoint"],
    "generation": ["text", "network", "config", "checkpoint", "ops", "kernels"],
    "serve": ["generation", "network", "text", "config", "checkpoint"],
    "commands": ["ascend", "generation", "network", "conversion", "launch", "text", "config", "hub", "checkpoint",
                 "ops", "kernels"],
    "bench": ["commands", "ascend", "generation", "network", "conversion", "launch", "text", "config", "checkpoint",
              "ops", "kernels"],
}
"""The wings that a wing's files may import, beside its own and the ground floor."""
TOP = ["__init__", "__main__", "api", "completion", "verbs"]
"""Files that may import anything, and that nothing imports."""


def wing_of(path):
    """'generation' for qwen15/generation/engine.py, the file's own name for one on the ground floor."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path):
    """Modules of the package that a file imports, at any depth, as paths below it ('generation.engine')."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(package[:len(package) - node.level + 1]) + (node.module.split(".") if node.module else [])
            for alias in node.names:
                target = PACKAGE.joinpath(*base, alias.name)
                inside = target.is_dir() or target.with_suffix(".py").exists()
                found.add(".".join(base + [alias.name] if inside else base))
    return found - {""}


def files():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def test_every_wing_and_every_ground_floor_file_has_its_place():
    wings = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    assert wings == sorted(BELOW), "a new wing needs a row in BELOW that says what is below it"
    ground = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in TOP)
    assert ground == sorted(GROUND), "a new file belongs in a wing; the ground floor is for what every wing may need"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path):
    here = wing_of(path)
    if here in TOP:
        return
    allowed = [here] + BELOW.get(here, []) + GROUND
    for module in sorted(imports(path)):
        other = module.split(".")[0]
        assert other in allowed, (
            f"{path.relative_to(PACKAGE)} imports {module}, which is not below it. Down from here are "
            f"{', '.join(BELOW.get(here, [])) or 'no wings'} and the ground floor: "
            "move what is needed into one of them, or pass it in")


def test_no_circle_of_imports():
    graph = {}
    for path in files():
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[name[:-len(".__init__")] if name.endswith(".__init__") else name] = imports(path)
    done, way = set(), []

    def visit(module):
        assert module not in way, "a circle: " + " -> ".join(way[way.index(module):] + [module])
        if module in done or module not in graph:
            return
        way.append(module)
        for other in sorted(graph[module]):
            visit(other)
        way.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_every_inner_module_says_what_it_is_for():
    for path in files():
        first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert first and first.splitlines()[0].endswith((".", ":")), path


def test_the_engine_knows_no_text_and_the_model_no_kernel():
    engine = imports(PACKAGE / "generation" / "engine.py")
    assert not [module for module in engine if module.split(".")[0] == "text"]
    assert not [module for module in imports(PACKAGE / "network" / "model.py")
                if module.split(".")[0] in ("kernels", "ops")]


HEAVY = ("mindspore", "mindformers", "torch", "transformers")
LIGHT = {
    "converting to MindSpore": "import convert_weight, qwen15.conversion.hugging_face",
    "converting back": "import convert_reversed, qwen15.conversion.hugging_face",
    "slicing": "import transform_ckpt, qwen15.conversion.reslice",
    "the command line": "from qwen15.commands import predict, batch, repl, dry_run",
    "the Python interface": "from qwen15 import load, generate, convert",
    "the tokenizer": "import qwen1_5_tokenizer",
    "the launcher": "import qwen15.launch.plan",
    "configuration": "import qwen15.config.load; from qwen15.commands import make_yaml, memory",
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
