"""What is seen of an instance: the newest of everything, whether it is at work, and nothing made up."""

import math

import msgspec
import pytest

from barcast.daemon import wire
from barcast.daemon.client import NewerSchemaError
from barcast.daemon.watch import Moment, Row, Seen
from tests.seen import CLOSE, HOUR, SECOND, done, moment, notice, seen, signal, status, target, topic


def test_figures_are_those_of_the_message():
    """Prices, probabilities and coverage are the message's; move, width and skew follow from its prices."""
    body = signal()
    row = Row.of(body)
    for i, bars in enumerate((1, 4)):
        said, prices = row.figures[bars], dict(zip(body.levels, body.quantiles[i], strict=True))
        assert (said.median, said.rise, said.inside) == (prices[0.5], body.rise[i], [0.904, 0.871][i])
        assert said.half == (prices[0.25], prices[0.75])
        assert said.most == (prices[0.05], prices[0.95])
        assert said.move == prices[0.5] / body.reference - 1
        assert said.width == (prices[0.95] - prices[0.05]) / body.reference
        low, middle, high = (math.log(prices[level]) for level in (0.05, 0.5, 0.95))
        assert said.skew == pytest.approx((high + low - 2 * middle) / (high - low))
        assert (said.outcomes, said.end_time) == ([250, 247][i], body.horizons[i].end_time)
    assert (row.close, row.until) == (CLOSE, CLOSE + 2 * HOUR)


def test_what_a_signal_does_not_say_is_nothing():
    """Without such levels or coverage there is no interval and no share: none is made up between levels."""
    body = signal(levels=[0.1, 0.9], quantiles=[[99.0, 102.0]] * 2, coverage=None)
    said = Row.of(body).figures[1]
    assert (said.median, said.half, said.most, said.move, said.width, said.skew) == (None,) * 6
    assert (said.inside, said.rise) == (None, 0.53)


def test_newest_of_each_symbol_and_strategy_counts():
    """An older signal or target that comes later, as at a redelivery, replaces nothing."""
    old, new = CLOSE, CLOSE + HOUR
    found = seen(signal(close=new), signal(close=old), target(close=new, target=0.5), target(close=old))
    assert found.rows["BTCUSD"].close == new
    assert found.targets["BTCUSD"]["drift"].target.target == 0.5
    assert found.strategies == ["drift"]
    assert found.horizons == [1, 4]


def test_group_is_followed_until_it_is_complete():
    """The signals of the newest close are counted towards what there will be; then the end is told."""
    found = seen(signal("A"), signal("B", close=CLOSE - HOUR), signal("A"))
    assert (found.close, len(found.came), found.due, found.done) == (CLOSE, 1, 3, None)
    found = seen(signal("A"), done(symbols=["A"], missing=["B"]), at=moment(2.5))
    assert (found.done.missing, found.took) == (["B"], int(2.5 * SECOND))
    again = [done(), done(), done(straggler=True), done(CLOSE + HOUR, shed=True)]
    found = seen(*again)
    assert (found.groups, found.stragglers, found.shed) == (2, 1, 1)


def test_what_was_taken_back_is_gone():
    """An empty retained message removes what the one before it said."""
    found = seen(signal(), target(), notice())
    for body in (signal(), target(), notice()):
        found.take(topic(body), b"", moment())
    assert (found.rows, found.targets, found.model) == ({}, {"BTCUSD": {}}, None)


@pytest.mark.parametrize(
    ("body", "word", "why"),
    [
        (status(), "LIVE", ""),
        (status(paused=True), "PAUSED", "an operator paused the daemon"),
        (status("starting"), "STARTING", "the daemon is starting"),
        (status("deaf"), "DEAF", "hears no bars"),
        (status("full"), "FULL", "disk"),
        (status("stopped"), "STOPPED", "was stopped"),
        (status("lost"), "OFFLINE", "lost its connection, or its life"),
    ],
)
def test_daemon_stands_as_its_status_says(body, word, why):
    """Each state has a word and a sentence; a daemon at work needs none."""
    standing = seen(body).standing(moment())
    assert standing.word == word
    assert why in standing.why
    assert bool(standing.why) == bool(why)


