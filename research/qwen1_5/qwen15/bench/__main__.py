"""`python -m qwen15 bench`."""

from __future__ import annotations

import sys

from ..errors import run_main
from .command import main

sys.exit(run_main(main))
