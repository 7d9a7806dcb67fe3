"""Who finds the positives: one file a miner."""
