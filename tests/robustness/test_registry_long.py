"""An etcd that is away for a minute under load, and members that come and go for one: `make robustness`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faultlab.cluster import cluster
from tests.faultlab.etcd import EtcdServer, etcd_missing
from tests.integration.registry.test_cluster import come_and_go, outage

pytestmark = pytest.mark.robustness


@pytest.fixture
def own_etcd():
    missing = etcd_missing()
    if missing:
        pytest.skip(missing)
    server = EtcdServer()
    server.start()
    yield server
    server.close()


def test_f27_etcd_down_for_a_minute_costs_no_request(tmp_path: Path, own_etcd: EtcdServer) -> None:
    with cluster(tmp_path, own_etcd.url, pace_ms=2) as town:
        num_answers = outage(town, own_etcd, outage_s=60.0)
    print(f"{num_answers} answers while etcd was away for 60 s, all of them right")


def test_f58_flapping_for_a_minute_costs_no_request(tmp_path: Path, own_etcd: EtcdServer) -> None:
    with cluster(tmp_path, own_etcd.url, pace_ms=2) as town:
        num_answers = come_and_go(town, times=20)
    print(f"{num_answers} answers while an instance came and went 20 times, all of them right")
