"""python -m moco_isl.embed FILE DIR --out features.parquet|.csv|.npz|.safetensors"""

import sys

# in a module of its own: processes that this one starts import it by its name
from moco_isl.embed.command import get_parser, main

__all__ = ["get_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
