"""A listening engine on the null device as a process: `python -m xllm.testing.instance_process`.

Prints `listening: host:port` to stderr, obeys the signals of an instance and exits as one.
"""

from __future__ import annotations

import argparse
import logging
import sys

from xllm.config import ClusterConfig
from xllm.engine.server import obey_signals
from xllm.testing.instance_thread import null_instance

LISTENING = "listening: "


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster-key-file")
    parser.add_argument("--grace-s", type=float, default=30.0)
    args = parser.parse_args()
    logging.basicConfig(level="INFO", stream=sys.stderr)
    server = null_instance(
        cluster=ClusterConfig(cluster_key_file=args.cluster_key_file), grace_s=args.grace_s
    )
    obey_signals(server)
    print(f"{LISTENING}{server.address[0]}:{server.address[1]}", file=sys.stderr, flush=True)
    code = server.wait()
    return 1 if code is None else code


if __name__ == "__main__":
    sys.exit(main())
