from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(line.split('"')[1] for line in (here / "moco_isl/__init__.py").read_text().splitlines() if line.startswith("__version__"))

setup(
    name="moco_isl",
    version=version,
    description="MoCo v2 with Instance Similarity Learning: features without labels, from positives mined for every image",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["moco_isl", "moco_isl.*", "launch", "launch.*"]),
    py_modules=["main_moco_isl", "main_knn", "main_lincls"],
    package_data={"moco_isl": ["data/*.npz", "data/*.md", "report/templates/*"], "launch": ["recipes/*", "*.md"]},
    entry_points={
        "console_scripts": [
            "main_moco_isl.py = main_moco_isl:main",
            "main_knn.py = main_knn:main",
            "main_lincls.py = main_lincls:main",
        ]
    },
    install_requires=["torch>=2.4", "torchvision>=0.19", "timm>=1.0", "numpy", "submitit>=1.5", "pyyaml", "safetensors", "tqdm"],
    extras_require={
        "svhn": ["scipy"],
        "faiss": ["faiss-cpu"],
        "heif": ["pillow-heif"],
        "report": ["matplotlib", "jinja2"],
        "tensorboard": ["tensorboard"],
        "test": ["pytest", "scipy", "matplotlib", "jinja2", "tensorboard", "lightly", "faiss-cpu"],
    },
)
