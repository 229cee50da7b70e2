"""Who belongs to the cluster: a small key-value store with leases, and membership on top of it."""
