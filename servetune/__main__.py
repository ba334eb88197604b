"""`python -m servetune` is the command `servetune`."""

from servetune.cli import main

main()
