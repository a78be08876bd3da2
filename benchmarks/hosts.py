"""Several real hosts on one machine, for tests and benchmarks: they can be powered off, cut off and slowed down.

A host is a set of Linux namespaces (network, mounts, process ids, host name, System V objects) with its own /tmp and
/dev/shm. A bridge in a network namespace of its own connects the hosts. They share the kernel, the processors and the
file system outside /tmp, so the same packages are installed on all. Left out: packet loss and clocks that differ.

Making namespaces needs root; where they cannot be made, `Hosts` raises RuntimeError.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

NETWORK = "10.77.0."
GCS_PORT = 6379
KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "RAY_worker_niceness")  # variables that processes on hosts get too
READY_S = 20.0
RAY_START_S = 90.0
# Fixed ports, so that none of Ray's servers takes a port from the range of its workers.
PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-listen-port": 6383,
    "dashboard-agent-grpc-port": 6384,
    "metrics-export-port": 6385,
    "min-worker-port": 10010,
    "max-worker-port": 10199,
}
# The first process of a host. It reaps: without that, actors would outlive a raylet that is gone. The folders that the
# host may see are bound aside first, because the empty /tmp would cover them.
FIRST = """
set -e
mount --make-rprivate /
hostname "$1"; ip="$2"; kept="$3"; shift 3
i=0; for folder in "$@"; do mkdir -p "$kept/$i"; mount --bind "$folder" "$kept/$i"; i=$((i+1)); done
for empty in /tmp /dev/shm $HIDDEN; do mount -t tmpfs -o size=4g tmpfs "$empty"; done
i=0; for folder in "$@"; do mkdir -p "$folder"; mount --move "$kept/$i" "$folder"; i=$((i+1)); done
printf '127.0.0.1 localhost\\n%s %s\\n' "$ip" "$(hostname)" > /tmp/.hosts
mount --bind /tmp/.hosts /etc/hosts
touch /tmp/.ready
sleep infinity &
while :; do wait -n || true; done
"""


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Host:
    """One host. pid: the process id, seen from outside, of the host's first process; all others end with it."""

    def __init__(self, hosts: "Hosts", name: str, number: int, *, sees: Sequence[Path]):
        self.name = name
        self.address = f"{NETWORK}{10 + number}"
        self.hardware_address = f"02:00:0a:4d:00:{10 + number:02x}"
        self.is_on = True
        self._hosts = hosts
        self._link = f"v-{name}"
        self.space = f"{hosts.stem}-{name}"
        switch = hosts.switch
        _call("ip", "netns", "add", self.space)
        _call("ip", "-n", self.space, "link", "set", "lo", "up")
        _call(
            "ip", "link", "add", self._link, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns",
            self.space,
        )  # fmt: skip
        self.heal()
        _call("ip", "-n", switch, "link", "set", self._link, "up")
        _call("ip", "-n", self.space, "link", "set", "eth0", "address", self.hardware_address)
        _call("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _call("ip", "-n", self.space, "link", "set", "eth0", "up")
        kept = hosts.state / name
        kept.mkdir()
        hidden = " ".join(str(folder) for folder in hosts.hidden if not folder.is_relative_to("/tmp"))
        self._first = subprocess.Popen(
            ["ip", "netns", "exec", self.space, "unshare", "-m", "-u", "-i", "-p", "-f", "--kill-child", "--mount-proc",
             "bash", "-c", FIRST, "first", name, self.address, str(kept), *map(str, sees)],
            stdin=subprocess.DEVNULL, stdout=(hosts.state / f"{name}.log").open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, "HIDDEN": hidden}, start_new_session=True,
        )  # fmt: skip
        self.pid = self._wait_until_ready()

    def _wait_until_ready(self) -> int:
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self._first.poll() is None:
            children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/root/tmp/.ready").exists():
                return int(children[0])
            time.sleep(0.05)
        self._first.kill()
        raise RuntimeError(f"host {self.name}: {(self._hosts.state / f'{self.name}.log').read_text().strip()}")

    def command(self, *command: str) -> list[str]:
        """The command that runs `command` on this host."""
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", *command]

    def start(
        self, *command: str, env: Mapping[str, str] | None = None, log: Path, cwd: str = "/tmp"
    ) -> subprocess.Popen:
        """Start a process on this host. log: a file outside of the host."""
        kept = {key: os.environ[key] for key in KEPT if key in os.environ}
        environment = {**kept, "HOME": "/tmp", "TMPDIR": "/tmp", "OMP_NUM_THREADS": "1", **(env or {})}
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command("env", "-C", cwd, *command), env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """Let the network drop what the host sends and what is sent to it. Nobody is told."""
        _call("ip", "-n", self._hosts.switch, "link", "set", self._link, "nomaster")

    def heal(self) -> None:
        """Connect the host to the others."""
        _call("ip", "-n", self._hosts.switch, "link", "set", self._link, "master", "br0")

    def power_off(self) -> None:
        """End every process of the host at once, without a last packet."""
        self.cut()
        os.kill(self.pid, signal.SIGKILL)
        self._first.wait()
        self.is_on = False

    def slow(self, rate: str) -> None:
        """Limit what the host sends and what is sent to it. rate: in the units of tc, such as `1gbit`."""
        for space, device in ((self._hosts.switch, self._link), (self.space, "eth0")):
            _call(
                "tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "256kb",
                "latency", "50ms",
            )  # fmt: skip

    def path(self, path: str) -> Path:
        """A path of this host, as it is reached from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def processes(self) -> dict[int, str]:
        """The command lines of the host's processes, by their ids on the host, but for its first two."""
        found = _call(*self.command("ps", "-eo", "pid,stat,args", "--no-headers"))
        lines = [line.split(None, 2) for line in found.splitlines()]
        ours = ("sleep infinity", "ps -eo", "bash -c")
        return {int(pid): args for pid, stat, args in lines if not stat.startswith("Z") and not args.startswith(ours)}

    def ray(
        self,
        token: str,
        head: "Host | None" = None,
        *,
        num_cpus: int,
        labels: Mapping[str, str],
        options: Sequence[str] = (),
    ) -> None:
        """Start Ray's node of this host. head: the host whose cluster it joins; None starts a cluster."""
        named = ",".join(f"{label}={value}" for label, value in {"host": self.name, **labels}.items())
        where = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
        if head is not None:
            where = [f"--address={head.address}:{GCS_PORT}"]
        ports = [f"--{name}={port}" for name, port in PORTS.items()]
        log = self._hosts.state / f"{self.name}-ray.log"
        process = self.start(
            sys.executable, "-m", "ray.scripts.scripts", "start", *where, *ports,
            f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}", "--num-gpus=0", "--temp-dir=/tmp/ray",
            "--object-store-memory=100000000", "--disable-usage-stats", f"--labels={named}", *options,
            env={**ray_environment(token), **_vllm_cache()}, log=log,
        )  # fmt: skip
        if process.wait(RAY_START_S):
            raise RuntimeError(f"Ray did not start on host {self.name}: {log.read_text()[-2000:]}")

    def leave(self) -> None:
        """End Ray's node of this host as its user would: `ray stop`."""
        _call(*self.command(sys.executable, "-m", "ray.scripts.scripts", "stop", "--grace-period", "10"))

    def remove(self) -> None:
        """End the host."""
        if self.is_on:  # else its process id may be another's by now
            self.power_off()


