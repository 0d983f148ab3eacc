"""The settings: what each field takes, what the error says about what it doesn't, and what the environment adds."""

from __future__ import annotations

import math
from typing import Any

import attr
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slotpool import SlotPool, SlotPoolConfig
from slotpool.errors import ConfigError

FIELDS = sorted(attr.fields_dict(SlotPoolConfig))
NO_FLAG: list[Any] = [1, 0, "yes", "", [True]]
NO_STRING: list[Any] = [None, "", 5, b"x", ["x"], "a\nb", "a\0b"]
NO_STRING_OR_NONE: list[Any] = NO_STRING[1:]
NO_STRINGS: list[Any] = [None, 5, {"a": 1}, [None], ["ok", ""], ["ok", 7], "a\0b"]

# name -> lowest and highest value
INTEGERS: dict[str, tuple[int, int]] = {
    "slots_per_container": (1, 1000),
    "min_containers": (0, 10_000),
    "max_containers": (1, 10_000),
    "prefetch": (0, 100_000),
    "max_output": (0, 100 * 1024 * 1024),
    "max_file_size": (1, 1024 * 1024 * 1024),
    "max_processes": (16, 1_000_000),
    "max_memory": (16, 100_000_000),
    "max_written": (1, 1 << 50),
    "max_disk": (1, 100_000_000),
    "cpu": (1, 1_000_000),
    "memory": (16, 100_000_000),
}
SECONDS: dict[str, tuple[float, float]] = {
    "acquire_timeout": (0, 86_400),
    "start_timeout": (0.1, 86_400),
    "command_timeout": (0.001, 86_400),
    "lease_ttl": (0.5, 3600),
    "health_check_interval": (0.05, 3600),
    "scale_cooldown": (0, 86_400),
    "scale_down_after": (0, 86_400),
    "setup_timeout": (0.001, 86_400),
}
OPTIONAL = ("max_memory", "max_written", "max_disk")
BAD: dict[str, list[Any]] = {
    **{
        name: [low - 1, high + 1, "3", 1.5, float(high), True, math.nan, [1], 10**400, *([] if name in OPTIONAL else [None])]
        for name, (low, high) in INTEGERS.items()
    },
    **{
        name: [low - 1, low - 1e-6, high + 1e-6, "3", True, None, math.nan, math.inf, -math.inf, [1], 1j]
        for name, (low, high) in SECONDS.items()
    },
    "servers": [
        None,
        5,
        "",
        "host:80",
        "ftp://host",
        "http://",
        "unix:",
        ["http://host:80", "x"],
        [5],
        "http://[::1",
        {"a": 1},
    ],
    "nomad_address": ["", 5, "host:4646", "http://", b"http://host", "http://[::1", ["http://host:4646"]],
    "backend": [None, "", "Local", "docker", 5, ["local"], True],
    "isolation": [None, "", "docker", "BWRAP", 5, ["none"], False],
    "token": NO_STRING_OR_NONE,
    "max_cpus": [0, 0.009, 10_001, "2", True, math.nan, math.inf, [1], 10**400],
    "cacert": NO_STRING_OR_NONE,
    "setup": [5, "", " ", ["true", ""], [None], b"true", {"true": 1}],
    "network": NO_FLAG,
    "readonly_paths": [None, 5, "relative", ["/ok", "relative"], ["/a\0b"], [5], {"/a": 1}],
    "state_dir": ["", "relative", 5, b"/tmp", "/a\nb"],
    "job_id": NO_STRING,
    "datacenter": NO_STRINGS,
    "image": NO_STRING,
    "driver": NO_STRING,
    "privileged": [*NO_FLAG, None],
    "purge_job_on_start": [*NO_FLAG, None],
    "auto_build_local_image": [*NO_FLAG, None],
    "dockerfile_path": NO_STRING_OR_NONE,
    "docker_build_context": NO_STRING_OR_NONE,
    "server_command": NO_STRINGS,
    "task_config": [None, 5, "a=b", [("a", 1)], {5: 1}, {"": 1}],
    "node_pool": NO_STRING_OR_NONE,
    "constraints": [None, 5, "x", [("a", "b")], [("a", "b", 5)], ["abc"]],
    "env": [None, 5, "A=b", {"A": 5}, {5: "b"}, {"": "b"}],
    "volumes": NO_STRINGS,
    "cap_add": NO_STRINGS,
    "update_job": NO_FLAG,
    "nomad_token": NO_STRING_OR_NONE,
    "nomad_namespace": NO_STRING_OR_NONE,
    "nomad_region": NO_STRING_OR_NONE,
    "nomad_cacert": NO_STRING_OR_NONE,
    "nomad_capath": NO_STRING_OR_NONE,
    "nomad_client_cert": NO_STRING_OR_NONE,
    "nomad_client_key": NO_STRING_OR_NONE,
    "nomad_tls_server_name": NO_STRING_OR_NONE,
    "nomad_skip_verify": NO_FLAG,
    "nomad_http_auth": NO_STRING_OR_NONE,
}


