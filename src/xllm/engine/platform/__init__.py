"""Where the maths runs: the contract (`base`), the choice (`registry`), one file per platform.

Only `cpu` and `cuda` import torch, and `registry` imports those only when they are asked for.
"""
