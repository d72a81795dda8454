"""`python -m qwen15 bench`."""

import sys

from ..errors import run_main
from .command import main

sys.exit(run_main(main))
