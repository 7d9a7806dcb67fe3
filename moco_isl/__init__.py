"""MoCo v2 with Instance Similarity Learning: mining positives, training on them, evaluation."""

__version__ = "0.1.0"
