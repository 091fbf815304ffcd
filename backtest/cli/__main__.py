"""`python -m barcast.backtest.cli`: the command line, also under torchrun."""

from barcast.backtest.cli import main

main()
