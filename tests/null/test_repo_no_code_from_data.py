"""A running engine and its wire never unpickle, compile or execute anything: watched by an audit hook."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, sys
from xllm.testing.null_engine import null_engine, spec
from xllm.wire.codec import HEADER, decode_engine, decode_front, encode
from xllm.wire.messages import Frames, Submit

FORBIDDEN = {"exec", "compile", "import", "marshal.loads", "marshal.load", "pickle.find_class", "os.system"}
FORBIDDEN |= {"subprocess.Popen", "ctypes.dlopen"}
seen = []
started = False

def hook(event, args):
    if started and event in FORBIDDEN:
        seen.append(event)

sys.addaudithook(hook)

def work():
    engine = null_engine()
    for index in range(3):
        asked = Submit(spec=spec(f"r{index}", tuple(range(3, 40)), max_tokens=5, temperature=1.0))
        engine.core.submit(decode_front(encode(asked)[HEADER.size :]).spec)
    said = Frames(frames=tuple(engine.run()), snapshot=engine.core.snapshot())
    return len(decode_engine(encode(said)[HEADER.size :]).frames)

work()          # lazy imports of libraries belong to start-up
started = True
frames = work()
if len(sys.argv) > 1:
    exec("1")   # proves that the hook sees what it should
started = False
json.dump({"frames": frames, "seen": seen}, sys.stdout)
"""


def probe(*words: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_serving_requests_executes_no_data() -> None:
    result = probe()
    assert result["seen"] == []
    assert result["frames"]


def test_the_watch_itself_works() -> None:
    assert "exec" in str(probe("provoke")["seen"])
