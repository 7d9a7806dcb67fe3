"""Pretraining, probe and kNN on a SLURM cluster, through submitit. Imports the scripts' parsers and
mains; nothing imports this.
"""
