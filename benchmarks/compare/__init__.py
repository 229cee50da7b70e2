"""xLLM and its peers on one machine, the same weights, each at its best documented settings.

    make bench-peers      # every peer into a virtual environment of its own, under .peers/
    make bench-compare    # the table

Nothing in `src/` imports this; peers are programs and libraries in other environments, never imports.
"""
