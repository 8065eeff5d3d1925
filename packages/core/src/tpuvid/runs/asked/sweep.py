"""What a sweep shows at the end: a contact sheet with labels (PNG), and a page that plays its videos side by side (HTML)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tpuvid.files.atomic import atomic_path
from tpuvid.runs.asked.items import label

INDEX_PAGE, SHEET = "index.html", "sweep.png"
TILE = 256
"""Pixels of a picture's larger side on the sheet."""
TEXT, GAP = 14, 8
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #fff; color: #111 }
table { border-collapse: collapse } th, td { padding: .4rem; text-align: left; vertical-align: top; font-weight: normal }
video { display: block; width: var(--size, 256px); background: #ddd } .failed { width: var(--size, 256px); color: #a00 }
figure { margin: 0 } figcaption { font-size: .85em; color: #555 } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
label, button { margin-right: 1rem }
"""
SCRIPT = """
const all = () => document.querySelectorAll('video');
document.getElementById('play').onclick = () => all().forEach(v => { v.currentTime = 0; v.play(); });
document.getElementById('pause').onclick = () => all().forEach(v => v.pause());
document.getElementById('size').oninput = e => document.body.style.setProperty('--size', e.target.value + 'px');
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: of `prompt` with the values that were swept."""

    prompt: str
    values: Mapping[str, Any]
    video: Path | None
    """The video; None where it failed."""


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of one prompt: the last axis goes across, the others go down."""

    prompt: str
    rows: Sequence[Sequence[Cell]]


def write_pages(folder: Path, cells: Sequence[Cell]) -> dict[str, Path]:
    """Write both into `folder`, over those of an earlier run."""
    tables = _tables(cells)
    page, sheet = folder / INDEX_PAGE, folder / SHEET
    with atomic_path(sheet, overwrite=True) as temporary:
        _draw(tables).save(temporary, format="PNG")
    with atomic_path(page, overwrite=True) as temporary:
        temporary.write_text(_page(tables), "utf-8")
    return {"sweep": page, "labelled contact sheet": sheet}


def _tables(cells: Sequence[Cell]) -> list[Table]:
    prompts: dict[str, dict[tuple, list[Cell]]] = {}
    for cell in cells:
        *down, _ = cell.values.items()
        prompts.setdefault(cell.prompt, {}).setdefault(tuple(down), []).append(cell)
    return [Table(prompt, list(rows.values())) for prompt, rows in prompts.items()]


def _page(tables: Sequence[Table]) -> str:
    body = []
    for table in tables:
        body.append(f"<h2>{html.escape(table.prompt)}</h2>\n<table>")
        for row in table.rows:
            *down, _ = row[0].values.items()
            heading = f"<th>{html.escape(label(dict(down)))}</th>" if down else ""
            body.append(f"<tr>{heading}{''.join(_cell(cell) for cell in row)}</tr>")
        body.append("</table>")
    newline = "\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>tpuvid sweep</title>\
<style>{STYLE}</style></head>
<body>
<p><button id="play">Play all from the start</button><button id="pause">Pause all</button>
<label>Size <input id="size" type="range" min="64" max="720" value="256"></label></p>
{newline.join(body)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _cell(cell: Cell) -> str:
    caption = html.escape(label(cell.values))
    if cell.video is None:
        shown = '<div class="failed">failed</div>'
    else:
        shown = f'<video src="{html.escape(quote(cell.video.name))}" autoplay loop muted playsinline controls></video>'
    return f"<td><figure>{shown}<figcaption>{caption}</figcaption></figure></td>"


def _draw(tables: Sequence[Table]) -> Any:
    """The middle frame of every video, under the values that made it."""
    from PIL import Image, ImageDraw, ImageFont

    from tpuvid.runs.compare import middle_frame

    font = ImageFont.load_default(size=TEXT)
    pictures = {cell.video: middle_frame(cell.video) for table in tables for row in table.rows for cell in row if cell.video}
    sizes = [_fit(picture.shape[1], picture.shape[0]) for picture in pictures.values()] or [(TILE, TILE)]
    labels = [label(cell.values) for table in tables for row in table.rows for cell in row]
    text_width = max((int(font.getlength(text)) for text in labels), default=0)
    width, height = max(max(w for w, _ in sizes), text_width), max(h for _, h in sizes)
    line = TEXT + GAP
    columns = max(len(row) for table in tables for row in table.rows)
    rows = sum(len(table.rows) for table in tables)
    total = GAP + columns * (width + GAP), GAP + rows * (height + line + GAP) + len(tables) * line
    sheet = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for table in tables:
        draw.text((GAP, top), _shortened(table.prompt, font, total[0] - 2 * GAP), fill="black", font=font)
        top += line
        for row in table.rows:
            for column, cell in enumerate(row):
                left = GAP + column * (width + GAP)
                draw.text((left, top), label(cell.values), fill="black", font=font)
                if cell.video:
                    picture = Image.fromarray(pictures[cell.video])
                    sheet.paste(picture.resize(_fit(*picture.size)), (left, top + line))
                else:
                    draw.text((left, top + line), "failed", fill="red", font=font)
            top += height + line + GAP
    return sheet


def _fit(width: int, height: int) -> tuple[int, int]:
    zoom = TILE / max(width, height)
    return max(1, round(width * zoom)), max(1, round(height * zoom))


def _shortened(text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
