"""How tests compare two searches for neighbours: rounding may swap rows that are equally near."""

import torch

Tensor = torch.Tensor


def alone(cosine: Tensor, gap: float) -> Tensor:
    """cosine [Q, k], falling -> which places [Q, k] no other cosine is within `gap` of.

    What would stand behind the last place is unknown, so that one never counts as alone.
    """
    apart = cosine[:, :-1] - cosine[:, 1:] > gap  # [Q, k - 1]
    before = torch.nn.functional.pad(apart, (1, 0), value=True)
    behind = torch.nn.functional.pad(apart, (0, 1), value=False)
    return before & behind


def assert_same_neighbours(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], gap: float = 1e-6
) -> None:
    """found (cosine [Q, k], row [Q, k]) of one search, wanted [Q, k] or [Q, k + 1] of another.

    Cosines must be equal to within `gap`. Rows must be equal where the cosines wanted before and
    behind are further away than that; with one more column wanted, the last place is compared too.
    No row may be found twice.
    """
    cosine, row = found
    k = cosine.shape[1]
    assert (
        cosine.shape == row.shape
        and len(cosine) == len(wanted[0])
        and wanted[0].shape[1] in (k, k + 1)
    )
    off = float((cosine - wanted[0][:, :k]).abs().max())
    assert off <= gap, f"cosines are off by {off:.2g}"
    ordered = row.sort(dim=1).values
    assert not bool((ordered[:, 1:] == ordered[:, :-1]).any()), "a row was found twice"
    wrong = alone(wanted[0], gap)[:, :k] & (row != wanted[1][:, :k])
    assert not bool(wrong.any()), f"{int(wrong.sum())} rows differ though no other is as near"
