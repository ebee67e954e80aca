"""Docstrings are written with Sphinx's roles; here they become Markdown for the site."""

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
_BLOCK = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    """Turns ``:class:`Name``` into code and the ``::`` before an indented block into a colon."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called for each module, class, function and attribute that was read."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _BLOCK.sub(":", text)
