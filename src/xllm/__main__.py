"""`python -m xllm` is the `xllm` command."""

import sys

from xllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
