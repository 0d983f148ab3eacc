"""``python -m slotpool`` is the command line."""

from .cli import main

main()
