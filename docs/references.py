"""Griffe extension for the reference.

The docstrings' Sphinx roles become links, and the adapters stand where they are installed, in ``qif_plugins.adapters``.
"""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`(?P<target>[^`]+)`")


class References(griffe.Extension):
    """Rewrites docstrings before mkdocstrings renders them."""

    def on_package(self, *, pkg, loader, **kwargs):
        if pkg.path == "qif_plugins" and "adapters" not in pkg.members:
            pkg.set_member("adapters", loader.load("adapters"))  # the folder at the repository's root

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            text = ROLE.sub(lambda match: link(match["target"], obj), obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def link(target, scope):
    """Link a role's target, which shows as code where the reference has no entry of that name.

    Args:
        target: As in Sphinx: ``~`` shows the last part alone, a leading dot is left out.
        scope: The object that the docstring belongs to; names are looked up from there outwards.
    """
    path = target.lstrip("~").lstrip(".")
    shown = path.rpartition(".")[2] if target.startswith("~") else path
    first, dot, rest = path.partition(".")
    try:
        identifier = scope.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        identifier = path
    return f'<autoref identifier="{identifier}" optional><code>{shown}</code></autoref>'
