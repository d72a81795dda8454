"""What a measurement prints: a table, one line of JSON, and a plot."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import shlex
import sys
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence

from ..checkpoint.atomic import write_small
from ..errors import UserError
from ..machine import allowed_cpus, cpu_fields, cpu_name

_MADE_BY = "qwen15 bench"


class Column(NamedTuple):
    """One column of a table: its heading and how a row shows in it; None leaves the cell empty."""

    title: str
    cell: Callable[[Mapping[str, Any]], Optional[str]]


class Measured(NamedTuple):
    """What a measurement has to show.

    Attributes:
        facts: on what it was taken, see `heading`.
        columns, rows: the table; the line of JSON has the rows whole.
        bars: the plot, None where there is none.
    """

    facts: Mapping[str, Any]
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    bars: Optional[Bars] = None


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown; columns that are empty in every row are left out."""
    cells = [[column.cell(row) or "" for column in columns] for row in rows]
    shown = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [[columns[i].title for i in shown], ["---"] * len(shown)] + [[line[i] for i in shown] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(key: str, form: str = ".1f") -> Callable[[Mapping[str, Any]], Optional[str]]:
    """A cell that shows row[key]; empty where there is none."""
    return lambda row: None if row.get(key) is None else f"{row[key]:{form}}"


def gigabytes(key: str) -> Callable[[Mapping[str, Any]], Optional[str]]:
    """A cell that shows row[key], bytes, in GB."""
    return lambda row: f"{row[key] / 1e9:.2f}"


def text(key: str) -> Callable[[Mapping[str, Any]], Optional[str]]:
    """A cell that shows row[key] as it is."""
    return lambda row: None if row.get(key) is None else str(row[key])


LIMITS = (
    Column("bandwidth, GB/s", number("bandwidth_gb_per_s")), Column("of bandwidth", number("of_bandwidth", ".2f")),
    Column("peak, GFLOP/s", number("peak_gflop_per_s", ".0f")), Column("of peak", number("of_peak", ".2f")),
    Column("of what both allow", number("of_both", ".2f")),
)
"""What `rounds.limits` gives."""
COMPARED = (
    Column("transformers, tokens/s", number("hf_tokens_per_s")),
    Column("times transformers", number("ratio_hf", ".2f")),
    Column("bfloat16, tokens/s", number("bfloat16_tokens_per_s")),
    Column("times bfloat16", number("ratio_bfloat16", ".2f")),
)
"""What `rounds.compared` gives."""


def machine() -> Dict[str, Any]:
    """This machine: CPU, cores this process may use, memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_name(cpu_fields()), "cores": len(allowed_cpus()),
            "memory_gb": round(memory_bytes / 1e9, 1), "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version()}


def json_line(what: str, argv: Sequence[str], facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Everything measured, on one line: figures are rounded to six digits, samples are what they were taken from."""
    made = {"bench": what, "command": shlex.join(["qwen15", "bench", what, *argv]),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **facts,
            "machine": machine(), "rows": list(rows)}
    return json.dumps(_rounded(made), ensure_ascii=False)


def heading(what: str, facts: Mapping[str, Any]) -> str:
    """The line over a table: what was measured, on what, when. A fact that is None, as who was compared is when nobody
    was, stands in the JSON alone."""
    here = machine()
    details = ", ".join(f"{value} {key}" if isinstance(value, int) else str(value) for key, value in facts.items()
                        if value is not None)
    return f"{what}: {details}; {here['cores']} cores of {here['cpu']}, {datetime.date.today().isoformat()}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def plot_target(asked: Optional[str], otherwise: str) -> Optional[str]:
    """The file a plot will be written to; None, after saying so, when none was asked for and matplotlib is missing.

    Raises:
        UserError: --plot without matplotlib, to no folder, or over a file that the bench did not write.
    """
    import importlib.util

    path = asked or otherwise
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UserError("the folder does not exist", where=f"--plot {path}")
    if importlib.util.find_spec("matplotlib") is None:
        if asked is not None:
            raise UserError("matplotlib is not installed", where="--plot", fix="Run: pip install matplotlib")
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    if os.path.lexists(path):
        if not os.path.isfile(path):
            raise UserError("is not a file", where=f"--plot {path}")
        with open(path, "rb") as file:
            if _MADE_BY.encode() not in file.read(4096):
                raise UserError("there is a file that the bench did not write", where=f"--plot {path}",
                                fix="Give another name.")
    return path


class Bars(NamedTuple):
    """One group of bars per label, one bar per series.

    Attributes:
        title: over the plot.
        unit: of the values.
        labels: the groups.
        series: name -> values, one a group, None for no bar.
        limit: name -> values, drawn as a line over each group: what the machine allowed.
    """

    title: str
    unit: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[Optional[float]]]
    limit: Optional[Mapping[str, Sequence[float]]] = None


def write_plot(path: str, bars: Bars) -> None:
    """Draw and write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6.4, 1.4 * len(bars.labels) + 2.4), 4.4), dpi=120)
    width = 0.8 / len(bars.series)
    for number_, (name, values) in enumerate(bars.series.items()):
        places = [i - 0.4 + width * (number_ + 0.5) for i, value in enumerate(values) if value is not None]
        drawn = axes.bar(places, [value for value in values if value is not None], width * 0.94, label=name)
        axes.bar_label(drawn,
                       [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values if value is not None],
                       fontsize=8, padding=1)
    for name, values in (bars.limit or {}).items():
        axes.hlines(values, [i - 0.45 for i in range(len(values))], [i + 0.45 for i in range(len(values))],
                    colors="black", linestyles="dashed", linewidth=1.2, label=name)
    axes.set_xticks(range(len(bars.labels)), bars.labels)
    axes.set_ylabel(bars.unit)
    axes.set_title(bars.title, fontsize=10, pad=26)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": _MADE_BY})
    pyplot.close(figure)
    write_small(path, content.getvalue())


def speeds(rows: Sequence[Mapping[str, Any]], key: str, theirs: str) -> Dict[str, Sequence[float]]:
    """Bars of ours and, where it took turns (its rows have hf_<key>), of transformers under the name `theirs`."""
    keys = {"qwen15": key, theirs: f"hf_{key}"}
    return {name: [row[of] for row in rows] for name, of in keys.items() if of in rows[0]}


def show(what: str, argv: Sequence[str], found: Measured, plot: Optional[str]) -> None:
    """Print the table, write the plot, and end with the line of JSON."""
    print(heading(what, found.facts) + "\n")
    print(table(found.columns, found.rows))
    if plot is not None and found.bars is not None:
        write_plot(plot, found.bars)
        print(f"\nplot: {plot}")
    print(json_line(what, argv, found.facts, found.rows), flush=True)
