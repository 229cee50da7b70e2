"""Programs that hold a library in their own process and answer runs over stdin and stdout.

Line in:  {"prompts", "output_lens", "at_s", "concurrency"}; line out: {"outcomes": [...]}, with the
fields of `xllm.cli.bench.metrics.Outcome`; before that one line when the model is loaded. Latencies
count from the moment a request may start (its time has come and a slot is free), as over HTTP.
"""
