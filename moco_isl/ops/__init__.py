"""Numerics that know nothing of mining: search, softmax, clustering, and their kernels."""
