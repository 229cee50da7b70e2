"""`xllm bench serve` at several request rates against one local server: where latency starts to climb.

make bench-serve
"""

from __future__ import annotations

import argparse
import sys

from xllm.cli.background import background_server
from xllm.cli.main import main as xllm
from xllm.cli.serving import SECTIONS
from xllm.config.load import load

RATES = ("1", "2", "4", "inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--num-prompts", default="32")
    args = parser.parse_args()
    # Without a limit of the wait: what is refused has no latency to report.
    keywords = {"model": args.model, "port": 0, "log_level": "warning", "max_queue_delay_s": 0}
    loaded = load(*SECTIONS, keywords=keywords)
    codes = []
    with background_server(loaded, lambda line: print(line, file=sys.stderr)) as url:
        for seed, rate in enumerate(RATES):
            print(f"\n== request rate {rate}, seed {seed}")
            words = ["bench", "serve", "--base-url", url, "--num-prompts", args.num_prompts]
            # Another seed per rate: equal prompts would come out of the prefix cache.
            words += ["--request-rate", rate, "--seed", str(seed), "--goodput", "ttft:1000", "tpot:200"]
            codes.append(xllm(words))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
