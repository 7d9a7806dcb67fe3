"""Checkpoints in MoCo's own form, written whole or not at all, and read without running their code.

A file holds MoCo's keys `epoch, arch, state_dict, optimizer`, with the prefix `module.` on the
names, which MoCo's own probe expects. Beside them are `args` (plain values) and `isl` (what an
exact resume needs). All of it is tensors and plain values.
"""

import contextlib
import errno
import math
import os
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

from moco_isl import files, schema
from moco_isl.encoders import head_name
from moco_isl.errors import BadInput, RunFailed
from moco_isl.files import TEMPORARY, shown
from moco_isl.run import plain

PREFIX = "module."
# names that DDP, torch.compile, FSDP and checkpointing insert
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
FOLDER = 0x10  # the bit of a zip entry's attributes that marks a folder


def save(state: dict, path: str | Path) -> None:
    """Write `state` to `path` such that `path` always holds either the old or the new whole file.

    This holds through a kill and a full disk too. Raises RunFailed where it cannot be written; the
    temporary file is removed then, and an older `path` stays as it was.
    """
    path = Path(path)
    try:
        files.write(state, path, path.with_name(path.name + TEMPORARY))
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error


@torch.no_grad()
def exploded(state) -> list[str]:
    """The names of the tensors in a state from which no training can go on.

    state: dicts and lists of tensors and plain values. A tensor is named if one of its values is
    not finite, or if the sum of its squares is not; half precision is spared the second test. Makes
    one reduction over all tensors of a device and type, and waits once for each.
    """
    groups: dict[tuple, dict[str, torch.Tensor]] = {}
    for name, tensor in _floats(state, ""):
        groups.setdefault((tensor.device, tensor.dtype), {})[name] = tensor
    found = []
    for (_, dtype), tensors in groups.items():
        # the sum of squares of finite halves may be infinite: their largest value is looked at
        order = math.inf if dtype.itemsize < 4 else 2
        norms = torch.stack(torch._foreach_norm(list(tensors.values()), order))  # [tensors]
        if not norms.sum().isfinite():
            found += [
                name for name, norm in zip(tensors, norms.tolist()) if not math.isfinite(norm)
            ]
    return found