def _vllm_cache() -> dict[str, str]:
    """vLLM's cache of this machine: without it, each engine of a fresh host inspects the classes of models first."""
    cache = Path.home() / ".cache" / "vllm"
    return {"VLLM_CACHE_ROOT": str(cache)} if cache.is_dir() and not cache.is_relative_to("/tmp") else {}


def ray_environment(token: str) -> dict[str, str]:
    """The variables by which Ray's processes, and drivers, of the cluster with this token know each other."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}


class Hosts:
    """The hosts, and the switch between them, as a context manager that removes everything at its end.

    hidden: folders that only the hosts see which are given them by `add(sees=...)`.

    Example: `with Hosts() as hosts: hosts.add("a").start("hostname", log=path).wait()`.
    """

    def __init__(self, hidden: Sequence[Path] = ()):
        self.stem = f"pt{secrets.token_hex(3)}"
        self.switch = f"{self.stem}-switch"
        self.hidden = hidden
        self.state = Path("/run") / self.stem
        self.all: dict[str, Host] = {}

    def __enter__(self) -> "Hosts":
        if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
            raise RuntimeError("that needs root, and the commands ip, unshare and nsenter")
        self.state.mkdir()
        try:
            _call("ip", "netns", "add", self.switch)
            _call("ip", "-n", self.switch, "link", "set", "lo", "up")
            _call("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
            _call("ip", "-n", self.switch, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, sees: Sequence[Path] = ()) -> Host:
        """Make a host and connect it. sees: folders below /tmp, or hidden ones, that this host shares with the test."""
        host = Host(self, name, len(self.all), sees=sees)
        for other in self.all.values():  # no packet asks who has an address: a cut is silence, not "no route to host"
            for here, there in ((host, other), (other, host)):
                _call(
                    "ip", "-n", here.space, "neigh", "replace", there.address, "lladdr", there.hardware_address, "dev",
                    "eth0", "nud", "permanent",
                )  # fmt: skip
        self.all[name] = host
        return host

    def close(self) -> None:
        """End all hosts, and remove the switch."""
        for host in self.all.values():
            host.remove()
        for space in [*(host.space for host in self.all.values()), self.switch]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(self.state, ignore_errors=True)


@contextlib.contextmanager
def cluster(
    num_cpus: Mapping[str, int],
    sees: Mapping[str, Sequence[Path]],
    labels: Mapping[str, Mapping[str, str]],
    *,
    options: Sequence[str] = (),
) -> Iterator[tuple[Hosts, dict[str, str]]]:
    """A Ray cluster, one host for each name; the first is its head.

    num_cpus: how many CPUs Ray may give away on each host. sees: the folders that a host shares with this process, and
    with other hosts that see them. labels: of Ray's nodes. options: more options of `ray start --head`. Yields the
    hosts, and the variables with which a driver joins the cluster.
    """
    token = secrets.token_hex(32)
    with Hosts(hidden=sorted({folder for folders in sees.values() for folder in folders})) as hosts:
        for name, cpus in num_cpus.items():
            head = next(iter(hosts.all.values()), None)
            host = hosts.add(name, sees=sees.get(name, ()))
            host.ray(token, head, num_cpus=cpus, labels=labels.get(name, {}), options=() if head else options)
        first = next(iter(hosts.all.values()))
        yield hosts, {**ray_environment(token), "RAY_ADDRESS": f"{first.address}:{GCS_PORT}"}
