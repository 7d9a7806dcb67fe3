"""A run starts from weights of any origin: the backbone is the file's, as its own library has it,
and everything around it is made anew.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import export
from moco_isl.builder import MoCo
from moco_isl.encoders import BACKBONE, Taps, build_encoder
from moco_isl.run import checkpoint
from moco_isl.run.backbone import load_backbone
from moco_isl.training import pretrain
from tests.runs import Kill, Running, differences, photos, run
from tests.test_bad_input import ask

# 37 images, 4 steps an epoch
FLAGS = (
    "--dataset digits --knn-holdout 1400 --moco-dim 16 --moco-k 64 -b 8 -j 0 --seed 1 --lr 0.01"
    " --epochs 1 --max-steps 2 --device cpu -p 1"
).split()
VIT = "vit_tiny_patch16_224"
PREFIX = "model.backbone."


def drawn(network):
    """The network with random numbers everywhere, averages of batch norm too."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            random = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(random + 0.5 if name.endswith("running_var") else 0.1 * random - 0.05)
    return network.eval()


def vit(side=16, name=VIT):
    return drawn(timm.create_model(name, num_classes=0, img_size=side))


def at_side(network, side=16):
    """timm's own conversion of a transformer to images of another side."""
    there = timm.create_model(VIT, num_classes=0, img_size=side)
    there.load_state_dict(checkpoint_filter_fn(dict(network.state_dict()), there))
    return there.eval()


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


# ---- a file of each kind: (path, the library's network without its head, words of the line) ------


def of_torchvision(folder):
    network = drawn(torchvision.models.resnet18(num_classes=7))
    torch.save(network.state_dict(), folder / "r.pth")
    network.fc = torch.nn.Identity()
    return folder / "r.pth", network, "(resnet18, stem imagenet): used all 120 tensors"


def of_timm_as_safetensors(folder):
    network = vit()
    save_file(network.state_dict(), folder / "v.safetensors")
    return folder / "v.safetensors", network, f"(timm:{VIT}, stem auto): used all 150 tensors"


def of_timms_training(folder):
    network = drawn(timm.create_model("mobilenetv3_small_050", num_classes=3))
    content = {"arch": "mobilenetv3_small_050", "epoch": 4, "state_dict": network.state_dict()}
    torch.save(content, folder / "m.pth.tar")
    network.reset_classifier(0)
    return folder / "m.pth.tar", network, "epoch 4): used all 242 tensors of the encoder; left 2"


def of_dino(folder):
    network = vit(32)
    teacher = under("backbone.", network.state_dict()) | {"head.mlp.0.weight": torch.zeros(3, 192)}
    student = {name: tensor + 1 for name, tensor in under("module.", teacher).items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 2}, folder / "dino.pth")
    said = "of teacher.backbone; left student, head; positions of side 32 interpolated to side 16"
    return folder / "dino.pth", at_side(network), said


def of_lightning(folder):
    network = drawn(build_encoder("resnet18w16", 10, "cifar"))
    state = under(PREFIX, network.state_dict()) | {"projector.weight": torch.zeros(2, 2)}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, folder / "l.ckpt")
    network.fc = torch.nn.Identity()
    return folder / "l.ckpt", network, "tensors of model.backbone; left projector, 2 of fc"


def of_hugging_face(folder):
    network = drawn(timm.create_model("mobilenetv3_small_050", num_classes=5))
    timm.models._hub.save_for_hf(network, folder / "hf", safe_serialization=True)
    network.reset_classifier(0)
    return folder / "hf", network, "(timm:mobilenetv3_small_050, stem auto): used all 242"


