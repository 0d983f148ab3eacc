"""What a pool's user is warned of, as it may be meant, and may be dangerous."""

from __future__ import annotations

import ipaddress
import os
import urllib.parse
import warnings

from .config import SlotPoolConfig


class SecurityWarning(UserWarning):
    """A pool is less safe than its user may think. If it is meant so, filter it:
    ``warnings.simplefilter("ignore", SecurityWarning)``.
    """


def warn_of(config: SlotPoolConfig, stacklevel: int) -> None:
    """Warn of what is dangerous in ``config``.

    :param stacklevel: as for :func:`warnings.warn`; 1 is this function's caller.
    """
    for found in _dangers(config):
        warnings.warn(found, SecurityWarning, stacklevel=stacklevel + 1)


def _dangers(config: SlotPoolConfig) -> list[str]:
    found = []
    if config.isolation == "none" and config.backend != "static":
        found.append('isolation="none": what runs in the slots can do whatever its server\'s user can, also to other slots')
    if config.token is not None:
        hosts = {host: None for host in map(_reached_in_clear, config.servers) if host}
        found += [f"servers: the token goes to {host} unencrypted; use https (slotpool serve --tls-cert)" for host in hosts]
    secrets = config.nomad_token or os.environ.get("NOMAD_TOKEN"), config.nomad_http_auth or os.environ.get("NOMAD_HTTP_AUTH")
    if config.backend == "nomad" and any(secrets):
        host = _reached_in_clear(config.nomad_address or "")
        found += [f"nomad_address: Nomad's token goes to {host} unencrypted; use https"] if host else []
    return found


def _reached_in_clear(address: str) -> str:
    """The host of that address, if others may be able to read what is sent there; else nothing."""
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme != "http" or host == "localhost":
        return ""
    try:
        return "" if ipaddress.ip_address(host).is_loopback else host
    except ValueError:
        return host
