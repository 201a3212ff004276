"""A benchmark for people: a Markdown table, and a bar chart."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffexport.bench import Figure, Report
from diffexport.bench_work import MATRIX, STEPS

_PAPER, _INK, _OURS, _PEERS = "#ffffff", "#1f2328", "#2563a8", "#9aa4ae"
_ROW, _LABEL, _BAR, _MARGIN = 26, 210, 520, 24


def markdown(report: Report) -> str:
    """What was measured, a table a batch."""
    lines = [
        f"{report.model}, {report.parameters / 1e6:.1f} M parameters{_work(report)}. "
        f"{report.cores} cores of {report.processor}. Each contender in a process of its own, in turn with the others.",
    ]
    for batch in dict.fromkeys(figure.batch for figure in report.figures):
        rates = ", ".join(f"{rate:.0f} in {precision}" for precision, rate in report.matrix.get(batch, {}).items())
        lines += [""]
        if rates:
            lines += [
                f"Batch {batch}; a product of two {MATRIX} x {MATRIX} matrices in turn with it: {rates} GFLOP/s.",
                "",
            ]
        lines += [
            f"| batch {batch} | ms a step (quartiles) | s an image, {STEPS} steps | GFLOP/s | of the matrix product "
            "| first start, s | next start, s | memory, MB | error | run / steps |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        figures = [figure for figure in report.figures if figure.batch == batch]
        lines += [_row(figure) for figure in sorted(figures, key=lambda figure: figure.step_ms)]
    lines += _by_batch(report)
    lines += [f"\n{note}" for note in report.notes]
    lines += [f"\nLeft out: {name}: {why}" for name, why in report.left_out.items()]
    return "\n".join(lines) + "\n"


def _work(report: Report) -> str:
    if report.work is None:
        return ""
    gflop, attention = report.work.gflop, report.work.attention
    part = f", of which {attention:.3g} attention" if attention else ""
    return f", {gflop:.3g} GFLOP a guided step of one image{part}"


def _by_batch(report: Report) -> list[str]:
    """What an image takes in each batch, where there are several."""
    batches = list(dict.fromkeys(figure.batch for figure in report.figures))
    if len(batches) < 2:
        return []
    took = {(figure.name, figure.batch): f"{figure.image_ms / 1e3:.3g}" for figure in report.figures}
    lines = ["", f"| s an image, {STEPS} steps | {' | '.join(f'batch {batch}' for batch in batches)} |"]
    lines.append("|---" * (1 + len(batches)) + "|")
    for name in dict.fromkeys(figure.name for figure in report.figures):
        lines.append(f"| {name} | {' | '.join(took.get((name, batch), '') for batch in batches)} |")
    return lines


def _row(f: Figure) -> str:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = (
        f.name,
        f"{f.step_ms:.1f} ({f.low_ms:.1f} to {f.high_ms:.1f})",
        f"{f.image_ms / 1e3:.3g}",
        shown(f.gflops, ".0f"),
        shown(f.of_matrix, ".2f"),
        f"{f.first_ms / 1e3:.2f}",
        f"{f.start_ms / 1e3:.2f}",
        f"{f.memory_mb:.0f}",
        f"{f.error:.1e}",
        shown(f.loop, ".3f"),
    )
    return f"| {' | '.join(cells)} |"


def save_chart(report: Report, path: str | Path) -> None:
    """Write the time of an image as bars, fastest first, a group a batch."""
    batches = list(dict.fromkeys(figure.batch for figure in report.figures))
    longest = max(figure.image_ms for figure in report.figures)
    height = 2 * _MARGIN + _ROW * (len(report.figures) + 2 * len(batches) + 1)
    page = Image.new("RGB", (2 * _MARGIN + _LABEL + _BAR + 110, height), _PAPER)
    draw, title, font = ImageDraw.Draw(page), ImageFont.load_default(16), ImageFont.load_default(13)
    top = _MARGIN
    draw.text((_MARGIN, top), f"{report.model}: seconds an image, {STEPS} guided steps", _INK, title)
    for batch in batches:
        top += 2 * _ROW if batch == batches[0] else int(1.5 * _ROW)
        draw.text((_MARGIN, top), f"batch {batch}", _INK, title)
        for figure in sorted((f for f in report.figures if f.batch == batch), key=lambda f: f.step_ms):
            top += _ROW
            left, middle = _MARGIN + _LABEL, top + _ROW // 2
            draw.text((left - 10, middle), figure.name, _INK, font, anchor="rm")
            end = left + max(2, round(_BAR * figure.image_ms / longest))
            draw.rectangle((left, top + 4, end, top + _ROW - 5), _OURS if figure.ours else _PEERS)
            draw.text((end + 8, middle), f"{figure.image_ms / 1e3:.3g} s", _INK, font, anchor="lm")
    page.crop((0, 0, page.width, top + _ROW + _MARGIN)).save(path, format="PNG")