def of_transformers(folder):
    """A ViT by the names that transformers writes, from timm's."""
    network = vit()
    state = {}
    for name, tensor in network.state_dict().items():
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        name = name.replace("cls_token", "embeddings.cls_token")
        name = name.replace("blocks.", "encoder.layer.")
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        name = name.replace("attn.proj", "attention.output.dense")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        name = "layernorm." + name[5:] if name.startswith("norm.") else name
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                own = name.replace("attn.qkv", f"attention.attention.{part}")
                state["vit." + own] = rows.clone()
        else:
            state["vit." + name] = tensor
    (folder / "vit").mkdir()
    torch.save(state | {"classifier.bias": torch.zeros(2)}, folder / "vit" / "pytorch_model.bin")
    config = {"model_type": "vit", "hidden_size": 192, "num_attention_heads": 3}
    (folder / "vit" / "config.json").write_text(json.dumps(config))
    return folder / "vit", network, f"(timm:{VIT}, stem auto): used all 150 tensors of vit; left"


KINDS = [
    of_torchvision,
    of_timm_as_safetensors,
    of_timms_training,
    of_dino,
    of_lightning,
    of_hugging_face,
    of_transformers,
]


@pytest.fixture
def looked_at(monkeypatch):
    """Let a run call a function with its parts and its reader before the first step."""
    train, looks = pretrain.train, []

    def looked_at_first(parts, reader, *rest):
        for look in looks:
            look(parts, reader)
        train(parts, reader, *rest)

    monkeypatch.setattr(pretrain, "train", looked_at_first)
    return looks.append


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items()) and a.keys() == b.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_is_the_librarys_and_the_rest_is_new(tmp_path, looked_at, kind):
    path, network, words = kind(tmp_path)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    seen = []

    def look(parts, reader):
        model = parts.model
        model.eval()
        with torch.no_grad():
            features = Taps(model.encoder_q, [BACKBONE])(images)[BACKBONE]
            assert torch.allclose(features, network(images), atol=1e-5)
        assert same(model.encoder_q.state_dict(), model.encoder_k.state_dict())
        rows = reader.features(model.encoder_k)  # [M, C]
        owner = parts.isl.slots.owner
        assert torch.allclose(model.queue.t(), rows[owner], atol=1e-6)
        assert set(owner.tolist()) == set(range(37)) and not parts.optimizer.state
        seen.append(sum(tensor.numel() for tensor in parts.model.encoder_q.parameters()))

    looked_at(look)
    code, out, err = ask([*FLAGS, "--mlp", "--init", str(path), "--out", str(tmp_path / "out")])
    assert (code, err) == (0, "") and seen
    assert words in out and "head drawn anew; encoder_k copied from encoder_q; queue filled" in out
    last = checkpoint.load(tmp_path / "out" / "checkpoint_last.pth.tar")
    assert last["isl"]["total"] == 2 and last["args"]["arch"] in out
    again, info = load_backbone(tmp_path / "out")  # the run's folder is read, too
    assert sum(t.numel() for t in again.parameters()) == seen[0] and info["head"] == "mlp"


def small(folder):
    """A bare file of the digits' network."""
    torch.save({"state_dict": drawn(build_encoder("digits", 9)).state_dict()}, folder / "d.pth")
    return str(folder / "d.pth")


def test_two_ranks_begin_as_one(tmp_path):
    """Their queues are filled with the same keys in the same order; 2 steps write over 16."""
    queues = []
    for ranks in (1, 2):
        argv = [*FLAGS, "--init", small(tmp_path), "--out", tmp_path / str(ranks)]
        run(argv, tmp_path / "log", ranks=ranks)
        content = checkpoint.load(tmp_path / str(ranks) / "checkpoint_last.pth.tar")
        queues.append(content["state_dict"]["module.queue"][:, 16:])
        owner = content["isl"]["state"]["slots"]["owner"][16:]
        queues.append(owner)
    assert torch.allclose(queues[0], queues[2], atol=1e-6) and torch.equal(queues[1], queues[3])
    assert (tmp_path / "log").read_text().count("queue filled with features of 37 images") == 2


def test_killed_and_resumed_it_equals_the_unbroken_run(tmp_path):
    argv = [*FLAGS, "--epochs", "3", "--max-steps", "0", "--init", small(tmp_path)]
    run([*argv, "--out", tmp_path / "whole"], tmp_path / "log")
    cut = [*argv, "--out", tmp_path / "cut", "--resume", "auto"]
    assert Running(cut, tmp_path / "log", kill=(0, Kill("epoch", 2, 0))).codes() == [-9]
    run(cut, tmp_path / "log")
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


