"""The settings of a pool: one frozen, validated object, filled from keywords and the environment."""

from __future__ import annotations

import difflib
import math
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any, Callable

import attr

from .errors import ConfigError, shown
from .preparing import Step, are_steps, as_steps

BACKENDS = ("local", "static", "nomad")
DRIVERS = ("docker", "podman", "exec", "raw_exec", "apptainer")
ISOLATIONS = ("auto", "bwrap", "user", "none")

# What standing servers have of their own, by the options of `slotpool serve`.
_OF_SERVERS = (
    "max_output",
    "max_processes",
    "max_memory",
    "max_cpus",
    "max_written",
    "max_disk",
    "readonly_paths",
    "state_dir",
)

_Validator = Callable[[Any, "attr.Attribute[Any]", Any], None]


def _check(expected: str, test: Callable[[Any], bool]) -> _Validator:
    def validate(_: Any, attribute: attr.Attribute[Any], value: Any) -> None:
        if not test(value):
            raise ConfigError(attribute.name, expected, shown(value))

    return validate


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _integer(low: int, high: int) -> _Validator:
    return _check(f"an integer from {low} to {high}", lambda v: _is_int(v) and low <= v <= high)


def _seconds(low: float, high: float) -> _Validator:
    return _check(f"a number of seconds from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high)


def _processors(low: float, high: float) -> _Validator:
    return _check(f"a number of processors from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high)


def _one_of(*choices: str) -> _Validator:
    return _check(" or ".join(repr(c) for c in choices), lambda v: v in choices)


def _text(v: Any) -> bool:
    return isinstance(v, str) and bool(v) and v.isprintable()


def _is_address(address: Any) -> bool:
    if not isinstance(address, str):
        return False
    try:
        parts = urllib.parse.urlsplit(address)
        if parts.port is None and parts.netloc.endswith(":"):
            return False
        return bool((parts.scheme in ("http", "https") and parts.hostname) or (parts.scheme == "unix" and parts.path))
    except ValueError:
        return False


_path = _check("an absolute path", lambda v: _text(v) and os.path.isabs(v))
_names = _check("names", lambda v: isinstance(v, tuple) and all(map(_text, v)))
_string = _check("a non-empty string", _text)


def _secret(_: Any, attribute: attr.Attribute[Any], value: Any) -> None:
    """As a header can carry it (RFC 6750); the error does not show it."""
    if not isinstance(value, str) or not value or not all("!" <= c <= "~" for c in value):
        raise ConfigError(attribute.name, "printable ASCII characters without spaces", "something else (not shown)")


_flag = _check("True or False", lambda v: isinstance(v, bool))


def _or_none(validator: _Validator) -> _Validator:
    def validate(instance: Any, attribute: attr.Attribute[Any], value: Any) -> None:
        if value is not None:
            validator(instance, attribute, value)

    return validate


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple, set)) else value


_setup = _check("bash commands, or functions of a slot", are_steps)
_paths = _check("absolute paths", lambda v: isinstance(v, tuple) and all(_text(p) and os.path.isabs(p) for p in v))
_urls = _check(
    "addresses such as 'http://host:8080'",
    lambda v: isinstance(v, tuple) and all(map(_is_address, v)),
)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _tuples(value: Any) -> Any:
    return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value) if isinstance(value, (list, tuple)) else value


_settings = _check("a mapping with names as keys", lambda v: isinstance(v, Mapping) and all(map(_text, v)))
_variables = _check(
    "a mapping of names to strings",
    lambda v: isinstance(v, Mapping) and all(_text(name) and isinstance(value, str) for name, value in v.items()),
)
_triples = _check(
    "triples of strings (attribute, operator, value)",
    lambda v: (
        isinstance(v, tuple) and all(isinstance(t, tuple) and len(t) == 3 and all(isinstance(s, str) for s in t) for t in v)
    ),
)


def _field(default: Any, validator: _Validator, **more: Any) -> Any:
    return attr.ib(default=default, validator=validator, **more)


