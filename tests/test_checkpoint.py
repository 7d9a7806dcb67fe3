"""Files: whole or not there, read without executing anything, ours and MoCo's, filled in where they
lack something.
"""

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from moco_isl import builder
from moco_isl.encoders import build_encoder
from moco_isl.errors import BadInput, RunFailed
from moco_isl.objectives.bank import Instance
from moco_isl.run import checkpoint
from tests.runs import DIGITS, _same
from tests.test_bad_input import Evil, ask


def moco(dim=16, K=32, mlp=True, arch="digits"):
    torch.manual_seed(0)
    return builder.MoCo(lambda num_classes: build_encoder(arch, num_classes), dim, K, mlp=mlp)


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "x.pth.tar"
    checkpoint.save({"a": torch.zeros(5)}, path)
    module, name = {"torch": torch, "os": os}[broken.split(".")[0]], broken.split(".")[1]
    real = getattr(module, name)

    def fails(*args, **options):
        if broken == "torch.save":
            args[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(RunFailed, match="cannot write .*x.pth.tar: No space left on device"):
        checkpoint.save({"a": torch.ones(5)}, path)
    monkeypatch.setattr(module, name, real)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth.tar"] and checkpoint.load(path)[
        "a"
    ].sum() == 0


def test_what_is_no_matter_of_the_disk_is_not_called_so(tmp_path):
    with pytest.raises(RuntimeError, match="DataLoader") as raised:  # it may be raised anywhere
        checkpoint.save({"a": Raises()}, tmp_path / "x")
    assert raised.type is RuntimeError and not list(tmp_path.iterdir())


class Raises:
    def __reduce__(self):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, name=name, real=real, **options: (
                done.append(name),
                real(*args, **options),
            )[1],
        )
    checkpoint.save({"a": 1}, tmp_path / "x")
    assert done == ["save", "fsync", "replace", "fsync"]  # the last of the folder


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_is_another_name_and_outlives_the_first(tmp_path, monkeypatch, links):
    first, second = tmp_path / "first", tmp_path / "second"
    checkpoint.save({"a": 1}, first)
    if not links:
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted"))
        )
    (tmp_path / ("second" + checkpoint.TEMPORARY)).touch()  # of a copy that was killed
    checkpoint.copy(first, second)
    assert second.samefile(first) == links
    checkpoint.save({"a": 2}, first)
    assert checkpoint.load(second) == {"a": 1} and sorted(p.name for p in tmp_path.iterdir()) == [
        "first",
        "second",
    ]


