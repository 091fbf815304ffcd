"""The daemon with a fast heartbeat, so that a test need not wait half a minute for its absence."""

from barcast.backtest.cli import main
from barcast.daemon import app

HEARTBEAT_SECONDS = 0.5

if __name__ == "__main__":
    app.HEARTBEAT_SECONDS = HEARTBEAT_SECONDS
    main()