# ---- MoCo files, ours and MoCo's, of another queue, head or side ---------------------------------


def moco(dim=16, K=64, mlp=False):
    torch.manual_seed(3)
    model = MoCo(lambda num_classes: build_encoder("digits", num_classes), dim, K, mlp=mlp)
    return drawn(model)


def saved(folder, **shape):
    content = {"epoch": 7, "arch": "digits", "state_dict": checkpoint.model_state(moco(**shape))}
    torch.save(content, folder / "moco.pth.tar")
    return moco(**shape), str(folder / "moco.pth.tar")


def test_a_queue_of_another_length_is_filled_anew(tmp_path, looked_at):
    model, path = saved(tmp_path, K=32)
    seen = []

    def look(parts, reader):
        for encoder in ("encoder_q", "encoder_k"):
            theirs = getattr(model, encoder).state_dict()
            assert same(theirs, getattr(parts.model, encoder).state_dict())
        rows = reader.features(parts.model.encoder_k)[parts.isl.slots.owner]
        seen.append(torch.allclose(parts.model.queue.t(), rows, atol=1e-6))

    looked_at(look)
    for way in ("--init", "--resume"):
        argv = [*FLAGS, "--epochs", "9", way, path, "--out", str(tmp_path / way)]
        code, out, err = ask(argv)
        assert (code, err) == (0, "") and "its queue does not fit, and is filled anew" in out
    assert seen == [True, True]


@pytest.mark.parametrize("flags", [["--moco-dim", "8"], ["--mlp"]])
def test_another_head_is_drawn_anew_where_it_was_asked_for(tmp_path, looked_at, flags):
    model, path = saved(tmp_path)
    seen = []

    def look(parts, reader):
        mine, theirs = (x.encoder_q.state_dict() for x in (parts.model, model))
        backbone = [name for name in theirs if not name.startswith("fc.")]
        assert all(torch.equal(mine[name], theirs[name]) for name in backbone)
        assert same(mine, parts.model.encoder_k.state_dict())
        seen.append({name for name in mine if name not in backbone})

    looked_at(look)
    argv = [x for x in FLAGS if x not in ("--moco-dim", "16")]
    code, out, err = ask([*argv, *flags, "--init", path, "--out", str(tmp_path / "out")])
    assert (code, err) == (0, "") and "its head does not fit, and is drawn anew" in out
    assert ("fc.2.weight" in seen[0]) == (flags == ["--mlp"])
    resumed = ["--epochs", "9", "--resume", path, "--out", str(tmp_path / "new")]
    code, _, err = ask([*argv, *flags, *resumed])
    assert code == 2 and "does not fit this model" in err, "no run goes on with another head"


def test_our_own_transformer_goes_on_at_another_side(tmp_path, looked_at):
    argv = [*FLAGS, "-a", f"timm:{VIT}", "--max-steps", "1"]
    assert ask([*argv, "--out", str(tmp_path / "a")])[0] == 0
    there = torch.load(tmp_path / "a" / "checkpoint_last.pth.tar", weights_only=True)["state_dict"]
    start = "module.encoder_q."
    state = {n.removeprefix(start): x for n, x in there.items() if n.startswith(start)}
    network = timm.create_model(VIT, num_classes=16, img_size=16)
    network.load_state_dict(state)
    wider = timm.create_model(VIT, num_classes=16, img_size=32).eval()
    wider.load_state_dict(checkpoint_filter_fn(state, wider))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = []

    def look(parts, reader):
        parts.model.eval()
        with torch.no_grad():
            seen.append(torch.allclose(parts.model.encoder_q(images), wider(images), atol=1e-5))

    looked_at(look)
    init = ["--init", str(tmp_path / "a"), "--image-size", "32", "--out", str(tmp_path / "b")]
    code, out, err = ask([*FLAGS, "--max-steps", "1", *init])
    assert (code, err) == (0, "") and seen == [True], "head and all"
    assert "positions of side 16 interpolated to side 32; encoder_k copied from" in out


