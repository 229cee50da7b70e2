"""Load generation and its metrics. Knows servers only through HTTP and engines only through `xllm.LLM`."""
