"""A text of more than 5 MB in which everything occurs that a tokenizer can get wrong; the same on every run."""

import glob
import os
import random
import sysconfig
import unicodedata
from typing import Callable, Dict, List

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NEWER_MARKS = "combining, Unicode 4 and later"
BLANKS = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u3000\x1c\x1f\u200b\ufeff"


def corpus(token_text: Callable[[int], str], vocab_size: int) -> Dict[str, List[str]]:
    """Documents by kind. `token_text` gives a vocabulary's tokens as text, which Chinese and mixed text is made of."""
    return {"code and English": _code(), "Chinese": _chinese(token_text, vocab_size),
            "every token": _tokens(token_text, vocab_size), "every character": _characters(), "emoji": _emoji(),
            "combining": _combining(unicodedata.ucd_3_2_0), NEWER_MARKS: _combining(unicodedata),
            "control and blanks": _blanks(), "control tokens": _controls(token_text, vocab_size)}


def _code() -> List[str]:
    """Python's own library: code, English, a few other scripts in its data."""
    documents, size = [], 0
    folder = sysconfig.get_path("stdlib")
    for path in sorted(glob.glob(os.path.join(folder, "*.py")) + glob.glob(os.path.join(folder, "*", "*.py"))):
        if "site-packages" in path:
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            documents.append(file.read())
        size += len(documents[-1])
        if size > 1_800_000:
            break
    return documents


def _chinese(token_text, vocab_size) -> List[str]:
    chance = random.Random(1)
    words = [text for text in map(token_text, range(vocab_size)) if text
             and all("\u4e00" <= c <= "\u9fff" for c in text)]
    documents = []
    for _ in range(120):
        parts = []
        for _ in range(1500):
            parts.append(chance.choice(words))
            if chance.random() < 0.25:
                parts.append(chance.choice(["，", "。", "。\n", "、", "“", "”", "：", " ", "2024年", "！\n\n", "（",
                                            "）", "GPT-4", "　　"]))
        documents.append("".join(parts))
    return documents


def _tokens(token_text, vocab_size) -> List[str]:
    order = list(range(vocab_size))
    random.Random(2).shuffle(order)
    return ["".join(token_text(index) for index in order[start:start + 3000]) for start in range(0, vocab_size, 3000)]


def _characters() -> List[str]:
    """Each character of the basic plane beside letters, digits, marks and blanks; the other planes in samples."""
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000
              and (point < 0x10000 or 0x10000 <= point < 0x20000 and point % 5 == 0 or point % 257 == 0)]
    return ["".join(f"a{c}{c}b {c}.1{c}\n'{c}s" for c in map(chr, points[start:start + 4000]))
            for start in range(0, len(points), 4000)]


def _emoji() -> List[str]:
    chance = random.Random(3)
    faces = [chr(point) for point in (*range(0x1F300, 0x1F650), *range(0x1F900, 0x1FA00), *range(0x2600, 0x27C0))]
    tones = [chr(point) for point in range(0x1F3FB, 0x1F400)]
    flags = [chr(point) for point in range(0x1F1E6, 0x1F200)]
    documents = []
    for _ in range(12):
        parts = []
        for _ in range(2500):
            kind = chance.randrange(6)
            face = chance.choice(faces)
            parts.append((face, face + chance.choice(tones), "\u200d".join(chance.choice(faces) for _ in range(3)),
                          chance.choice(flags) + chance.choice(flags), face + "\ufe0f",
                          chance.choice([" ok ", "!", "\n", "1\u20e3"]))[kind])
        documents.append("".join(parts))
    return documents


def _combining(database) -> List[str]:
    """Marks that `database` knows in any order on any base, decomposed text of many scripts."""
    chance = random.Random(4)
    marks = [chr(point) for point in range(0x110000) if database.combining(chr(point))]
    bases = "aeioucnszyAEOUgdkㄱ가কkதಕกאبεωий中1>=<"
    hangul = [unicodedata.normalize("NFD", chr(point)) for point in range(0xAC00, 0xD7A4, 37)]
    documents = []
    for _ in range(10):
        parts = []
        for _ in range(3500):
            parts.append(chance.choice(bases) + "".join(chance.choice(marks)
                                                        for _ in range(chance.choice((0, 1, 1, 2, 3)))))
            if chance.random() < 0.2:
                parts.append(chance.choice(hangul + [" ", "\n", "क्षि", "ﷺ", "ﬁ", "Å", "Ω", "e\u0301\u0327"]))
        documents.append("".join(parts))
    return documents


def _blanks() -> List[str]:
    chance = random.Random(5)
    controls = [chr(point) for point in (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x200E, 0x202E, 0x2066, 0xFEFF,
                                         0xFFFD, 0xFFFF)]
    words = ["word", "Word", "'s", "'LL", "'ſ", "12", "...", "中", "é", ")", " (", "_x"]
    documents = []
    for _ in range(10):
        parts = []
        for _ in range(6000):
            pool = (BLANKS, controls, words)[chance.choice((0, 0, 1, 2, 2))]
            parts.append(chance.choice(pool) * chance.choice((1, 1, 1, 2, 3, 9)))
        documents.append("".join(parts))
    return documents


def _controls(token_text, vocab_size) -> List[str]:
    """Control tokens, whole, doubled, cut and changed, between ordinary tokens."""
    chance = random.Random(6)
    near = [*CONTROL_TOKENS, *CONTROL_TOKENS, "<|im_end|", "|im_end|>", "<|im_end|>>", "<<|im_end|>", "<|IM_END|>",
            "<|im_end |>", "<|im_",
            "<|im_end|><|im_start|>user\n"]
    documents = []
    for _ in range(20):
        parts = []
        for _ in range(1500):
            parts.append(chance.choice(near) if chance.random() < 0.3 else token_text(chance.randrange(vocab_size)))
        # A mark that NFC would compose with the '>' of a control token is a case of its own (see test_tokenizer.py).
        documents.append("".join(parts).replace(">\u0338", "> \u0338"))
    return documents
