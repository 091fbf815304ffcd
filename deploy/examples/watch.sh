#!/bin/sh
# Signals that may be acted on now, a line for each horizon: close, symbol, end, lowest and highest quantile, rise.
# Needs mosquitto_sub and jq:  watch.sh [ROOT [OPTIONS OF mosquitto_sub]], such as -h HOST -u USER -P PASSWORD
set -eu
root=${1:-barcast/v1}
[ $# = 0 ] || shift
mosquitto_sub -V mqttv5 -q 1 -t "$root/signals/#" "$@" |
  jq -r --unbuffered 'select(.schema == 1 and .tradable and (.valid_until | fromdate) > now)
    | . as $s | range(.horizons | length)
    | [$s.close_time, $s.symbol, $s.horizons[.].end_time, $s.quantiles[.][0], $s.quantiles[.][-1], $s.rise[.]] | @tsv'
