"""How the ranks of a job find each other, from what SLURM says about the job alone.

Rank 0 opens torch's key-value store on its node, at the first free port of a short list that every
rank can work out: a function of the job's id and of how often it was restarted, so that two jobs on
a node differ, and no restart meets what its last life left behind. The others look through the same
list for the store that answers with this job's name. Then every rank signs in, and waits until all
have, or gives up.
"""

import os
import socket
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, TCPStore

# below 32768: Linux hands out the ports from there on to any program
FIRST_PORT = 10_000
PORTS = 22_000
CANDIDATES = 8


class CannotJoin(RuntimeError):
    """Not all ranks came together in time."""


@dataclass
class Place:
    """Where a rank stands among all ranks and among those of its node."""

    job: str  # unique among the jobs that run
    life: int  # 0, then one more with every restart
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: str
    first_node: str

    @property
    def name(self) -> str:
        return f"{self.job}/{self.life}"

    @property
    def ports(self) -> list[int]:
        return [
            FIRST_PORT + zlib.crc32(f"{self.name}/{i}".encode()) % PORTS for i in range(CANDIDATES)
        ]


def join(place: Place, seconds: float, stop: Callable[[], bool]) -> TCPStore | None:
    """Meet the other ranks and return the store; sets MASTER_ADDR, RANK and the like.

    The store has to be kept as long as ranks may want to talk. None if stop() came first. Raises
    CannotJoin after `seconds`, naming who is missing.
    """
    end = time.monotonic() + seconds
    found = _open(place) if place.rank == 0 else _find(place, end, stop)
    if found is None:
        return None
    store, port = found
    signatures = [f"launch/{place.name}/rank{r}" for r in range(place.world)]
    store.set(signatures[place.rank], place.node)
    while not _has(store, signatures):
        if stop():
            return None
        if time.monotonic() > end:
            missing = [r for r, signature in enumerate(signatures) if not _has(store, [signature])]
            raise CannotJoin(
                f"{len(missing)} of {place.world} ranks did not join within {seconds:.0f} s:"
                f" {_ranks(missing)}. Their logs say why, if they started; --join-timeout gives"
                " slow nodes longer"
            )
        time.sleep(0.1)
    os.environ.update(
        MASTER_ADDR=place.first_node,
        MASTER_PORT=str(port),
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world),
    )
    return store


def _open(place: Place) -> tuple[TCPStore, int]:
    for port in place.ports:
        # multi_tenant: init_process_group("env://") of this process then uses this very server
        try:
            store = TCPStore(
                place.first_node,
                port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=60),
            )
        except DistError as error:
            reason = str(error).splitlines()[0]
            continue
        store.set(f"launch/{place.name}", "here")
        return store, port
    raise CannotJoin(f"rank 0 cannot open any of the ports {place.ports} on {place.node}: {reason}")


def _find(place: Place, end: float, stop: Callable[[], bool]) -> tuple[TCPStore, int] | None:
    while time.monotonic() < end:
        for port in place.ports:
            if stop():
                return None
            store = _client(place.first_node, port) if _listens(place.first_node, port) else None
            if store is not None and _has(store, [f"launch/{place.name}"]):
                return store, port
        time.sleep(0.2)
    raise CannotJoin(
        f"rank {place.rank} on {place.node} did not find rank 0 at {place.first_node} (ports"
        f" {place.ports}): it did not start in time, its log says why, or a firewall stands between"
        " the nodes"
    )


def _has(store: TCPStore, keys: list[str]) -> bool:
    try:
        return store.check(keys)
    except DistError as error:
        raise CannotJoin(
            "rank 0 ended while the others were still joining; its log says why"
        ) from error


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
        return True
    except OSError:
        return False


def _client(host: str, port: int, seconds: float = 5) -> TCPStore | None:
    """The store at host:port; None if what listens there is no store.

    In a thread: the constructor waits for ever on a listener that is mute.
    """
    found = []

    def connect() -> None:
        try:
            found.append(
                TCPStore(
                    host,
                    port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=60),
                )
            )
        except (DistError, RuntimeError):
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _ranks(numbers: list[int], most: int = 16) -> str:
    return "rank " + ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
