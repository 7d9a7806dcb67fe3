"""One page about one run or several.

It shows how training went, what was mined, and whether the mining helped or hurt.
"""
