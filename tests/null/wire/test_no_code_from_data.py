"""Whatever arrives on a wire, no code is made of it: an audit hook sees whenever the interpreter does so."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import asyncio, contextlib, pickle, sys
from tests.null.wire import test_hostile as hostile
from tests.null.wire.peers import RawPeer, join
from xllm.testing.instance_thread import null_instance

FORBIDDEN = ("pickle.find_class", "marshal.loads", "exec", "compile", "import", "ctypes.dlopen",
             "subprocess.Popen", "os.system")
armed, fired = False, []

def hook(event, args):
    if armed and event in FORBIDDEN:
        fired.append(f"{event} {str(args)[:200]}")

sys.addaudithook(hook)

async def attack(server):
    front = await join(server)
    for _, rubbish in (*hostile.STRANGERS.values(), *hostile.MEMBERS.values()):
        with contextlib.closing(RawPeer(server.address)) as peer:
            with contextlib.suppress(OSError, AssertionError):  # it may be cut off while it still speaks
                await asyncio.to_thread(rubbish, peer)
    await hostile.works(front, "r")
    await front.stream.close()

async def main():
    global armed
    server = null_instance(limits=hostile.QUICK)
    await attack(server)  # whatever is imported or compiled on first use
    armed = True
    await attack(server)
    if sys.argv[1] == "control":
        with contextlib.suppress(Exception):
            pickle.loads(b"cbuiltins\\nlist\\n.")
    armed = False
    server.stop()
    await asyncio.to_thread(server.wait, 20.0)
    print(server.counters.num_dropped)

asyncio.run(main())
print(fired)
"""


def run(mode: str) -> tuple[int, str]:
    """(peers dropped, what the hook saw)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    dropped, fired = done.stdout.split("\n", 1)
    return int(dropped), fired.strip()


def test_hand_shake_garbage_and_requests_run_no_code() -> None:
    dropped, fired = run("attack")
    assert dropped >= 40, "the attacks did not arrive: this test shows nothing"
    assert fired == "[]"


def test_the_hook_would_have_seen_it() -> None:
    _, fired = run("control")
    assert "pickle.find_class" in fired
