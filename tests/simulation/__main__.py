"""Play one schedule, or many over the cores."""

import argparse
import tempfile
import time
from pathlib import Path

from tests.simulation.world import play, prepared

parser = argparse.ArgumentParser()
parser.add_argument("first", type=int)
parser.add_argument("count", type=int)
a = parser.parse_args()
from collections import Counter
total = Counter(); bad = 0
with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, prepared():
    t=time.process_time()
    for seed in range(a.first, a.first+a.count):
        o = play(seed, Path(folder))
        total.update(o.happened)
        if a.count==1: print("\n".join(o.history))
        if o.violations: bad+=1; print(seed, o.violations[:3])
    t=time.process_time()-t
for k,v in sorted(total.items()): print(k,v)
print(bad, t/a.count*1e3, "ms", o.steps, o.events)