# ---- flags that the file knows -------------------------------------------------------------------


def flags_of_run(folder):
    return json.loads((folder / "args.json").read_text())["args"]


def test_flags_that_the_file_knows_need_not_be_given(finished, tmp_path):
    bare = ["--dataset", "digits", "--knn-holdout", "1400", "-b", "8", "-j", "0", "--device", "cpu"]
    argv = [*bare, "--max-steps", "1", "--init", str(finished)]  # the run's folder
    code, out, err = ask([*argv, "--out", str(tmp_path / "ours")])
    known = "--arch digits --image-size 16 --mlp --moco-dim 16 --moco-t 0.1"
    assert (code, err) == (0, "") and f"{known}\n" in out
    ours = flags_of_run(tmp_path / "ours")
    assert (ours["moco_k"], ours["moco_t"], ours["mlp"], ours["moco_m"]) == (16, 0.1, True, 0.99)
    assert ours["lr"] == 0.03 and not ours["cos"], "those of the new run are its own"

    (tmp_path / "c.yaml").write_text("moco-t: 0.3\nmoco-k: 40\n")
    config = ["--config", str(tmp_path / "c.yaml"), "--no-mlp"]
    code, out, err = ask([*argv, *config, "--out", str(tmp_path / "config")])
    config = flags_of_run(tmp_path / "config")
    assert (code, config["moco_t"], config["moco_k"], config["mlp"]) == (0, 0.3, 40, False)

    _, path = saved(tmp_path, dim=8, K=32, mlp=True)
    code, out, err = ask(
        [*bare, "--moco-k", "32", "--max-steps", "1", "--init", path, "--out", str(tmp_path / "m")]
    )
    theirs = flags_of_run(tmp_path / "m")
    assert (code, err) == (0, "") and "does not fit" not in out
    assert (theirs["moco_dim"], theirs["moco_k"], theirs["mlp"]) == (8, 32, True)


