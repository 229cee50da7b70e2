"""Which instance a request goes to: pure policies over snapshots. No clock, no I/O, no event loop."""
