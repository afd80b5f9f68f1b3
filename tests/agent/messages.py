"""Migration messages as tests need them."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from warmsync.v1 import migration_pb2 as pb


def migration(name: str = "web1", state: Any = pb.STATE_SYNCING, **progress: Any) -> pb.Migration:
    """A source's migration in its third round, 25 % of 4 MiB done."""
    numbers: dict[str, Any] = {
        "rounds": 3,
        "sent_bytes": 3 << 30,
        "total_bytes": 2 << 30,
        "round_bytes": 4 << 20,
        "round_done_bytes": 1 << 20,
        "dirty_bytes": 5 << 20,
        "throughput_bytes_per_second": float(100 << 20),
        "dirty_rate_bytes_per_second": float(20 << 20),
        "predicted_downtime_seconds": 0.18,
    }
    return pb.Migration(
        name=f"migrations/{name}",
        role=pb.ROLE_SOURCE,
        state=state,
        peer="10.0.0.2:7070",
        volumes=[
            pb.Volume(source="/dev/a", target="/dev/b", size_bytes=2 << 30, block_size_bytes=4096)
        ],
        tracker=pb.TRACKER_EBPF,
        tracker_reason="block devices",
        carrier=pb.CARRIER_GRPC,
        block_size_bytes=4096,
        max_downtime_seconds=0.5,
        progress=pb.Progress(**{**numbers, **progress}),
        history=[pb.Transition(state=pb.STATE_PENDING, time=Timestamp(seconds=1_700_000_000))],
        create_time=Timestamp(seconds=1_700_000_000),
    )
