"""The service and the engine on a virtual clock: random faults, exact answers, reproducible by a seed."""
