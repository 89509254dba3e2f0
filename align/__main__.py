"""`python -m align`, so that `accelerate launch -m align STAGE CONFIG` works."""

from align.cli import main

main()
