"""Make docs/chat.png: a chat as it looks, recorded in a terminal of its own and drawn as an image.

Usage: python record_chat.py CHECKPOINT CONFIG IMAGE      (needs pillow, and the font DejaVu Sans Mono)
"""

import argparse
import fcntl
import os
import pty
import re
import struct
import sys
import tempfile
import termios
from typing import List

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "research", "qwen1_5")
TYPED = ("What is the capital of France?", "Which river flows through it?", "/system Answer with one word.",
         "What color is the sky?", "/save talk.json", "/quit")
COLUMNS = 112
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def record(command: List[str], folder: str) -> str:
    """Run `command` in a terminal, type TYPED, each line once the program asks; what the screen shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 500, 0, 0))
        os.chdir(folder)
        os.execvpe(command[0], command, {**os.environ, "XDG_STATE_HOME": folder, "TERM": "xterm"})
    screen, waiting = "", list(TYPED)
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the program has closed the terminal
            data = b""
        if not data:
            break
        screen += data.decode("utf-8", "replace")
        if waiting and _ESCAPES.sub("", screen).endswith("\n> "):
            os.write(terminal, f"{waiting.pop(0)}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = _ESCAPES.sub("", screen)
    if code or waiting:
        sys.exit(f"the chat ended with {code}, {len(waiting)} lines were not asked for:\n{text}")
    return text


def draw(text: str, image: str) -> None:
    """`text` as a terminal shows it; what was typed is brighter."""
    from PIL import Image, ImageDraw, ImageFont

    lines = [part for line in text.rstrip().split("\n")
             for part in ([line[at:at + COLUMNS] for at in range(0, len(line), COLUMNS)] or [""])]
    plain, bold = (ImageFont.truetype(f"DejaVuSansMono{kind}.ttf", 15) for kind in ("", "-Bold"))
    width, height, edge = round(plain.getlength("M")), 21, 18
    picture = Image.new("RGB", (COLUMNS * width + 2 * edge, len(lines) * height + 2 * edge), "#1e1e2e")
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        typed = line.startswith(("> ", "$ "))
        pen.text((edge, edge + number * height), line, font=bold if typed else plain,
                 fill="#a6e3a1" if typed else "#cdd6f4")
    picture.quantize(32).save(image, optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("config")
    parser.add_argument("image")
    args = parser.parse_args()
    script, config = os.path.join(MODULE, "run_qwen1_5.py"), os.path.abspath(args.config)
    options = ["--load_checkpoint", os.path.abspath(args.checkpoint), "--chat", "--max_new_tokens", "60"]
    with tempfile.TemporaryDirectory() as folder:
        text = record([sys.executable, script, "--config", config, *options], folder)
    shown = (f"$ python run_qwen1_5.py --config {os.path.basename(config)} "
             f"--load_checkpoint {os.path.basename(options[1])} --chat\n")
    draw(shown + text.replace(folder + os.sep, "").replace(os.path.dirname(options[1]) + os.sep, ""), args.image)
    print(text)


if __name__ == "__main__":
    main()
