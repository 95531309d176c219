"""Stands between a worker and another's program, and leaves nothing of it behind. Start at `main`.

Runs as a process of its own: `python -I -S launcher.py`. Standard input is a line of JSON
that says what to start, and then stays open for as long as the worker lives and wants the program:
at its end, whatever ended it (a kill -9, too), the program and all that it started are killed. What
became of it goes to `status` as one line of JSON. Linux only; imports only the standard library.
"""

import ctypes
import json
import os
import pwd
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 47, 4
#: Seconds between two looks at how much memory it has; and for it to end by itself when told to.
_LOOK_S, _GRACE_S = 0.2, 0.5
#: Killing goes on for so long: a process that forks while it is killed leaves a child.
_KILL_S = 2.0
_PROCESSES_MAX = 64
_REAPED_AT_ONCE = 20_000
_FILES_MAX, _FILE_MAX = 1_024, 4 * 2**30
_CANNOT_START = 127
_PAGE = resource.getpagesize()
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _libc.prctl(option, value, 0, 0, 0)


def main() -> None:
    """Start what the order says, watch it, end it, tell what became of it."""
    order: dict[str, Any] = json.loads(_line())
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what it leaves behind becomes a child of ours
    launcher = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(order, launcher)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2, *order["keep"]):  # its pipes must end when it ends
        os.dup2(nothing, number)
    os.chdir("/")
    told = _watch(pid, order["memory"])
    _kill_all()
    shutil.rmtree(order["directory"], ignore_errors=True)  # here, for the worker may be gone
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told |= {"cpu_s": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss * 1024}
    os.write(order["status"], json.dumps(told).encode() + b"\n")


def _line() -> bytes:
    """Read one line and not a byte more."""
    found = bytearray()
    while not found.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            sys.exit(0)  # the worker is gone
        found += piece
    return bytes(found)


def _become(order: dict[str, Any], launcher: int) -> None:
    """Give up what the program must not have, and become it."""
    try:
        os.setsid()  # a group of its own, which it cannot leave for ours
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(_CANNOT_START)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(order["status"])
        _limit(order)
        if order["user"]:
            _switch(order["user"])
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # another login forgets it
        _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)  # what let us switch would stay with it
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if os.geteuid() == 0:
            _drop_capabilities()
        if order["confined"]:
            _confine(order["directory"], order["readable"])
        os.umask(0o077)
        os.chdir(order["directory"])
        os.execve(order["command"][0], order["command"], order["environment"])  # noqa: S606 - no shell is wanted
    finally:
        os._exit(_CANNOT_START)


def _drop_capabilities() -> None:
    """Leave a superuser nothing but its name: what it starts has no capability."""
    for number in range(64):
        _prctl(_PR_CAPBSET_DROP, number)


def _limit(order: dict[str, Any]) -> None:
    cpu = max(1, int(order["cpu"]))
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _FILES_MAX),
        (resource.RLIMIT_FSIZE, _FILE_MAX),
        # a bound for what grows faster than it is looked at
        (resource.RLIMIT_DATA, 2 * order["memory"]),
    ):
        _lower(what, most, most)
    _lower(resource.RLIMIT_CPU, cpu, cpu + 5)


def _lower(what: int, soft: int, hard: int) -> None:
    """Set a limit, or leave a lower one."""
    allowed = resource.getrlimit(what)[1]
    if allowed != resource.RLIM_INFINITY:
        soft, hard = min(soft, allowed), min(hard, allowed)
    resource.setrlimit(what, (soft, hard))


