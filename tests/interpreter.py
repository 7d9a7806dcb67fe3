"""Triton's interpreter for the scripts of tests, which start with this import.

TRITON_INTERPRET=1 must be set before.
"""

import inspect

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope) -> None:
    """As Triton's own, but scalars may bound a range: up to Triton 3.6 they are arrays of one
    number, which numpy 2.4 and newer do not take for a whole number. Newer versions of Triton
    squeeze them as here.
    """
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


if len(inspect.signature(_patch).parameters) == 2:  # another form in the first versions of Triton 3
    interpreter._patch_lang_tensor = _patch_with_index
