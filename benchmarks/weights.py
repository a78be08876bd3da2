"""Weights from host to host, over hosts that are made of namespaces of this machine (hosts.py; needs root).

chain_vs_line   time until three hosts have 95 MiB, each tensor checked, through a chain at 1 Gbit/s / time of one copy
                on such a line
loss_s          seconds that it takes the two others longer when the host in the middle of the chain is powered off
                half-way
socket_share    bytes/s of one host's pull without a limit of the line / bytes/s of a bare socket between the same
                processes (sendfile into recv_into, nothing checked)
delta_saving    bytes of all bf16 weights / bytes that reach a host of what an AdamW step at a learning rate of 1e-6
                changed of them (weights of standard deviation 0.02, random gradients)
pause_gap_ms    how much longer an engine behind a line of 20 Mbit/s pauses for new weights than one on the trainer's
                host (or the other way round), in milliseconds: the difference of the medians, in one RL run
publish_peak    memory that a rank needs to publish its own parts of the weights / to gather whole tensors, beyond that
                of the training; two ranks that share the experts (publish_ranks.py)

The trainer's part is `SharedWeights`, the hosts' part `WeightCopies`; both are what a run on a cluster uses. No Ray and
no engine is in all but the last, so loading into the engine comes on top (rl_weights.py).
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace as changed
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from hosts import Host, Hosts
from msgspec.structs import replace

from posttrain.hosts.relay import Relay, Source
from posttrain.hosts.weights import WeightCopies, WeightsOffer

NUM_TENSORS, TENSOR_FLOATS = 24, 1_038_000  # 95 MiB
RATE, RATE_BITS = "1gbit", 1e9
SLOW_RATE = "20mbit"
ROUNDS = 5
DEADLINE_S = 30.0
BARE_BYTES = 4 << 20


class Brought(msgspec.Struct):
    """A reader's answer. at: when the weights were there, by the monotonic clock, which all hosts here share.

    num_pulled: the bytes that it has pulled of all versions so far.
    """

    at: float
    num_pulled: int = 0


class Process:
    """A trainer or reader on a host, which takes one line and answers with one."""

    def __init__(self, host: Host, role: str):
        command = host.command(sys.executable, __file__, role, host.address)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.source = msgspec.json.decode(self._answer(), type=Source)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark has ended")
        return line

    def publish(self, how: str = "publish") -> WeightsOffer:
        """Have the trainer write another version; `train`: of bf16 weights, after an optimizer step."""
        self.send(how)
        return msgspec.json.decode(self._answer(), type=WeightsOffer)

    def brought(self) -> Brought:
        """Wait until the reader has what it was sent to bring."""
        return msgspec.json.decode(self._answer(), type=Brought)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def processes(num_readers: int, rate: str | None) -> Iterator[tuple[Hosts, Process, list[Process]]]:
    with Hosts() as hosts:
        names = ["trainer", *(f"r{number}" for number in range(num_readers))]
        made = [Process(hosts.add(name), "trainer" if name == "trainer" else "reader") for name in names]
        for host in hosts.all.values():
            if rate is not None:
                host.slow(rate)
        try:
            yield hosts, made[0], made[1:]
        finally:
            for process in made:
                process.end()


def bring(offer: WeightsOffer, trainer: Process, readers: Sequence[Process]) -> float:
    """Send the readers to bring a version, in a chain. Returns when they were sent."""
    began = time.monotonic()
    for place, reader in enumerate(readers):
        before = [other.source for other in reversed(readers[:place])]
        reader.send(msgspec.json.encode(replace(offer, sources=(*before, trainer.source))).decode())
    return began


def chain_vs_line() -> tuple[float, dict[str, Any]]:
    with processes(3, RATE) as (_, trainer, readers):
        times = []
        for _ in range(ROUNDS + 1):
            offer = trainer.publish()
            began = bring(offer, trainer, readers)
            times.append(max(reader.brought().at for reader in readers) - began)
        line_s = 8 * offer.num_bytes / RATE_BITS
    middle = statistics.median(times[1:])  # the first round warms up
    return middle / line_s, {"seconds": middle, "line_s": line_s, "all": [round(value, 3) for value in times[1:]]}


def loss_s() -> tuple[float, dict[str, Any]]:
    with processes(3, RATE) as (hosts, trainer, readers):
        bring(trainer.publish(), trainer, readers)
        for reader in readers:
            reader.brought()
        offer = trainer.publish()
        began = bring(offer, trainer, readers)
        whole_s = max(reader.brought().at for reader in readers) - began
        offer = trainer.publish()
        began = bring(offer, trainer, readers)
        time.sleep(whole_s / 2)
        hosts.all["r1"].power_off()
        answers = [readers[place].brought() for place in (0, 2)]
    lost_s = max(answer.at for answer in answers) - began
    return lost_s - whole_s, {"seconds": lost_s, "without_loss_s": whole_s}


def socket_share() -> tuple[float, dict[str, Any]]:
    with processes(1, None) as (_, trainer, readers):
        ours, bare = [], []
        for _ in range(ROUNDS + 1):
            offer = trainer.publish()
            began = bring(offer, trainer, readers)
            ours.append(readers[0].brought().at - began)
            trainer.send("bare")
            port = int(trainer._answer())
            began = time.monotonic()
            readers[0].send(f"bare {trainer.source.address} {port} {offer.num_bytes}")
            bare.append(readers[0].brought().at - began)
    shares = [peer / own for peer, own in zip(bare[1:], ours[1:], strict=True)]
    rate = offer.num_bytes / statistics.median(bare[1:]) / 1e9
    return statistics.median(shares), {"bare_gb_per_s": rate, "all": [round(share, 2) for share in shares]}


def delta_saving() -> tuple[float, dict[str, Any]]:
    with processes(2, RATE) as (_, trainer, readers):
        pulled, times, whole = [0], [], 0
        for _ in range(ROUNDS + 1):
            offer = trainer.publish("train")
            began = bring(offer, trainer, readers)
            answers = [reader.brought() for reader in readers]
            assert answers[0].num_pulled == answers[1].num_pulled
            pulled.append(answers[0].num_pulled)
            times.append(round(max(answer.at for answer in answers) - began, 3))
            whole = offer.num_bytes
    first, *changes = [after - before for before, after in pairwise(pulled)]
    assert first == whole
    further = {"mib": whole / 2**20, "whole_s": times[0], "seconds": statistics.median(times[1:]), "bytes": changes}
    return whole / statistics.median(changes), further


def pause_gap_ms() -> tuple[float, dict[str, Any]]:
    from hosts_run import running

    with tempfile.TemporaryDirectory() as scratch, running(Path(scratch), {"left": 1}, home_cpus=2) as cluster:
        rollout = {"workers": 2, "nodes": ["home", "left"], "spread": True}
        run = cluster.start("pauses", steps=24, resources={"rollout": rollout})
        run.await_steps(2)
        cluster.hosts.all["left"].slow(SLOW_RATE)
        first = len(run.steps())
        if run.wait():
            raise RuntimeError(run.said())
        pauses: dict[str, list[float]] = {}
        for event in run.events("busy"):
            if event["what"] == "update_weights":
                pauses.setdefault(event["actor"], []).append(1000 * (event["end"] - event["start"]))
    medians = {name: statistics.median(values[first:]) for name, values in pauses.items()}
    return max(medians.values()) - min(medians.values()), {"medians_ms": medians, "updates": len(pauses.popitem()[1])}


# ---------------------------------------------------------------- on the hosts


def run_trainer(address: str) -> None:
    import torch

    from posttrain.sampling.roads import offer_of
    from posttrain.sampling.weights import SharedWeights, TensorSpec

    relay = Relay(address)
    print(msgspec.json.encode(relay.source).decode(), flush=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        weights = SharedWeights(folder, relay, "trainer")
        trained = SharedWeights(folder, relay, "trainer", delta=True)
        values = [torch.randn(TENSOR_FLOATS) for _ in range(NUM_TENSORS)]
        specs = [TensorSpec(f"layer.{place}", value.dtype, tuple(value.shape)) for place, value in enumerate(values)]
        masters = [torch.nn.Parameter(value * 0.02) for value in values]
        optimizer = torch.optim.AdamW(masters, lr=1e-6)
        for version, line in enumerate(sys.stdin):
            if line == "publish\n":
                manifest = weights.publish(specs, values, version)
                print(msgspec.json.encode(offer_of(manifest)).decode(), flush=True)
            elif line == "train\n":
                if version:
                    for master in masters:
                        master.grad = torch.randn_like(master)
                    optimizer.step()
                rounded = (master.detach().bfloat16() for master in masters)
                manifest = trained.publish([changed(spec, dtype=torch.bfloat16) for spec in specs], rounded, version)
                print(msgspec.json.encode(offer_of(manifest)).decode(), flush=True)
            else:
                server = socket.create_server((address, 0))
                threading.Thread(target=send_bare, args=(server, Path(manifest.path)), daemon=True).start()
                print(server.getsockname()[1], flush=True)


def send_bare(server: socket.socket, path: Path) -> None:
    with server, server.accept()[0] as connection, path.open("rb") as file:
        connection.sendfile(file)


def run_reader(address: str) -> None:
    relay = Relay(address)
    copies = WeightCopies(relay)
    print(msgspec.json.encode(relay.source).decode(), flush=True)
    place = memoryview(bytearray(NUM_TENSORS * (TENSOR_FLOATS * 4 + 64)))
    with ThreadPoolExecutor(2) as threads:
        for line in sys.stdin:
            if line.startswith("bare"):
                _, host, port, num_bytes = line.split()
                receive_bare((host, int(port)), place[: int(num_bytes)])
            else:
                copies.bring(msgspec.json.decode(line, type=WeightsOffer), DEADLINE_S, threads).result()
            print(msgspec.json.encode(Brought(time.monotonic(), copies.num_pulled)).decode(), flush=True)


def receive_bare(address: tuple[str, int], place: memoryview) -> None:
    have = 0
    with socket.create_connection(address) as connection:
        while have < len(place):
            have += connection.recv_into(place[have : have + BARE_BYTES])


if __name__ == "__main__":
    if sys.argv[1:2] in (["trainer"], ["reader"]):
        {"trainer": run_trainer, "reader": run_reader}[sys.argv[1]](sys.argv[2])
    else:
        from measure import Entry, main
        from publish_ranks import publish_peak

        table = {
            "chain_vs_line": Entry(chain_vs_line, "<= 1.15"),
            "loss_s": Entry(loss_s, "<= 1"),
            "socket_share": Entry(socket_share, ">= 0.8"),
            "delta_saving": Entry(delta_saving, ">= 5"),
            "pause_gap_ms": Entry(pause_gap_ms, "<= 20"),
            "publish_peak": Entry(publish_peak, "< 1"),
        }
        main(__doc__, table, ("torch", "xxhash"))
