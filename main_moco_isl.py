#!/usr/bin/env python
"""MoCo's main_moco.py with ISL: the flags and files of MoCo, and a few more.

The run itself, from its flags to its end: moco_isl/pretraining.py.
"""

import sys

from moco_isl.pretraining import check_args, get_parser, main

__all__ = ["check_args", "get_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
