"""Real Nomad agents for tests: one on the loopback, or a server and clients in network namespaces."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Callable

import requests

# Names a process's agent in its environment: the tasks and helpers of an agent inherit it.
MARK = "TEST_AGENT_DIRECTORY"
START_LIMIT = 60.0
STOP_LIMIT = 30.0


class AgentError(RuntimeError):
    """An agent that doesn't do what it was told."""


class ApiError(AgentError):
    """An answer other than 2xx."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


def _environment() -> dict[str, str]:
    """What an agent gets: nothing that sets it up, and nothing that breaks it."""
    unwanted = ("NOMAD_", "CONSUL_", "VAULT_", "AWS_CA_BUNDLE")  # Nomad 2.0.5 doesn't start with the last
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


def _failure(*command: str) -> str:
    """What a command says if it fails, else ""."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=_environment(), check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=_environment(), cwd=cwd, check=False)
    if done.returncode:
        raise AgentError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@cache
def why_no_nomad() -> str:
    """Why no agent can be started here; "" if one can."""
    if shutil.which("nomad") is None:
        return "nomad is not installed"
    if os.geteuid() != 0:
        return "a Nomad client needs root"
    failure = _failure("nomad", "version")
    return f"nomad doesn't work: {failure}" if failure else ""


@cache
def why_no_docker() -> str:
    """Why there is no docker driver here; "" if there is."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    # Without an engine some versions print that and exit 0, unless they need a field of the engine's.
    failure = _failure("docker", "info", "--format", "{{.Containers}}")
    return f"no docker engine: {failure}" if failure else ""


@cache
def why_no_cluster() -> str:
    """Why no cluster can be started here; "" if one can."""
    if why_no_nomad():
        return why_no_nomad()
    for program in ("ip", "nsenter", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = "ip link add name probe0 type bridge && ip link add name probe1 type veth peer name probe2"
    failure = _failure("unshare", "--net", "sh", "-c", probe)
    return f"no network namespaces: {failure}" if failure else ""


class Process:
    """One ``nomad agent`` with a directory of its own, which has its configuration, data and log."""

    def __init__(self, name: str, namespace: str = "") -> None:
        self.name = name
        self.address = ""
        self.directory = ""
        self.token = ""
        self.node_id = ""
        self._inside = ["nsenter", f"--net={namespace}"] if namespace else []
        self._process: subprocess.Popen[bytes] | None = None
        self._verify: str | None = None
        self._cert: tuple[str, str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log(self) -> str:
        return Path(self.directory, "agent.log").read_text(errors="replace")

    def api(self, method: str, path: str, body: Any = None, token: str | None = None, timeout: float = 30.0) -> Any:
        """An answer's JSON. Without a ``token`` the agent's own is sent, if it has one; "" is anonymous."""
        token = self.token if token is None else token
        headers = {"X-Nomad-Token": token} if token else {}
        with requests.Session() as session:
            session.trust_env = False  # no proxy, no other CA
            answer = session.request(
                method,
                self.address + path,
                json=body,
                headers=headers,
                timeout=timeout,
                verify=self._verify or True,
                cert=self._cert,
            )
        if not answer.ok:
            raise ApiError(answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def prepare(self, **files: str) -> None:
        """Make the directory with configuration files."""
        if not self.directory:
            self.directory = tempfile.mkdtemp(prefix=f"nomad-{self.name}-")
            os.chmod(self.directory, 0o755)  # tasks of other users reach their files through it
            os.mkdir(f"{self.directory}/tmp")
            os.chmod(f"{self.directory}/tmp", 0o1777)
        for name, text in files.items():
            Path(self.directory, f"{name}.hcl").write_text(text)

    def launch(self, **environment: str) -> None:
        configs = [f"-config={path}" for path in sorted(Path(self.directory).glob("*.hcl"))]
        with open(Path(self.directory, "agent.log"), "ab") as log:
            self._process = subprocess.Popen(
                [*self._inside, "nomad", "agent", *configs, f"-data-dir={self.directory}/data"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                # Killed helpers leave the directories of their sockets.
                env={**_environment(), **environment, MARK: self.directory, "TMPDIR": f"{self.directory}/tmp"},
                start_new_session=True,
            )

    def wait_until(self, true: Callable[[], Any], what: str, limit: float = START_LIMIT) -> None:
        """Ask until something is true; an API that doesn't answer yet says no."""
        deadline = time.monotonic() + limit
        said = ""
        while True:
            try:
                if true():
                    return
            except (ApiError, requests.ConnectionError, requests.Timeout) as error:
                said = f" ({error})"
            if self._process is None or self._process.poll() is not None:
                raise self._error(f"has ended before {what}")
            if time.monotonic() > deadline:
                raise self._error(f"waited {limit:.0f} s in vain until {what}{said}")
            time.sleep(0.05)

    def _error(self, text: str) -> AgentError:
        return AgentError("\n".join([f"Nomad agent {self.name} {text}; its log ends with:", *self.log.splitlines()[-30:]]))

    def wait_ready(self) -> None:
        raise NotImplementedError

    def wait_leader(self) -> None:
        self.wait_until(lambda: self.api("GET", "/v1/status/leader"), "a leader is elected")

    def wait_node(self, *drivers: str) -> None:
        def ready() -> bool:
            client = self.api("GET", "/v1/agent/self")["stats"]["client"]
            if client["heartbeat_ttl"] == "0s":
                return False  # the server has a node ready that was so before a restart
            self.node_id = client["node_id"]
            node = self.api("GET", f"/v1/node/{self.node_id}")
            healthy = all(node["Drivers"].get(driver, {}).get("Healthy") for driver in drivers)
            return healthy and node["Status"] == "ready"

        self.wait_until(ready, "its node is ready")

    def halt(self, number: int = signal.SIGINT) -> None:
        """End the agent's process only; its tasks go on."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def restart(self, hard: bool = False) -> None:
        """End the agent and start it with the data that it has, on the ports that it had; ``hard`` is kill -9."""
        self.halt(signal.SIGKILL if hard else signal.SIGINT)
        self.launch()
        self.wait_ready()

    def clean(self) -> None:
        """Remove what the ended agent has left, its tasks too."""
        if not self.directory:
            return
        allocations = self._allocations()
        _remove_containers(allocations)
        self._kill_all()
        for allocation in allocations:
            network = Path("/run/netns", allocation)
            if network.exists():
                _run("umount", "-l", str(network))
                network.unlink()
        for mount in reversed(_mounts(self.directory)):
            _run("umount", "-l", mount)
        for directory, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
            if any(allocation in directory for allocation in allocations):
                _remove_cgroup(directory)
        shutil.rmtree(self.directory)
        self.directory = ""

    def _allocations(self) -> set[str]:
        directory = Path(self.directory, "data", "alloc")
        return {path.name for path in directory.iterdir()} if directory.exists() else set()

    def processes(self) -> list[int]:
        """The agent, its helpers and its tasks."""
        variable = f"{MARK}={self.directory}\0".encode()
        allocations = [allocation.encode() for allocation in self._allocations()]  # their cgroups are named for them
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                zombie = b") Z " in (process / "stat").read_bytes()
                groups = (process / "cgroup").read_bytes()
                ours = variable in (process / "environ").read_bytes() or any(name in groups for name in allocations)
            except OSError:
                continue
            if ours and not zombie:
                found.append(int(process.name))
        return found

    def _kill_all(self) -> None:
        deadline = time.monotonic() + STOP_LIMIT
        while True:
            pids = self.processes()
            if not pids:
                return
            if time.monotonic() > deadline:
                raise AgentError(f"processes of Nomad agent {self.name} can't be killed: {pids}")
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)


def _remove_containers(allocations: set[str]) -> None:
    if not allocations or why_no_docker():
        return
    label = "com.hashicorp.nomad.alloc_id"
    listing = ["docker", "ps", "--all", "--no-trunc", f"--filter=label={label}"]
    lines = _run(*listing, "--format", f'{{{{.ID}}}} {{{{.Label "{label}"}}}}').splitlines()
    containers = [line.split(" ")[0] for line in lines if line.split(" ")[1] in allocations]
    if containers:
        _run("docker", "rm", "--force", "--volumes", *containers)


def _mounts(directory: str) -> list[str]:
    """What is mounted in a directory, the oldest first."""
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in points]
    return [point for point in points if point.startswith(f"{directory}/")]


def _remove_cgroup(directory: str) -> None:
    deadline = time.monotonic() + STOP_LIMIT
    while True:
        try:
            os.rmdir(directory)
            return
        except FileNotFoundError:
            return
        except OSError:  # busy until the last process has been collected
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


COMMON = """
region = "global"
datacenter = "dc1"
name = "{name}"
bind_addr = "{ip}"
log_level = "INFO"
disable_update_check = true
leave_on_interrupt = false
ports {{
  http = {http}
  rpc = {rpc}
  serf = {serf}
}}
advertise {{
  http = "{ip}"
  rpc = "{ip}"
  serf = "{ip}"
}}
telemetry {{
  publish_allocation_metrics = false
  publish_node_metrics = false
  collection_interval = "60s"
}}
consul {{
  auto_advertise = false
  server_auto_join = false
  client_auto_join = false
}}
ui {{
  enabled = false
}}
"""

SERVER = """
server {{
  enabled = true
  bootstrap_expect = 1
  raft_multiplier = 1
  {more}
}}
"""

# The resources are what the tests need, whatever there is.
CLIENT = """
client {{
  enabled = true
  network_interface = "{interface}"
  cpu_total_compute = 20000
  memory_total_mb = 20000
  gc_interval = "10s"
  gc_disk_usage_threshold = 99
  gc_inode_usage_threshold = 99
  {more}
  options = {{
    "fingerprint.denylist" = "env_aws,env_azure,env_digitalocean,consul,vault{denied}"
    "driver.allowlist" = "{drivers}"
  }}
}}
plugin "raw_exec" {{
  config {{
    enabled = true
  }}
}}
"""

DOCKER = """
plugin "docker" {
  config {
    allow_privileged = true
    volumes {
      enabled = true
    }
    gc {
      image = false
    }
  }
}
"""

ACL = """
acl {
  enabled = true
}
"""

TLS = """
tls {{
  http = true
  rpc = true
  ca_file = "{ca}"
  cert_file = "{cert}"
  key_file = "{key}"
  verify_server_hostname = true
  verify_https_client = true
}}
"""


class Agent(Process):
    """A server and a client in one process, on the loopback."""

    def __init__(self, *, acl: bool = False, tls: bool = False, drivers: str = "docker,exec,raw_exec", extra: str = "") -> None:
        super().__init__("agent")
        self.bootstrap_token = ""
        self.ca_file = self.client_cert = self.client_key = ""
        self._acl = acl
        self._tls = tls
        self._drivers = drivers
        self._extra = extra
        self._ports: socket.socket | None = None
        self._silent = ""

    def __enter__(self) -> Agent:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until there is a leader and the node is ready."""
        try:
            self.prepare()
            self._ports, first = _claim_ports()
            self._silent = f"http://127.0.0.1:{first}"
            self.address = f"{'https' if self._tls else 'http'}://127.0.0.1:{first + 1}"
            dynamic = f"min_dynamic_port = {first + 10}\n  max_dynamic_port = {first + BLOCK - 1}"
            config = COMMON.format(name="agent", ip="127.0.0.1", http=first + 1, rpc=first + 2, serf=first + 3)
            config += SERVER.format(more="") + DOCKER
            config += CLIENT.format(interface="lo", more=dynamic, drivers=self._drivers, denied="")
            if self._acl:
                config += ACL
            if self._tls:
                config += self._make_certificates()
            # A file of its own: Nomad merges files, and refuses a block that is twice in one.
            self.prepare(agent=config, extra=self._extra)
            self.launch()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def launch(self, **environment: str) -> None:
        # A node that registers before there is a leader is often refused, and tries again only after 15 to 30 s. So the
        # client waits first, 2 s, for an answer to the question whether it is in Google's cloud.
        super().launch(GCE_ENV_URL=f"{self._silent}/", **environment)

    def stop(self) -> None:
        """End the agent and its tasks, and remove everything it made."""
        try:
            self.halt()
            self.clean()
        finally:
            if self._ports is not None:
                self._ports.close()
                self._ports = None

    def wait_ready(self) -> None:
        self.wait_leader()
        if self._acl and not self.bootstrap_token:
            self.wait_until(self._bootstrap, "its ACL system is bootstrapped")
        self.wait_node("raw_exec", *([] if why_no_docker() else ["docker"]))

    def _bootstrap(self) -> bool:
        self.bootstrap_token = self.token = self.api("POST", "/v1/acl/bootstrap")["SecretID"]
        return True

    def token_for(self, policy_rules: str) -> str:
        """The secret of a new token with these rules."""
        name = f"test-{random.getrandbits(64):016x}"
        self.api("POST", f"/v1/acl/policy/{name}", {"Name": name, "Rules": policy_rules})
        token = self.api("POST", "/v1/acl/token", {"Name": name, "Type": "client", "Policies": [name]})
        return str(token["SecretID"])

    def _make_certificates(self) -> str:
        directory = f"{self.directory}/tls"
        os.mkdir(directory, 0o700)
        _run("nomad", "tls", "ca", "create", cwd=directory)
        _run("nomad", "tls", "cert", "create", "-server", "-region=global", cwd=directory)
        _run("nomad", "tls", "cert", "create", "-client", "-region=global", cwd=directory)
        self.ca_file = f"{directory}/nomad-agent-ca.pem"
        self.client_cert = f"{directory}/global-client-nomad.pem"
        self.client_key = f"{directory}/global-client-nomad-key.pem"
        self._verify, self._cert = self.ca_file, (self.client_cert, self.client_key)
        server = f"{directory}/global-server-nomad"
        return TLS.format(ca=self.ca_file, cert=f"{server}.pem", key=f"{server}-key.pem")


