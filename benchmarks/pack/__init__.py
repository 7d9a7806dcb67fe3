"""The first minutes on a GPU: what is proven, measured and trained there, in one command.

See `benchmarks.pack.__main__`.
"""