def test_stale_files_go_and_a_users_own_stay(tmp_path):
    for name in ("checkpoint_last.pth.tar" + checkpoint.TEMPORARY, "mine.tmp"):
        (tmp_path / name).touch()
    checkpoint.remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.tmp"]


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_no_pickle_is_executed(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    if how == "pickle":
        Path("x").write_bytes(pickle.dumps({"state_dict": Evil()}))
    else:
        torch.save({"state_dict": Evil()}, "x", _use_new_zipfile_serialization=how == "zip")
    for mmap in (False, True):
        with pytest.raises(BadInput, match="not executed"):
            checkpoint.load("x", mmap=mmap)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with open("x", "rb") as file:
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert Path("executed").exists()  # the trap was armed


def damages(whole: bytes):
    """The file with a bit flipped, or a page of zeros: drawn at random, and each bit of the
    directory that calls an entry a folder.
    """
    draw = random.Random(0)
    for _ in range(60):
        place = draw.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
    for _ in range(20):
        place = draw.randrange(0, len(whole), 512)
        yield whole[:place] + bytes(len(whole[place : place + 512])) + whole[place + 512 :]
    start = 0
    # a line of the directory; the attributes are its bytes 38 to 41
    while (start := whole.find(b"PK\x01\x02", start + 1)) > 0:
        yield whole[: start + 38] + b"\x10" + whole[start + 39 :]


@pytest.mark.parametrize("sums", [True, False])
def test_a_damaged_file_is_refused_or_what_it_was(tmp_path, sums):
    """Whatever a process has set: a checkpoint of ours has its check sums."""
    content = {
        "epoch": 3,
        "state_dict": {f"layer{i}": torch.randn(40, 40) for i in range(3)},
        "args": {"lr": 0.1},
    }
    before = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    set_sums = getattr(torch.serialization, "set_crc32_options", lambda _: None)
    set_sums(sums)
    try:
        checkpoint.save(content, tmp_path / "whole")
    finally:
        set_sums(before)
    assert all(entry.CRC for entry in zipfile.ZipFile(tmp_path / "whole").infolist())
    refused = 0
    for harmed in damages((tmp_path / "whole").read_bytes()):
        (tmp_path / "x").write_bytes(harmed)
        try:
            assert _same(checkpoint.load(tmp_path / "x"), content, "") == []
        except BadInput as error:
            refused += 1
            assert "damaged" in str(error) and "\n" not in str(error)
    assert refused > 70


def test_files_without_check_sums_are_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes them")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoint.load(tmp_path / "x")["a"], torch.arange(3.0))


def test_a_look_at_a_file_checks_all_but_the_tensors(tmp_path):
    checkpoint.save({"epoch": 3, "a": torch.full((100,), 7.0)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole.replace(torch.full((1,), 7.0).numpy().tobytes(), b"abcd", 1))
    assert checkpoint.load(tmp_path / "x", mmap=True)["epoch"] == 3
    with pytest.raises(
        BadInput, match="it is damaged .Bad CRC-32 for file 'x/data/0'|it is damaged .Bad CRC-32"
    ):
        checkpoint.load(tmp_path / "x")
    (tmp_path / "x").write_bytes(whole.replace(b"epoch", b"eqoch"))
    with pytest.raises(BadInput, match="it is damaged"):
        checkpoint.load(tmp_path / "x", mmap=True)


def test_files_of_old_torch_are_read(tmp_path):
    content = {"epoch": 3, "state_dict": {"a": torch.arange(3.0)}}
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=False)
    for mmap in (False, True):
        got = checkpoint.load(tmp_path / "x", mmap=mmap)
        assert got["epoch"] == 3 and torch.equal(got["state_dict"]["a"], torch.arange(3.0))


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("bare", [True, False])
def test_a_stripped_file_is_filled_in(prefix, bare):
    """As MoCo publishes them: the query encoder alone; some have been saved without `module.`, or
    as a bare state dict.
    """
    source, model = moco(), moco()
    torch.nn.init.normal_(source.encoder_q.fc[2].weight)
    kept = {
        prefix + name: x for name, x in source.state_dict().items() if name.startswith("encoder_q.")
    }
    queue = model.queue.clone()
    filled = checkpoint.load_model(
        model, kept if bare else {"epoch": 200, "arch": "digits", "state_dict": kept}, "x"
    )
    assert filled == ["encoder_k", "queue"] and torch.equal(model.queue, queue)
    for encoder in (model.encoder_q, model.encoder_k):
        assert all(
            torch.equal(x, y)
            for x, y in zip(encoder.state_dict().values(), source.encoder_q.state_dict().values())
        )


def test_a_whole_file_is_taken_as_it_is():
    source, model = moco(), moco()
    for x in source.parameters():
        torch.nn.init.normal_(x)
    source.queue.normal_()
    source.queue_ptr.fill_(7)
    assert checkpoint.load_model(model, {"state_dict": checkpoint.model_state(source)}, "x") == []
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in source.state_dict().items())


def test_the_bank_takes_a_mocos_query_encoder():
    torch.manual_seed(1)
    model = Instance(lambda num_classes: build_encoder("digits", num_classes), 16, mlp=True)
    source = moco()
    assert checkpoint.load_model(model, {"state_dict": checkpoint.model_state(source)}, "x") == []
    assert torch.equal(model.encoder_q.fc[2].weight, source.encoder_q.fc[2].weight)


@pytest.mark.parametrize(
    "other, words",
    [
        (
            {"arch": "resnet18w16"},
            (
                "missing encoder_q.conv1.0.weight.* and .* more; unknown encoder_q.conv1.weight.*"
                " give the -a"
            ),
        ),
        (
            {"dim": 8},
            (
                r"other shapes: queue \[8, 32\] for \[16, 32\], encoder_q.fc.2.weight \[8, .* give"
                r" the -a"
            ),
        ),
        ({"mlp": False}, "missing encoder_q.fc.0.weight.*unknown encoder_q.fc.weight.* --mlp"),
    ],
)
def test_what_does_not_fit_is_named_and_not_loaded(other, words):
    model = moco()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(BadInput, match=words):
        checkpoint.load_model(
            model, {"arch": "y", "state_dict": checkpoint.model_state(moco(**other))}, "x"
        )
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---- what is called good -------------------------------------------------------------------------


