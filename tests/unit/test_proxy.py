"""An owner's proxy: which are taken, where a login may stand, and that it is shown nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.address import Address, parse_address
from client.proxy import VARIABLE, Proxy, chosen_proxy, read_proxy
from protocol.errors import AddressMalformed, ProxyUnusable

SECRET = "p%40ss-word"
LOGIN = f"http://user:{SECRET}@proxy.example:3128"


def test_addresses_are_read_and_shown() -> None:
    for text, host in (
        ("fl.example.org:8443", "fl.example.org"),
        ("localhost:1", "localhost"),
        ("192.0.2.7:65535", "192.0.2.7"),
        ("[2001:db8::1]:8443", "2001:db8::1"),
    ):
        address = parse_address(text)
        assert (address.host, str(address)) == (host, text)


def test_a_proxy_has_an_address_and_perhaps_a_login() -> None:
    assert read_proxy("http://proxy.example:3128/") == Proxy(Address("proxy.example", 3128))
    assert read_proxy("http://[::1]:80").address == Address("::1", 80)
    assert read_proxy(LOGIN).login == ("user", "p@ss-word")
    assert read_proxy("http://user@proxy.example:80").login == ("user", "")


def test_a_login_is_shown_nowhere() -> None:
    proxy = read_proxy(LOGIN)
    assert str(proxy) == "proxy.example:3128"
    assert "word" not in repr(proxy)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "socks5://proxy.example:1080",
            "https://proxy.example:3128",
            "proxy.example:3128",
            "proxy.example",
        ),
        *(
            "http://proxy.example",
            "http://proxy.example:0",
            "http://",
            "http://[::1:80",
            "//proxy.example:80",
        ),
        *("http://proxy.example:80/path", "http://proxy.example:80?a", f"socks5://user:{SECRET}@host:1"),
        *(f"http://user:{SECRET}@", f"http://user:{SECRET}@host:x", f"http://user:{SECRET}@host:1/x"),
    ],
)
def test_what_is_not_supported_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ProxyUnusable) as caught:
        read_proxy(text)
    assert "word" not in caught.value.explain()
    assert caught.value.exit_code == 2


def test_the_command_line_goes_before_the_environment_and_holds_no_login() -> None:
    both = {VARIABLE: LOGIN}
    chosen = chosen_proxy("http://other.example:80", both)
    assert chosen is not None
    assert str(chosen) == "other.example:80"
    assert chosen_proxy(None, both) == read_proxy(LOGIN)
    assert chosen_proxy(None, {}) is None
    assert chosen_proxy("", both) is None, "an empty option is none"
    with pytest.raises(ProxyUnusable, match=VARIABLE) as caught:
        chosen_proxy(LOGIN, {})
    assert "word" not in caught.value.explain()


def test_a_node_ends_before_it_asks_for_anything(tmp_path: Path) -> None:
    """A malformed address, a proxy that is not supported; no passphrase, no home."""
    environment = {name: value for name, value in os.environ.items() if "PASSPHRASE" not in name}
    for options, kind in (
        (["--server", "https://host:1"], AddressMalformed),
        (["--server", "host:1", "--proxy", "socks5://127.0.0.1:1080"], ProxyUnusable),
        (["--server", "host:1", "--proxy", LOGIN], ProxyUnusable),
    ):
        command = [sys.executable, "-m", "fedseal", "client", "--home", str(tmp_path), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == kind.exit_code, done.stderr
        assert kind.code in done.stderr
        assert "Traceback" not in done.stderr
        assert "word" not in done.stderr + done.stdout
