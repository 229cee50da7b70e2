"""OpenVINO GenAI: a library, so measured in a worker process that runs in its own environment."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.compare import workers
from benchmarks.compare.adapters.context import Context, installed, output_of
from benchmarks.compare.engine import Launch
from benchmarks.compare.settings import OPENVINO_PROPERTIES, OPENVINO_SCHEDULER, Entry

_VERSION = "import importlib.metadata as m; print(m.version('openvino-genai'))"


def launch(entry: Entry, context: Context) -> Launch:
    python = installed(context, "openvino")
    properties = dict(OPENVINO_PROPERTIES) | {"INFERENCE_NUM_THREADS": context.num_threads}
    scheduler = dict(OPENVINO_SCHEDULER) | {"cache_size": context.kv_gib, "max_num_seqs": context.max_seqs}
    settings = {
        "model": str(context.weights(entry, gguf=True)),
        "properties": properties,
        "scheduler": scheduler,
    }
    program = Path(workers.__file__).with_name("openvino_worker.py")
    return Launch(
        command=(str(python), str(program), json.dumps(settings)),
        about={
            "version": output_of([str(python), "-c", _VERSION]),
            "properties": json.dumps(properties),
            "scheduler": json.dumps(scheduler),
        },
    )