def config_of(**values: Any) -> SlotPoolConfig:
    """As a caller without a type checker makes one."""
    return SlotPoolConfig(**values)


CASES = [pytest.param(name, value, id=f"{name}={value!r:.20}") for name in BAD for value in BAD[name]]


def test_every_field_has_bad_values_here() -> None:
    assert sorted(BAD) == FIELDS


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_is_refused_by_an_error_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**{name: value})
    assert caught.value.field == name
    assert caught.value.expected
    assert caught.value.got
    assert str(caught.value) == f"{name}: expected {caught.value.expected}, got {caught.value.got}"


@pytest.mark.parametrize("name", SECONDS)
def test_a_number_of_seconds_beyond_all_floats_is_refused_like_any_other(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**{name: 10**400})
    assert caught.value.field == name


@pytest.mark.parametrize("name", [*INTEGERS, *SECONDS])
def test_both_ends_of_a_range_are_in_it(name: str) -> None:
    for value in {**INTEGERS, **SECONDS}[name]:
        more = {"max_containers": 10_000} if name == "min_containers" else {}
        more.update({"min_containers": 0} if name == "max_containers" else {})
        config = config_of(**{name: value, **more})
        assert getattr(config, name) == value


@pytest.mark.parametrize("field", ["servers", "nomad_address"])
@pytest.mark.parametrize("address", ["http://host:port", "http://host:99999", "https://host:-1"])
def test_an_address_whose_port_is_none_is_refused(field: str, address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**{field: address})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "address", ["http://host", "http://host:8080", "https://host:1", "http://[::1]:80", "unix:///run/x.sock"]
)
def test_addresses_of_servers_are_urls_with_a_host_or_paths_of_sockets(address: str) -> None:
    assert config_of(servers=address).servers == (address,)


@pytest.mark.parametrize("token", ["\u00e9", "\u65e5\u672c", " a", "a "])
def test_a_token_that_would_not_arrive_as_it_is_is_refused(token: str) -> None:
    """Only visible ASCII reaches a server unchanged in a header."""
    with pytest.raises(ConfigError) as caught:
        config_of(token=token)
    assert caught.value.field == "token"


def test_the_token_is_shown_neither_by_repr_nor_by_the_error_about_it() -> None:
    assert "hush-hush" not in repr(config_of(token="hush-hush"))
    with pytest.raises(ConfigError) as caught:
        config_of(token="hush-hush\n")  # read from a file, as it happens
    assert "hush-hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("slots_per_contaner", "slots_per_container"),
        ("lease_tll", "lease_ttl"),
        ("isolations", "isolation"),
        ("max_container", "max_containers"),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}\\?") as caught:
        SlotPoolConfig.make({name: 3})
    assert caught.value.field == name


def test_a_name_like_no_other_is_refused_without_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        SlotPoolConfig.make({"qqqqqq": 3})
    assert caught.value.field == "qqqqqq"
    assert "did you mean" not in str(caught.value)


def test_a_pool_takes_the_same_as_keywords() -> None:
    assert SlotPool(slots_per_container=3).config == config_of(slots_per_container=3)
    with pytest.raises(ConfigError, match="did you mean slots_per_container") as caught:
        SlotPool(slots_per_contaner=3)
    assert caught.value.field == "slots_per_contaner"


def test_a_pool_takes_a_config_or_keywords_but_not_both() -> None:
    config = config_of(slots_per_container=3)
    assert SlotPool(config).config is config
    with pytest.raises(ConfigError) as caught:
        SlotPool(config, slots_per_container=4)
    assert caught.value.field == "config"
    bad: Any = {"slots_per_container": 3}
    with pytest.raises(ConfigError) as caught:
        SlotPool(bad)
    assert caught.value.field == "config"


