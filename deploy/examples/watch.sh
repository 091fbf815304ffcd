#!/bin/sh
# Signals that may be acted on now, a line for each horizon: close, symbol, end, lowest and highest quantile, rise.
# Needs mosquitto_sub and jq:  watch.sh [HOST [PORT [ROOT]]]
set -eu
mosquitto_sub -V mqttv5 -q 1 -h "${1:-127.0.0.1}" -p "${2:-1883}" -t "${3:-barcast/v1}/signals/#" |
  jq -r --unbuffered 'select(.schema == 1 and .tradable and (.valid_until | fromdate) > now)
    | . as $s | range(.horizons | length)
    | [$s.close_time, $s.symbol, $s.horizons[.].end_time, $s.quantiles[.][0], $s.quantiles[.][-1], $s.rise[.]] | @tsv'
