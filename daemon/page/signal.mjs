// What follows from the prices of a signal.

const [LOW, MEDIAN, HIGH] = [0.05, 0.5, 0.95];

/** What the table says of one horizon, as daemon/watch.py defines it; null is what the signal does not say. */
export function figures(signal, horizon) {
  const row = signal.horizons.findIndex((one) => one.bars === horizon);
  if (row < 0) return null;
  const [low, middle, high] = [LOW, MEDIAN, HIGH].map((level) => signal.quantiles[row][signal.levels.indexOf(level)] ?? null);
  const wide = low !== null && high !== null;
  const [down, centre, up] = [low, middle, high].map(Math.log);
  return {
    last: signal.reference,
    width: wide ? (high - low) / signal.reference : null,
    skew: wide && middle !== null && low < high ? (up + down - 2 * centre) / (up - down) : null,
    rise: signal.rise[row],
  };
}

/** Where the median is among the levels (-1: nowhere), and the ends of intervals: the widest, then central ones. */
export function spread(levels) {
  const last = levels.length - 1;
  const central = levels.flatMap((low, k) => {
    const other = low < MEDIAN ? levels.findIndex((high) => Math.abs(low + high - 1) < 1e-9) : -1;
    return other < 0 || (k === 0 && other === last) ? [] : [[k, other]];
  });
  return { median: levels.indexOf(MEDIAN), pairs: last > 0 ? [[0, last], ...central] : [] };
}
