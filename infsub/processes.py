"""Several processes that train one model together, by JAX's own distributed runtime.

Every process holds the whole state and takes the same steps, each on its devices' share of the batch.
Process 0 alone decides, reads and writes; what it decides goes to the others as lines of JSON, over a
connection to each. That connection is also how a process learns, at once and on any backend, that
another is gone: a collective would wait for it for ever. A process alone does none of this.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from infsub import records, signals
from infsub.shards import WHOLE, Shard
from infsub.types import UserError

T = TypeVar("T")
PATIENCE = 300.0  # seconds within which all processes must have started
MOMENT = 2.0  # seconds within which the news of a process that is gone has come
_FAREWELL = b"bye\n"
_PORTS = 2**16 - 2**12  # the ports from here on are taken by a job's number, as jax does


class Team(NamedTuple):
    """Who trains together.

    Attributes:
      shard: process i of n.
      coordinator: HOST:PORT where process 0 is found.
      scheduler: who started them, whom jax asks which device is whose; "deactivate": nobody it knows.
      device: which of its host's GPUs is this process's; "" where all that it sees are.
    """

    shard: Shard
    coordinator: str
    scheduler: str = "deactivate"
    device: str = ""


def parse(coordinator: str, shard: Shard, environment: Mapping[str, str]) -> Team | None:
    """The team of a --coordinator and a --shard, or of several tasks of SLURM or Open MPI, or none.

    A --shard without a coordinator is one that need not talk, in a scheduler's task too.

    Raises:
      UserError: no HOST:PORT, or nobody says which process this is or where the first one is.
    """
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"--coordinator={coordinator} is no HOST:PORT of process 0.")
    if shard != WHOLE:
        return Team(shard, coordinator) if coordinator else None
    # mpirun starts its daemons by srun, whose variables its ranks then have too; jax asks in this order.
    if found := _open_mpi(environment) or _slurm(environment):
        if not (coordinator or found.coordinator):
            raise UserError(
                "several tasks of Open MPI train together, and it does not say where the first one is: "
                "give --coordinator=HOST:PORT, or --shard=i/n for processes that need not talk."
            )
        return found._replace(coordinator=coordinator or found.coordinator)
    if coordinator:
        raise UserError(
            "--coordinator is for n processes that train together: give each its --shard=i/n too, or "
            "start them by srun or mpirun."
        )
    return None


def _slurm(environment: Mapping[str, str]) -> Team | None:
    # In the shell of salloc, a step of one task, SLURM_NTASKS is the allocation's.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    names = ("SLURM_PROCID", tasks, "SLURM_JOB_ID")
    index, size, job = (int(environment.get(name, "0")) for name in names)
    # Of a task that srun has started: node001, node[001,007-015] or node001,other2.
    first = re.match(r"([^,[]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", ""))
    if not first or size < 2:
        return None
    coordinator = f"{first[1]}{first[2] or ''}:{_PORTS + job % 2**12}"
    device = _device(environment, "SLURM_LOCALID")
    return Team(Shard(index, size), coordinator, "slurm", device)


def _open_mpi(environment: Mapping[str, str]) -> Team | None:
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    index, size = (int(environment.get(name, "0")) for name in names)
    if size < 2:
        return None
    device = _device(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, or tcp6://[fe80::1,fe80::2]:34911
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    first = re.match(r"(\d+)\..*?tcp(?:://([^,:]+)|6://\[([^],]+))", uri)
    if not first:  # Open MPI 5
        return Team(Shard(index, size), "", device=device)
    host, port = first[2] or f"[{first[3]}]", _PORTS + int(first[1]) // 2**12 % 2**12
    return Team(Shard(index, size), f"{host}:{port}", "ompi", device)


def _device(environment: Mapping[str, str], name: str) -> str:
    """The place of a task on its host, unless it sees a GPU of its own alone."""
    place, visible = environment.get(name, ""), environment.get("CUDA_VISIBLE_DEVICES")
    own = visible is not None and len(visible.split(",")) == 1
    return "" if own else place


def apart(team: Team | None) -> None:
    """Tasks of one host that do not train together, and so do not join, share its GPUs all the same.

    Before it, jax must not have computed anything.
    """
    if team and team.device:
        import jax

        jax.config.update("jax_cuda_visible_devices", team.device)


class _Tie:
    """A connection to another process; when that one ends without a farewell, so does this one."""

    def __init__(self, connection: socket.socket, other: Shard) -> None:
        self._connection, self._other = connection, other
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that is gone without a word is missed within half a minute.
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, value: Any) -> None:
        with contextlib.suppress(OSError):  # the other is gone: `_read` has the news
            self._connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        return self._arrived.get()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(_FAREWELL)

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                if line == _FAREWELL:
                    return
                self._arrived.put(json.loads(line))
        signals.end(
            f"process {self._other.index} of {self._other.count} has ended, and the training with it: "
            "see what it said; the same command continues from the last checkpoint.",
            1,
        )


class _Joined(NamedTuple):
    """This process, and its ties: of process 0 to all others, of another one to process 0."""

    shard: Shard = WHOLE
    ties: tuple[_Tie, ...] = ()


_joined = _Joined()


def count() -> int:
    """How many processes train together now."""
    return _joined.shard.count


def is_first() -> bool:
    """Whether this process is the one that decides, reads and writes."""
    return _joined.shard.index == 0


@contextlib.contextmanager
def joined(team: Team | None) -> Iterator[None]:
    """While entered, this process trains with the others of the team; of none, alone.

    Before it, jax must not have computed anything; afterwards each process is by itself again. What
    `together` raises ends all processes in good order; any other exception ends this one when it has
    been told, and thereby the others.

    Raises:
      UserError: the others cannot be reached.
    """
    if team is None:
        yield
        return
    _join(team)
    try:
        yield
    except BaseException as error:
        if count() > 1:
            if isinstance(error, Exception):
                # A collective fails when another process ends: its tie has the sentence for that.
                time.sleep(MOMENT)
            atexit.register(_end_at_exit)  # jax would wait for the others there
        raise
    leave()


def _end_at_exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _join(team: Team) -> None:
    """Ties the processes together, and then their devices."""
    global _joined
    import jax

    host, _, port = team.coordinator.rpartition(":")
    deadline = time.monotonic() + PATIENCE
    try:
        if team.shard.index == 0:
            with _server(int(port)) as server, _server(0) as free:
                connections = _gather(server, team, deadline)
                address = f"{host}:{free.getsockname()[1]}"
        else:
            connections = {0: _reach(host.strip("[]"), int(port), team, deadline)}
    except OSError as error:
        index, size = team.shard
        raise UserError(
            f"process {index} of {size}: the others are not reached at {team.coordinator} "
            f"({error.strerror or error}): start all {size} within {PATIENCE:.0f} seconds, on hosts that "
            "reach process 0 there."
        ) from error
    ties = {i: _Tie(each, Shard(i, team.shard.count)) for i, each in sorted(connections.items())}
    _joined = _Joined(team.shard, tuple(ties.values()))
    (address, *_) = exchanged(address if is_first() else "")
    if not is_first():
        address = _relayed(address)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, *team.shard[::-1], cluster_detection_method=team.scheduler)
    signals.take_back()  # jax has put a handler of SIGTERM beneath Python's


def _server(port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free."""
    if socket.has_dualstack_ipv6():
        options: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return socket.create_server(("::", port), **options)
    return socket.create_server(("", port))


