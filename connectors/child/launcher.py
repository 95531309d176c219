"""Stands between a worker and another's program, and leaves nothing of it behind. Start at `main`.

Runs as a process of its own: `python -I -S launcher.py`. Standard input is a line of JSON
that says what to start, and then stays open for as long as the worker lives and wants the program:
at its end, whatever ended it (a kill -9, too), the program and all that it started are killed. What
became of it goes to `status` as one line of JSON. Linux only; imports only the standard library.
"""

import ctypes
import errno
import fcntl
import json
import os
import pwd
import resource
import select
import shutil
import signal
import socket
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
_CANNOT_GUARD, _CANNOT_START = 126, 127
_PAGE = resource.getpagesize()
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _libc.prctl(option, value, 0, 0, 0)


def main() -> None:
    """Start what the order says, watch it, end it, tell what became of it."""
    order: dict[str, Any] = json.loads(_line())
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what it leaves behind becomes a child of ours
    launcher = os.getpid()
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _become(order, launcher, there)
    there.close()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2, *order["keep"]):  # its pipes must end when it ends
        os.dup2(nothing, number)
    os.chdir("/")
    door = _Door(here, order["guard"]) if order["guard"] is not None else None
    here.close()
    told = _watch(pid, order["memory"], door)
    _kill_all(pid)
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


def _become(order: dict[str, Any], launcher: int, to_launcher: socket.socket) -> None:
    """Give up what the program must not have, and become it."""
    guarded = order["guard"] is not None
    try:
        os.setsid()  # a group of its own, which it cannot leave for ours
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(_CANNOT_START)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(order["status"])
        if guarded:
            os.close(order["guard"])
        _limit(order)
        if order["user"]:
            _switch(order["user"])
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # another login forgets it
        _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)  # what let us switch would stay with it
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if os.geteuid() == 0:
            _drop_capabilities()
        if order["confined"]:
            _confine(order["directory"], order["readable"], guarded=guarded)
        os.umask(0o077)
        os.chdir(order["directory"])
        _filter(to_launcher, guarded=guarded)
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
_BIND_TCP, _CONNECT_TCP = 1, 2
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


def _confine(directory: str, readable: list[str], *, guarded: bool) -> None:
    """Let this process and its children write in one directory, and read little but the system.

    Nor may they look into a process outside, or send it a signal where the kernel can forbid that.
    """
    version = landlock()
    if version == 0:
        return  # `resource test` says so; one that is to be guarded is not started then
    handled = (1 << 13) - 1
    handled |= _REFER if version >= _MOVES else 0
    handled |= _TRUNCATE if version >= _TRUNCATES else 0
    net = _BIND_TCP | _CONNECT_TCP if guarded else 0  # a second wall behind the filter below
    words = (handled, net, 3 if version >= _SCOPES else 0)
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


# ── which calls to the system it may make ────────────────────────────────────────────────────

_SET_FILTER, _ACTION_AVAILABLE, _SIZES, _NEW_LISTENER = 1, 2, 3, 8
_KILL, _REFUSE, _ASK_US, _LET = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
#: Where the kernel shows a filter the number of a call, the machine and the arguments.
_NUMBER, _MACHINE, _ARGUMENT = 0, 4, (16, 24, 32, 40)
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_FAST_OPEN = 0x20000000
_KIND = 0xF  # of a socket's type, without the flags beside it
_OTHERS = 0x40000000  # numbers of another way to call an x86-64 kernel begin here


class _Calls:
    """Numbers of the calls that a filter looks at, for one kind of machine."""

    def __init__(self, machine: int, seccomp: int, **numbers: int) -> None:
        self.machine, self.seccomp, self.numbers = machine, seccomp, numbers


_CALLS = {
    "x86_64": _Calls(
        0xC000003E, 317, socket=41, socketpair=53, connect=42, bind=49, listen=50, sendto=44,
        sendmsg=46, sendmmsg=307, setsid=112, setpgid=109, io_uring_setup=425, io_uring_enter=426,
        io_uring_register=427, pidfd_getfd=438,
    ),
    "aarch64": _Calls(
        0xC00000B7, 277, socket=198, socketpair=199, connect=203, bind=200, listen=201, sendto=206,
        sendmsg=211, sendmmsg=269, setsid=157, setpgid=154, io_uring_setup=425, io_uring_enter=426,
        io_uring_register=427, pidfd_getfd=438,
    ),
}  # fmt: skip


def _calls() -> _Calls | None:
    """Return the calls of this machine, if its programs make them as we know."""
    return _CALLS.get(os.uname().machine) if sys.maxsize > 2**32 else None


