"""Several hosts on one machine: network namespaces whose links have a given speed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from dat_ds.errors import ConfigError

_SUBNET = "10.213.7"
_BURST, _LATENCY = "64kb", "50ms"


class ShapedNetwork:
    """Hosts that are connected by a switch, each by a link of its own; use it as a context.

    Traffic between hosts stays inside the machine, and each link carries at most ``mbit`` megabits
    a second in each direction (a token bucket filter at both of its ends).

    Args:
        hosts: Number of hosts, at most 250.
        mbit: Speed of every link.

    Raises:
        ConfigError: Without the tools or the rights that it takes.
    """

    def __init__(self, hosts: int, mbit: float) -> None:
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise ConfigError(f"{' and '.join(missing)} not found: apt install iproute2.")
        if os.geteuid() != 0:
            raise ConfigError("Network namespaces take root: run this command as root.")
        self.hosts, self.mbit = hosts, mbit
        self._name = f"dat{os.getpid() % 100_000}"  # Linux allows 15 characters

    def __enter__(self) -> ShapedNetwork:
        """Make the hosts."""
        try:
            _ip("link", "add", self._name, "type", "bridge")
            _ip("link", "set", self._name, "up")
            for host in range(self.hosts):
                self._add_host(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove them."""
        for host in range(self.hosts):
            # Takes the host's end of its link along, and with it the other end.
            _ip("netns", "del", self._host(host), check=False)
        _ip("link", "del", self._name, check=False)

    def address(self, host: int) -> str:
        """IP address of a host."""
        return f"{_SUBNET}.{host + 1}"

    def interface(self, host: int) -> str:
        """Name of a host's network interface, inside it."""
        return f"{self._name}n{host}"

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """A command line that runs on a host."""
        return ["ip", "netns", "exec", self._host(host), *words]

    def _host(self, host: int) -> str:
        return f"{self._name}h{host}"

    def _add_host(self, host: int) -> None:
        name, inside, outside = self._host(host), self.interface(host), f"{self._name}p{host}"
        shaped = ["root", "tbf", "rate", f"{self.mbit:g}mbit", "burst", _BURST, "latency", _LATENCY]
        _ip("netns", "add", name)
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", name)
        _ip("link", "set", outside, "master", self._name)
        _ip("link", "set", outside, "up")
        _run(["tc", "qdisc", "add", "dev", outside, *shaped])
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", inside)
        _ip("-n", name, "link", "set", inside, "up")
        _run(["tc", "-n", name, "qdisc", "add", "dev", inside, *shaped])


def _ip(*words: str, check: bool = True) -> None:
    _run(["ip", *words], check=check)


def _run(words: list[str], *, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise ConfigError(f"{' '.join(words)}: {done.stderr.strip()}")
