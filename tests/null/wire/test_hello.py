"""The hand-shake: who is let in, who is refused by which name, and that no proof can be used twice."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import msgspec
import pytest

from xllm.config import ClusterConfig
from xllm.errors import ConfigError, XllmError
from xllm.wire.codec import HEADER, encode
from xllm.wire.hello import (
    FRONT,
    INSTANCE,
    MAX_HANDSHAKE_BYTES,
    Handshake,
    Identity,
    listen_address,
    parse_address,
)
from xllm.wire.messages import WIRE_VERSION, Drain, EngineMessage, FrontMessage, Hello, Proof, Refused
from xllm.wire.proof import ClusterKey, read_key

KEY = ClusterKey(b"k" * 16)


def body(message: FrontMessage | EngineMessage) -> bytes:
    return encode(message)[HEADER.size :]


def side(role: str, **fields: object) -> Handshake:
    accepts = INSTANCE if role == FRONT else FRONT
    fields.setdefault("key", KEY)
    identity = Identity(role=role, **fields)  # type: ignore[arg-type]
    return Handshake(identity, accepts=accepts, connecting=role == FRONT)


def shake(front: Handshake, instance: Handshake) -> None:
    """Both sides until they are done; raises what either raises."""
    assert instance.feed(body(front.hello)) == ()
    (proof,) = front.feed(body(instance.hello))
    (answer,) = instance.feed(body(proof))
    assert front.feed(body(answer)) == ()
    assert front.done
    assert instance.done


def refused(code: str, front: Handshake, instance: Handshake) -> None:
    with pytest.raises(XllmError) as error:
        shake(front, instance)
    assert error.value.code == code


def changed(handshake: Handshake, **fields: object) -> Handshake:
    """The side after it has lied in its hello."""
    handshake.hello = msgspec.structs.replace(handshake.hello, **fields)
    handshake._own = body(handshake.hello)
    return handshake


def test_two_that_share_a_key_let_each_other_in_and_know_who_it_is() -> None:
    front, instance = side(FRONT, peer_id="f"), side(INSTANCE, peer_id="i")
    shake(front, instance)
    assert front.peer == instance.hello
    assert instance.peer == front.hello


def test_the_next_version_may_say_more_in_its_hello() -> None:
    instance = side(INSTANCE)
    fields = msgspec.to_builtins(side(FRONT).hello, builtin_types=(bytes,))
    newer = msgspec.msgpack.encode({**fields, "type": "hello", "version": WIRE_VERSION + 1, "colour": "red"})
    assert instance.feed(newer) == ()
    proof = Proof(mac=KEY.prove(FRONT, newer, body(instance.hello)))
    assert len(instance.feed(body(proof))) == 1
    assert instance.done


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("wire_version", {"version": WIRE_VERSION - 2}),
        ("wire_version", {"version": WIRE_VERSION + 2}),
        ("wire_version", {"version": WIRE_VERSION - 1}),  # knows no proof; only over an inherited socket
        ("wrong_cluster", {"cluster": "other"}),
        ("wrong_role", {"role": INSTANCE}),
        ("wrong_role", {"role": ""}),
        ("bad_hello", {"incarnation": ""}),
        ("bad_hello", {"nonce": b"short"}),
        ("bad_hello", {"peer_id": "x" * 300}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(code: str, fields: dict[str, object]) -> None:
    refused(code, changed(side(FRONT), **fields), side(INSTANCE))


def test_a_process_does_not_connect_to_itself() -> None:
    refused("own_incarnation", side(FRONT, incarnation="same"), side(INSTANCE, incarnation="same"))


def test_another_instance_than_the_expected_one_is_refused() -> None:
    front = Handshake(
        Identity(role=FRONT, key=KEY), accepts=INSTANCE, connecting=True, peer_id="the one registered"
    )
    refused("wrong_peer", front, side(INSTANCE, peer_id="another that got its port"))


@pytest.mark.parametrize("key", [ClusterKey(), ClusterKey(b"x" * 16)])
def test_without_the_key_nobody_gets_in_and_nothing_is_proved_to_him(key: ClusterKey) -> None:
    front, instance = side(FRONT, key=key), side(INSTANCE)
    instance.feed(body(front.hello))
    (proof,) = front.feed(body(instance.hello))
    with pytest.raises(XllmError) as error:
        instance.feed(body(proof))
    assert error.value.code == "cluster_key"
    assert not instance.done


def test_a_front_refuses_an_instance_without_the_key() -> None:
    """It has sent its proof already; what comes back must be one, too."""
    front, instance = side(FRONT), side(INSTANCE, key=ClusterKey(b"x" * 16))
    (_,) = front.feed(body(instance.hello))
    instance.feed(body(front.hello))
    forged = Proof(mac=ClusterKey(b"x" * 16).prove(INSTANCE, instance._own, front._own))
    with pytest.raises(XllmError) as error:
        front.feed(body(forged))
    assert error.value.code == "cluster_key"


def test_a_reflected_proof_is_refused() -> None:
    """Somebody without the key sends back what he gets: hello with its nonce, and the proof."""
    front = side(FRONT)
    mirror = changed(side(INSTANCE), nonce=front.hello.nonce)
    with pytest.raises(XllmError) as error:
        front.feed(body(mirror.hello))
    assert error.value.code == "own_incarnation"
    front = side(FRONT)
    (proof,) = front.feed(body(side(INSTANCE).hello))
    with pytest.raises(XllmError) as error:
        front.feed(body(proof))
    assert error.value.code == "cluster_key"


def test_a_recorded_hand_shake_cannot_be_replayed() -> None:
    front, instance = side(FRONT), side(INSTANCE)
    instance.feed(body(front.hello))
    (proof,) = front.feed(body(instance.hello))
    again = side(INSTANCE)
    again.feed(body(front.hello))
    with pytest.raises(XllmError) as error:
        again.feed(body(proof))
    assert error.value.code == "cluster_key"


def test_a_hello_changed_on_its_way_makes_the_proof_invalid() -> None:
    front, instance = side(FRONT, peer_id="honest"), side(INSTANCE)
    instance.feed(body(msgspec.structs.replace(front.hello, peer_id="somebody else")))
    (proof,) = front.feed(body(instance.hello))
    with pytest.raises(XllmError) as error:
        instance.feed(body(proof))
    assert error.value.code == "cluster_key"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x91" * 4000,
        body(Drain()),
        body(Proof(mac=b"x" * 32)),
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_before_the_proof_nothing_else_is_taken(data: bytes) -> None:
    with pytest.raises(XllmError) as error:
        side(INSTANCE).feed(data)
    assert error.value.code == "bad_hello"


def test_a_second_hello_and_endless_ones_are_refused() -> None:
    instance = side(INSTANCE)
    instance.feed(body(side(FRONT).hello))
    with pytest.raises(XllmError):
        instance.feed(body(side(FRONT).hello))
    with pytest.raises(XllmError):
        side(INSTANCE).feed(b"\xc4" * (MAX_HANDSHAKE_BYTES + 1))


def test_the_peers_reason_is_kept_short() -> None:
    told = Refused(error=ConfigError("no\n" * 10_000, code="c" * 500).info())
    with pytest.raises(ConfigError) as error:
        side(FRONT).feed(body(told))
    assert len(error.value.message) < 1000
    assert "\n" not in error.value.message
    assert len(error.value.code) == 64


# -- the key ----------------------------------------------------------------------------------


def key_file(path: Path, data: bytes, mode: int = 0o600) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_a_key_is_read_without_the_newline_an_editor_added(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", b"k" * 16 + b"\n")
    assert read_key(path).prove("r", b"a", b"b") == KEY.prove("r", b"a", b"b")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(key_file(tmp_path / "key", b"k" * 32, mode))


@pytest.mark.parametrize(("data", "why"), [(b"k" * 15, "fewer than 16"), (b"k" * 4097, "more than 4096")])
def test_a_key_of_an_odd_size_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read_key(key_file(tmp_path / "key", data))


def test_a_missing_key_a_directory_and_a_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("missing", ".", "pipe"):
        with pytest.raises(ConfigError):
            read_key(str(tmp_path / name))


def test_the_key_shows_itself_nowhere(tmp_path: Path) -> None:
    secret = "sesame-sesame-sesame"
    config = ClusterConfig(cluster_key_file=key_file(tmp_path / "key", secret.encode()))
    identity = Identity.of(config, FRONT)
    assert identity.key
    assert secret not in f"{identity!r} {identity} {identity.key!r} {config!r}"
    with pytest.raises(TypeError):
        pickle.dumps(identity.key)


# -- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.0.2.7:1", "example.org:1"])
def test_listening_beyond_this_machine_needs_a_key(listen: str) -> None:
    config = ClusterConfig(listen=listen)
    with pytest.raises(ConfigError, match="cluster_key_file"):
        listen_address(config, ClusterKey())
    assert listen_address(config, KEY)[1] == 1


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:5", "[::1]:0", "127.3.2.1:9"])
def test_listening_on_this_machine_does_not(listen: str) -> None:
    assert listen_address(ClusterConfig(listen=listen), ClusterKey())[0] == listen.rsplit(":", 1)[0].strip(
        "[]"
    )


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "host:x", "host:65536", "host:-1", "::1:5", "h:1:2", "host:²"]
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(address, "listen")


def test_a_role_is_part_of_the_proof() -> None:
    assert KEY.prove(FRONT, b"a", b"b") != KEY.prove(INSTANCE, b"a", b"b")
    assert KEY.prove(FRONT, b"a", b"b") != KEY.prove(FRONT, b"b", b"a")
    # Lengths stand before the parts, so that nothing can move from one into the next.
    assert KEY.prove(FRONT, b"ab", b"c") != KEY.prove(FRONT, b"a", b"bc")


def test_own_and_peer_hello_have_fresh_nonces() -> None:
    nonces = {side(FRONT).hello.nonce for _ in range(8)}
    assert len(nonces) == 8
    assert all(len(n) >= 16 for n in nonces)
    assert isinstance(side(FRONT).hello, Hello)