def can_guard() -> bool:
    """Say whether this kernel can hold a program to the connections that it is given."""
    calls = _calls()
    if calls is None or landlock() == 0:  # without Landlock it could take over who guards it
        return False
    action, sizes = ctypes.c_uint32(_ASK_US), (ctypes.c_uint16 * 3)()
    return (
        _libc.syscall(calls.seccomp, _ACTION_AVAILABLE, 0, ctypes.byref(action)) == 0
        and _libc.syscall(calls.seccomp, _SIZES, 0, ctypes.byref(sizes)) == 0
        and sizes[0] == _ASKED.size
    )


def _filter(to_launcher: socket.socket, *, guarded: bool) -> None:
    """Keep it in its process group; where it is guarded, it makes no connection by itself."""
    calls = _calls()
    if calls is None:
        return  # `can_guard` says so
    program = _program(calls, guarded=guarded)
    steps = ctypes.create_string_buffer(program)
    order = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(steps))
    )
    flags = _NEW_LISTENER if guarded else 0
    made = _libc.syscall(calls.seccomp, _SET_FILTER, flags, order)
    if not guarded:
        return
    if made < 0:
        os._exit(_CANNOT_GUARD)
    socket.send_fds(to_launcher, [b"x"], [made])
    os.close(made)


def _program(calls: _Calls, *, guarded: bool) -> bytes:
    """Return the filter, as steps of the kernel's own little machine.

    It sees numbers, never what a pointer leads to; so whoever asks for a socket gets one that is
    connected already, and `connect` does nothing and says that all is well.
    """
    number = calls.numbers
    well, denied = _REFUSE, _REFUSE | errno.EPERM
    otherwise = _KILL if guarded else _LET  # a program of 32 bits, say
    steps = [_step(_LOAD, _MACHINE), *_unless(_IF_EQUAL, calls.machine, otherwise)]
    steps += [_step(_LOAD, _NUMBER)]
    steps += _when(_IF_AT_LEAST, _OTHERS, _REFUSE | errno.ENOSYS if guarded else _LET)
    for name in ("setsid", "setpgid"):  # killing a group misses nobody who forks meanwhile
        steps += _when(_IF_EQUAL, number[name], well)
    if guarded:
        steps += _when(_IF_EQUAL, number["connect"], well)
        for name in ("bind", "listen", "pidfd_getfd"):
            steps += _when(_IF_EQUAL, number[name], denied)
        for name in ("io_uring_setup", "io_uring_enter", "io_uring_register"):  # past all filters
            steps += _when(_IF_EQUAL, number[name], _REFUSE | errno.ENOSYS)
        for name, place in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
            # that would connect, too
            steps += _within(number[name], [
                _step(_LOAD, _ARGUMENT[place]), *_when(_IF_ANY, _FAST_OPEN, denied),
                _step(_RETURN, _LET),
            ])  # fmt: skip
        steps += _within(number["socket"], [
            _step(_LOAD, _ARGUMENT[0]), *_when(_IF_EQUAL, socket.AF_INET6,
                                               _REFUSE | errno.EAFNOSUPPORT),
            *_unless(_IF_EQUAL, socket.AF_INET, denied),
            _step(_LOAD, _ARGUMENT[2]), *_when(_IF_EQUAL, 0, None, skip=2),
            *_unless(_IF_EQUAL, socket.IPPROTO_TCP, denied),
            _step(_LOAD, _ARGUMENT[1]), _step(_AND, _KIND),
            *_unless(_IF_EQUAL, socket.SOCK_STREAM, denied), _step(_RETURN, _ASK_US),
        ])  # fmt: skip
        # a pair reaches nobody, but for datagrams: each of those may name another receiver
        steps += _within(number["socketpair"], [
            _step(_LOAD, _ARGUMENT[0]), *_unless(_IF_EQUAL, socket.AF_UNIX, denied),
            _step(_LOAD, _ARGUMENT[1]), _step(_AND, _KIND),
            *_when(_IF_EQUAL, socket.SOCK_DGRAM, denied), _step(_RETURN, _LET),
        ])  # fmt: skip
    return b"".join([*steps, _step(_RETURN, _LET)])


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _when(test: int, value: int, answer: int | None, *, skip: int = 1) -> list[bytes]:
    """Answer if the test holds, else go on; without an answer, skip so many steps."""
    if answer is None:
        return [_step(test, value, skip, 0)]
    return [_step(test, value, 0, 1), _step(_RETURN, answer)]


def _unless(test: int, value: int, answer: int) -> list[bytes]:
    return [_step(test, value, 1, 0), _step(_RETURN, answer)]


def _within(number: int, steps: list[bytes]) -> list[bytes]:
    """Take these steps for one call only; they end with an answer."""
    return [_step(_IF_EQUAL, number, 0, len(steps)), *steps]


# ── the connections that it is given ─────────────────────────────────────────────────────────

_RECEIVE, _ANSWER, _GIVE = 0xC0502100, 0xC0182101, 0x40182103
_ASKED, _ANSWERED = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_GIVEN = struct.Struct("=QIIII")
_AND_ANSWER = 2
_PAIR_S = 2.0
#: So many may come at a time, then one each so many seconds: each keeps a port for a while.
_BURST, _PACE_S = 64, 0.02