def test_of_a_typed_flag_the_parser_knows(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 0.03\ndata: DIR\n")
    parse = lambda *argv: main_moco_isl.get_parser().parse_args(list(argv)).given
    assert parse() == set()
    assert parse("-a", "resnet50", "--no-mlp", "DIR") == {"arch", "mlp", "data"}
    typed = parse("--config", str(tmp_path / "c.yaml"), "--miner", "diffusion", "--isl-walk", "3")
    assert typed == {"config", "lr", "data", "miner", "isl_walk"}
    assert "given" not in vars(main_moco_isl.get_parser().parse_args([]))


# ---- the page, and the other scripts -------------------------------------------------------------


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """With files of those names, and the flags that make them small."""
    page = (Path(__file__).parent.parent / "docs" / "moco.md").read_text()
    block = page.partition("## Start from weights you have")[2].split("```")[1]
    monkeypatch.chdir(tmp_path)
    small = [*photos(tmp_path / "DIR", 6)[3:], "--epochs", "1", "--max-steps", "1"]
    small = [x for x in small if x not in ("--mlp",)]
    for flag in ("--moco-dim", "--moco-k", "--image-size"):
        if flag in small:
            del small[small.index(flag) : small.index(flag) + 2]
    assert ask(["DIR", "-a", "digits", *small, "--moco-k", "16", "--out", "runs/moco"])[0] == 0
    of_torchvision(tmp_path)[0].rename("resnet18.pth")
    of_dino(tmp_path)[0].rename("dino_pretrain_full_checkpoint.pth")
    (tmp_path / "models").mkdir()
    of_hugging_face(tmp_path)[0].rename("models/mobilenet")
    commands = [line.split()[2:] for line in block.strip().splitlines()]
    for i, argv in enumerate(commands):
        more = [*small, "--out", f"runs/{i}"]
        more += [] if "--moco-k" in argv else ["--moco-k", "8"]
        more += [] if "--image-size" in argv else ["--image-size", "16"]
        if "--resume" in argv:
            more = ["--max-steps", "2", "--device", "cpu"]
        code, out, err = ask([*argv, *more])
        assert (code, err) == (0, "") and "=> loaded '" in out, argv
    assert len(commands) == 5


def test_the_other_scripts_take_folders(finished, tmp_path, capsys):
    judge = ["--dataset", "digits", "--device", "cpu", "-j", "0"]
    last = finished / "checkpoint_last.pth.tar"
    said = []
    for path in (finished, last):
        assert main_knn.main([*judge, "--pretrained", str(path)]) == 0
        said.append(re.findall(r"^ *(?:output|backbone) .*", capsys.readouterr().out, re.M))
    assert said[0] == said[1] and len(said[0]) == 2
    probe = [*judge, "--cache-features", "--epochs", "1", "--out", str(tmp_path / "probe")]
    assert main_lincls.main([*probe, "--pretrained", str(finished)]) == 0
    again = [*judge, "-e", "--resume", str(tmp_path / "probe"), "--cache-features"]
    assert main_lincls.main([*again, "--pretrained", str(finished)]) == 0
    for kind in (of_dino, of_hugging_face):
        path, network, _ = kind(tmp_path)
        out = tmp_path / f"{kind.__name__}.safetensors"
        assert export.main([str(path), "--to", "safetensors", "--out", str(out)]) == 0
        encoder, info = load_backbone(out)
        own = network.state_dict()
        here = {n: x for n, x in encoder.state_dict().items() if n in own and n != "pos_embed"}
        assert all(torch.equal(x, own[n]) for n, x in here.items()) and len(here) > 100


# ---- files that are no start ---------------------------------------------------------------------


def wrong(folder):
    """What is wrong -> (path, flags, words of the line)."""
    network = build_encoder("digits", 9)
    convnext = timm.create_model("convnext_atto", num_classes=0)
    torch.save(convnext.state_dict(), folder / "convnext.pth")
    torch.save(under("vit.", network.state_dict()) | {"x": torch.ones(1)}, folder / "v.pth")
    two = under("a.", network.state_dict()) | under("b.", network.state_dict())
    torch.save({"state_dict": two}, folder / "two.pth")
    torch.save({"arch": "vit_small", "state_dict": network.state_dict()}, folder / "named.pth")
    configs = {
        "bert": {"model_type": "bert"},
        "heads": {"model_type": "vit", "hidden_size": 192, "num_attention_heads": 6},
        "nothing": {},
        "args": {"architecture": VIT, "model_args": {"global_pool": "avg"}},
        "list": [],
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        save_file(network.state_dict(), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "bert", folder / "shards")
    (folder / "shards" / "model.safetensors").rename(folder / "shards" / "model.1.safetensors")
    (folder / "shards" / "model.safetensors.index.json").write_text("{}")
    return {
        "not shown": ("convnext.pth", [], "do not show it: give it with -a"),
        "another architecture": ("v.pth", ["-a", "resnet18"], "does not fit resnet18"),
        "two encoders": ("two.pth", [], "holds 2 encoders, named a.*, b.*"),
        "a name nobody knows": ("named.pth", [], "unknown architecture 'vit_small'"),
        "another model": ("bert", [], "is of model_type bert: expected timm's architecture, or"),
        "heads that differ": ("heads", [], "num_attention_heads is 6: expected 3, as timm's"),
        "a config of nothing": ("nothing", [], "names no architecture: expected timm's"),
        "another pooling": ("args", [], "model_args {'global_pool': 'avg'} make another network"),
        "a config that is none": ("list", [], "config.json'"),
        "several files": ("shards", [], "neither model.safetensors nor pytorch_model.bin"),
    }


def test_what_is_no_start_is_one_line(tmp_path):
    for what, (name, flags, words) in wrong(tmp_path).items():
        out = tmp_path / "out"
        code, _, err = ask([*FLAGS, *flags, "--init", str(tmp_path / name), "--out", str(out)])
        assert code == 2 and not out.exists(), what
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err, (what, err)
