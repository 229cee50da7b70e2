"""A real etcd for the stage, one for all tests that leave it alive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faultlab.etcd import EtcdServer, etcd_missing


@pytest.fixture
def own_etcd() -> Iterator[EtcdServer]:
    """A server that the test may kill, pause and wipe."""
    missing = etcd_missing()
    if missing:
        pytest.skip(missing)
    server = EtcdServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[EtcdServer]:
    """A server that many tests share; each keeps to a prefix or cleans up."""
    missing = etcd_missing()
    if missing:
        pytest.skip(missing)
    server = EtcdServer()
    try:
        server.start()
        yield server
    finally:
        server.close()
