"""Accepts the followers' connections, each after it has shown the cluster's key."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed import handshake
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.exit import Unreachable

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 30.0
"""All processes have joined before."""
_BACKLOG = 64


def accept_followers(cluster: Cluster, key: bytes) -> dict[int, socket.socket]:
    """Waits until all followers have connected; strangers are refused and logged. Nobody can connect afterwards.

    Raises:
      ConfigError: process 0 can't listen on the coordinator's address, or a follower has not connected in time.
    """
    connections: dict[int, socket.socket] = {}
    missing = set(range(1, cluster.num_processes))
    refused: list[str] = []
    arrived: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()

    def welcome(connection: socket.socket, address: str) -> None:
        try:
            arrived.put((handshake.accept(connection, key), connection))
        except (handshake.Refused, OSError) as error:
            log.warning("refused a connection from %s: %s", address, error)
            refused.append(f"{address} ({error})")
            connection.close()

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:  # closed: all are here, or it is too late
                return
            # A thread each: a stranger that says nothing must not keep the others waiting.
            threading.Thread(target=welcome, args=(connection, str(address[0])), daemon=True).start()

    with _listen(cluster) as listener:
        host, port = listener.getsockname()[:2]
        cluster.store.publish("leader", str(port))
        threading.Thread(target=serve, args=(listener,), name="cluster-accept", daemon=True).start()
        until = time.monotonic() + _CONNECT_SECONDS
        while missing:
            try:
                process, connection = arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                names = ", ".join(cluster.name(i) for i in sorted(missing))
                raise Unreachable(
                    "coordinator",
                    f"{names} did not connect to {host}:{port}. Is the port open to it? Refused: {', '.join(refused) or 'none'}.",
                ) from None
            if process in missing:
                missing.discard(process)
                connections[process] = connection
            else:
                log.warning("refused a connection: it says that it is process %d, which is not expected.", process)
                connection.close()
        listener.shutdown(socket.SHUT_RDWR)
    return connections


def _listen(cluster: Cluster) -> socket.socket:
    """Listens on any free port of the coordinator's interface, which followers reach.

    Raises:
      ConfigError: the address is not this host's.
    """
    host = cluster.coordinator_host
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            "coordinator", f"process 0 can't listen on {host}: {error}. It must be an address of process 0's own host."
        ) from error
