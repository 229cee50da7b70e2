"""The version, once: read by the build, the CLI, `/version` and the package's `__version__`."""

__version__ = "0.1.0"
