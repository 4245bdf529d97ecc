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
            # The folder at the repository's root, read without extensions, which meet it as a part of the package.
            finder = griffe.GriffeLoader(
                extensions=griffe.Extensions(),
                search_paths=[pkg.filepath.parent.parent],
                lines_collection=loader.lines_collection,
                modules_collection=loader.modules_collection,
            )
            pkg.set_member("adapters", finder.load("adapters"))
            host = pkg["adapters.spikingjelly"]
            for name, member in list(host.members.items()):  # of the two versions Griffe takes the last, 0.0.0.0.14
                if member.is_alias and ".v0." in member.target_path:
                    host.set_member(name, griffe.Alias(name, f"qif_plugins.adapters.spikingjelly.v2.{name}"))

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            text = ROLE.sub(lambda match: link(match["target"], obj), obj.docstring.value)
            text = re.sub(r"^\s*::$", "", text, flags=re.MULTILINE)
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