def test_what_has_exploded_is_named():
    nan, inf = float("nan"), float("inf")
    state = {
        "sound": torch.full((4,), 1e18),
        "none": torch.zeros(0),
        "int": torch.tensor([2**62]),
        "half": torch.full((9,), 6e4).half(),
        "plain": inf,
        "nan": torch.tensor([[1.0, nan]]),
        "nested": [{"inf": torch.tensor(-inf)}, {"large": torch.full((2,), 1e20)}],
    }
    assert checkpoint.exploded(state) == ["nan", "nested.0.inf", "nested.1.large"]
    assert (
        checkpoint.exploded(
            {name: state[name] for name in ("sound", "none", "int", "half", "plain")}
        )
        == []
    )


# ---- through the main script ---------------------------------------------------------------------


def test_an_exploded_state_is_not_written_over_the_last_good_file(tmp_path):
    """At this rate the first step is large and sound, the second too large for any network."""
    argv = [*DIGITS, "--epochs", "2", "--save-every", "1", "--lr", "1e10", "--out", str(tmp_path)]
    code, _, err = ask(argv)
    last = tmp_path / "checkpoint_last.pth.tar"
    assert (
        code == 3
        and err.count("\n") == 1
        and "exploded at epoch 0, step 2 (state_dict.module.encoder_q.conv1.1.running_var" in err
    )
    assert f"the last good file is {last}" in err
    content = checkpoint.load(last)
    assert content["isl"]["step"] == 1 and checkpoint.exploded(content) == []


def mocos_file(path):
    """What MoCo's main_moco.py saves: the optimizer counts all parameters of the model, and has
    momentum for the query encoder's.
    """
    model = moco(K=128)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=1e-4)
    sum(p.square().sum() for p in model.encoder_q.parameters()).backward()
    optimizer.step()
    names = {"module." + name: x for name, x in model.state_dict().items()}
    torch.save(
        {"epoch": 1, "arch": "digits", "state_dict": names, "optimizer": optimizer.state_dict()},
        path,
    )
    return model, optimizer


def test_a_training_file_of_mocos_goes_on(tmp_path):
    model, optimizer = mocos_file(tmp_path / "moco.pth.tar")
    code, out, err = ask(
        [
            *DIGITS,
            "--epochs",
            "2",
            "--max-steps",
            "1",
            "--lr",
            "0",
            "--resume",
            str(tmp_path / "moco.pth.tar"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert (code, err) == (0, "") and "it has no" not in out and "(epoch 1)" in out
    after = checkpoint.load(tmp_path / "out" / "checkpoint_last.pth.tar")
    assert after["epoch"] == 1 and torch.equal(
        after["state_dict"]["module.encoder_q.fc.0.weight"], model.encoder_q.fc[0].weight
    )
    mine, theirs = after["optimizer"], optimizer.state_dict()
    assert (
        mine["state"].keys() == theirs["state"].keys()
        and mine["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    )
    keys = after["state_dict"]["module.queue"]
    assert torch.equal(keys[:, 64:], model.queue[:, 64:]) and not torch.equal(
        keys[:, :64], model.queue[:, :64]
    )
    optimizer.load_state_dict(mine)  # and MoCo could go on with ours


def test_a_published_file_goes_on_and_says_what_was_filled_in(tmp_path):
    model, _ = mocos_file(tmp_path / "whole.pth.tar")
    kept = {
        name: x
        for name, x in torch.load(tmp_path / "whole.pth.tar")["state_dict"].items()
        if "encoder_q" in name
    }
    torch.save({"epoch": 1, "arch": "digits", "state_dict": kept}, tmp_path / "stripped.pth.tar")
    code, out, err = ask(
        [
            *DIGITS,
            "--epochs",
            "2",
            "--max-steps",
            "1",
            "--resume",
            str(tmp_path / "stripped.pth.tar"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert (code, err) == (0, "")
    for words in (
        "it has no encoder_k, which is copied",
        "it has no queue, which is filled anew",
        "queue filled with features of 128 images",
        "it has no optimizer either: that one starts fresh",
    ):
        assert words in out
    assert checkpoint.load(tmp_path / "out" / "checkpoint_last.pth.tar")["isl"]["total"] == 1
