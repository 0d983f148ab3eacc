"""Rights: capabilities, set-user-id programs, namespaces, the kernel's settings, descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from arena import LOOK, PYTHON, Arena
from attacks import attack
from conftest import ROOT

from slotpool.errors import SlotBroken


@attack("use descriptors inherited past Landlock", "there are none but 0, 1, 2", docker=True)
def test_a_command_inherits_no_descriptor_but_its_three(arena: Arena) -> None:
    listing = arena.server.bash(arena.a, "ls -l /proc/self/fd | tail -n +2 | sed 's/.*[0-9:]* \\([0-9]* -> .*\\)/\\1/'")[
        "stdout"
    ]
    found = dict(line.split(" -> ") for line in listing.splitlines())
    assert sorted(found) == ["0", "1", "2", "3"]
    assert found["0"] == "/dev/null"
    assert found["2"].startswith("pipe:")
    assert found["3"].endswith("/fd")  # the listing's own
    shell = arena.server.bash(arena.a, "for fd in /proc/$$/fd/*; do echo ${fd##*/}; done; sleep 0")["stdout"].split()
    # The pattern's own, where the shell has heard its command and tells its end, and bash's.
    assert set(shell) <= {"0", "1", "2", "3", "10", "11", "255"}
    code = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1])"
    for _ in range(2):  # in the shell that was waiting, and in one started for it
        assert arena.server.bash(arena.a, f'{PYTHON} -c "{code}"')["stdout"] == "[0, 1, 2]\n"
    assert arena.run(arena.a, code) == "[0, 1, 2]\n"


@attack("capabilities, root's user or groups", "none; no new privileges", docker=True)
def test_a_command_has_no_capability_and_can_get_none(arena: Arena) -> None:
    status = arena.server.bash(arena.a, "cat /proc/self/status")["stdout"]
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"] == "1"
    assert "0" not in fields["Uid"].split()
    assert "0" not in fields["Gid"].split()
    assert "0" not in fields["Groups"].split()


ESCALATE = r"""
import subprocess
MS_BIND, NEWUSER, NEWNS = 4096, 0x10000000, 0x20000
O_EXCL = os.O_EXCL

def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")

def unshared():
    pid = os.fork()
    if pid == 0:
        ok = libc.unshare(NEWUSER | NEWNS) == 0
        os._exit(0 if ok else 1)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError("unshare")

def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10)
    if done.returncode:
        raise OSError(done.stdout)

def writes(path):
    with open(path, "r+b", 0) as f:
        same = f.read(4096)
        f.seek(0)
        f.write(same)  # nothing changes, even if it may be written

os.mkdir("m")
ways = {
    "setuid": lambda: os.setuid(0),
    "setresuid": lambda: os.setresuid(0, 0, 0),
    "setgid": lambda: os.setgid(0),
    "setgroups": lambda: os.setgroups([0]),
    "chroot": lambda: os.chroot("."),
    "mknod": lambda: os.mknod("null", 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "mknod-disk": lambda: os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0)),
    "mount": lambda: call(libc.mount(b"none", b"m", b"tmpfs", 0, None)),
    "bind": lambda: call(libc.mount(b"/usr", b"m", None, MS_BIND, None)),
    "remount": lambda: call(libc.mount(None, b"/", None, 32, None)),
    "umount": lambda: call(libc.umount2(b"/proc", 2)),
    "pivot_root": lambda: call(libc.syscall(155 if os.uname().machine == "x86_64" else 41, b".", b"m")),
    "chown": lambda: os.chown("m", 0, 0),
    "sethostname": lambda: call(libc.sethostname(os.uname().nodename.encode(), len(os.uname().nodename))),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "su": lambda: run("su", "-c", "true"),
    "mount-binary": lambda: run("mount", "-t", "tmpfs", "none", "m"),
    "unshare-mount": lambda: run("unshare", "-m", "true"),
    "nsenter": lambda: run("nsenter", "-t", "1", "-m", "true"),
    "setns": lambda: call(libc.setns(os.open("/proc/%d/ns/mnt" % given["server"], os.O_RDONLY), 0)),
    "kmem": lambda: os.open("/dev/kmsg", os.O_RDONLY),
    "mem": lambda: os.open("/dev/mem", os.O_RDONLY),
    "kcore": lambda: os.read(os.open("/proc/kcore", os.O_RDONLY), 16),
    "sysrq": lambda: os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY)),
    "shadow": lambda: open("/etc/shadow").close(),
    "passwd": lambda: open("/etc/passwd", "a").close(),
    "usr": lambda: open("/usr/planted", "w").close(),
    "root": lambda: os.mkdir("/planted"),
    "proc-1-root": lambda: open("/proc/1/root/etc/shadow").close(),
    "disk": lambda: [os.open(path, os.O_RDONLY) for path in glob.glob("/dev/[svx]d[a-z]*") or ["/none"]],
    "cgroup": lambda: os.mkdir("/sys/fs/cgroup/planted"),
}
if given["namespaces"]:
    ways["unshare"] = unshared
    ways["unshare-binary"] = lambda: run("unshare", "-U", "true")
