"""From what items hold to a stored feature: contents, shards that survive a killed run, workers, a cluster."""
