"""KV pages between engines: one protocol, several ways for the bytes. No scheduling, no page policy."""
