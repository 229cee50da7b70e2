"""The hand-shake of two peers on a network connection: who they are, and that they know the cluster's key.

Hello from both sides, then Proof: first from the one who connected, since whoever listens tells nothing
that depends on the key to somebody who has not proved to have it. A state machine over frame bodies
without sockets or time; until it is done nothing but its three messages is ever decoded.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field

import msgspec

from xllm.config import ClusterConfig
from xllm.errors import AccessError, ConfigError, ErrorInfo, XllmError
from xllm.ids import new_request_id
from xllm.wire.messages import WIRE_VERSION, Hello, Proof, Refused
from xllm.wire.proof import MAC_BYTES, ClusterKey, read_key

HANDSHAKE_S = 5.0
MAX_HANDSHAKE_FRAME_BYTES = 4096
MAX_HANDSHAKE_BYTES = 64 * 1024
NONCE_BYTES = 32
MIN_NONCE_BYTES = 16
MAX_NAME_CHARS = 256
OLDEST_VERSION = WIRE_VERSION - 1
NEWEST_VERSION = WIRE_VERSION + 1

FRONT = "front"
INSTANCE = "instance"

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Hello | Proof | Refused] = msgspec.msgpack.Decoder(Hello | Proof | Refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a process is on the wire. `incarnation` is drawn anew by each process."""

    role: str
    cluster: str = "default"
    peer_id: str = ""
    incarnation: str = field(default_factory=new_request_id)
    key: ClusterKey = field(default_factory=ClusterKey)

    @classmethod
    def of(cls, config: ClusterConfig, role: str, peer_id: str | None = None) -> Identity:
        """From the settings; reads the key's file. Raises ConfigError."""
        incarnation = new_request_id()
        return cls(
            role=role,
            cluster=config.cluster,
            peer_id=peer_id or config.instance_id or incarnation,
            incarnation=incarnation,
            key=read_key(config.cluster_key_file),
        )


class Handshake:
    """One side of one hand-shake.

    Send `hello`, pass every frame body that arrives to `feed` and send the messages it returns, until
    `done`. `feed` raises an XllmError with a code that names what was wrong; `refusal` makes the last
    message of it, which the peer puts into its own log.
    """

    def __init__(
        self, identity: Identity, *, accepts: str, connecting: bool, peer_id: str | None = None
    ) -> None:
        """`accepts` is the role the peer must have, `peer_id` its name where the caller knows it."""
        self._identity = identity
        self._accepts = accepts
        self._connecting = connecting
        self._peer_id = peer_id
        self.hello = Hello(
            incarnation=identity.incarnation,
            role=identity.role,
            peer_id=identity.peer_id,
            cluster=identity.cluster,
            nonce=secrets.token_bytes(NONCE_BYTES),
        )
        self._own = _encoder.encode(self.hello)
        self._its = b""
        self._num_bytes = 0
        self.peer: Hello | None = None
        self.done = False

    def feed(self, body: bytes) -> tuple[Proof, ...]:
        """What to answer. Raises XllmError, after which the connection must be closed."""
        self._num_bytes += len(body)
        if self.done or self._num_bytes > MAX_HANDSHAKE_BYTES:
            raise _not_a_handshake()
        message = decode_handshake(body)
        if isinstance(message, Refused):
            raise _told(message.error)
        if isinstance(message, Hello):
            return self._take_hello(message, body)
        return self._take_proof(message)

    def _take_hello(self, hello: Hello, body: bytes) -> tuple[Proof, ...]:
        if self.peer is not None:
            raise _not_a_handshake()
        self._check(hello)
        self.peer, self._its = hello, body
        return (self._proof(),) if self._connecting else ()

    def _take_proof(self, proof: Proof) -> tuple[Proof, ...]:
        if self.peer is None:
            raise _not_a_handshake()
        key = self._identity.key
        if len(proof.mac) != MAC_BYTES or not key.holds(proof.mac, self._accepts, self._its, self._own):
            raise AccessError(
                f"{_who(self.peer)} does not have this cluster's key; compare cluster_key_file on both sides",
                code="cluster_key",
            )
        self.done = True
        return () if self._connecting else (self._proof(),)

    def _proof(self) -> Proof:
        return Proof(mac=self._identity.key.prove(self._identity.role, self._own, self._its))

    def _check(self, hello: Hello) -> None:
        """The proof covers these fields later; refusing by name early is for honest mistakes."""
        own = self._identity
        if not OLDEST_VERSION < hello.version <= NEWEST_VERSION:
            # One older talks over an inherited socket only: it knows neither proof nor attaching.
            raise ConfigError(
                f"the peer speaks wire version {hello.version}, this side {WIRE_VERSION}; "
                "install neighbouring versions of xllm",
                code="wire_version",
            )
        texts = (hello.incarnation, hello.role, hello.peer_id, hello.cluster)
        if any(len(text) > MAX_NAME_CHARS for text in texts) or not hello.incarnation:
            raise _not_a_handshake()
        if not MIN_NONCE_BYTES <= len(hello.nonce) <= MAX_NAME_CHARS:
            raise _not_a_handshake()
        if hello.incarnation == own.incarnation or hello.nonce == self.hello.nonce:
            raise ConfigError(
                "the connection leads back to this very process; check the addresses", code="own_incarnation"
            )
        if hello.role != self._accepts:
            raise ConfigError(
                f"the peer is a {hello.role!r}, a {self._accepts!r} was expected here; check the address",
                code="wrong_role",
            )
        if hello.cluster != own.cluster:
            raise ConfigError(
                f"the peer belongs to cluster {hello.cluster!r}, this side to {own.cluster!r}",
                code="wrong_cluster",
            )
        if self._peer_id is not None and hello.peer_id != self._peer_id:
            raise ConfigError(
                f"at this address is {hello.peer_id!r} and not {self._peer_id!r}", code="wrong_peer"
            )


def decode_handshake(body: bytes) -> Hello | Proof | Refused:
    """The only decoder that sees bytes of somebody unknown."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _not_a_handshake() from error


def refusal(error: XllmError) -> Refused:
    """What the peer is told of a hand-shake that failed here."""
    return Refused(error=error.info())


def listen_address(config: ClusterConfig, key: ClusterKey) -> tuple[str, int]:
    """(host, port) to listen on. Raises ConfigError, also for listening beyond this machine without a key."""
    host, port = parse_address(config.listen, "listen")
    if not key and not _is_loopback(host):
        raise ConfigError(
            f"listen={config.listen}: beyond this machine members must prove to know a key; "
            "set cluster_key_file",
            param="listen",
        )
    return host, port


def parse_address(address: str, param: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as (host, port). Raises ConfigError."""
    host, colon, digits = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not digits.isascii() or not digits.isdigit() or int(digits) > 65535:
        raise ConfigError(f"{param}={address!r}: must be host:port", param=param)
    return host, int(digits)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may lead anywhere


def _told(info: ErrorInfo) -> XllmError:
    """The peer's reason as our error. Its text is somebody unknown's: short, and quoted."""
    return ConfigError(f"the peer refuses: {info.message[:MAX_NAME_CHARS]!r}", code=info.code[:64])


def _who(hello: Hello) -> str:
    return f"peer {hello.peer_id[:64]!r}"


def _not_a_handshake() -> ConfigError:
    return ConfigError("the peer does not speak this protocol", code="bad_hello")