def _switch(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


# ── what it may touch ────────────────────────────────────────────────────────────────────────

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_PATH_BENEATH = 1
#: Since these versions of Landlock: files are moved, truncated; a scope for signals and sockets.
_MOVES, _TRUNCATES, _NET, _SCOPES = 2, 3, 4, 6
#: What a program needs of a system: its libraries, and who is who on the network.
SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc", "/sys/devices/system/cpu",
    *(f"/etc/{name}" for name in (
        "ssl", "pki", "ca-certificates", "crypto-policies", "resolv.conf", "hosts", "host.conf",
        "nsswitch.conf", "gai.conf", "services", "protocols", "passwd", "group", "localtime",
        "timezone", "mime.types", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "os-release",
    )),
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: Where semaphores between processes live.
_SHARED = "/dev/shm"  # noqa: S108 - not ours to choose


def landlock() -> int:
    """Return the version of Landlock that the kernel has; 0 if it has none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, 1)))


def _confine(directory: str, readable: list[str]) -> None:
    """Let this process and its children write in one directory, and read little but the system.

    Nor may they look into a process outside, or send it a signal where the kernel can forbid that.
    """
    version = landlock()
    if version == 0:
        return  # `resource test` says so
    handled = (1 << 13) - 1
    handled |= _REFER if version >= _MOVES else 0
    handled |= _TRUNCATE if version >= _TRUNCATES else 0
    words = (handled, 0, 3 if version >= _SCOPES else 0)
    count = 1 if version < _NET else 2 if version < _SCOPES else 3
    attributes = struct.pack(f"={count}Q", *words[:count])
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        os._exit(_CANNOT_START)
    for path in (*SYSTEM, *readable):
        _allow(ruleset, path, _READ & handled)
    for path in _DEVICES:
        _allow(ruleset, path, (_READ | _WRITE_FILE | _TRUNCATE) & handled)
    for path in (directory, _SHARED):
        _allow(ruleset, path, handled)
    if _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
        os._exit(_CANNOT_START)
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    """Allow something below a path, if it is there."""
    try:
        found = os.open(path, os.O_PATH)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(found).st_mode):
        access &= _OF_A_FILE
    rule = struct.pack("=Qi", access, found)
    if _libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) != 0:
        os._exit(_CANNOT_START)
    os.close(found)


# ── what becomes of it ───────────────────────────────────────────────────────────────────────


def _watch(pid: int, memory: int) -> dict[str, Any]:
    """Wait for its end, or end it: when told to, or when it takes too much."""
    told: dict[str, Any] = {"code": None, "signal": None, "limit": "", "stopped": False}
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, select.POLLIN)
    while not told["limit"]:
        ready = [number for number, _ in poll.poll(_LOOK_S * 1_000)]
        if ended in ready:
            _, status = os.waitpid(pid, 0)
            if os.WIFEXITED(status):
                told["code"] = os.WEXITSTATUS(status)
            else:
                told["signal"] = os.WTERMSIG(status)
                told["limit"] = "cpu" if told["signal"] == signal.SIGXCPU else ""
            return told
        if 0 in ready:
            told["stopped"] = True
            _ask(pid, ended)
            return told
        _reap_others(pid)
        told["limit"] = _too_much(memory)
    return told


def _reap_others(pid: int) -> None:
    """Take leave of what was left behind and has ended: each would keep a number of the system's.

    So many at a time: those that fork and end all the time come as fast as they are reaped. The
    status of `pid` stays for whoever watches it.
    """
    for _ in range(_REAPED_AT_ONCE):
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None or found.si_pid == pid:
            return
        os.waitpid(found.si_pid, 0)


def _ask(pid: int, ended: int) -> None:
    """Ask it to end, and give it a moment."""
    try:
        os.killpg(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    select.select([ended], [], [], _GRACE_S)


def _too_much(memory: int) -> str:
    pids = _family()
    if len(pids) > _PROCESSES_MAX:
        return "processes"
    return "memory" if sum(map(_resident, pids)) > memory else ""


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:  # noqa: PTH123 - starts at once
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _family() -> list[int]:
    """Return all processes that come from this one, however they tried to get away."""
    above: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - as above
        if name.isdecimal():
            above.setdefault(_parent(int(name)), []).append(int(name))
    found, new = [], [os.getpid()]
    while new:
        new = [pid for one in new for pid in above.get(one, ())]
        found += new
    return found


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - as above
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _kill_all() -> None:
    """Kill what is left until nothing is; what was left behind is reaped here, too."""
    deadline = time.monotonic() + _KILL_S
    while True:
        family = _family()
        # whole groups first, each once: one that forks and ends all the time is gone by its pid
        for group in set(map(_group, family)) - {0, os.getpgrp()}:
            _kill(os.killpg, group)
        for pid in family:
            _kill(os.kill, pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _kill(kill: Callable[[int, int], None], whom: int) -> None:
    try:
        kill(whom, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    main()
