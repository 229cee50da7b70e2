"""Who looks at the front: timelines, decision log, traces. Observers only; nothing here decides or serves."""
