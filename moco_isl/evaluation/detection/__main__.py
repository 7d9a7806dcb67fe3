"""python -m moco_isl.evaluation.detection FILE --data VOC_DIR"""

import sys

# in a module of its own: processes that this one starts import it by its name
from moco_isl.evaluation.detection.command import check_args, get_parser, main

__all__ = ["check_args", "get_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