for name, way in ways.items():
    try:
        way()
    except (OSError, subprocess.TimeoutExpired):
        print("denied", name)
    else:
        print("DONE", name)
"""


@attack("33 ways to rights: setuid, mount, chroot, mknod, setns, raw sockets, devices, su ...", "each is denied", docker=True)
def test_no_right_can_be_had(arena: Arena) -> None:
    # With Landlock no mount can be made in any namespace; without it and in user mode, one of its own is no way to others.
    given = {"namespaces": not arena.own_users, "server": arena.pid}
    told = arena.run(arena.a, LOOK + ESCALATE, given=given)
    assert "DONE" not in told
    assert told.count("denied") > 30
    assert not Path("/usr/planted").exists()
    arena.assert_unharmed()


@attack("a user namespace of one's own, and mounts in it", "no way to others' files or processes", docker=True)
def test_a_user_namespace_of_ones_own_leads_nowhere(arena: Arena, victim: Path) -> None:
    """Where one can be made at all, it maps no one else."""
    code = f"""
unshare -Urm sh -c '
mount -t tmpfs none /mnt && echo MOUNTED
mount --bind / . && echo MOUNTED
mount -o remount,rw / && echo MOUNTED
cat {arena.outside(arena.name)} /etc/shadow
echo x > {victim}
cat /proc/{arena.pid}/environ
[ {arena.own_users} = True ] && kill -0 {arena.pid} && echo SIGNALLED'
true"""
    arena.server.bash(arena.a, "touch sleeper")
    result = arena.server.bash(arena.a, code)
    assert arena.secret not in result["stdout"]
    for word in ("SIGNALLED", "root:"):
        assert word not in result["stdout"], result
    if not arena.own_users or arena.landlock:
        assert "MOUNTED" not in result["stdout"], result
    arena.assert_unharmed()


WRITE_SYSTEM = r"""
for top in ("/proc/sys", "/sys"):
    for directory, _, names in os.walk(top):
        if time.monotonic() > deadline:
            sys.exit("it takes too long")
        for name in names:
            path = os.path.join(directory, name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                same = os.read(fd, 4096)
                os.lseek(fd, 0, 0)
                os.write(fd, same)  # nothing changes, even if it may be written
                print("WRITTEN", path)
            except OSError:
                pass
            finally:
                os.close(fd)
"""


# ipc_namespaces(7); pid_max is each PID namespace's own as of Linux 6.14, and not for slots to write before that.
OWN_SETTINGS = re.compile(
    r"WRITTEN /proc/sys/(fs/mqueue/\w+|kernel/(msgmax|msgmnb|msgmni|auto_msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced"
    r"|pid_max))\Z"
)


@attack("write every file of /proc/sys and /sys", "none that concerns others", docker=True)
def test_no_setting_of_the_kernel_can_be_written(arena: Arena) -> None:
    told = arena.run(arena.a, LOOK + WRITE_SYSTEM)
    written = [line for line in told.splitlines() if line.startswith("WRITTEN")]
    if not arena.own_users:  # those of its own namespaces concern nobody else
        inside = arena.server.bash(arena.a, "readlink /proc/self/ns/ipc /proc/self/ns/pid")["stdout"].split()
        assert not {*inside} & {os.readlink("/proc/self/ns/ipc"), os.readlink("/proc/self/ns/pid")}
        written = [line for line in written if not OWN_SETTINGS.match(line)]
    assert written == []


CRASH = r"""
import resource, subprocess
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
attempt(resource.setrlimit, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for name in given["links"]:
    os.symlink(given["victim"], name)
for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGQUIT, signal.SIGSYS):
    crash = f"ulimit -c unlimited; ulimit -c hard; kill -{int(number)} $$"
    done = subprocess.run(["bash", "-c", crash], stderr=subprocess.DEVNULL)
    print("ENDED", done.returncode, resource.getrlimit(resource.RLIMIT_CORE))
for name in os.listdir("."):
    if name.startswith("core") and not os.path.islink(name):
        print("DUMPED", name)
"""


@attack("core dumps, of its own and of the zygote, over planted links", "none is written", docker=True)
def test_no_core_is_dumped(arena: Arena, tmp_path: Path) -> None:
    target = arena.outside("holder.py")
    told = arena.run(arena.a, LOOK + CRASH, given={"victim": target, "links": ["core", "core.1", "core.2"]})
    assert told.count("ENDED") == 4
    assert told.count("(0, 0)") == 4
    assert "DUMPED" not in told
    for number in ("ABRT", "SEGV", "QUIT"):
        with contextlib.suppress(SlotBroken):  # it is the zygote that is hit
            arena.server.bash(arena.a, f"kill -{number} $PPID; sleep 5", timeout=1.0)
    found = arena.server.bash(arena.a, "find . /tmp /dev/shm -name 'core*' -type f 2>/dev/null")["stdout"]
    assert found == ""
    arena.assert_unharmed()
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith("core"):  # else whoever is named there has it
        environment = {"NEEDLE": "x", "GIVEN": json.dumps({"links": []}), "PATH": os.environ["PATH"]}
        raised = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)\n" if ROOT else ""
        code = raised + LOOK + CRASH
        control = subprocess.run(
            [PYTHON, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert not ROOT or "DUMPED" in control.stdout, "the attack does not work"


SET_USER_ID = r"""
import shutil, subprocess
tell = "print('uid', os.geteuid())"
for path in given["programs"]:
    for code in (f"import os; {tell}", f"import os; os.setuid(0); {tell}"):
        try:
            done = subprocess.run([path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10)
            print("RAN", path, done.stdout.decode())
        except OSError as e:
            print("REFUSED", path, e)
own = shutil.copy(given["python"], "own")
os.chmod(own, 0o6755)
done = subprocess.run(["./own", "-c", f"import os; {tell}"], stdout=subprocess.PIPE)
print("RAN own", done.stdout.decode())
"""


@attack("run root's set-user-id programs and one with file capabilities", "they run as the slot's user", docker=True)
def test_a_set_user_id_program_gives_nothing(arena: Arena) -> None:
    """It is put beside the system's own, where slots can see it."""
    if not ROOT:
        pytest.skip("only root can make such programs")
    plain, capable = "/usr/local/bin/slotpool-test-suid", "/usr/local/bin/slotpool-test-capable"
    capability = "b'\\x01\\x00\\x00\\x02' + b'\\xff' * 4 + b'\\x00' * 4 + b'\\xff' * 4 + b'\\x00' * 4"  # VFS_CAP_REVISION_2
    make = f"""import os, shutil, sys
real = os.path.realpath(sys.executable)
for path in {plain!r}, {capable!r}:
    shutil.copy(real, path)
os.chmod({plain!r}, 0o4755)
os.chmod({capable!r}, 0o755)
os.setxattr({capable!r}, "security.capability", {capability})
"""
    interpreter = arena.python if arena.mode == "docker" else PYTHON
    arena.as_root([interpreter, "-c", make])
    try:
        given = {"programs": [plain, capable], "python": plain}
        works = arena.as_root(
            ["setpriv", "--reuid=65534", "--clear-groups", plain, "-c", "import os; print('uid', os.geteuid())"]
        )
        assert works == "uid 0", "the attack does not work"
        told = arena.run(arena.a, LOOK + SET_USER_ID, given=given)
    finally:
        arena.as_root(["rm", "-f", plain, capable])
    uid = int(arena.server.bash(arena.a, "id -u")["stdout"])
    assert told.count("RAN") + told.count("REFUSED") == 5
    assert "uid 0" not in told
    assert f"RAN own uid {uid}" in told
    arena.assert_unharmed()
