"""Docstrings name functions as :func:`name`; the reference pages link them."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|data|mod|attr|exc):`~?([\w.]+)`")


class Roles(Extension):
    """Every role becomes a link where the site describes its target, and code elsewhere."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def link(role: re.Match[str]) -> str:
            name = role[1]
            target = name if name.startswith("scorematch.") else f"{obj.module.path}.{name}"
            return f'<autoref identifier="{target}" optional><code>{name.removeprefix("scorematch.")}</code></autoref>'

        obj.docstring.value = re.sub(r"::\n", ":\n", ROLE.sub(link, obj.docstring.value))
