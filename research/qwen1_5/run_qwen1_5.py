"""Predict with Qwen1.5: `python run_qwen1_5.py --config predict_qwen1_5_72b.yaml --predict_data TEXT ...`."""

import sys

from qwen15.commands.predict import main
from qwen15.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
