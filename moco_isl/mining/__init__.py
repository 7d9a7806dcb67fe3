"""What rounds of all miners share, from features to positive sets; knows nothing of training."""
