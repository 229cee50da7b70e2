"""Knowledge of the cluster's key: how it is read, and how two peers prove that they have it.

The key itself never crosses the wire and stands in no log, argument list or repr. No sockets here, and
no decision about who may connect: that is `hello`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path

from xllm.errors import ConfigError

MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 4096
MAC_BYTES = 32
_LABEL = b"xllm wire proof 1"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class ClusterKey:
    """The shared key; empty on a machine that asks for none. Does not show itself."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes = b"") -> None:
        self._key = key

    def __bool__(self) -> bool:
        return bool(self._key)

    def __repr__(self) -> str:
        return "ClusterKey(set)" if self._key else "ClusterKey(none)"

    def __reduce__(self) -> str:
        raise TypeError("a cluster key is not to be serialised")

    def prove(self, role: str, own_hello: bytes, peer_hello: bytes) -> bytes:
        """What the peer must see to believe that the sender of `own_hello`, acting as `role`, has the key.

        Over the bytes of both hellos as they were sent: the nonces make it valid once, role and order make
        a reflected one invalid, and fields unknown to one side are covered as well.
        """
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in (_LABEL, role.encode(), own_hello, peer_hello):
            mac.update(len(part).to_bytes(4, "little"))
            mac.update(part)
        return mac.digest()

    def holds(self, proof: bytes, role: str, its_hello: bytes, own_hello: bytes) -> bool:
        """Whether the sender of `its_hello` made `proof` with this key; takes equally long either way."""
        return hmac.compare_digest(proof, self.prove(role, its_hello, own_hello))


def read_key(path: str | None) -> ClusterKey:
    """The key in the file; no file = no key. Raises ConfigError for what would not keep a secret."""
    if path is None:
        return ClusterKey()
    try:
        # The mode of the very file that is read, and not of another one put in its place meanwhile.
        # Without waiting, should it be a pipe.
        with open(Path(path).expanduser(), "rb", opener=_open_at_once) as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise _refuse("cannot be read; make it with: head -c 32 /dev/urandom | base64 > FILE") from error
    if not stat.S_ISREG(mode):
        raise _refuse("is not a regular file")
    if mode & _OTHERS:
        raise _refuse("may be read by others; run chmod 600 on it")
    if len(key) > MAX_KEY_BYTES:
        raise _refuse(f"has more than {MAX_KEY_BYTES} bytes")
    key = key.strip()  # editors add a newline, and hosts must agree
    if len(key) < MIN_KEY_BYTES:
        raise _refuse(f"has fewer than {MIN_KEY_BYTES} bytes")
    return ClusterKey(key)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse(what: str) -> ConfigError:
    return ConfigError(f"cluster_key_file: the file {what}", param="cluster_key_file")
