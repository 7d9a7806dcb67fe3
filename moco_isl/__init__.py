"""MoCo v2 with Instance Similarity Learning: what is mined, how it is trained on, and how good it
is.
"""

__version__ = "0.1.0"
