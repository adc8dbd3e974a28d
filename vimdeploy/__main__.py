"""`python -m vimdeploy`."""

from vimdeploy.cli.main import main

main()
