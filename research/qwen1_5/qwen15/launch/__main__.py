"""`python -m qwen15.launch`, which scripts/msrun_launcher.sh starts."""

import sys

from ..errors import run_main
from .plan import main

if __name__ == "__main__":
    sys.exit(run_main(main))
