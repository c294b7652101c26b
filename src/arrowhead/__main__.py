"""`python -m arrowhead` is the command line."""

from arrowhead.cli import main

main()