def _floats(value, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        # one on meta has no values; where it is used, the check of its shape refuses it
        if value.is_floating_point() and value.numel() and not value.is_meta:
            yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _floats(inner, f"{name}.{key}" if name else str(key))


def copy(source: Path, target: Path) -> None:
    """Make `target` another name of the whole file `source`, atomically.

    It is a hard link where the file system has them, and else a copy.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        with files.replacing(target, temporary):
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise RunFailed(
            f"cannot write {target}: {error.strerror or error}; {source} is whole"
        ) from error


def require_writable(path: str | Path, flag: str) -> None:
    """Raise BadInput where no file can be written at `path`; make its folder.

    This is asked before hours are spent on what the file is to hold.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise BadInput(
            f"{flag} '{path}' cannot be written: {error.strerror}; expected the name of a file, in"
            " a folder to create files in"
        ) from error


def save_safetensors(
    tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]
) -> None:
    """Write a safetensors file, whole or not at all, with the permissions of other new files.

    Raises RunFailed. Such a file has no check sums: damage to it may not be seen when it is read.
    """
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with files.replacing(path, temporary):
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(
                tensors,
                temporary,
                metadata={key: files.encodable(value) for key, value in metadata.items()},
            )
            temporary.chmod(mode)  # the library makes files that only their owner may read
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise RunFailed(f"cannot write '{path}': {error}") from error


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors' do.

    Such a file begins with the length of a header and the header, which is JSON.
    """
    with open(path, "rb") as file:
        start = file.read(9)
        return (
            len(start) == 9
            and start[8:] == b"{"
            and struct.unpack("<Q", start[:8])[0] < os.fstat(file.fileno()).st_size
        )


def remove_stale(folder: Path) -> None:
    """Delete the temporary files that a killed save left behind."""
    for path in folder.glob("*" + TEMPORARY):
        path.unlink(missing_ok=True)


def require_file(path: str | Path) -> Path:
    """Return `path` if it is a file that can be read; else raise BadInput.

    The error for a folder names the checkpoints in it.

    Raises BadInput, for a folder with the checkpoints in it.
    """
    path = Path(path)
    found = files.kind(path)
    if not found:
        raise BadInput(f"no file at '{path}': expected a checkpoint; check the path")
    if found == "folder":
        inside = sorted(p.name for p in path.glob("*.pth*"))
        hint = f"; it holds {', '.join(inside[-3:])}: name one of them" if inside else ""
        raise BadInput(f"'{path}' is a folder: expected a checkpoint file{hint}")
    return files.require_file(path, expected="a checkpoint")


def load(path: str | Path, map_location: torch.device | str = "cpu", mmap: bool = False) -> dict:
    """The dict in a checkpoint file, read without ever executing a pickle.

    `plain` says which plain data beside the tensors is read. Raises BadInput with what is wrong
    with the file.
    The check sums that torch.save has written are compared, so that no damaged value is taken.
    Files of torch before 1.6, and those written with torch.serialization.set_crc32_options(False),
    have none: damage to them may not be seen.
    mmap: tensors are read from the file only when they are used, and are not checked. Names, shapes
    and plain values are checked.
    """
    path = require_file(path)
    if damage := _damage(path, whole=not mmap):
        raise BadInput(
            f"cannot read '{path}': it is damaged ({damage}); expected a file as torch.save wrote"
            " it; copy it anew, or remove it and go on from an older one"
        )
    try:
        with warnings.catch_warnings(), plain.allowed(), files.utf8_name(path) as name:
            # torch warns of pickles of unusual protocols; the error below says what is wrong
            warnings.simplefilter("ignore")
            content = torch.load(
                name,
                map_location=map_location,
                weights_only=True,
                mmap=mmap and zipfile.is_zipfile(path),
            )
    except Exception as error:  # a file of any kind may raise anything here
        raise BadInput(
            f"cannot read '{path}': {_what_is_wrong(path, error)}; expected a checkpoint of this"
            " project or of MoCo, or another torch.save of a state dict"
        ) from error
    if not isinstance(content, dict):
        raise BadInput(
            f"'{path}' holds a {type(content).__name__}: expected a dict with a 'state_dict'"
        )
    return content


def model_state(model: nn.Module) -> dict:
    """The model's state dict under MoCo's published names: `module.encoder_q. ...`."""
    return {PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def plain_names(
    state: dict[str, torch.Tensor], path: str | Path, own: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """The tensors under the model's own names.

    The names in WRAPPERS are left out wherever they stand, and so is what stands before
    `encoder_q.`.
    own: the model's names, which stay as they are. Raises BadInput where two tensors would get the
    same name.
    """
    own = {_without_wrappers(name): name for name in own}
    before = {
        found[1]
        for name in state
        if (found := re.match(r"((?:[^.]+\.)*?)encoder_q\.", _without_wrappers(name)))
    }
    before = before.pop() if len(before) == 1 else ""  # such as Lightning's "model."
    found = {}
    for name, tensor in state.items():
        new = _without_wrappers(name).removeprefix(before)
        new = own.get(new, new)
        if new in found:
            raise BadInput(
                f"'{path}' holds two tensors for {new}, one of them as {name}: expected one; take"
                " the other out of the file"
            )
        found[new] = tensor
    return found


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_moco(content: dict) -> bool:
    """Whether a file holds the query encoder of a MoCo or an Instance."""
    state = content.get("state_dict", content)
    return _is_state_dict(state) and any("encoder_q." in name for name in state)


def match(
    model: nn.Module, content: dict, path: str | Path, init: bool = False
) -> tuple[dict, list[str]]:
    """Compare what `load` gave with a `builder.MoCo` or `builder.Instance`, and return its tensors.

    The model may be on the meta device. Of an encoder without a head the file's head is left out.

    Takes our files, MoCo's training files and MoCo's published, stripped ones, with names of
    wrappers in theirs or without. Returns the tensors by the model's names, and which of "head",
    "encoder_k", "queue" and "classifier" the model does not get from the file. Those are what the
    file lacks, and with `init` what has another shape in it: of another head the key encoder and
    the queue are of no use either. A queue of another length is never taken. Raises BadInput with
    the names that do not fit.
    """
    state = content.get("state_dict", content)
    if not _is_state_dict(state):
        raise BadInput(
            f"'{path}' holds no state_dict of tensors: expected a file of this project or of MoCo's"
            " main_moco.py"
        )
    wanted = model.state_dict()
    state = plain_names(state, path, wanted)
    if not any(name.startswith("encoder_q.") for name in state):
        raise BadInput(
            f"'{path}' has no encoder_q.*, but {some(state)}: expected a MoCo file; --init starts"
            " from bare encoder weights"
        )
    head = f"encoder_q.{head_name(model.encoder_q)}."
    filled = _not_taken(wanted, state, head if init else None)

    def part_of(name: str) -> str:
        return "head" if name.startswith(head) else name.split(".")[0].removesuffix("_ptr")

    parts = {part_of(name) for name in wanted}
    wanted = {name: tensor for name, tensor in wanted.items() if part_of(name) not in filled}
    state = {name: tensor for name, tensor in state.items() if part_of(name) not in filled}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name in wanted or name.startswith("encoder_q.")
    }
    _require_fit(state, wanted, content, path)
    shape = dict(schema.like(wanted))
    if "queue_ptr" in shape:
        shape["queue_ptr"] = schema.Tensor("int", (1,), low=0, high=model.K - 1)
    where = f"cannot use the weights in {files.named('', path)}"
    schema.require(state, shape, where, cure=schema.EARLIER)
    return state, [part for part in filled if part in parts]


def _not_taken(wanted: dict, state: dict, head: str | None) -> list[str]:
    """The parts of a model that it does not get from a file, see `match`.

    head: what the names of the head begin with, where another head may be left; else None.
    """

    def differ(begin: str) -> bool:
        of_wanted, of_state = (
            {name: tensor.shape for name, tensor in tensors.items() if name.startswith(begin)}
            for tensors in (wanted, state)
        )
        return of_wanted != of_state

    anew = head is not None and differ("classifier.")
    if head is not None and differ(head):
        state = {name: tensor for name, tensor in state.items() if name.startswith("encoder_q.")}
        filled = ["head"]
    else:
        filled = []
    has = lambda part, names: any(name.startswith(part) for name in names)
    filled += [p for p in ("encoder_k", "queue") if has(p, wanted) and not has(p, state)]
    if "queue" in state and "queue" in wanted:
        C, K = wanted["queue"].shape
        if state["queue"].shape[:-1] == (C,) and state["queue"].shape != (C, K):
            filled.append("queue")
    return filled + ["classifier"] * anew


def _is_state_dict(state) -> bool:
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in state.items())
    )


def _require_fit(state: dict, wanted: dict, content: dict, path: str | Path) -> None:
    """Raise BadInput, with what to do, where names or shapes of tensors are not those wanted."""
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    found = {"missing": missing, "unknown": extra, "other shapes:": shapes}
    faults = [f"{what} {some(names)}" for what, names in found.items() if names]
    if not faults:
        return
    cure = "give the -a, --stem, --moco-dim and --mlp it was trained with"
    raise BadInput(f"'{path}'{_said(content)} does not fit this model: {'; '.join(faults)}; {cure}")


def load_model(model: nn.Module, content: dict, path: str | Path, init: bool = False) -> list[str]:
    """Load what `load` gave into a `builder.MoCo` or `builder.Instance`.

    `match` says which files it takes, what init stands for and what it raises. Returns which parts
    are not the file's: "head" stays as it was; "encoder_k" is copied from the query encoder here;
    "queue" stays as it was, and the caller has to fill it.
    """
    state, filled = match(model, content, path, init)
    model.load_state_dict(state, strict=False)
    if "encoder_k" in filled:
        model.copy_query_to_key()
    return filled


def _said(content: dict) -> str:
    return f" (arch {files.shown(content['arch'])})" if isinstance(content.get("arch"), str) else ""


def some(names) -> str:
    """The first three of some names, and how many more there are."""
    names = [files.shown(str(name)) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _damage(path: Path, whole: bool) -> str:
    """What contradicts the check sums in a zip file of torch.save; '' for nothing.

    It is '' for a file without check sums too. whole: read the tensors too, not only what is beside
    them.
    """
    try:
        if not zipfile.is_zipfile(path):
            return ""
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.CRC for entry in entries):
                return ""
            for entry in entries:
                name = shown(entry.filename)
                if (
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.compress_size != entry.file_size
                ):
                    return f"{name} is compressed, which torch.save does not do"
                # torch would leave the memory of its tensor uninitialised
                if entry.external_attr & FOLDER:
                    return f"{name} is called a folder"
                if whole or "/data/" not in entry.filename:
                    with archive.open(entry) as file:  # reading to the end compares the check sum
                        while file.read(1 << 20):
                            pass
    except Exception as error:  # a damaged archive may raise anything here
        return shown(str(error) or type(error).__name__)
    return ""


def _what_is_wrong(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return error.strerror or str(error)
    with open(path, "rb") as file:
        start = file.read(8)
    if not start:
        return "it is empty"
    # places in the file that are not there
    if "reading zip archive" in str(error) or isinstance(error, OSError):
        return "it is cut off or damaged"
    if is_safetensors(path):
        return "it is a safetensors file, which holds weights alone"
    if start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "it is cut off or damaged"
    if start.isascii() and start.decode().isprintable():
        return "it is a text file"
    if (found := re.search(r"GLOBAL (\S+)", str(error))) and not found[1].startswith("torch."):
        return f"it holds a pickled {found[1]}, and pickles are not executed"
    if "Weights only load failed" in str(error) or start[:1] == b"\x80":
        return "it holds pickled Python objects, which are not executed"
    return "it is not a file of torch.save"
