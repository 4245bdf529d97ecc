"""MkDocs hook: the docstrings' reStructuredText roles and literal-block colons as Markdown."""

import re

from markdown import Extension
from markdown.preprocessors import Preprocessor

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|ref):`~?(?P<target>[^`]+)`")


def _last(match):
    shown = match["target"] if not match[0].split("`")[1].startswith("~") else match["target"].rsplit(".", 1)[-1]
    return f"`{shown.lstrip('.')}`"


class _Roles(Preprocessor):
    def run(self, lines):
        converted = [ROLE.sub(_last, line) for line in lines]
        return [re.sub(r"::$", ":", line) if line.strip() != "::" else "" for line in converted]


class RolesExtension(Extension):
    def extendMarkdown(self, md):  # noqa: N802
        # After fenced code has been set aside.
        md.preprocessors.register(_Roles(md), "docstring_roles", 20)


def on_config(config):
    config.markdown_extensions.append(RolesExtension())
    return config
