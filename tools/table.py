"""Plain tables for the terminal, in Markdown's form so that they can be pasted."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right."""
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).replace("%", "", 1).replace("-", "", 1).replace(",", "").isdigit()


def cost_table(summary: dict[str, Any]) -> str:
    """What a run cost, from `LLM.run_summary`; a second line is what its plan expected."""
    lines = []
    if predicted := summary["predicted"]:
        times = [f"{predicted[name]:.2f}" for name in ("io_wait_ms", "memory_ms", "compute_ms", "total_ms")]
        lines = [["expected", "", "", "", *times]]
    return table(
        ["tokens", "tokens/s", "MiB read/token", "cache hits", "I/O wait ms", "memory ms", "compute ms", "total ms/step"],
        [
            [
                summary["tokens"],
                f"{summary['tokens_per_s']:.1f}",
                f"{summary['mib_per_token']:.3f}",
                f"{100 * summary['cache_hit_rate']:.1f}%" if summary["predicted_share"] else "-",
                f"{summary['io_wait_ms']:.2f}",
                f"{summary['memory_ms']:.2f}",
                f"{summary['compute_ms']:.2f}",
                f"{summary['total_ms']:.2f}",
            ],
            *lines,
        ],
    )
