"""Pretraining, probe and kNN on a SLURM cluster, through submitit.

It imports the scripts' parsers and mains; nothing imports this.
"""
