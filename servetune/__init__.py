"""servetune: serve a vision-language model that learns from the unlabeled questions it is asked."""

from importlib.metadata import version

__version__ = version("servetune")
