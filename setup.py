"""Install Qwen1.5 on MindSpore; compiles the CPU kernels when there is a C++ compiler."""

import glob
import os
import sys

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

if not (3, 9) <= sys.version_info[:2] <= (3, 12):
    # pip looks for MindSpore before it looks at python_requires, and says only that there is none.
    sys.exit(f"error: this is Python {sys.version.split()[0]}, and MindSpore has packages for 3.9 to 3.12. "
             "Install with one of these.")

SOURCE = "research/qwen1_5"


class BuildWithKernels(build_py):
    """Copies the Python files as usual, then compiles the kernel library beside them.

    Without a compiler, or when compiling fails, the installation goes on and says so: the reference operators need no
    library. In a checkout (pip install -e) a library that is newer than its sources stays.
    """

    def run(self):
        super().run()
        sys.path.insert(0, os.path.abspath(SOURCE))
        from qwen15.errors import UserError
        from qwen15.kernels import build

        target = None if self.editable_mode else os.path.join(self.build_lib, "qwen15", "kernels", "_lib")
        if target is None and _is_newer(build.OUTPUT_DIR / build.LIBRARY_NAME, build.HERE):
            return
        try:
            print("kernel library:", build.build(target))
        except UserError as error:
            print(f"kernel library not built: {error}", file=sys.stderr)


class WithLibrary(Distribution):
    """A library is inside, so the wheel is for one platform."""

    def has_ext_modules(self):
        return True


class WheelWithKernels(bdist_wheel):
    """For every Python: the library knows none."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def _is_newer(library, sources) -> bool:
    """Whether the compiled library has been made after the last change of a source."""
    changed = max(path.stat().st_mtime for pattern in ("*.cpp", "*.h", "build.py") for path in sources.glob(pattern))
    return library.exists() and library.stat().st_mtime > changed


MINDFORMERS = "mindformers>=1.8,<2; python_version < '3.12'"
TRANSFORMERS = "transformers>=4.51,<6"
"""Compared with, never needed to run. From 5.13 on it wants the safetensors that is kept out below."""

with open("README.md", encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()

SERVE = ["starlette>=0.40", "uvicorn>=0.30", "prometheus_client>=0.20", "llguidance>=1.0"]

setup(
    name="qwen15-mindspore",
    version="0.1.0",
    description="Qwen1.5 on MindSpore: convert, slice and predict, on a CPU or on Ascend cards",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    python_requires=">=3.9,<3.13",
    package_dir={"": SOURCE},
    packages=find_packages(SOURCE),
    py_modules=["convert_reversed", "convert_weight", "qwen1_5_tokenizer", "run_qwen1_5", "transform_ckpt"],
    package_data={"qwen15": ["py.typed"], "qwen15.serve": ["page.html"],
                  "qwen15.kernels": ["*.cpp", "*.h", "_lib/*.so"]},
    data_files=[("share/qwen1_5", sorted(glob.glob(f"{SOURCE}/*.yaml")))],
    distclass=WithLibrary,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
    install_requires=[
        "mindspore>=2.7.2,<2.11",
        "numpy>=1.26,<2",
        "pyyaml>=6",
        # 0.8.0 writes wrong bytes for arrays that are not contiguous, and MindSpore hands it such arrays.
        "safetensors>=0.5.3,<0.8",
        "tiktoken>=0.7",
        "tokenizers>=0.21",
        "jinja2>=3.1",
        "huggingface_hub>=0.30,<3",
        "tqdm>=4.60",
        "scipy>=1.6",  # --calibrate: LAPACK in place; MindSpore brings it too
    ],
    extras_require={
        # Cards, and `type: Qwen2Tokenizer` in MindFormers' own programs. It brings the transformers that it goes with,
        # and ends at 3.11. MindFormers 2.0, for MindSpore 2.10, wants a package that PyPI lacks: see docs/ascend.md.
        "ascend": [MINDFORMERS],
        "quickstart": ["gguf>=0.10"],
        "gguf": ["gguf>=0.10"],
        "serve": SERVE,
        "completion": ["shtab>=1.7"],
        # 2.52 and later have no build for Python 3.9.
        "ray": [*SERVE, "ray[serve]>=2.51"],
        "modelscope": ["modelscope>=1.20"],
        "bench": ["matplotlib>=3.7", TRANSFORMERS],
        # .bin files only. Take a CPU build: pip install torch --index-url https://download.pytorch.org/whl/cpu
        "torch": ["torch>=2.4"],
        # torch is left out: scripts/test.sh installs a CPU build where one is offered.
        "test": [MINDFORMERS, TRANSFORMERS, *SERVE, "gguf>=0.10", "hypothesis>=6", "matplotlib>=3.7",
                 "modelscope>=1.20", "mypy>=1.11", "openai>=1.40", "pytest>=7", "pytest-timeout",
                 "pytest-xdist", "shtab>=1.7"],
    },
    entry_points={"console_scripts": ["qwen15 = qwen15.__main__:run"]},
)
