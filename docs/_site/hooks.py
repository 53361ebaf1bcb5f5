"""What the site does to a page beyond Markdown: equations, links to source files, and lists as GitHub reads them."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

SMALL_PRIME = "<msup><mi>x</mi><mi>&#x02032;</mi></msup>"
ROOT = Path(__file__).resolve().parents[2]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Source files are no pages: a link to one becomes its name, once it is certain that the file is there."""
    here = Path(page.file.abs_src_path).parent

    def name(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which does not exist")
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        return link[1] if link[1].startswith("`") else f"`{link[1]}`"

    markdown = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)\)", name, markdown)
    markdown = re.sub(r"^  - ", "    - ", markdown, flags=re.MULTILINE)  # GitHub nests lists by two spaces
    return markdown.replace("<details><summary>", '<details markdown="1"><summary>')


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """TeX becomes MathML, which browsers draw without any script."""

    def equation(found: re.Match[str]) -> str:
        tex = unescape(found["tex"]).strip()
        mathml = convert(tex, display="block" if found["tag"] == "div" else "inline")
        if "\\" in mathml or "<mi>&</mi>" in mathml:
            raise ValueError(f"{page.file.src_uri}: no MathML for {tex}")
        # The prime of x' carries the meaning of whole equations; as a superscript of a superscript it is hard to see.
        mathml = mathml.replace(SMALL_PRIME, "<mrow><mi>x</mi><mtext>&#x02032;</mtext></mrow>")
        return mathml.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.167em" />')

    pattern = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(pattern, equation, html, flags=re.DOTALL)