BLOCK = 200


def _claim_ports() -> tuple[socket.socket, int]:
    """A block of ports for an agent and its tasks; while its first is open no other agent of tests takes them.

    They are below those that the kernel gives to connections, so they are free at a restart too.
    """
    blocks = list(range(10000, 32000, BLOCK))
    random.shuffle(blocks)
    for first in blocks:
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", first))
            claim.listen()
            for port in range(first + 1, first + 4):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(type=kind) as probe:
                        probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        return claim, first
    raise AgentError("no free ports")


class Namespace:
    """A network namespace that lives as long as this is open or a process is in it."""

    # Not `ip netns`: that leaves a mount.

    def __init__(self) -> None:
        command = ["unshare", "--net", "sh", "-c", "echo; read -r _"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise AgentError("no network namespace")
            self._descriptor = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        _run("nsenter", f"--net={self.path}", "ip", *arguments)

    def close(self) -> None:
        os.close(self._descriptor)


class Member(Process):
    """One agent of a cluster, in a namespace of its own."""

    def __init__(self, name: str, ip: str, switch: Namespace, server: Member | None, extra: str) -> None:
        self._namespace = Namespace()
        super().__init__(name, self._namespace.path)
        self.ip = ip
        self.address = f"http://{ip}:4646"
        self._server = server
        self._extra = extra
        self._switch = switch

    def connect(self) -> None:
        self._switch.ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self._namespace.path)
        self._switch.ip("link", "set", self.name, "master", "bridge", "up")
        self._namespace.ip("address", "add", f"{self.ip}/24", "dev", "eth0")
        self._namespace.ip("link", "set", "eth0", "up")

    def link(self, up: bool) -> None:
        self._switch.ip("link", "set", self.name, "up" if up else "down")

    def begin(self) -> None:
        """Start without waiting until it is ready."""
        self.connect()
        self.prepare()
        config = COMMON.format(name=self.name, ip=self.ip, http=4646, rpc=4647, serf=4648)
        if self._server is None:
            config += SERVER.format(more=HEARTBEATS)
        else:
            join = f'server_join {{\n    retry_join = ["{self._server.ip}:4647"]\n    retry_interval = "1s"\n  }}'
            config += CLIENT.format(interface="eth0", more=join, drivers="raw_exec", denied=",env_gce")
        self.prepare(agent=config, extra=self._extra)
        self.launch()

    def wait_ready(self) -> None:
        self.wait_leader()
        if self._server is None:
            # A client that registers before there is a key to sign its identity with tries again after 15 to 30 s.
            self.wait_until(lambda: self.api("GET", "/.well-known/jwks.json")["keys"], "it has a key")
        else:
            self.wait_node("raw_exec")

    def interrupt(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.halt()
        self.clean()
        self._namespace.close()


# The failover's time is what clients have after an election to tell that they live. A restarted server may refuse them
# at first, and then they try again only after 15 to 30 s.
HEARTBEATS = """heartbeat_grace = "2s"
  min_heartbeat_ttl = "2s"
  failover_heartbeat_ttl = "60s\""""


class Cluster:
    """A server and clients that can be cut off, each in a namespace; only the driver raw_exec.

    They hang on a bridge in one more namespace: the firewall of the host's own, which an engine sets up for itself, would
    drop what a bridge there forwards. The host has an address in that network.
    """

    def __init__(self, clients: int = 3, *, extra: str = "") -> None:
        self._count = clients
        self._extra = extra
        self._switch: Namespace | None = None
        self._link = ""
        self._members: list[Member] = []

    @property
    def server(self) -> Member:
        return self._members[0]

    @property
    def clients(self) -> list[Member]:
        return self._members[1:]

    @property
    def address(self) -> str:
        return self.server.address

    def api(self, method: str, path: str, body: Any = None, token: str | None = None, timeout: float = 30.0) -> Any:
        """The server's answer, see `Process.api`."""
        return self.server.api(method, path, body, token, timeout)

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until all nodes are ready."""
        try:
            self._switch = Namespace()
            self._switch.ip("link", "add", "bridge", "type", "bridge")
            self._switch.ip("link", "set", "bridge", "up")
            network = self._attach()
            self._members.append(Member("server", f"{network}.2", self._switch, None, self._extra))
            self.server.begin()
            self.server.wait_ready()
            for i in range(self._count):
                self._members.append(Member(f"client{i}", f"{network}.{10 + i}", self._switch, self.server, self._extra))
                self._members[-1].begin()
            for client in self.clients:
                client.wait_ready()
        except BaseException:
            self.stop()
            raise

    def _attach(self) -> str:
        """Give the host an address in the network, and return the network's prefix."""
        assert self._switch is not None
        for number in _free_networks():
            link = f"nomadtest{number}"
            try:
                _run("ip", "link", "add", link, "type", "veth", "peer", "name", "root", "netns", self._switch.path)
            except AgentError as error:
                if "File exists" in str(error):
                    continue
                raise
            self._link = link
            self._switch.ip("link", "set", "root", "master", "bridge", "up")
            _run("ip", "address", "add", f"10.77.{number}.1/24", "dev", link)
            _run("ip", "link", "set", link, "up")
            return f"10.77.{number}"
        raise AgentError("no free network in 10.77.0.0/16")

    def stop(self) -> None:
        """End the agents and their tasks, and remove everything they made."""
        for member in self._members:
            member.interrupt()
        while self._members:
            self._members[-1].close()
            self._members.pop()
        if self._link:
            _run("ip", "link", "delete", self._link)
            self._link = ""
        if self._switch is not None:
            self._switch.close()
            self._switch = None

    def cut(self, i: int) -> None:
        """Take a client's link down: what it sends is lost, and what is sent to it."""
        self.clients[i].link(False)

    def heal(self, i: int) -> None:
        self.clients[i].link(True)

    def index(self, node_id: str) -> int:
        """Which client a node is."""
        return [client.node_id for client in self.clients].index(node_id)

    def wait_status(self, i: int, status: str, limit: float = START_LIMIT) -> None:
        """Wait until the server takes a client's node for "ready" or "down"."""
        path = f"/v1/node/{self.clients[i].node_id}"
        self.server.wait_until(lambda: self.api("GET", path)["Status"] == status, f"client{i} is {status}", limit)


def _free_networks() -> Iterator[int]:
    taken = set(re.findall(r"\b10\.77\.(\d+)\.", _run("ip", "-4", "route", "show", "table", "all")))
    return (number for number in range(1, 255) if str(number) not in taken)
