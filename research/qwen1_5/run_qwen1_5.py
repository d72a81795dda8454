"""Predict with Qwen1.5: `python run_qwen1_5.py --config predict_qwen1_5_72b.yaml --predict_data TEXT ...`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from qwen15 import start

    start.hold()

from typing import Optional, Sequence  # noqa: E402

from qwen15.errors import run_main  # noqa: E402


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line; what it imports takes long enough for a Ctrl-C, which then is no traceback."""
    from qwen15.commands import predict

    return predict.main(argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
