"""Shows the examples of docstrings as code: they are doctests, and quotations to Markdown."""

from __future__ import annotations

import re

import griffe

EXAMPLE = re.compile(r"^(?P<code> *>>> .*(?:\n.*\S.*)*)", re.MULTILINE)  # to the next empty line


class Doctests(griffe.Extension):
    """Is told of each object that has been read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            text = EXAMPLE.sub("\n```pycon\n\\g<code>\n```\n", obj.docstring.value)
            obj.docstring.value = text.replace("  # doctest: +SKIP", "")
