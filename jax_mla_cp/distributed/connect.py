"""Connects the processes of a cluster with each other: process 0 leads, the others follow."""

from __future__ import annotations

from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.handshake import cluster_key
from jax_mla_cp.distributed.leader import Leader


def connect(cluster: Cluster) -> Leader | Follower:
    """Waits until all processes are connected. From then on, a process that ends or is silent ends all.

    Raises:
      ConfigError: as `cluster_key`, `Leader` and `Follower`.
    """
    key = cluster_key(cluster.options.cluster_key_file, cluster.store, cluster.process_id)
    return Leader(cluster, key) if cluster.leads else Follower(cluster, key)