@attr.s(frozen=True, kw_only=True, auto_attribs=True)
class SlotPoolConfig:
    """What a pool is made of. Durations are seconds. Every field can be given to :class:`SlotPool` as a keyword instead.

    :ivar backend: where containers come from: ``local`` (server processes on this machine), ``static`` (the standing servers in
        ``servers``), ``nomad``. Default: ``static`` if ``servers`` is given, ``nomad`` if an address is given or the variable
        ``NOMAD_ADDR`` is set, else ``local``.
    :ivar servers: addresses of standing servers, ``http://host:port``, ``https://host:port`` or ``unix:///path``. What limits
        their slots is theirs to say (``slotpool serve``): it is an error to give it here.
    :ivar token: bearer token of those servers. Default: the variable ``SLOTPOOL_TOKEN``.
    :ivar cacert: file of the certificates (PEM) by which those of standing servers at ``https`` addresses are checked. Default:
        the variable ``SLOTPOOL_CACERT``, else the system's.
    :ivar slots_per_container: slots of each container.
    :ivar min_containers: containers that are always there; :meth:`SlotPool.start` waits for them, or for one of ``servers``.
        With 0 the first ``acquire`` starts one.
    :ivar max_containers: containers that demand can bring about.
    :ivar acquire_timeout: how long :meth:`SlotPool.acquire` waits unless told otherwise.
    :ivar start_timeout: how long :meth:`SlotPool.start` waits for ``min_containers``.
    :ivar command_timeout: limit of a command that is given none.
    :ivar lease_ttl: a lease that nobody renews ends after this time. The pool renews its leases; when its process dies,
        its slots come back after this time.
    :ivar prefetch: idle leases kept ready, so that ``acquire`` needn't ask a server. Default: ``slots_per_container`` when
        local, 0 when the servers may be shared with other pools.
    :ivar health_check_interval: longest period between two looks at the containers. Leases are renewed at least
        three times in a ``lease_ttl``.
    :ivar scale_cooldown: pause after a scaling that was refused.
    :ivar scale_down_after: containers that demand does not need any more are ended after this time.
    :ivar isolation: ``auto`` (the strongest that works, never ``none``), ``bwrap``, ``user`` or ``none``. Servers, or a job,
        that stand already and have another are refused.
    :ivar network: whether slots can reach the network. Default: the isolation's own, which is no network for ``bwrap``;
        the other modes can't keep a slot off it.
    :ivar max_output: bytes kept of a command's stdout, and of its stderr.
    :ivar max_file_size: bytes of a file read or written.
    :ivar max_processes: processes and threads of a slot.
    :ivar max_memory: MB of memory for a slot. Default: as much as there is. By control groups where the server may write them
        (:meth:`SlotPool.get_stats` tells under ``limits``), else for each of its processes by itself.
    :ivar max_cpus: processors that a slot may use. Default: its even share of all. Needs control groups.
    :ivar max_written: bytes of each file that a slot's own commands write. Default: as much as fits.
    :ivar max_disk: MB of files in a slot's workspace, and as many in each of ``/tmp``, ``/var/tmp`` and ``/dev/shm``. They are
        kept in memory then, and count towards ``max_memory``. Default: as much as fits. Needs isolation ``bwrap``.
    :ivar setup: what makes each slot ready before it is handed out, once for each clean workspace: a bash command, a function
        that is called with the slot, or a sequence of such steps. :meth:`SlotPool.slot` takes further ones.
    :ivar setup_timeout: limit of each command of a setup.
    :ivar readonly_paths: directories of this machine that slots see, read-only, beside ``/usr`` and the like. With isolation
        ``user`` not below ``/tmp``, ``/var/tmp`` and ``/dev/shm``, and without Landlock file modes alone keep them as they are.
    :ivar state_dir: where local containers keep workspaces. Default: below the system's directory for temporary files.
    :ivar nomad_address: of a Nomad agent, ``http://host:4646`` or ``unix:///path``. Default: ``NOMAD_ADDR``. So it is with
        ``nomad_token nomad_namespace nomad_region nomad_cacert nomad_capath nomad_client_cert nomad_client_key
        nomad_tls_server_name nomad_skip_verify nomad_http_auth``: each is the variable of that name unless it is given.
    :ivar job_id: the Nomad job with the containers; pools with the same one share it.
    :ivar datacenter: name or names of datacenters.
    :ivar driver: ``docker``, ``podman``, ``exec`` and ``raw_exec`` (the server on the node itself), or ``apptainer``.
    :ivar image: of the containers. With the tag ``local`` it is never pulled, but with Docker built where it is missing.
    :ivar server_command: what runs ``slotpool serve`` on a node or in the image. Default: the image's entry point; for ``exec``
        and ``raw_exec`` this interpreter; for ``apptainer`` ``python3``.
    :ivar cpu, memory: of a container, in MHz and MB.
    :ivar privileged, cap_add, volumes: of a container, as Docker has them.
    :ivar env: variables of the servers. Slots don't see them.
    :ivar task_config: more entries for the driver's configuration.
    :ivar node_pool, constraints: where containers may run; a constraint is ``(attribute, operator, value)``.
    :ivar update_job: a job that stands and differs from this configuration: None refuses it, True changes it (its containers
        are replaced), False takes it as it is.
    :ivar purge_job_on_start: remove a job of that name first, with all its containers.
    :ivar auto_build_local_image: build a missing local image.
    :ivar dockerfile_path, docker_build_context: instead of slotpool's own.
    """

    servers: tuple[str, ...] = _field((), _urls, converter=_strings)
    nomad_address: str | None = attr.ib(validator=_or_none(_check("an address such as 'http://host:4646'", _is_address)))
    backend: str = attr.ib(validator=_one_of(*BACKENDS))
    token: str | None = attr.ib(validator=_or_none(_secret), repr=False)
    cacert: str | None = attr.ib(validator=_or_none(_string))
    slots_per_container: int = _field(10, _integer(1, 1000))
    min_containers: int = _field(1, _integer(0, 10_000))
    max_containers: int = _field(10, _integer(1, 10_000))
    prefetch: int = attr.ib(validator=_integer(0, 100_000))
    acquire_timeout: float = _field(30.0, _seconds(0, 86_400))
    start_timeout: float = _field(120.0, _seconds(0.1, 86_400))
    command_timeout: float = _field(30.0, _seconds(0.001, 86_400))
    lease_ttl: float = _field(30.0, _seconds(0.5, 3600))
    health_check_interval: float = _field(30.0, _seconds(0.05, 3600))
    scale_cooldown: float = _field(60.0, _seconds(0, 86_400))
    scale_down_after: float = _field(60.0, _seconds(0, 86_400))
    setup_timeout: float = _field(300.0, _seconds(0.001, 86_400))
    isolation: str = _field("auto", _one_of(*ISOLATIONS))
    network: bool | None = _field(None, _or_none(_flag))
    max_output: int = _field(50_000, _integer(0, 100 * 1024 * 1024))
    max_file_size: int = _field(256 * 1024 * 1024, _integer(1, 1024 * 1024 * 1024))
    max_processes: int = _field(1024, _integer(16, 1_000_000))
    max_memory: int | None = _field(None, _or_none(_integer(16, 100_000_000)))
    max_cpus: float | None = _field(None, _or_none(_processors(0.01, 10_000)))
    max_written: int | None = _field(None, _or_none(_integer(1, 1 << 50)))
    max_disk: int | None = _field(None, _or_none(_integer(1, 100_000_000)))
    setup: tuple[Step, ...] = _field((), _setup, converter=as_steps)
    readonly_paths: tuple[str, ...] = _field((), _paths, converter=_strings)
    state_dir: str | None = _field(None, _or_none(_path))

    job_id: str = _field("slotpool-sandbox", _string)
    datacenter: tuple[str, ...] = _field(("dc1",), _names, converter=_strings)
    image: str = _field("slotpool-sandbox:local", _string)
    driver: str = _field("docker", _one_of(*DRIVERS))
    server_command: tuple[str, ...] = _field((), _names, converter=_strings)
    task_config: Mapping[str, Any] = _field({}, _settings, converter=_copied, hash=False)
    privileged: bool = _field(False, _flag)
    cpu: int = _field(500, _integer(1, 1_000_000))
    memory: int = _field(512, _integer(16, 100_000_000))
    node_pool: str | None = _field(None, _or_none(_string))
    constraints: tuple[tuple[str, str, str], ...] = _field((), _triples, converter=_tuples)
    env: Mapping[str, str] = _field({}, _variables, converter=_copied, hash=False)
    volumes: tuple[str, ...] = _field((), _names, converter=_strings)
    cap_add: tuple[str, ...] = _field((), _names, converter=_strings)
    update_job: bool | None = _field(None, _or_none(_flag))
    purge_job_on_start: bool = _field(False, _flag)
    auto_build_local_image: bool = _field(True, _flag)
    dockerfile_path: str | None = _field(None, _or_none(_string))
    docker_build_context: str | None = _field(None, _or_none(_string))
    nomad_token: str | None = _field(None, _or_none(_secret), repr=False)
    nomad_namespace: str | None = _field(None, _or_none(_string))
    nomad_region: str | None = _field(None, _or_none(_string))
    nomad_cacert: str | None = _field(None, _or_none(_string))
    nomad_capath: str | None = _field(None, _or_none(_string))
    nomad_client_cert: str | None = _field(None, _or_none(_string))
    nomad_client_key: str | None = _field(None, _or_none(_string))
    nomad_tls_server_name: str | None = _field(None, _or_none(_string))
    nomad_skip_verify: bool | None = _field(None, _or_none(_flag))
    nomad_http_auth: str | None = _field(None, _or_none(_secret), repr=False)

    @nomad_address.default
    def _address_of_environment(self) -> str | None:
        return None if self.servers else os.environ.get("NOMAD_ADDR") or None

    @backend.default
    def _backend_of_addresses(self) -> str:
        return "static" if self.servers else "nomad" if self.nomad_address else "local"

    @token.default
    def _token_of_environment(self) -> str | None:
        return os.environ.get("SLOTPOOL_TOKEN") or None

    @cacert.default
    def _cacert_of_environment(self) -> str | None:
        return os.environ.get("SLOTPOOL_CACERT") or None

    @prefetch.default
    def _prefetch_of_backend(self) -> int:
        return self.slots_per_container if self.backend == "local" else 0

    def __attrs_post_init__(self) -> None:
        if self.max_containers < self.min_containers:
            raise ConfigError("max_containers", f"at least min_containers, {self.min_containers}", shown(self.max_containers))
        if self.backend == "static" and not self.servers:
            raise ConfigError("servers", 'at least one address for backend="static"', shown(self.servers))
        if self.servers and self.backend != "static":
            raise ConfigError("backend", '"static", as servers are given', shown(self.backend))
        for name in _OF_SERVERS if self.servers else ():
            value, default = getattr(self, name), attr.fields_dict(type(self))[name].default
            if value != default:
                raise ConfigError(name, f"{default!r}, as standing servers have their own (slotpool serve)", shown(value))

    def of_server(self) -> dict[str, Any]:
        """What a server on this machine is given, see :class:`.HostConfig`."""
        return {
            "slots": self.slots_per_container,
            "isolation": self.isolation,
            "max_output": self.max_output,
            "max_file": self.max_file_size,
            "max_processes": self.max_processes,
            "max_memory": self.max_memory and self.max_memory << 20,
            "max_cpus": self.max_cpus,
            "max_written": self.max_written,
            "max_disk": self.max_disk and self.max_disk << 20,
            "readonly_paths": self.readonly_paths,
            "state_dir": self.state_dir,
        }

    @classmethod
    def make(cls, settings: Mapping[str, Any]) -> SlotPoolConfig:
        """The configuration with those fields.

        :raises ConfigError: if one of them isn't a field, or can't have that value.
        """
        known = attr.fields_dict(cls)
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"a setting of SlotPoolConfig (did you mean {close[0]}?)" if close else "a setting of SlotPoolConfig"
                raise ConfigError(name, hint, "an unknown name")
        return cls(**settings)