def test_it_is_frozen_and_a_changed_copy_is_validated() -> None:
    config = config_of()
    with pytest.raises(attr.exceptions.FrozenInstanceError):
        config.cpu = 7  # type: ignore[misc]
    assert attr.evolve(config, cpu=7).cpu == 7
    with pytest.raises(ConfigError):
        attr.evolve(config, cpu=0)


def test_fewer_containers_at_most_than_at_least_are_refused() -> None:
    assert config_of(min_containers=4, max_containers=4).max_containers == 4
    with pytest.raises(ConfigError) as caught:
        config_of(min_containers=5, max_containers=4)
    assert caught.value.field == "max_containers"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_output", 10),
        ("max_processes", 100),
        ("max_memory", 64),
        ("max_cpus", 1),
        ("max_written", 10),
        ("max_disk", 10),
        ("readonly_paths", ["/opt"]),
        ("state_dir", "/x"),
    ],
)
def test_what_standing_servers_have_of_their_own_is_not_given_to_a_pool(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="standing servers have their own") as caught:
        config_of(servers="http://a:1", **{field: value})
    assert caught.value.field == field
    assert config_of(backend="local", **{field: value})


def test_servers_go_with_the_static_backend_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(backend="static")
    assert caught.value.field == "servers"
    with pytest.raises(ConfigError) as caught:
        config_of(backend="local", servers="http://host:80")
    assert caught.value.field == "backend"


def test_one_string_is_a_list_of_one_and_never_of_its_letters() -> None:
    assert config_of(datacenter="dc7").datacenter == ("dc7",)
    assert config_of(datacenter=["dc7", "dc8"]).datacenter == ("dc7", "dc8")
    assert config_of(readonly_paths="/opt").readonly_paths == ("/opt",)
    assert config_of(servers=["http://a:1", "unix:///b"]).servers == ("http://a:1", "unix:///b")


def test_with_nothing_said_the_pool_is_local_and_keeps_its_slots_ready() -> None:
    config = config_of()
    assert (config.backend, config.prefetch, config.isolation) == ("local", config.slots_per_container, "auto")
    assert (config.nomad_address, config.token, config.servers, config.network) == (None, None, (), None)
    assert config_of(slots_per_container=7).prefetch == 7
    assert config_of(slots_per_container=7, prefetch=2).prefetch == 2


def test_servers_make_it_static_and_leave_other_pools_their_slots() -> None:
    config = config_of(servers="http://host:80")
    assert (config.backend, config.prefetch) == ("static", 0)


def test_a_nomad_address_makes_it_nomad_and_leaves_other_pools_their_slots() -> None:
    config = config_of(nomad_address="http://host:4646")
    assert (config.backend, config.prefetch) == ("nomad", 0)


def test_nomad_addr_of_the_environment_counts_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_ADDR", "http://elsewhere:4646")
    config = config_of()
    assert (config.backend, config.nomad_address) == ("nomad", "http://elsewhere:4646")
    assert config_of(nomad_address="http://here:1").nomad_address == "http://here:1"
    assert config_of(backend="local").backend == "local"
    assert config_of(nomad_address=None).backend == "local"
    static = config_of(servers="http://host:80")
    assert (static.backend, static.nomad_address) == ("static", None)


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_ADDR", "")
    monkeypatch.setenv("SLOTPOOL_TOKEN", "")
    config = config_of()
    assert (config.backend, config.nomad_address, config.token) == ("local", None, None)


def test_a_bad_nomad_addr_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_ADDR", "elsewhere:4646")
    with pytest.raises(ConfigError) as caught:
        config_of()
    assert caught.value.field == "nomad_address"


def test_the_token_of_the_environment_counts_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTPOOL_TOKEN", "from-outside")
    assert config_of().token == "from-outside"
    assert config_of(token="given").token == "given"
    assert config_of(token=None).token is None


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.binary(max_size=3),
    st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["local", "static", "nomad", "none", "http://host:80", "unix:///x", "/x"]),
)


@given(values=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3))
@example(values={"servers": "http://host:80", "nomad_address": "http://host:4646"})
@settings(max_examples=200)
def test_whatever_is_given_it_is_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    field = ""
    try:
        config = SlotPoolConfig.make(values)
    except ConfigError as e:
        field = e.field
    if field:
        assert field in FIELDS
    else:
        assert config.min_containers <= config.max_containers
        assert config.backend in ("local", "static", "nomad")
