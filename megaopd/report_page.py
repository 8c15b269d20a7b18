"""An HTML page that opens anywhere: no script, no network, light or dark as the reader has it.

Whatever a model or a data set wrote comes to a page through `html.escape`. Should one piece be
forgotten, the page's policy still lets no script run and nothing be fetched.
"""

from __future__ import annotations

from html import escape
from pathlib import Path


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a page; a reader sees the old one or the new one.

    Args:
        title: plain text.
        body: HTML; characters that UTF-8 has not (half a surrogate pair) are written as escapes.
    """
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { --page: #f9f9f7; --card: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --muted: #6f6d68;
  --grid: #e5e4df; --axis: #b9b7ae; --good: #006300; --bad: #b3261e;
  --series-1: #2a78d6; --series-2: #eb6834; --series-3: #1baf7a; --series-4: #eda100;
  --series-5: #4a3aa7; --series-6: #e87ba4; --series-7: #898781; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d0d0d; --card: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --muted: #a09e97;
    --grid: #2c2c2a; --axis: #52514e; --good: #4fbf4f; --bad: #f08080;
    --series-1: #3987e5; --series-2: #d95926; --series-3: #199e70; --series-4: #c98500;
    --series-5: #9085e9; --series-6: #d55181; --series-7: #898781; } }
body { margin: 0 auto; padding: 24px; max-width: 1080px; background: var(--page);
  color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 22px; margin: 0 0 16px; } .state { margin: -10px 0 16px; color: var(--soft); }
h2 { font-size: 16px; margin: 28px 0 10px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tiles div { background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  padding: 10px 14px; }
.tiles span { display: block; color: var(--soft); font-size: 12px; }
.tiles b { font-size: 20px; font-weight: 600; }
.tiles small { color: var(--soft); font-size: 14px; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px 14px 6px; background: var(--card);
  border: 1px solid var(--grid); border-radius: 8px; display: flex; flex-direction: column; }
figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--soft); font-size: 12px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 5px; }
svg { width: 100%; height: auto; margin-top: auto; }
.tick { font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); } .axis { stroke: var(--axis); }
.reference { stroke: var(--muted); stroke-dasharray: 5 4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.hover { fill: var(--ink); fill-opacity: 0; } .hover:hover { fill-opacity: 0.07; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--grid); }
.samples { width: 100%; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--grid); text-align: left;
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
pre { margin: 0; max-height: 14em; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 12.5px/1.45 ui-monospace, monospace; }
.right { color: var(--good); font-size: 12px; } .wrong { color: var(--bad); font-size: 12px; }
"""
