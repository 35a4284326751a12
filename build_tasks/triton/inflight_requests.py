"""The number of requests that an ensemble lets into its steps."""

from typing import Any

from build_tasks.triton.release_table import FIELDS_SINCE

MIN_IN_FLIGHT = 64  # requests of an ensemble at each step


def inflight_limit(ensemble: Any, network: Any, release: str) -> int:
    """Return the default of an ensemble's max_inflight_requests, 0 if the release does not have it.

    Prepared pictures wait in memory for the network. The limit ends that before memory does, and is far above what the
    network needs to be busy: four of its largest batches for each instance. It must not be low: a request above the
    limit blocks a thread of the server's HTTP or gRPC. Source: the core's ensemble_scheduler.cc in branch r26.04.
    """
    if release < FIELDS_SINCE["ModelEnsembling.max_inflight_requests"]:
        return 0
    instances = sum(max(group.count, 1) * max(len(group.gpus), 1) for group in network.instance_group)
    return max(MIN_IN_FLIGHT, int(4 * ensemble.max_batch_size * max(instances, 1)))
