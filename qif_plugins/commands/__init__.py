"""The subcommands of ``qif``, one module each; see :mod:`qif_plugins.cli`."""