class _Door:
    """Where it gets its sockets: each is one end of a connection whose other end the worker has.

    The connection is one over loopback, so that it looks like any other, and its port is open for
    no longer than it takes to make it: nobody else comes in.
    """

    def __init__(self, child: socket.socket, worker: int) -> None:
        _, numbers, _, _ = socket.recv_fds(child, 1, 1)
        self.number = numbers[0] if numbers else -1
        self.refused = not numbers  # by the kernel; or it has ended
        self._worker = socket.socket(fileno=worker)
        self._worker.settimeout(0)
        self._turn = 0.0

    def late(self) -> float:
        """Return how long the next one must wait; not above 0 if it need not."""
        return self._turn - time.monotonic()

    def serve(self) -> None:
        """Answer one who asks for a socket; one who has died meanwhile gets none."""
        asked = bytearray(_ASKED.size)
        self._turn = max(self._turn, time.monotonic() - _BURST * _PACE_S) + _PACE_S
        try:
            fcntl.ioctl(self.number, _RECEIVE, asked)
        except OSError:
            return
        who, kind = _ASKED.unpack(asked)[0], _ASKED.unpack(asked)[7]
        try:
            self._give(who, kind)
        except OSError:  # none can be made, or the worker takes no more just now
            self._refuse(who)

    def _give(self, who: int, kind: int) -> None:
        theirs, ours = _connected()
        with theirs, ours:
            socket.send_fds(self._worker, [b"x"], [ours.fileno()])
            theirs.setblocking(not kind & socket.SOCK_NONBLOCK)
            closes = os.O_CLOEXEC if kind & socket.SOCK_CLOEXEC else 0
            given = _GIVEN.pack(who, _AND_ANSWER, theirs.fileno(), 0, closes)
            fcntl.ioctl(self.number, _GIVE, given)

    def _refuse(self, who: int) -> None:
        try:
            fcntl.ioctl(self.number, _ANSWER, _ANSWERED.pack(who, 0, -errno.EMFILE, 0))
        except OSError:
            return


def _connected() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new connection; whoever else comes to its port is sent away."""
    with socket.socket() as listener:
        listener.settimeout(_PAIR_S)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        one = socket.socket()
        try:
            one.settimeout(_PAIR_S)
            one.connect(listener.getsockname())
            while True:
                other, whose = listener.accept()
                if whose == one.getsockname():
                    return one, other
                other.close()
        except BaseException:
            one.close()
            raise


# ── what becomes of it ───────────────────────────────────────────────────────────────────────


def _watch(pid: int, memory: int, door: _Door | None) -> dict[str, Any]:
    """Wait for its end, or end it: when told to, or when it takes too much."""
    told: dict[str, Any] = {"code": None, "signal": None, "limit": "", "stopped": False}
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, select.POLLIN)
    if door is not None and door.number >= 0:
        poll.register(door.number, select.POLLIN)
    look = time.monotonic() + _LOOK_S
    while not told["limit"]:
        until = look - time.monotonic()
        if door is not None and door.number >= 0:
            late = door.late()
            poll.modify(door.number, 0 if late > 0 else select.POLLIN)
            until = min(until, late) if late > 0 else until
        ready = dict(poll.poll(max(0.0, until) * 1_000))
        if ended in ready:
            told |= _ended(pid)
            if door is not None and door.refused and told["code"] == _CANNOT_GUARD:
                told["limit"] = "guard"
            return told
        if 0 in ready:
            told["stopped"] = True
            _ask(pid, ended)
            return told
        if door is not None and door.number in ready:
            if ready[door.number] & select.POLLIN:
                door.serve()
            else:
                poll.unregister(door.number)  # all that could ask have ended
                os.close(door.number)
                door.number = -1
        if time.monotonic() >= look:
            _reap_others(pid)
            told["limit"] = _too_much(memory)
            look = time.monotonic() + _LOOK_S
    return told


def _ended(pid: int) -> dict[str, Any]:
    """Return how it ended. It is not reaped: its number is still that of its group."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    if found is None:
        return {}
    if found.si_code == os.CLD_EXITED:
        return {"code": found.si_status}
    return {
        "signal": found.si_status, "limit": "cpu" if found.si_status == signal.SIGXCPU else "",
    }  # fmt: skip


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


def _kill_all(pid: int) -> None:
    """Kill what is left until nothing is; what was left behind is reaped here, too.

    Its group first, while `pid` is not reaped: where it could not leave it, nobody gets away.
    """
    _kill(os.killpg, pid)
    deadline = time.monotonic() + _KILL_S
    while True:
        family = _family()
        # whole groups first, each once: one that forks and ends all the time is gone by its pid
        for group in set(map(_group, family)) - {0, os.getpgrp()}:
            _kill(os.killpg, group)
        for one in family:
            _kill(os.kill, one)
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
