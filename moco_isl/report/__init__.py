"""One page about one run or several: how training went, what was mined, and whether the mining
helps or hurts.
"""