def _gather(server: socket.socket, team: Team, deadline: float) -> dict[int, socket.socket]:
    """The connections of all other processes; strangers, and who comes twice, are turned away."""
    found: dict[int, socket.socket] = {}
    while len(found) < team.shard.count - 1:
        server.settimeout(max(0.001, deadline - time.monotonic()))
        connection, _ = server.accept()
        connection.settimeout(MOMENT)
        with contextlib.suppress(OSError, ValueError, TypeError):
            index, size = json.loads(connection.recv(64))
            if size == team.shard.count and 0 < index < size and index not in found:
                connection.sendall(b"+")
                found[index] = connection
                continue
        connection.close()
    return found


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to who may not listen there yet."""
    while True:
        try:
            return socket.create_connection((host, port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _reach(host: str, port: int, team: Team, deadline: float) -> socket.socket:
    """The connection to process 0."""
    connection = _connected(host, port, deadline)
    connection.settimeout(MOMENT)
    connection.sendall(json.dumps(team.shard).encode())
    if connection.recv(1) != b"+":
        connection.close()
        raise UserError(
            f"{team.coordinator} does not wait for process {team.shard.index} of {team.shard.count}: one "
            "is there already, or it is of other processes; give another port."
        )
    return connection


def _relayed(address: str) -> str:
    """An address of this host's own that leads to `address`, and stays when that one is gone.

    jax aborts a process, with a page of C++, as soon as its connection to process 0 ends.
    """
    host, _, port = address.rpartition(":")
    server = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(2**16):
                target.sendall(content)

    def serve() -> None:
        while True:
            near, _ = server.accept()
            far = _connected(host.strip("[]"), int(port), math.inf)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def leave() -> None:
    """From now on each process is by itself; all must come here."""
    global _joined
    if count() > 1:
        import jax

        for tie in _joined.ties:
            tie.close()
        jax.distributed.shutdown()
        _joined = _Joined()


def exchanged(value: Any) -> list[Any]:
    """What each process gives here, values of JSON, [n]; every process must come here."""
    if is_first():
        values = [value, *(tie.receive() for tie in _joined.ties)]
        for tie in _joined.ties:
            tie.send(values)
        return values
    _joined.ties[0].send(value)
    return _joined.ties[0].receive()


def together(action: Callable[[], T]) -> T:
    """action() of this process, when it has gone well in all of them.

    Raises:
      UserError, records.Stopped: what the action of one of them has raised; in all, which then have left
        each other.
    """
    result, failed = None, None
    try:
        result = action()
    except (UserError, records.Stopped) as error:
        failed = error
    told = exchanged(failed and [str(failed), getattr(failed, "exit_code", None)])
    wrong = next(filter(None, told), None)
    if wrong is None:
        return result  # pyright: ignore[reportReturnType]
    leave()
    text, code = wrong
    raise failed or (UserError(text) if code is None else records.Stopped(text, code))


def of_first(tree: Any) -> Any:
    """A pytree of arrays as process 0 has it, to the bit; the others give one of the same shapes."""
    if count() == 1:
        return tree
    import jax
    from jax.experimental import multihost_utils

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    # As bytes: the broadcast is a sum with zeros, and -0.0 + 0.0 is another zero.
    content = np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves), np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()
    found, start = [], 0
    for leaf in leaves:
        part = content[start : (start := start + leaf.nbytes)]
        found.append(np.frombuffer(part, leaf.dtype).reshape(leaf.shape))
    return jax.tree.unflatten(jax.tree.structure(tree), found)
