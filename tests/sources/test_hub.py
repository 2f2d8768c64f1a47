"""Names on the hub: the cache first, then the network, and a quick end where there is none."""

import time

import pytest
from huggingface_hub import constants

from hybridlm.sources import hub


@pytest.fixture
def online(monkeypatch):
    """No word in the environment; nothing here goes to the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    return monkeypatch


def test_what_is_in_the_cache_asks_no_network(online):
    online.setattr(hub, "is_reachable", lambda: pytest.fail("the network was asked"))
    assert hub.look_up(lambda: constants.HF_HUB_OFFLINE) is True
    assert constants.HF_HUB_OFFLINE is False


def test_what_is_not_there_is_fetched(online):
    online.setattr(hub, "is_reachable", lambda: True)
    seen = []

    def load():
        seen.append(constants.HF_HUB_OFFLINE)
        if constants.HF_HUB_OFFLINE:
            raise OSError("not in the cache")
        return "fetched"

    assert hub.look_up(load) == "fetched"
    assert seen == [True, False]


@pytest.mark.parametrize(("reachable", "offline", "says"), [
    (True, False, "OSError: no such name$"), (False, False, "no such name; the hub cannot be reached"),
    (True, True, "no such name; HF_HUB_OFFLINE is set")])
def test_what_is_nowhere_says_where_it_was_looked_for(online, reachable, offline, says):
    online.setattr(constants, "HF_HUB_OFFLINE", offline)
    online.setattr(hub, "is_reachable", lambda: reachable)

    def load():
        raise OSError("no such name\nmore words")

    with pytest.raises(hub.NotFound, match=says):
        hub.look_up(load)


def test_a_hub_that_does_not_answer_is_given_up_soon(online):
    online.setattr(hub, "CONNECT_TIMEOUT_S", 0.2)

    def connect(address, timeout):
        time.sleep(2)
        raise OSError

    online.setattr(hub.socket, "create_connection", connect)
    start = time.monotonic()
    assert not hub.is_reachable()
    assert time.monotonic() - start < 1.5


def test_a_proxy_is_asked_in_place_of_the_hub(online):
    online.setattr(hub, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise OSError

    online.setattr(hub.socket, "create_connection", connect)
    assert not hub.is_reachable()
    assert asked == [("proxy.example", 3128)]
