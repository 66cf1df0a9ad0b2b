"""``python -m lensbridge`` is the command ``lensbridge``."""

from .cli import main

main()
