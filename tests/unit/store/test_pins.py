from loaderd.server.store.pins import Pins

COMMIT = "a" * 40


def test_a_snapshot_is_held_until_every_holder_has_let_go() -> None:
    pins = Pins()
    first = pins.hold("org/model", COMMIT, "m:1")
    again = pins.hold("org/model", COMMIT, "m:1")
    other = pins.hold("org/model", COMMIT, "m:2")
    assert pins.holders("org/model", COMMIT) == ("m:1", "m:2")
    assert pins.holders("org/model", "b" * 40) == ()
    assert pins.holders("org/other", COMMIT) == ()
    first.release()
    first.release()  # a second time counts for nothing
    assert pins.holders("org/model", COMMIT) == ("m:1", "m:2")
    again.release()
    assert pins.holders("org/model", COMMIT) == ("m:2",)
    other.release()
    assert pins.holders("org/model", COMMIT) == ()
