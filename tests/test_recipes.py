"""One recipe a row of the paper's Tables 1 and 2: each is parsed, says what its method is, and
starts on a few small pictures, with a round of mining where it mines.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

import main_moco_isl
from moco_isl import pretraining
from moco_isl.encoders import build_encoder, on_meta

ROOT = Path(__file__).parent.parent

RECIPES = ROOT / "launch" / "recipes"
TABLE_1 = {  # row -> recipe
    "Random": "random_cifar10",
    "DeepCluster": "deepcluster_cifar10",
    "RotNet": "rotnet_cifar10",
    "Instance": "instance_cifar10",
    "AND": "and_cifar10",
    "ISL w/o HPE": "isl_without_hpe_cifar10",
    "PAD": "pad_cifar10",
    "ISL": "bank_cifar10",
}
TABLE_2 = {
    "Random": "random_imagenet",
    "DeepCluster": "deepcluster_imagenet",
    "RotNet": "rotnet_imagenet",
    "Instance": "instance_imagenet",
    "AND": "and_imagenet",
    "PAD": "pad_imagenet",
    "LA": "la_imagenet",
    "ISL": "bank_imagenet",
    "MoCo-v1": "queue_imagenet_mocov1",
    "MoCo-v2": "queue_imagenet_mocov2",
    "MoCo-v2+ISL": "queue_imagenet_mocov2_isl",
}
BESIDE = [
    "la_cifar10",
    "isl_published_cifar10",
    "queue_cifar10_mocov2",
    "queue_cifar10_notebook",
    "bank_cifar100",
]
ROWS = [*TABLE_1.values(), *TABLE_2.values(), *BESIDE]
SMALL = (  # what a recipe's size is cut down to
    "--dataset folder --image-size 32 -b 8 -j 0 --device cpu --amp off --no-fast --print-freq 100"
    " --epochs 2 --isl-rounds 1 --isl-start 1 --isl-every 1 --max-steps 6 --save-every 0"
    " --moco-k 64 --knn-every 0"
).split()
OF_A_MINER = {
    "gan": "--isl-gan-iters 5 --isl-gan-min-iters 5".split(),
    "cluster": "--isl-clusters 4".split(),
    "diffusion": "--isl-subgraph 8".split(),
}


def parse(recipe, *flags):
    config = ["--config", str(RECIPES / f"{recipe}.yaml")]
    return pretraining.get_parser().parse_args([*config, "DIR", *flags])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        kind = folder / "train" / f"class{i % 4}"
        kind.mkdir(parents=True, exist_ok=True)
        colour = (60 * (i % 4) + i, 255 - 6 * i, 5 * i)
        image = Image.effect_noise((32, 32), 40).convert("RGB")
        Image.blend(image, Image.new("RGB", (32, 32), colour), 0.5).save(kind / f"{i}.png")
    return folder


@pytest.mark.parametrize("recipe", ROWS)
def test_a_row_of_the_tables_starts(recipe, photos, tmp_path):
    args = parse(recipe)
    on_meta(lambda: build_encoder(args.arch, args.moco_dim, args.stem))
    miner = args.miner
    flags = [*SMALL, *OF_A_MINER.get(miner, []), "--out", str(tmp_path / "out"), "--seed", "1"]
    if args.objective == "deepcluster":
        flags += ["--dc-clusters", "4", "--dc-every", "1"]
    if args.arch == "resnet50":
        flags += ["-a", "resnet18w16"]
    config = ["--config", str(RECIPES / f"{recipe}.yaml")]
    assert main_moco_isl.main([*config, str(photos), *flags]) == 0
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["miner"] for line in rounds] == ([] if miner == "none" else [miner])
    assert steps and (steps[-1]["lr"] > 0) == (not recipe.startswith("random"))
    if recipe.startswith("deepcluster"):
        assert [line["kind"] for line in lines].count("clusters") == 2
    if miner not in ("none", "gan"):  # a GAN of five iterations collapses
        assert rounds[0]["edges"] > 0


def test_the_recipes_say_what_the_methods_are():
    for where in ("cifar10", "imagenet"):
        instance, anchors, close, graph, isl = (
            parse(f"{name}_{where}") for name in ("instance", "and", "la", "pad", "bank")
        )
        for args in (instance, anchors, close):
            assert args.isl_hpe == 0, "hard positives are PAD's and ISL's"
        for args in (graph, isl):
            assert args.isl_hpe == 0.5
        for args in (instance, anchors, close, graph, isl):
            assert args.objective == "bank" and not args.mlp and args.isl_bank_mix == 0.5
        assert (instance.miner, isl.miner, isl.isl_as) == ("none", "gan", "paper")
        assert (anchors.miner, anchors.isl_neighbors, anchors.isl_from) == ("entropy", 1, "bank")
        assert anchors.isl_rounds * anchors.isl_share == 1.25, "the first round is Instance's"
        assert (close.miner, close.isl_loss, close.isl_background) == ("cluster", "local", 4096)
        assert (close.isl_every, close.isl_from, graph.miner) == (1, "bank", "diffusion")
        for args in (anchors, close, graph):
            assert args.isl_budget == ["all"] and not args.isl_keep
        assert isl.isl_keep
    assert parse("isl_without_hpe_cifar10").isl_hpe == 0
    assert parse("isl_published_cifar10").isl_as == "published"
    v1 = parse("queue_imagenet_mocov1")
    assert not (v1.mlp or v1.aug_plus or v1.cos) and (v1.moco_t, v1.moco_k) == (0.07, 65536)
    assert (v1.schedule, v1.epochs, v1.arch) == ([120, 160], 200, "resnet50")


def test_the_notebooks_recipe_is_the_notebooks():
    args = parse("queue_cifar10_notebook")
    assert not args.mlp and args.aug_plus and args.cos and args.crop_min == 0.08
    assert (args.moco_k, args.moco_m, args.moco_t, args.bn_splits) == (4096, 0.99, 0.1, 8)
    assert (args.batch_size, args.lr, args.weight_decay, args.epochs) == (512, 0.06, 5e-4, 200)


def test_every_recipe_of_a_method_is_a_row_or_beside_one():
    known = {*ROWS, "bank_svhn"}
    files = {path.stem for path in RECIPES.glob("*.yaml")}
    methods = {x for x in files if not x.startswith(("sweep_", "queue_"))}
    assert methods <= known and known <= files
