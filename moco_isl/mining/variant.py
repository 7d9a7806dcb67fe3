"""The paper's text and its published code, where they differ: the flag --isl-as."""

from moco_isl.errors import BadInput
from moco_isl.options import opt

PAPER = "paper"
PUBLISHED = "published"


def variant_option():
    return opt(
        PAPER,
        "--isl-as",
        choices=(PAPER, PUBLISHED),
        rare=True,
        help="where ISL's text and code differ. paper: the positive of a GAN's triplet is a member"
        " of the anchor's set, the hard positive the least similar member. published: the anchor"
        " itself, and the most similar member",
    )


def is_published(variant: str) -> bool:
    """Whether a value of the flag is the published code's. Raises BadInput."""
    if variant not in (PAPER, PUBLISHED):
        raise BadInput(f"--isl-as {variant}: expected {PAPER} or {PUBLISHED}")
    return variant == PUBLISHED
