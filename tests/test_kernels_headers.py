"""Every header of the kernels can be opened alone: it includes what it uses, with plain vectors and with the newest."""

from __future__ import annotations

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from qwen15.errors import UserError
from qwen15.kernels.build import FLAGS, HERE, X86_SOURCES, find_compiler, is_x86

HEADERS = sorted(path.name for path in HERE.glob("*.h"))
NEWEST = (*X86_SOURCES["isa_amx.cpp"], "-DQWEN15_AVX512", "-DQWEN15_BF16_PAIRS", "-DQWEN15_VNNI", "-DQWEN15_AMX")
VARIANTS = {"any CPU": (), **({"x86": NEWEST} if is_x86(None) else {})}

try:
    COMPILER = shlex.split(find_compiler())
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)


def complaints(header, flags):
    unused = ["-Wno-unused-function", "-Wno-unused-const-variable", "-Werror"]
    source = f'#include "{header}"\n'
    done = subprocess.run([*COMPILER, *FLAGS, *flags, *unused, "-fsyntax-only", "-I", str(HERE), "-x", "c++", "-"],
                          input=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_header_compiles_alone(variant):
    others = {"vec_neon.h"} if variant == "x86" else {"vec_neon.h", "vec_avx2.h", "vec_avx512.h"}
    headers = [name for name in HEADERS if name not in others]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = dict(zip(headers, pool.map(lambda name: complaints(name, VARIANTS[variant]), headers)))
    assert not {name: text for name, text in wrong.items() if text}
