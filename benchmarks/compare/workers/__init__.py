"""Programs that hold a library in their own process and answer runs over stdin and stdout.

Line in:  {"prompts", "output_lens", "at_s", "concurrency"}; line out: {"outcomes": [...]}, with the
fields of `xllm.cli.bench.metrics.Outcome`; before that one line when the model is loaded. Latencies
count from the moment a request may start (its time has come and a slot is free), as over HTTP.
With "max_tpot_s", "max_ttft_s" and "hopeless" a run ends early, and answers with the rows that ended, once
that many of them are over one of the limits.
"""
