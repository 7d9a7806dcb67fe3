from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "moco_isl/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="moco_isl",
    version=version,
    description=(
        "MoCo v2 with Instance Similarity Learning: features without labels, from positives mined"
        " for every image"
    ),
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["moco_isl", "moco_isl.*", "launch", "launch.*"]),
    py_modules=["main_moco_isl", "main_knn", "main_lincls"],
    package_data={
        "moco_isl": ["data/*.npz", "data/*.md", "report/templates/*"],
        "launch": ["recipes/*"],
    },
    entry_points={
        "console_scripts": [
            # without .py: Python looks for modules beside the script first, and would take it for
            # the module of that name
            "main_moco_isl = main_moco_isl:main",
            "main_knn = main_knn:main",
            "main_lincls = main_lincls:main",
            "moco-isl = moco_isl.__main__:main",
        ]
    },
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "timm>=1.0",
        "numpy",
        "submitit>=1.5",
        "pyyaml",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "svhn": ["scipy"],
        "diffusion": ["scipy"],
        "faiss": ["faiss-cpu"],
        "heif": ["pillow-heif"],
        "tiff": ["tifffile", "imagecodecs"],
        "webdataset": ["webdataset"],
        "hf": ["datasets"],
        "detection": ["pycocotools", "pillow>=10.1"],
        "embed": ["pyarrow", "scikit-learn", "matplotlib"],
        "report": ["matplotlib", "jinja2"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "docs": ["mkdocs~=1.6", "mkdocs-material~=9.8"],
        "test": [
            "pytest",
            "pytest-xdist",
            "setuptools>=70.1",
            "scipy",
            "matplotlib",
            "jinja2",
            "tensorboard",
            "lightly",
            "faiss-cpu",
            "pycocotools",
            "pillow-heif",
            "tifffile",
            "webdataset",
            "datasets",
            "pyarrow",
            "scikit-learn",
            "wandb",
            "mlflow-skinny",
            "sqlalchemy",
            "alembic",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "nbclient",
            "ipykernel",
            "build",
            "ruff~=0.17.6",  # formats differ between its versions
        ],
    },
)
