"""Write docs/flags.md and docs/flags_en.md: every flag of every command, read off the parsers.

The English sentences are those of --help; flags_zh.json beside this file has the Chinese ones. Run it after a flag has
changed: python scripts/flags_page.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "research" / "qwen1_5"))

from qwen15.launch.plan import USAGE  # noqa: E402
from qwen15.verbs import VERBS, parsers  # noqa: E402

Row = Tuple[str, str, str]
SHARED = "configuration"
"""Title of the group of flags that several commands have; it is written once."""
TRANSLATIONS = Path(__file__).with_name("flags_zh.json")
WORDS = {
    "en": {"title": "# Every flag", "other": "[中文](flags.md)",
           "begin": "Made by `python scripts/flags_page.py` from the commands' own parsers; `qwen15 VERB --help` says "
                    "the same.\n\n"
                    "Tab completes them: `pip install shtab`, then `source <(qwen15 completion bash)`; "
                    'zsh: `eval "$(qwen15 completion zsh)"`; tcsh too.',
           "flag": "flag", "value": "value", "what": "what it does",
           "shared": "## Flags of the configuration",
           "of": "Of {}. Each overrides the YAML; one that is not given leaves it alone.",
           "also": "Also [the flags of the configuration](#flags-of-the-configuration).",
           "positions": "Positions, not flags; 1, 2, 6 or 9 of them:"},
    "zh": {"title": "# 全部参数", "other": "[English](flags_en.md)",
           "begin": "本页由 `python scripts/flags_page.py` 从各命令的解析器生成；`qwen15 命令 --help` "
                    "给出同样的内容（英文）。\n\n"
                    "Tab 补全：`pip install shtab`，然后 `source <(qwen15 completion bash)`；"
                    'zsh 用 `eval "$(qwen15 completion zsh)"`；tcsh 亦可。',
           "flag": "参数", "value": "取值", "what": "作用",
           "shared": "## 配置参数", "of": "用于 {}。每个参数覆盖 YAML 中的值；未给出的参数不改变 YAML。",
           "also": "另有[配置参数](#配置参数)。",
           "positions": "按位置给出，不是选项；1、2、6 或 9 个："},
}


def rows(actions: List[argparse.Action]) -> List[Row]:
    """(flag, value, help) of every flag and position that is shown."""
    found = []
    for action in actions:
        if isinstance(action, argparse._HelpAction) or action.help in (None, argparse.SUPPRESS):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        if action.nargs == 0:
            value = ""
        elif action.choices is not None:
            value = " \\| ".join(f"`{choice}`" for choice in action.choices)
        else:
            value = f"`{action.metavar or action.dest.upper()}`".replace("|", "\\|")
            value += " ..." if action.nargs in ("+", "*") else ""
        found.append((names, value if action.option_strings else "", _text(action)))
    return found


def _text(action: argparse.Action) -> str:
    """What --help says, with the usual names for the cache and home folders of whoever runs this."""
    said = str(action.help) % vars(action)
    if os.environ.get("XDG_CACHE_HOME"):
        said = said.replace(os.environ["XDG_CACHE_HOME"], "~/.cache")
    return said.replace(str(Path.home()), "~")


def commands() -> Iterator[Tuple[str, List[Row], List[Row]]]:
    """(command, its own flags, those of the configuration)."""
    for name, parser in parsers():
        own: List[Row] = []
        shared: List[Row] = []
        for group in parser._action_groups:
            (shared if group.title == SHARED else own).extend(rows(group._group_actions))
        yield name, own, shared


def launcher() -> List[Row]:
    """The positions of the launcher, from its usage."""
    return [(f"`{name}`", "", text) for name, text in re.findall(r"^  ([A-Z_]+)  +(.*)$", USAGE, re.M)]


def page(language: str) -> str:
    """The page in 'en' or 'zh'."""
    words = WORDS[language]
    chinese: Dict[str, str] = json.loads(TRANSLATIONS.read_text("utf-8")) if language == "zh" else {}

    def table(found: List[Row]) -> List[str]:
        lines = [f"| {words['flag']} | {words['value']} | {words['what']} |", "|---|---|---|"]
        return lines + [f"| {name} | {value} | {chinese.get(text, text).replace('|', chr(92) + '|')} |"
                        for name, value, text in found] + [""]

    made = {name: (own, shared) for name, own, shared in commands()}
    lines = [words["title"], "", words["other"], "", words["begin"], ""]
    for name, verb in VERBS.items():
        lines += [f"## qwen15 {name}", "", f"{chinese.get(verb.what, verb.what)}", ""]
        if name not in made:
            lines += [words["positions"], "", *table(launcher())]
            continue
        own, shared = made[name]
        lines += table(own)
        lines += [words["also"], ""] if shared else []
        for part in made:
            if part.startswith(f"{name} "):
                lines += [f"### qwen15 {part}", "", *table(made[part][0])]
    users = [f"`qwen15 {name}`" for name, (_, shared) in made.items() if shared]
    lines += [words["shared"], "", words["of"].format(", ".join(users)), ""]
    lines += table(list(dict.fromkeys(row for _, shared in made.values() for row in shared)))
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    for language, name in (("en", "flags_en.md"), ("zh", "flags.md")):
        (ROOT / "docs" / name).write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
