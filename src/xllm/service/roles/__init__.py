"""Which instance does what: pools, switches, and when the mix changes. Pure but for `board`."""
