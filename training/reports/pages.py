"""Self-contained HTML pages: nothing in them refers to anything outside."""

import html
from collections.abc import Sequence


def page(title: str, sections: Sequence[str]) -> str:
    """The whole page; ``sections`` are HTML, ``title`` is text."""
    return PAGE.format(title=html.escape(title), body="\n".join(sections))


def table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """``rows`` of text, the header first, which may be empty. ``kind`` is its class: numbers do not wrap, facts do."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    head = f"<thead><tr>{head}</tr></thead>" if any(rows[0]) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<div class='wide'><table class='{kind}'>{head}<tbody>{body}</tbody></table></div>"


def folded(title: str, text: str) -> str:
    """``text`` as it is, behind a line that opens it."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


# What stands above pictures of posteriors.
ALONG_ATTACK = (
    "<h2>Target posteriors along an attack</h2>",
    "<p>The first test samples, attacked by the cross-entropy of the trained model. The target of direct SCORE is the "
    "posterior at the attacked point; the target of a surrogate would be 1 at every step.</p>",
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 1080px;
  margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .25rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .4rem; }}
.lead {{ font-size: 1.1rem; max-width: 52rem; }}
.note {{ color: #666; font-size: .9rem; max-width: 52rem; }}
.wide {{ overflow-x: auto; }}
img {{ max-width: 100%; height: auto; display: block; }}
@media (max-width: 700px) {{ .wide img {{ max-width: none; width: 700px; }} }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .4rem .9rem .4rem 0; vertical-align: top; }}
tbody td {{ white-space: nowrap; }}
.facts td {{ white-space: normal; }}
thead th {{ border-bottom: 2px solid #222; font-weight: 600; }}
tbody tr {{ border-bottom: 1px solid #e6e6e6; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .82rem; }}
summary {{ cursor: pointer; margin-top: .8rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
