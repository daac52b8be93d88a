"""``python -m sharpkit`` is the command line."""

from sharpkit.cli import main

main()
