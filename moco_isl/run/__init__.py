"""What any script of ours needs to run: flags, ranks, exits, the folder, checkpoints, signals."""