def test_connection_comes_before_what_is_known():
    """Connecting, no broker, no status yet, silence, and again live: each is told for what it is."""
    found = seen(linked=False)
    assert found.standing(moment(3)).word == "CONNECTING"
    found.link(True, "", moment(4))
    assert found.standing(moment(5)).word == "NO STATUS"
    assert "barcast/v1/status/desk" in found.standing(moment(5)).why
    said = status(time=wire.to_text(CLOSE + 6 * SECOND))
    found.take(topic(said), msgspec.json.encode(said), moment(6))
    assert found.standing(moment(36)).word == "LIVE"
    assert found.standing(moment(36.5)).word == "SILENT"
    found.link(False, "refused", moment(40))
    standing = found.standing(moment(52))
    assert (standing.word, standing.why[:18]) == ("NO BROKER", "for 12 s: refused;")
    found.link(True, "", moment(60))
    assert found.standing(moment(61)).word == "NO STATUS"  # what was known before may be long over


def test_a_status_that_the_broker_kept_is_as_old_as_it_says():
    """A daemon that went without a last will is silent; where a clock is wrong, the second one tells."""
    kept = status(time=wire.to_text(CLOSE - 40 * SECOND))
    found = seen(kept)
    assert found.standing(moment()).word == "SILENT"
    found.take(topic(kept), msgspec.json.encode(kept), moment(13))
    assert found.standing(moment(14)).word == "LIVE"
    rehearsal = Seen("barcast/v1", "desk", "1h", moment(0), speed=3600.0)
    rehearsal.link(True, "", moment(0))
    rehearsal.take(topic(kept), msgspec.json.encode(kept), moment(1))
    assert rehearsal.standing(moment(2)).word == "LIVE"


def test_last_will_of_an_earlier_start_says_nothing():
    """A daemon that was started anew is not offline because of the end of the one before."""
    found = seen(status(boot="new"), status("lost", boot="old"))
    assert found.standing(moment()).word == "LIVE"


def test_silence_is_in_real_seconds():
    """A rehearsal's clock runs faster: what passes on it is no silence."""
    found = seen(status())
    assert found.standing(Moment(CLOSE + 100 * HOUR, 20.0)).word == "LIVE"


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        msgspec.json.encode(signal(reference=0.0)),
        msgspec.json.encode(signal(quantiles=[[-1.0] * 7] * 2)),
        msgspec.json.encode(signal(reference=1e-300, quantiles=[[1e-300, 1, 2, 3, 4, 5, 1e308]] * 2)),
        msgspec.json.encode(signal(rise=[0.5])),
        msgspec.json.encode(signal(valid_until="soon")),
        msgspec.json.encode(signal(close_time="2026-01-05T15:00:00")),
    ],
)
def test_bad_messages_are_counted_and_change_nothing(payload):
    """Whatever is published in the instance's place, the watching goes on."""
    found = seen(signal("A"))
    found.take(topic(signal()), payload, moment())
    assert (list(found.rows), found.unreadable) == (["A"], 1)


@pytest.mark.parametrize("wrong", [{"close_time": "soon"}, {"valid_until": "soon"}])
def test_a_target_without_times_is_none(wrong):
    """Neither is it drawn, nor does it stand in the way of the next one."""
    found = seen(signal(), target(**wrong))
    assert (found.targets.get("BTCUSD", {}), found.unreadable) == ({}, 1)
    found.take(topic(target()), msgspec.json.encode(target()), moment())
    assert found.targets["BTCUSD"]["drift"].target == target()


def test_newer_messages_end_it():
    """What only a newer barcast understands is not shown in part."""
    with pytest.raises(NewerSchemaError, match="install the barcast that the daemon has"):
        seen(signal(schema=2))
