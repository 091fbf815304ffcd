"""A feed and a reader on one broker: sends bars, and prints the signals that come of them.

market.py ROOT BARS SYMBOL...     ROOT a root topic, BARS a file with an array of bars
"""

import sys
import threading
from pathlib import Path

import paho.mqtt.client as paho

ROOT, BARS, *SYMBOLS = sys.argv[1:]


def client(user: str) -> paho.Client:
    """A client that has logged in; each user's password is the name."""
    c = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    c.username_pw_set(user, user)
    c.connect("127.0.0.1", 1883)
    return c


seen: dict[str, bytes] = {}
subscribed, complete = threading.Event(), threading.Event()
reader, feed = client("reader"), client("feed")


def note(_client: object, _data: object, message: paho.MQTTMessage) -> None:
    """Keep the signal of a symbol, and count."""
    seen[message.topic] = message.payload
    if len(seen) == len(SYMBOLS):
        complete.set()


reader.on_message = note
reader.on_subscribe = lambda *_: subscribed.set()
reader.subscribe([(f"{ROOT}/signals/session/{symbol}", 1) for symbol in SYMBOLS])
reader.loop_start()
assert subscribed.wait(10)
feed.loop_start()
feed.publish(f"{ROOT}/bars/session", Path(BARS).read_bytes(), qos=1).wait_for_publish(10)
complete.wait(40)
for payload in seen.values():
    print(payload.decode())
