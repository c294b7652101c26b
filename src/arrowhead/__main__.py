"""`python -m arrowhead` is the command line."""

from arrowhead.cli.main import main

main()
